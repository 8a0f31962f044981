"""What anything inside raises becomes a body, in the form of the dialect that was asked."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepgguf.errors import StepggufError
from stepgguf.server.dialects.dialect import ErrorForm
from stepgguf.server.problem import problem_of

log = logging.getLogger(__name__)


class AnswerErrors:
    """Answers exceptions. After the head has gone out there is no answer left to give: the connection ends.

    error_form: gives the form of errors at a path. It goes by the path, because most errors here come from the layers
    inside, before there is a route.
    """

    def __init__(self, app: ASGIApp, error_form: Callable[[str], ErrorForm]) -> None:
        self._app, self._error_form = app, error_form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except (HTTPException, RequestValidationError, StepggufError) as error:
            if started:
                raise
            await self._answer(error, scope, receive, send)
        except Exception as error:
            if started:
                raise
            log.exception("%s failed", scope["state"]["trace"])
            await self._answer(error, scope, receive, send)

    async def _answer(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        problem = problem_of(error)
        if problem.status >= 500:
            log.error("%s: %s", scope["state"]["trace"], problem.message)
        content = self._error_form(scope["path"]).body(problem, scope["state"]["trace"])
        await JSONResponse(content, problem.status, dict(problem.headers))(scope, receive, send)
