"""Write what each image installs to engine.txt and adapter.txt, read from pyproject.toml."""

import tomllib
from pathlib import Path

EXTRAS = {
    # Extras that one setting can ask for (DLLM_QUANTIZATION, DLLM_TRACING) are always installed.
    "engine": ("engine", "quantization"),
    "adapter": ("adapter", "otel", "client"),
}

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for image, extras in EXTRAS.items():
    lines = [line for extra in extras for line in project["optional-dependencies"][extra]]
    Path(f"{image}.txt").write_text("\n".join(lines) + "\n")
