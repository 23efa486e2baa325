"""`GET /v1/models`: the one model served, with what is particular to an H-Net."""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field

from server.responses import Shape, described
from server.service import Service

router = APIRouter()
_STARTED = int(time.time())


class StageShape(Shape):
    stage: int = Field(ge=0)
    d_model: int
    layout: str
    parameters: int


class HNetShape(Shape):
    stages: list[StageShape]
    embedding_parameters: int
    device: str
    dtype: str
    kernels: str


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    hnet: HNetShape


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


@router.get("/v1/models", responses=described(ModelList, errors=(401, 503)))
async def list_models(request: Request) -> dict[str, Any]:
    """The models served: one."""
    service: Service = request.app.state.service
    service.admission.check_loaded()
    return {"object": "list", "data": [_card(service)]}


# As a parameter of the function the name would bring a 422 into the document, which no request is answered with.
@router.get(
    "/v1/models/{model_id:path}",
    responses=described(ModelCard, errors=(401, 404, 503)),
    openapi_extra={"parameters": [{"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}]},
)
async def retrieve_model(request: Request) -> dict[str, Any]:
    """One model by its name."""
    service: Service = request.app.state.service
    service.admission.check_loaded()
    service.check_model(request.path_params["model_id"])
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    info = service.info
    return {
        "id": service.model_name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "hnet-serve",
        "root": info.model,
        "parent": None,
        "max_model_len": info.max_model_len,
        "hnet": {
            "stages": [msgspec.to_builtins(stage) for stage in info.stages],
            "embedding_parameters": info.embedding_parameters,
            "device": info.device,
            "dtype": info.dtype,
            "kernels": info.kernels,
        },
    }
