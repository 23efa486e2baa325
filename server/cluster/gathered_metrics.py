"""Several servers' metrics as one page, each sample with the name of whose it is. Knows Prometheus's text format
only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


def gathered(expositions: Mapping[str, str]) -> bytes:
    """expositions: by the name of whose they are, in the text format → one exposition, its samples labelled so."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Gathered(expositions))
    return generate_latest(registry)


class _Gathered(Collector):
    def __init__(self, expositions: Mapping[str, str]) -> None:
        self._expositions = expositions

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, exposition in self._expositions.items():
            for family in text_string_to_metric_families(exposition):
                if family.name.endswith("_created"):  # when a counter began: the library's, in this format alone
                    continue
                ours = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    ours.add_sample(sample.name, {**sample.labels, LABEL: name}, sample.value)
        yield from families.values()
