"""GET /v1/models: the names that this server's one model goes by. Answered without asking the engine's thread."""

from __future__ import annotations

from fastapi import APIRouter

from stepgguf.server.dialects.openai import Model, Models
from stepgguf.server.service import Service, TheService

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def models(service: TheService) -> Models:
    """The file's own name first; the others are accepted for it."""
    return {"object": "list", "data": [_model(service, id) for id in service.config.known_ids]}


@router.get("/v1/models/{id:path}")
async def model(id: str, service: TheService) -> Model:
    return _model(service, service.model(id))


def _model(service: Service, id: str) -> Model:
    return {
        "id": id,
        "object": "model",
        "created": service.started,
        "owned_by": "stepfun-ai",
        "root": None,
        "context_length": service.engine.info.n_ctx,
    }
