"""GET /health and /metrics: how the server is, for programs that ask every few seconds."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response
from typing_extensions import TypedDict

from stepgguf.server.dialects.dialect import FROM_EVERY_ROUTE, refusals
from stepgguf.server.dialects.openai_errors import OPENAI_ERRORS
from stepgguf.server.problem import Refusal
from stepgguf.server.service import TheService

router = APIRouter(tags=["stepgguf"], responses=refusals(OPENAI_ERRORS, *FROM_EVERY_ROUTE))


class HealthAnswer(TypedDict):
    status: str
    running: int
    queued: int


@router.get("/health", responses=refusals(OPENAI_ERRORS, 503))
async def health(service: TheService) -> HealthAnswer:
    """503 once the engine cannot take requests any more."""
    stats = service.engine.stats()
    if not stats.alive:
        raise Refusal(503, "the engine has stopped; start the server again", code="engine_failed")
    return {"status": "ok", "running": stats.n_running, "queued": stats.n_queued}


@router.get("/metrics", response_class=Response)
async def metrics(service: TheService) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
