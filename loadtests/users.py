"""Locust's users: they ask by the clock, whatever has become of what they asked before, and read what streams back.

    locust -f loadtests/users.py --host http://127.0.0.1:8000 --scenario chat --user-rate 0.5 --users 4

A user is a source of `--user-rate` requests a second. A request is sent when it is due, in a greenlet of its own, and
its latency counts from then, so that a server that falls behind is not asked less and not spared. Each process
writes a line for every request into the folder `--records`; to locust it reports the time to the first byte, the
longest gap, the bytes a second and the whole of each stream as metrics of their own.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, TextIO

from gevent.pool import Group
from locust import User, events, task

from loadtests import scenario as scenarios
from loadtests.client import ask
from loadtests.scenario import Asked
from loadtests.stream import Record

_numbers = itertools.count()


@events.init_command_line_parser.add_listener
def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--scenario", default="chat", help="its name or file")
    parser.add_argument("--user-rate", type=float, default=0.5, help="requests a second of one user")
    parser.add_argument("--user-streams", type=int, default=128, help="that one user may have open")
    parser.add_argument("--records", default="", help="a folder for a line about each request")
    parser.add_argument("--peer", default="", help="the model's name at a server that is not ours")
    parser.add_argument("--drain", type=float, default=30.0, help="seconds that open streams have after the end")


class Client(User):
    """A source of requests that does not wait for answers."""

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self._options = options
        self._scenario = scenarios.load(options.scenario)
        index = getattr(self.environment.runner, "worker_index", 0)
        self._rng = random.Random(f"{self._scenario.name} {options.user_rate} {index} {next(_numbers)}")
        self._streams = Group()
        self._due: float | None = None
        self._log: TextIO | None = None
        if options.records:
            path = Path(options.records) / f"{os.getpid()}-{id(self)}.jsonl"
            self._log = path.open("w", encoding="utf-8")
            self._log.write(json.dumps({"started": time.monotonic()}) + "\n")

    def wait_time(self) -> float:
        return max(0.0, (self._due or 0.0) - time.monotonic())

    @task
    def arrive(self) -> None:
        """Sends what is due, and says when the next is."""
        arrivals = self._scenario.arrivals
        if self._due is not None:
            for _ in range(arrivals.size):
                self._send(self._due)
            self._due += arrivals.interval(self._options.user_rate, self._rng)
        else:
            self._due = time.monotonic() + arrivals.first(self._options.user_rate, self._rng)

    def _send(self, due: float) -> None:
        asked = self._scenario.request(self._rng.randrange(self._scenario.variants))
        kind = self._scenario.kind(asked.kind)
        record = Record(asked.kind, asked.variant, due)
        abort_after = None
        if self._rng.random() < kind.abort_share:
            abort_after = self._rng.randint(1, asked.max_tokens)
        if len(self._streams) >= self._options.user_streams:
            self._report(record)
        else:
            self._streams.spawn(self._stream, asked, record, abort_after)

    def _stream(self, asked: Asked, record: Record, abort_after: int | None) -> None:
        salt, peer = f"{self._rng.getrandbits(64):x}", self._options.peer or None
        try:
            ask(self.host, asked, record, salt=salt, peer=peer, abort_after=abort_after)
        finally:
            self._report(record)

    def _report(self, record: Record) -> None:
        if self._log is not None:
            self._log.write(record.to_json() + "\n")
        values: dict[str, Any] = {"stream (ms)": 1e3 * (record.end - record.due) if record.end else 0}
        if record.first_byte is not None:
            values["first byte (ms)"] = 1e3 * record.first_byte
        if record.gaps:
            values["longest gap (ms)"] = 1e3 * max(record.gaps)
            values["rate (bytes/s)"] = record.rate
        error = None if record.outcome in ("complete", "aborted") else RuntimeError(f"{record.outcome} {record.reason}")
        for name, value in values.items():
            self.environment.events.request.fire(
                request_type=record.kind,
                name=name,
                response_time=value,
                response_length=record.num_bytes,
                exception=error if name.startswith("stream") else None,
                context={},
            )

    def on_stop(self) -> None:
        self._streams.join(timeout=self._options.drain)
        self._streams.kill()
        if self._log is not None:
            self._log.close()
