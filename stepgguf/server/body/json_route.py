"""From the bytes of a request's body to the object that its route takes, off the event loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from stepgguf.server.body.json_text import parse_json
from stepgguf.server.body.unknown_fields import REQUEST, RequestUnknowns
from stepgguf.server.problem import Refusal
from stepgguf.server.validation import describe_errors


class JsonRoute(APIRoute):
    """Reads a body with `JsonRequest`, and does with unknown fields what this server does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        annotation: Any = self.body_field.field_info.annotation if self.body_field is not None else object
        model = TypeAdapter(annotation)

        async def handle(request: Request) -> Response:
            # The handler runs in this request's context, and so do the threads that it starts.
            REQUEST.set(RequestUnknowns(request.app.state.service.unknown))
            return await handler(JsonRequest(request, model))

        return handle


class JsonRequest(Request):
    """A request whose JSON becomes the route's model off the event loop, since a large body takes a while. FastAPI
    validates on the event loop; it then finds an instance and has nothing to do."""

    def __init__(self, request: Request, model: TypeAdapter[Any]) -> None:
        super().__init__(request.scope, request.receive)
        self._model = model

    async def json(self) -> Any:
        depth = self.app.state.service.config.max_json_depth
        return await run_in_threadpool(_validated, await self.body(), depth, self._model)


def _validated(body: bytes, depth: int, model: TypeAdapter[Any]) -> Any:
    value = parse_json(body, depth)
    try:
        return model.validate_python(value)
    except ValidationError as error:
        # FastAPI's locations start with where the value was; `describe_errors` reads both kinds.
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        message, param = describe_errors(errors, value)
        raise Refusal(400, message, param=param) from None
