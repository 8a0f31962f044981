"""The page: one HTML file with everything in it, which asks no network for anything.

    page.html   the skeleton: {{title}} {{policy}} {{style}} {{data}} {{script}}
    page.css    put in as it is, and so are SCRIPTS, one after the other
    data        JSON that the script reads; `<` is written as \\u003c, so no name can end the element

The policy allows this style and this script by their digests and nothing else, so what a name might smuggle in would
not run, and no address is ever asked.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

from stepgguf.report import figures
from stepgguf.report.measured import MeasuredFile

SCRIPTS = ("draw.js", "file.js", "errors.js", "frontier.js", "page.js")


def render_page(measured: MeasuredFile, frontier: dict[str, Any] | None = None) -> str:
    """The report on a file as one HTML document. frontier: what was evaluated, of frontier.py."""
    style, script = _package_file("page.css"), "".join(map(_package_file, SCRIPTS))
    data = {**figures.summary(measured), **figures.tensor_maps(measured), "frontier": frontier}
    parts = {
        "title": html.escape(f"{measured.name} · {measured.paths[0].name}"),
        "policy": "default-src 'none'; img-src data:; "
        f"style-src {_csp_digest(style)}; script-src {_csp_digest(script)}; base-uri 'none'; form-action 'none'",
        "style": style,
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _package_file("page.html"))


def _package_file(name: str) -> str:
    return files("stepgguf.report").joinpath(name).read_text(encoding="utf-8")


def _csp_digest(text: str) -> str:
    """A CSP source that stands for exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
