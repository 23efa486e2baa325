"""A front over replicas in this process, on the fake engine: what Ray does between them, in a few lines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import uvicorn

from server.cluster.affinity import PrefixAffinity
from server.cluster.call import Call, Piece, Whole
from server.cluster.front import NoReplica, ReplicaLost, build_front
from server.cluster.front_metrics import FrontMetrics
from server.cluster.replica import Replica
from server.engine_loop import EngineLaunch
from server.serving import bind
from server.settings import ServerSettings


class LocalReplicas:
    """`front.Replicas` over replicas here. One that is killed is lost to everybody who reads from it."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.alive = {replica.name: replica for replica in replicas}
        self._killed = {replica.name: asyncio.Event() for replica in replicas}
        self._affinity = PrefixAffinity()
        self.calls: list[tuple[str, str]] = []  # replica, path
        self.left = 0  # calls that were closed before their end

    def kill(self, name: str) -> None:
        del self.alive[name]
        self._killed[name].set()

    async def call(self, call: Call) -> AsyncGenerator[Piece, None]:
        ranking = self._affinity.rank(call.beginnings, dict.fromkeys(self.alive, 0))
        if not ranking.replicas:
            raise NoReplica
        name = ranking.replicas[0]
        self._affinity.record(call.beginnings, name)
        self.calls.append((name, call.path))
        pieces = self.alive[name].answer(call)
        killed = asyncio.create_task(self._killed[name].wait())
        ended, following = False, None
        try:
            while True:
                following = asyncio.ensure_future(anext(pieces, None))
                await asyncio.wait({following, killed}, return_when=asyncio.FIRST_COMPLETED)
                if killed.done():
                    raise ReplicaLost
                piece = await following
                if piece is None:
                    ended = True
                    return
                yield piece
        finally:
            self.left += not ended
            killed.cancel()
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            await pieces.aclose()

    async def all(self, call: Call) -> Sequence[Whole]:
        return await asyncio.gather(*(replica.whole(call) for replica in self.alive.values()))


class Cluster:
    """A front on a port of this machine, in a thread."""

    def __init__(self, names: Sequence[str], settings: ServerSettings, **engine: Any) -> None:
        self._names, self._settings, self._engine = names, settings, engine
        self._socket = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.metrics = FrontMetrics()
        self.replicas: LocalReplicas
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    async def _main(self) -> None:
        launch = EngineLaunch(factory="fake_engine:build", arguments=self._engine)
        started = [Replica(name, self._settings, launch) for name in self._names]
        for replica in started:
            await replica.start()
        self._loop = asyncio.get_running_loop()
        self.replicas = LocalReplicas(started)
        app = build_front("front-1", self.replicas, self.metrics, self._settings.max_body_bytes)
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        self._ready.set()
        await self._server.serve(sockets=[self._socket])
        for replica in started:
            await replica.stop()

    def kill(self, name: str) -> None:
        self._loop.call_soon_threadsafe(self.replicas.kill, name)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, trust_env=False, verify=False)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
