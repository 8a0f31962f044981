"""The chat page and the API's description: files, and nothing that comes from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from stepgguf.server.middleware.access import STATIC

STATIC_FOLDER = Path(__file__).parents[1] / "static"
# The pages load nothing from elsewhere and run nothing but the files in static/.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept, and asked for again by its ETag: a new version comes as a whole
}


def add_page(app: FastAPI) -> None:
    """Serve the page at /, the API's description at /docs, and the files that both need."""
    _add_file(app, "/", STATIC_FOLDER / "index.html")
    _add_file(app, "/docs", STATIC_FOLDER / "docs.html")
    app.mount(STATIC, _PageFiles(directory=STATIC_FOLDER))


class _PageFiles(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def _add_file(app: FastAPI, path: str, file: Path) -> None:
    async def page() -> FileResponse:
        return FileResponse(file, headers=HEADERS)

    app.get(path, include_in_schema=False)(page)
