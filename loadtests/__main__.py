"""Load tests from the command line: a scenario at its levels of load, or the highest load at which its objective holds.

    hnet bench serve run mixed [--url http://127.0.0.1:8000 | --model demo] [--rates 2,4,8] [--workers 2]
    hnet bench serve capacity chat [--from 1] [--precision 1.1]
    hnet bench serve run chat --url http://127.0.0.1:8080 --peer MODEL

Without --url a server of this checkout is started on the loopback. Everything is bounded: seconds of a level, streams
that are open, levels. HNET_API_KEY is sent as the key. The exit code is 1 where a count does not add up or a stream
came wrong.
"""

from __future__ import annotations

import argparse
import ipaddress
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.report import commit, machine
from benchmarks.server_process import free_port, our_server
from loadtests import scenario as scenarios
from loadtests import solo
from loadtests.capacity import search
from loadtests.level import Client, Target, measure
from loadtests.report import Run, write
from loadtests.scenario import Scenario
from loadtests.summary import Figures, figures, meets

MEMORY_IS_KNOWN = Path("/proc/self/smaps_rollup").exists()


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends locust and the server with us
    if options.command == "list":
        for name in scenarios.names():
            print(f"{name:18} {scenarios.load(name).description}")
        return
    try:
        scenario = _scenario(options)
        run = _run(scenario, options)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"load test: {error}") from error
    page, document = write(run, options.output)
    for fault in run.faults():
        print(f"WRONG {fault}")
    for doubt in run.doubts():
        print(f"DOUBTFUL {doubt}")
    print(*run.in_words(), f"{page} {document}", sep="\n")
    raise SystemExit(1 if run.faults() else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hnet bench serve", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="scenarios that come with the project")
    for name, text in (
        ("run", "a scenario at its levels of load"),
        ("capacity", "the most at which its promise holds"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("scenario", help="its name or a file")
        command.add_argument("--url", help="of a server that runs; without it one is started")
        command.add_argument("--allow-remote", action="store_true", help="let --url be of another machine")
        command.add_argument("--peer", help="the model's name at --url, a server that is not ours")
        command.add_argument("--model", default="demo", help="that the started server serves")
        command.add_argument("--server-option", action="append", default=[], help="passed to it; may be given again")
        command.add_argument("--seconds", type=float, help="of a level")
        command.add_argument("--warm-up", type=float, help="seconds of a level that are not counted")
        command.add_argument("--workers", type=int, default=1, help="processes that make the load")
        command.add_argument("--max-streams", type=int, default=512, help="open at once")
        command.add_argument("--drain", type=float, default=30.0, help="seconds for streams that are open at the end")
        command.add_argument("--solo", type=int, default=32, help="requests repeated alone to compare their bytes")
        command.add_argument("--output", type=Path, help="a new folder for the report and all records")
        if name == "run":
            command.add_argument("--rates", help="requests a second, as 2,4,8, in place of the scenario's")
        else:
            command.add_argument("--from", dest="first", type=float, default=1.0, help="requests a second to begin at")
            command.add_argument("--precision", type=float, default=1.1, help="ratio of the bounds it ends with")
            command.add_argument("--levels", type=int, default=12, help="tried at most")
    return parser


def _scenario(options: argparse.Namespace) -> Scenario:
    """As it is asked for; raises ValueError where it cannot be done."""
    rates = getattr(options, "rates", None)
    scenario = scenarios.load(options.scenario).with_changes(
        rates=tuple(float(rate) for rate in rates.split(",")) if rates else None,
        seconds=options.seconds,
        warm_up=options.warm_up,
    )
    if options.peer and options.url is None:
        raise ValueError("--peer needs the --url of the server")
    if options.url and not options.allow_remote and not _is_loopback(options.url):
        raise ValueError(f"{options.url} is not on this machine: --allow-remote if that is meant")
    if not 1 <= options.workers <= 64:
        raise ValueError("--workers is between 1 and 64")
    if options.output is None:
        options.output = Path("build") / "loadtests" / f"{scenario.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return scenario


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _target(options: argparse.Namespace) -> Iterator[Target]:
    if options.url is not None:
        yield Target(options.url.rstrip("/"), options.peer)
        return
    with our_server(options.model, free_port(), *options.server_option) as server:
        server.wait()
        yield Target(f"http://127.0.0.1:{server.port}", memory=server.private_bytes if MEMORY_IS_KNOWN else None)


def _run(scenario: Scenario, options: argparse.Namespace) -> Run:
    client = Client(options.workers, options.max_streams, options.drain)
    records = []
    with _target(options) as target:

        def at(rate: float) -> Figures:
            level = measure(target, scenario, options.output / f"{rate:g}", rate, client)
            records.extend(level.records)
            found = figures(level, scenario.objective)
            _say(found)
            return found

        levels = _levels(scenario, options, at)
        compared = None
        if options.solo and target.peer is None:
            compared = solo.compare(target.url, scenario, records, options.solo)
    about = options.url or f"hnet serve {options.model} {' '.join(options.server_option)}".strip()
    return Run(scenario, about, machine(), commit(), levels, compared)


def _levels(scenario: Scenario, options: argparse.Namespace, at: Callable[[float], Figures]) -> list[Figures]:
    """In rising order of load."""
    if options.command == "run":
        return [at(rate) for rate in scenario.rates]
    tried: list[Figures] = []

    def holds(rate: float) -> bool:
        tried.append(at(rate))
        return meets(tried[-1], scenario.objective)

    search(holds, options.first, options.precision, options.levels)
    return sorted(tried, key=lambda level: level.rate)


def _say(level: Figures) -> None:
    shown = " ".join(f"{name}={count}" for name, count in level.outcomes.items() if count)
    print(
        f"{level.rate:g} requests/s: served {level.served:.2f}/s of {level.offered:.2f}/s, "
        f"{level.goodput:.0f} bytes/s, first byte p99 {level.first_byte.p99:.3f} s, "
        f"objective {100 * level.attained:.1f} %; {shown}",
        flush=True,
    )


if __name__ == "__main__":
    main()
