"""The application: which dialects and routes there are, and what stands before them.

Plain ASGI layers: Starlette's BaseHTTPMiddleware would come between a stream and the news that its reader has gone.

    TraceRequests          an id, a log line and a count for every request; whatever was begun for it ends with it
     [CORSMiddleware]      Starlette's; answers preflights, so before the key is asked for
      AnswerErrors         what anything inside raises becomes a body
       HostCheck           the names this server goes by
        [KeyCheck]         the API key
         ContentTypeCheck  what a web page of somebody else could send
          SizeLimit        how large a body may be, and how slow
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from stepgguf import __version__
from stepgguf.chat.exchange import ChatModel
from stepgguf.server.body.unknown_fields import UnknownFields
from stepgguf.server.config import ServerConfig
from stepgguf.server.dialects.chat_completions.route import CHAT_COMPLETIONS
from stepgguf.server.dialects.completions.route import COMPLETIONS
from stepgguf.server.dialects.dialect import ErrorForm
from stepgguf.server.dialects.messages.route import MESSAGES
from stepgguf.server.dialects.openai_errors import OPENAI_ERRORS
from stepgguf.server.dialects.responses.route import RESPONSES
from stepgguf.server.dialects.responses.store import AnswerStore
from stepgguf.server.metrics import Metrics
from stepgguf.server.middleware.access import HostCheck, KeyCheck
from stepgguf.server.middleware.bodies import ContentTypeCheck, SizeLimit
from stepgguf.server.middleware.errors import AnswerErrors
from stepgguf.server.middleware.trace import TraceRequests
from stepgguf.server.problem import Refusal
from stepgguf.server.routes import health, missing, models, page, tokenizer
from stepgguf.server.service import Service, now
from stepgguf.server.tasks import TaskLedger

DIALECTS = (CHAT_COMPLETIONS, COMPLETIONS, RESPONSES, MESSAGES)
ROUTERS = (*(dialect.router for dialect in DIALECTS), models.router, tokenizer.router, health.router)
PATHS = tuple(route.path for router in ROUTERS for route in router.routes if isinstance(route, APIRoute))


def create_app(chat: ChatModel, config: ServerConfig) -> FastAPI:
    """Return the application that serves one model in all dialects. The caller closes the engine."""
    metrics = Metrics(chat.engine)
    app = _Application(
        title="stepgguf",
        version=__version__,
        summary=f"{chat.engine.info.name}, in the dialects of OpenAI and Anthropic",
        docs_url=None,
        redoc_url=None,
        middleware=_middleware(config, metrics),
    )
    app.state.service = Service(
        chat, config, metrics, now(), TaskLedger(config, metrics), UnknownFields(strict=config.strict)
    )
    app.state.answers = AnswerStore(config)
    for error_class in (HTTPException, RequestValidationError):
        app.add_exception_handler(error_class, _leave_to_middleware)
    for router in ROUTERS:
        app.include_router(router)
    page.add_page(app)
    return app


class _Application(FastAPI):
    """FastAPI with a description of this API that says what is really answered."""

    def openapi(self) -> dict[str, Any]:
        """Return the document without the 422 that FastAPI adds to every route with parameters: here it is a 400, which
        the routes name."""
        document = super().openapi()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document


def _error_form(path: str) -> ErrorForm:
    """Return the form of errors at a path: that of the dialect whose prefix it has, whether there is a route or not;
    elsewhere OpenAI's."""
    owners = (dialect for dialect in DIALECTS if path.startswith(dialect.router.prefix))
    return next((dialect.error_form for dialect in owners), OPENAI_ERRORS)


def _middleware(config: ServerConfig, metrics: Metrics) -> list[Middleware]:
    """Return the layers of the drawing above, the outermost first."""
    layers = [Middleware(TraceRequests, metrics=metrics)]
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
    layers += [Middleware(AnswerErrors, error_form=_error_form), Middleware(HostCheck, config=config)]
    if config.api_key is not None:
        layers.append(Middleware(KeyCheck, key=config.api_key))
    return [*layers, Middleware(ContentTypeCheck), Middleware(SizeLimit, config=config)]


async def _leave_to_middleware(request: Request, error: Exception) -> Response:
    """Raise the error again for AnswerErrors, which knows the dialect's form: FastAPI's own handlers would answer in
    theirs."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405) and not isinstance(error, Refusal):
        asked = f"{request.method} {request.url.path}"
        advice = missing.address_advice(request.url.path, str(request.base_url), PATHS)
        raise Refusal(error.status_code, f"there is no {asked}; {advice}", headers=error.headers)
    raise error
