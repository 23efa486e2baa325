"""What a front counts. Knows numbers and their names."""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter

Beginning = Literal["known", "new", "shed", "none"]
BEGINNINGS: tuple[Beginning, ...] = get_args(Beginning)


class FrontMetrics:
    """What a front counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.routed = Counter(
            "hnet_front_routed",
            "Requests by how their replica was found: it had read the beginning of the prompt (known), nobody had "
            "(new), who had was too busy (shed), or there is no prompt to go by (none).",
            ["beginning"],
            registry=self.registry,
        )
        for beginning in BEGINNINGS:
            self.routed.labels(beginning)
        self.known_bytes = Counter(
            "hnet_front_known_bytes", "Bytes of prompts that the chosen replica had read.", registry=self.registry
        )
        self.repeated = Counter(
            "hnet_front_repeated",
            "Requests handed to another replica because theirs was lost before it answered.",
            registry=self.registry,
        )
        self.lost = Counter(
            "hnet_front_lost",
            "Requests that ended with an error because their replica was lost.",
            registry=self.registry,
        )


of_this_process = FrontMetrics()
"""Ray makes the router by itself and copies its module, so this one, to which it refers by name, is where it counts."""
