"""Ray Serve's choice of a replica, by the beginning of the prompt. Knows Ray; what to choose by is `affinity`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.cluster import front_metrics
from server.cluster.affinity import BLOCK, DEFAULT_SLACK, PrefixAffinity, Ranking
from server.cluster.call import Call
from server.cluster.front_metrics import Beginning


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray's class is not typed
    """Prefers the replica that has read most of the prompt, while it has at most `slack` requests more than the least
    busy."""

    def initialize_state(self, slack: int = DEFAULT_SLACK) -> None:
        self._affinity = PrefixAffinity(slack=slack)
        self._running: dict[str, int] = {}  # requests of this front by replica
        self._rankings: dict[str, Ranking] = {}  # by request, until it is routed

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._keep()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._keep()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank, the preferred one first."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = (
                True  # the ranks are all there are: asking on needs a pause
            )
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ranking = self._affinity.rank(
            _beginnings(pending_request), {name: self._load(by_name[name]) for name in by_name}
        )
        if pending_request is not None:
            self._rankings[pending_request.metadata.internal_request_id] = ranking
        return [[by_name[name]] for name in ranking.replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        beginnings, name = _beginnings(pending_request), replica_id.unique_id
        self._running[name] = self._running.get(name, 0) + 1
        ranking = self._rankings.pop(pending_request.metadata.internal_request_id, None)
        if ranking is not None:
            _count(ranking, beginnings, name)
        self._affinity.record(beginnings, name)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        name = replica_id.unique_id
        if name in self._running:
            self._running[name] -= 1

    def _load(self, replica: RunningReplica) -> int:
        """Requests that the replica works on: ours, or all of which it has told, whichever are more."""
        told = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return max(told, self._running.get(replica.replica_id.unique_id, 0))

    def _keep(self) -> None:
        names = {replica_id.unique_id for replica_id in self.curr_replicas}
        self._affinity.keep(names)
        self._running = {name: count for name, count in self._running.items() if name in names}


def _beginnings(pending_request: PendingRequest | None) -> Sequence[int]:
    call = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return call.beginnings if isinstance(call, Call) else ()


def _count(ranking: Ranking, beginnings: Sequence[int], name: str) -> None:
    """What became of a request; one that its first choice did not take is shed as one that was not to get there."""
    counted = front_metrics.of_this_process
    how: Beginning = "new" if beginnings else "none"
    if ranking.shed or (ranking.matched and ranking.replicas[0] != name):
        how = "shed"
    elif ranking.matched:
        how = "known"
        counted.known_bytes.inc(ranking.matched * BLOCK)
    counted.routed.labels(how).inc()
