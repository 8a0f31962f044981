"""What to say to clients that ask at an address where there is nothing. Mostly their base URL is not quite right."""

from __future__ import annotations

from collections.abc import Iterable

API = "/v1"
# llama-server's own routes, and what does the same here
LLAMA_SERVER_ROUTES = {
    "/completion": "/v1/completions",
    "/apply-template": "/tokenize",
    "/slots": "/metrics",
    "/props": "/v1/models",
}


def address_advice(asked: str, origin: str, routes: Iterable[str]) -> str:
    """Return a sentence that says what was meant. asked: the path; origin: scheme, host and port; routes: the paths
    that there are."""
    asked, origin = asked.rstrip("/"), origin.rstrip("/")
    bases = f"the base URL of OpenAI's clients is {origin}{API}, that of Anthropic's {origin}"
    meant = LLAMA_SERVER_ROUTES.get(asked) or _meant_route(asked, routes)
    if meant is not None:
        return f"it is {meant}: {bases}"
    if asked in ("", API):
        return bases
    if asked.startswith("/api/"):
        return f"this server speaks the APIs of OpenAI and Anthropic, not Ollama's: {bases}"
    return "/docs lists what there is"


def _meant_route(asked: str, routes: Iterable[str]) -> str | None:
    """Return the longest route whose end is asked for: without /v1, with it twice, below some other prefix."""
    ends = {route.removeprefix(API): route for route in routes if "{" not in route}
    if asked in ends.values():  # it takes another method
        return None
    found = [end for end, route in ends.items() if asked.endswith(end) and asked != route]
    return ends[max(found, key=len)] if found else None
