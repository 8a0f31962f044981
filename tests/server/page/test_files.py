"""The pages' files: what they may load, who may see them, and the page of the API."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepgguf.server import app
from stepgguf.server.routes.page import STATIC_FOLDER
from tests.server.browser import Page
from tests.server.conftest import Serve, Server

VENDOR = STATIC_FOLDER / "vendor"


def test_pages_load_and_run_nothing_but_their_own_files(server: Server) -> None:
    for path in ("/", "/docs", "/static/chat/page.js", "/static/vendor/temml/temml.min.js"):
        response = server.client.get(path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    again = server.client.get(
        "/static/theme.css", headers={"if-none-match": server.client.get("/static/theme.css").headers["etag"]}
    )
    assert again.status_code == 304


@pytest.mark.parametrize("path", ["/static/nothing.js", "/static/../app.py", "/static/%2e%2e/app.py", "/static/chat/"])
def test_there_is_nothing_else(server: Server, path: str) -> None:
    assert server.client.get(path).status_code == 404


@pytest.mark.slow
def test_the_files_need_no_key(serve: Serve) -> None:
    with serve(api_key="a secret") as server:
        assert server.client.get("/static/chat/page.js").status_code == 200
        assert server.client.get("/static/../v1/models").status_code == 401


def test_every_library_has_its_licence_beside_it() -> None:
    folders = [path for path in VENDOR.iterdir() if path.is_dir()]
    readme = (VENDOR / "README.md").read_text()
    for folder in folders:
        assert (folder / "LICENSE").stat().st_size > 500
        assert all(
            path.name in readme or path.suffix == ".woff2" for path in folder.iterdir() if path.name != "LICENSE"
        )
        assert folder.name in readme
    assert len(folders) == 4


@pytest.mark.slow
def test_the_page_of_the_api_has_the_fields_in_the_order_of_the_document(server: Server, page: Page) -> None:
    """Those that must be there come first."""
    document = server.client.get("/openapi.json").json()
    page.ask_driver("POST", "url", url=f"{server.url}/docs")
    page.until("document.querySelector('.route')")
    shown = page.run("""
      return [...document.querySelectorAll(".route")].map((route) => [
        route.querySelector("summary code").textContent,
        [...route.querySelector("dl")?.children ?? []].map((field) => field.querySelector("code").textContent),
      ]);
    """)
    assert sorted({path for path, _ in shown}) == sorted(document["paths"])
    fields = dict(shown)
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/completions"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        required = body.get("required", [])
        names = [*body["properties"]]
        assert fields[path] == sorted(names, key=lambda name: (name not in required, names.index(name)))
    page.show_width(360)
    assert page.run("for (const d of document.querySelectorAll('details')) d.open = true; return innerWidth") == 360
    assert page.run("return document.documentElement.scrollWidth") <= 360


def test_the_chat_page_is_small(server: Server) -> None:
    """What a first visit loads, without the font that is for formulas."""
    sizes = [
        path.stat().st_size for path in STATIC_FOLDER.rglob("*") if path.suffix in (".html", ".css", ".js", ".mjs")
    ]
    assert sum(sizes) < 600_000


def test_no_file_names_another_place() -> None:
    own = [path for path in STATIC_FOLDER.rglob("*") if path.is_file() and VENDOR not in path.parents]
    for path in own:
        assert "http://" not in path.read_text(), path
        assert "https://" not in path.read_text().replace("https?:", ""), path


def test_the_folder_is_the_packages_own() -> None:
    assert STATIC_FOLDER.is_relative_to(Path(app.__file__).parent)
