"""`GET /v1/models`: the one model served, with what is particular to an H-Net."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from server.service import Service

router = APIRouter()
_STARTED = int(time.time())


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The models served: one."""
    service: Service = request.app.state.service
    service.admission.check_loaded()
    return {"object": "list", "data": [_card(service)]}


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> dict[str, Any]:
    """One model by its name."""
    service: Service = request.app.state.service
    service.admission.check_loaded()
    service.check_model(model_id)
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
