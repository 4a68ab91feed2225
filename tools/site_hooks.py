"""Fits the pages to the site (`mkdocs.yml`).

The pages are written to be read in the repository, where they link to files outside `docs/`. The
site takes along the pictures among those files; of a link to another file it keeps the path.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_PICTURES = {".png", ".svg", ".gif", ".webp"}


def on_files(files: Files, config: Any) -> Files:
    """Add the plots of the benchmarks."""
    for picture in sorted((ROOT / "benchmarks/results").glob("*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that leave `docs/` into pictures of the site, or into plain paths."""
    folder = (DOCS / page.file.src_uri).parent

    def rewrite(found: re.Match[str]) -> str:
        image, text, target, _anchor = found.groups()
        if re.match(r"[a-z]+:|/", target):
            return found[0]
        file = (folder / target).resolve()
        if file.is_relative_to(DOCS) or not file.exists():
            return found[0]
        path = file.relative_to(ROOT).as_posix()
        if file.suffix in _PICTURES:
            back = "../" * (len(Path(page.file.src_uri).parts) - 1)
            return f"{image}[{text}]({back}{path})"
        return text if path in text else f"{text} (`{path}`)"

    return _LINK.sub(rewrite, markdown)
