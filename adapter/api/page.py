"""Web pages: a text being denoised, and the description of the API with Swagger UI."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parents[1] / "static"

#: The pages may run their own scripts and call their own server, nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
#: Files of Swagger UI, which a package brings, so that /docs needs no other server.
SWAGGER_PACKAGE = "fastapi_offline"

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    """Serve the page, which is a client of /v1/generate/stream."""
    return FileResponse(STATIC / "index.html", headers=HEADERS)


@router.get("/docs")
async def docs() -> FileResponse:
    """Serve the description of the API, where you can try every call."""
    return FileResponse(STATIC / "docs.html", headers=HEADERS)


@router.get("/static/swagger/{name}")
async def swagger_file(name: Literal["swagger-ui-bundle.js", "swagger-ui.css"]) -> FileResponse:
    """Serve a file of Swagger UI."""
    return FileResponse(_swagger_folder() / name)


def mount_files(app: FastAPI) -> None:
    """Serve the pages' scripts and styles."""
    app.mount("/static", StaticFiles(directory=STATIC), name="static")


@cache
def _swagger_folder() -> Path:
    # Found and not imported: nothing of the package's code is needed.
    spec = find_spec(SWAGGER_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"/docs needs the package {SWAGGER_PACKAGE}")
    return Path(spec.origin).parent / "static"
