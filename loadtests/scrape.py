"""What a server says of itself at `/metrics`, and what it counted between two looks. Knows names; no requests."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from loadtests.client import headers

Labels = tuple[tuple[str, str], ...]


class NoMetrics(RuntimeError):
    """The server has none that are ours."""


@dataclass(frozen=True)
class Scrape:
    """Samples by name and labels."""

    samples: Mapping[tuple[str, Labels], float]

    @classmethod
    def parse(cls, text: str) -> Scrape:
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        return cls({(each.name, tuple(sorted(each.labels.items()))): each.value for each in samples})

    def __sub__(self, earlier: Scrape) -> Scrape:
        """What was counted in between; means something for counters and histograms only."""
        return Scrape({key: value - earlier.samples.get(key, 0.0) for key, value in self.samples.items()})

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples `hnet_NAME` that have these labels."""
        wanted = set(labels.items())
        found = (value for (each, has), value in self.samples.items() if each == f"hnet_{name}" and wanted <= set(has))
        return sum(found)

    def mean(self, histogram: str) -> float | None:
        count = self.total(f"{histogram}_count")
        return self.total(f"{histogram}_sum") / count if count else None


def scrape(url: str) -> Scrape:
    """Raises NoMetrics where there are none of ours."""
    request = urllib.request.Request(f"{url}/metrics", headers=headers())
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = Scrape.parse(answer.read().decode())
    except (urllib.error.URLError, ValueError) as error:
        raise NoMetrics(f"{url}/metrics: {error}") from error
    if not any(name.startswith("hnet_") for name, _ in found.samples):
        raise NoMetrics(f"{url}/metrics has no metric whose name begins with hnet_")
    return found


def scrape_idle(url: str, seconds: float = 60.0) -> Scrape:
    """As `scrape`, once nothing runs and nothing waits; raises RuntimeError if that takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        found = scrape(url)
        if found.total("num_requests_running") + found.total("num_requests_waiting") == 0:
            return found
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server at {url} is still busy after {seconds:g} s")
        time.sleep(0.1)
