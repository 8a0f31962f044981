"""GET /v1/models: the names that this server's one model goes by. Answered without asking the engine's thread."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from typing_extensions import TypedDict

from stepgguf.server.dialects.dialect import FROM_EVERY_ROUTE, refusals
from stepgguf.server.dialects.openai_errors import OPENAI_ERRORS
from stepgguf.server.service import Service, TheService


class ModelEntry(TypedDict):
    """root is null: clients take the first such model for their default."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: None
    context_length: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelEntry]


router = APIRouter(tags=["OpenAI"], responses=refusals(OPENAI_ERRORS, *FROM_EVERY_ROUTE))


@router.get("/v1/models")
async def models(service: TheService) -> ModelList:
    """The file's own name first; the others are accepted for it."""
    return {"object": "list", "data": [_model_entry(service, id) for id in service.config.known_ids]}


@router.get("/v1/models/{id:path}", responses=refusals(OPENAI_ERRORS, 404))
async def model(id: str, service: TheService) -> ModelEntry:
    return _model_entry(service, service.model_id(id))


def _model_entry(service: Service, id: str) -> ModelEntry:
    return {
        "id": id,
        "object": "model",
        "created": service.started,
        "owned_by": "stepfun-ai",
        "root": None,
        "context_length": service.engine.info.n_ctx,
    }
