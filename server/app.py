"""The HTTP application: routes, errors in one shape, and the layers every request passes.

Knows which route is where and in which order the layers lie; what a route does is its own file's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

import hnet_runtime
from server import chat, completions, exposition, models, probes, score, segment, tokenization
from server.admission import Admission, Backlog
from server.auth import ApiKey, KeyRing
from server.body_limit import BodyLimit
from server.chat_templates import ChatTemplate, find_template
from server.engine_client import EngineClient, Observer, Transport
from server.errors import ApiError, internal
from server.metrics import Metrics
from server.observers import Observers
from server.request_id import RequestIds
from server.service import Service
from server.settings import ServerSettings
from server.structured import ConstraintChecker

log = logging.getLogger("hnet.server")


def build_service(settings: ServerSettings, transport: Transport) -> tuple[Service, Metrics]:
    """Wires up one server around a way to its engine; nothing is started yet."""
    backlog = Backlog()
    metrics = Metrics(backlog)
    observer: Observer = metrics
    tracing = None
    if settings.otlp_traces_endpoint is not None:
        from server.tracing import open_tracing  # what it imports need not be installed

        tracing = open_tracing(settings.otlp_traces_endpoint)
        observer = Observers(metrics, tracing)
    client = EngineClient(
        transport,
        observer,
        engine_timeout=settings.engine_timeout,
        max_restarts=settings.max_engine_restarts,
        request_timeout=settings.request_timeout,
    )
    admission = Admission(client, backlog, settings)
    return Service(settings, client, admission, ConstraintChecker(), tracing), metrics


def build_app(service: Service, metrics: Metrics) -> ASGIApp:
    """The ASGI application. Its lifespan starts the engine's loading and ends the engine."""
    api = FastAPI(
        title="hnet-serve",
        description="Byte-level H-Nets behind OpenAI's API. One token is one byte.",
        version=hnet_runtime.__version__,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    api.state.service = service
    api.state.chat_template = find_template(service.settings)
    api.state.registry = exposition.build_registry(service, metrics)
    for module in (completions, chat, models, segment, score, tokenization, probes, exposition):
        api.include_router(module.router)
    api.add_exception_handler(ApiError, _api_error)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(ClientDisconnect, _gone)
    api.add_exception_handler(Exception, _defect)
    app: ASGIApp = BodyLimit(api, service.settings.max_body_bytes)
    settings = service.settings
    if settings.api_key or settings.api_key_file is not None:
        app = ApiKey(app, KeyRing(settings.api_key, settings.api_key_file), metrics_public=settings.metrics_public)
    if settings.allowed_origins:  # a browser asks first, and without a key
        app = CORSMiddleware(
            app,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "x-ignored-params", "retry-after", "retry-after-ms"),
        )
    if service.tracing is not None:
        app = service.tracing.layer(app)
    return RequestIds(app)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.client.start()
    try:
        yield
    finally:
        await service.client.stop()
        if service.tracing is not None:
            await service.tracing.close()
        template: ChatTemplate = app.state.chat_template
        await asyncio.to_thread(template.close)
        await asyncio.to_thread(service.constraints.close)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status >= 500:
        log.warning("request %s: %d %s", request.state.request_id, error.status, error.message)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """The framework's own errors: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {ascii(request.url.path)[1:-1]}"
    message, code = {
        404: (f"There is no {where}.", "unknown_url"),
        405: (f"{where} is not allowed; see the Allow header.", "method_not_allowed"),
    }.get(error.status_code, (str(error.detail), None))
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


async def _gone(request: Request, error: Exception) -> Response:
    """The client went away while it was still sending: nobody reads this, and nothing is wrong here."""
    return Response(status_code=completions.CLIENT_CLOSED_REQUEST)


async def _defect(request: Request, error: Exception) -> Response:
    # The framework raises the exception again after this answer, and `RequestIds` logs it.
    return internal(request.state.request_id).response()
