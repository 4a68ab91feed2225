"""Web page that shows a text being denoised."""

from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parents[1] / "static"

#: The page may run its own script and call its own server, nothing else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    """Serve the page, which is a client of /v1/generate/stream."""
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    return FileResponse(STATIC / "index.html", headers=headers)


def mount_files(app: FastAPI) -> None:
    """Serve the page's script and styles."""
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
