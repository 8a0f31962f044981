"""What a wire dialect is to the server: its routes, and how it says that something is wrong.

dialects/NAME/request.py   the body that a client sends -> ChatRequest
dialects/NAME/writer.py    deltas -> the dialect's events, and its whole answer (writer.py beside this file)
dialects/NAME/route.py     the routes, and the Dialect that app.py lists
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import APIRouter

from stepgguf.server.body.json_route import JsonRoute
from stepgguf.server.problem import Problem

Responses = dict[int | str, dict[str, Any]]  # as FastAPI takes them: what a route may answer, by status

FROM_EVERY_ROUTE = (401, 403, 500)
OF_A_BODY = (400, 408, 413, 415)  # it is wrong, late, too large, not said to be JSON
OF_A_GENERATION = (404, 429, 503)  # there is no such model, the queue is full, the engine begins anew
STREAMED: Responses = {200: {"content": {"text/event-stream": {}}}}


class ErrorForm(Protocol):
    """How a dialect says that something is wrong."""

    @property
    def schema(self) -> type:
        """The TypedDict that describes the body."""

    def body(self, problem: Problem, trace_id: str) -> Mapping[str, Any]:
        """Return the body of a response with the problem's status, which is also the data of an event in a stream."""


def refusals(form: ErrorForm, *statuses: int) -> Responses:
    """Return the declaration that a route may answer with these statuses, in this form."""
    return {
        status: {"model": form.schema, "description": "What is wrong, and with which field."} for status in statuses
    }


@dataclass(frozen=True, slots=True)
class Dialect:
    """A wire dialect.

    `router` has a prefix: the path below which everything, also what is no route, is answered in `error_form`.
    """

    router: APIRouter
    error_form: ErrorForm

    @classmethod
    def below(cls, prefix: str, error_form: ErrorForm, *, tag: str) -> Dialect:
        """Make a dialect without routes yet. All that it gets take JSON; `tag` groups them in the OpenAPI document."""
        declared = refusals(error_form, *FROM_EVERY_ROUTE)
        return cls(APIRouter(prefix=prefix, route_class=JsonRoute, tags=[tag], responses=declared), error_form)

    @property
    def of_an_answer(self) -> Responses:
        """The declaration of a route whose body is answered by the model, streamed or whole."""
        return STREAMED | refusals(self.error_form, *OF_A_BODY, *OF_A_GENERATION)
