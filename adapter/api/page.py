"""Web pages: texts being denoised, and the description of the API with Swagger UI."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parents[1] / "static"

#: The pages may run their own scripts and call their own server, nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
#: Our own page makes no markup from texts at all; Swagger UI does.
PAGE_POLICY = f"{POLICY}; require-trusted-types-for 'script'; trusted-types 'none'"
#: Browsers ask whether a file has changed, so that all files are of one release.
REVALIDATE = {"Cache-Control": "no-cache"}
#: Files of Swagger UI, which a package brings, so that /docs needs no other server.
SWAGGER_PACKAGE = "fastapi_offline"

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    """Serve the page, which is a client of the API."""
    headers = HEADERS | REVALIDATE | {"Content-Security-Policy": PAGE_POLICY}
    return FileResponse(STATIC / "index.html", headers=headers)


@router.get("/docs")
async def docs() -> FileResponse:
    """Serve the description of the API, where you can try every call."""
    return FileResponse(STATIC / "docs.html", headers=HEADERS)


@router.get("/static/swagger/{name}")
async def swagger_file(name: Literal["swagger-ui-bundle.js", "swagger-ui.css"]) -> FileResponse:
    """Serve a file of Swagger UI."""
    return FileResponse(_swagger_folder() / name)


class Files(StaticFiles):
    """The pages' scripts and styles."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Answer with a file that browsers revalidate at each use."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(REVALIDATE)
        return response


def mount_files(app: FastAPI) -> None:
    """Serve the pages' scripts and styles."""
    app.mount("/static", Files(directory=STATIC), name="static")


@cache
def _swagger_folder() -> Path:
    # Found and not imported: nothing of the package's code is needed.
    spec = find_spec(SWAGGER_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"/docs needs the package {SWAGGER_PACKAGE}")
    return Path(spec.origin).parent / "static"
