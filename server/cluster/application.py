"""`serve run server.cluster.application:build`: the server as a Ray Serve application.

A front takes HTTP from Ray's proxies and hands each request to one of the replicas, each of which is an engine and
the whole server above it. Knows Ray and settings; what is asked and answered is the server's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import click
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from server.cli.serve import launch_of, log_to_stderr, settings_of
from server.cluster import front_metrics
from server.cluster.affinity import DEFAULT_SLACK
from server.cluster.call import Call, Piece, Whole
from server.cluster.front import NoReplica, ReplicaLost, build_front
from server.cluster.replica import Replica
from server.settings import ServerSettings

REPLICA = "HnetReplica"
FRONT = "HnetFront"
MANY = (
    1_000_000  # requests Ray lets through: when there are too many, the replica's own gate says so, in OpenAI's shape
)
SHUTDOWN_MARGIN = 15.0  # seconds beyond the drain


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """What is set of the cluster; everything else is an option of `hnet serve`, by its name there.

    replicas: how many; or, where max_replicas is set, between min_replicas and so many, as many as have
    target_ongoing_requests each. num_cpus, num_gpus: that Ray sets aside for a replica. fronts: processes that take
    HTTP. routing: by the beginnings of prompts, or to the less busy one of two. slack: see `affinity.PrefixAffinity`.
    health_check_period: seconds; a replica is replaced when it fails three times, and at once when its process dies.
    """

    replicas: int = 1
    min_replicas: int = 1
    max_replicas: int | None = None
    target_ongoing_requests: float = 32.0
    upscale_delay: float = 30.0
    downscale_delay: float = 600.0
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    fronts: int = 1
    front_cpus: float = 0.0
    routing: Literal["prefix", "balanced"] = "prefix"
    slack: int = DEFAULT_SLACK
    health_check_period: float = 10.0

    def __post_init__(self) -> None:
        for name, least in (("replicas", 1), ("min_replicas", 0), ("fronts", 1), ("slack", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.max_replicas is not None and not 1 <= max(1, self.min_replicas) <= self.max_replicas:
            raise ValueError(f"max_replicas must be at least 1 and min_replicas, not {self.max_replicas}")


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application for these settings. Raises ValueError, in one line, for one that is wrong or not known."""
    cluster, settings = split(arguments)
    replicas: dict[str, Any] = (
        {"num_replicas": cluster.replicas}
        if cluster.max_replicas is None
        else {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.min_replicas,
                max_replicas=cluster.max_replicas,
                target_ongoing_requests=cluster.target_ongoing_requests,
                upscale_delay_s=cluster.upscale_delay,
                downscale_delay_s=cluster.downscale_delay,
            )
        }
    )
    if cluster.routing == "prefix":
        replicas["request_router_config"] = RequestRouterConfig(
            request_router_class="server.cluster.prefix_router.PrefixRouter",
            request_router_kwargs={"slack": cluster.slack},
        )
    quiet = LoggingConfig(enable_access_log=False)  # the server has a log of its own
    replica = serve.deployment(
        HnetReplica,
        name=REPLICA,
        ray_actor_options={"num_cpus": cluster.num_cpus, "num_gpus": cluster.num_gpus},
        max_ongoing_requests=MANY,
        logging_config=quiet,
        health_check_period_s=cluster.health_check_period,
        graceful_shutdown_timeout_s=settings.drain_timeout + SHUTDOWN_MARGIN,
        **replicas,
    ).bind(settings)
    front = serve.deployment(
        serve.ingress()(HnetFront),
        name=FRONT,
        num_replicas=cluster.fronts,
        ray_actor_options={"num_cpus": cluster.front_cpus},
        max_ongoing_requests=MANY,
        logging_config=quiet,
        graceful_shutdown_timeout_s=settings.drain_timeout + SHUTDOWN_MARGIN,
    )
    return front.bind(replica, settings)


def split(arguments: Mapping[str, Any]) -> tuple[ClusterSettings, ServerSettings]:
    """The cluster's settings and the server's. Raises ValueError, in one line, naming what is wrong."""
    names = {field.name for field in fields(ClusterSettings)}
    try:
        cluster = TypeAdapter(ClusterSettings).validate_python(
            {name: value for name, value in arguments.items() if name in names}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    rest = {name: value for name, value in arguments.items() if name not in names}
    try:
        return cluster, settings_of(rest)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None


class HnetReplica:
    """Ray's side of a replica."""

    async def __init__(self, settings: ServerSettings) -> None:  # type: ignore[misc]  # Ray awaits it
        log_to_stderr(settings.log_level)
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(name, settings, launch_of(settings))
        await self._replica.start()

    async def answer(self, call: Call) -> AsyncGenerator[Piece, None]:
        pieces = self._replica.answer(call)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    async def whole(self, call: Call) -> Whole:
        return await self._replica.whole(call)

    async def check_health(self) -> None:
        self._replica.check()

    async def __del__(self) -> None:  # Ray awaits it, once open requests have ended
        await self._replica.stop()


class HnetFront:
    """Ray's side of the front."""

    def __init__(self, replicas: DeploymentHandle, settings: ServerSettings) -> None:
        log_to_stderr(settings.log_level)
        self._replicas, self._max_body_bytes = replicas, settings.max_body_bytes

    def __serve_build_asgi_app__(self) -> ASGIApp:
        name = f"front-{serve.get_replica_context().replica_id.unique_id}"
        replicas = RayReplicas(self._replicas)
        # Ray's proxy names requests itself, by the client's name where there is one.
        return build_front(name, replicas, front_metrics.of_this_process, self._max_body_bytes, names_requests=False)


class RayReplicas:
    """`front.Replicas` through Ray's handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._answers = handle.options(stream=True)

    async def call(self, call: Call) -> AsyncGenerator[Piece, None]:
        response = self._answers.answer.remote(call)
        ended = False
        try:
            async for piece in response:
                yield piece
            ended = True
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise NoReplica from error
        except (RayTaskError, TaskCancelledError):  # a defect of ours, or our own cancelling
            raise
        except RayError as error:
            raise ReplicaLost from error
        finally:
            if not ended:
                response.cancel()

    async def all(self, call: Call) -> Sequence[Whole]:
        try:
            wholes: list[Whole] = await self._handle.broadcast("whole", call).results_async()
        except RayTaskError:  # a defect of ours
            raise
        except RayError as error:  # one has died and is not replaced yet
            raise ReplicaLost from error
        return wholes
