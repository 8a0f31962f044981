"""The application: which routes there are, and what stands before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from stepgguf import __version__
from stepgguf.chat.exchange import ChatModel
from stepgguf.server.body.unknown_fields import UnknownFields
from stepgguf.server.config import ServerConfig
from stepgguf.server.dialects.chat_completions import route as chat_completions
from stepgguf.server.dialects.completions import route as completions
from stepgguf.server.dialects.messages import route as messages
from stepgguf.server.dialects.responses import route as responses
from stepgguf.server.dialects.responses.store import Answers
from stepgguf.server.metrics import Metrics
from stepgguf.server.middleware import guard
from stepgguf.server.problem import AnthropicError, OpenAIError, Refusal
from stepgguf.server.routes import missing as astray
from stepgguf.server.routes import models
from stepgguf.server.routes import tokenizer as tokens
from stepgguf.server.service import Service, now

STATIC = Path(__file__).parent / "static"
OPENAI_ROUTERS = tuple(module.router for module in (chat_completions, completions, responses, models, tokens))
PATHS = tuple(route.path for router in (*OPENAI_ROUTERS, messages.router) for route in router.routes)
# The pages load nothing from elsewhere and run nothing but the files in static/.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # kept, and asked for again by its ETag: a new version comes as a whole
}


def create_app(chat: ChatModel, config: ServerConfig) -> FastAPI:
    """One model behind all dialects. The caller closes the engine."""
    metrics = Metrics(chat.engine)
    app = FastAPI(
        title="stepgguf",
        version=__version__,
        summary=f"{chat.engine.info.name}, in the dialects of OpenAI and Anthropic",
        docs_url=None,
        redoc_url=None,
        middleware=_middleware(config, metrics),
    )
    app.state.service = Service(chat, config, metrics, now(), UnknownFields(strict=config.strict))
    app.state.answers = Answers(config)
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _leave_to_guard)
    for router in OPENAI_ROUTERS:
        app.include_router(router, responses=_errors(OpenAIError))
    app.include_router(messages.router, responses=_errors(AnthropicError))
    _add_page(app, "/", STATIC / "index.html")
    _add_page(app, "/docs", STATIC / "docs.html")
    app.mount(guard.STATIC, _Static(directory=STATIC))
    return app


def _errors(model: object) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: every answer that is not a success has this form."""
    return {"default": {"model": model, "description": "What is wrong, and with which field."}}


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


def _add_page(app: FastAPI, path: str, file: Path) -> None:
    async def page() -> FileResponse:
        return FileResponse(file, headers=PAGE_HEADERS)

    app.get(path, include_in_schema=False)(page)


def _middleware(config: ServerConfig, metrics: Metrics) -> list[Middleware]:
    """Outermost first; see guard.py."""
    layers = [Middleware(guard.Trace, metrics=metrics)]
    if config.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )
        )
    layers += [Middleware(guard.Errors), Middleware(guard.Host, config=config)]
    if config.api_key is not None:
        layers.append(Middleware(guard.Key, key=config.api_key))
    return [*layers, Middleware(guard.Form), Middleware(guard.Size, config=config)]


async def _leave_to_guard(request: Request, error: Exception) -> Response:
    """FastAPI's own handlers would answer in its own form."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405) and not isinstance(error, Refusal):
        asked = f"{request.method} {request.url.path}"
        advice = astray.advice(request.url.path, str(request.base_url), PATHS)
        raise Refusal(error.status_code, f"there is no {asked}; {advice}", headers=error.headers)
    raise error
