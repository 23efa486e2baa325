"""What HTTP costs: bytes a second that streams get through the server ÷ those of the engine alone.

    hnet bench http [--streams 1,16,64] [--max-tokens 512] [--rounds 5] [--json FILE]

Both serve the same requests (prompts, seeds, bytes, rows, settings), in turns, each in a process that stays up: the
server as `hnet serve` runs it, the engine alone as `Engine.tick` in a loop. Both are timed from the first request to
the last byte, prompts included. The engine alone is asked for all at once, and then, since over HTTP requests come one
after the other and rows that began together run cheaper, for one every millisecond (*in turn*).

The client is one thread of this process over plain sockets, which keeps what comes and reads it afterwards; it needs
its part of the same cores, so its CPU seconds are given beside the server's. CPU seconds are the kernel's own, by
thread; of all that is measured, they depend least on what else runs. The thread that runs the model is also asked what
it does with its time: what is neither on a core nor spent waiting for one is spent waiting for others (for Python's
lock, or for requests).
"""

from __future__ import annotations

import json
import multiprocessing
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from benchmarks.report import Row, finish, numbers, options_parser, print_table
from benchmarks.server_process import ServerProcess, free_port, our_server

MAX_MODEL_LEN = 2048  # as our_server has it
IN_TURN = 1e-3  # seconds between two requests
READ_BYTES = 1 << 18
PATIENCE = 120.0  # seconds of silence after which a stream is given up
END = b"0\r\n\r\n"  # of a chunked response


@dataclass(frozen=True)
class Served:
    """Bytes of completions, wall seconds from the first request to the last byte, events, the median seconds to a
    stream's first event, CPU seconds by whom they were used, and those that the model's thread waited for a core."""

    generated: int
    seconds: float
    events: int
    first: float
    cpu: dict[str, float]
    queued: float

    @property
    def rate(self) -> float:
        return self.generated / self.seconds


def prompts(streams: int, turn: int) -> list[bytes]:
    """One a stream, different from the first byte after BOS on: nothing of them is in a prefix cache."""
    return [b"\xfe%03d-%03d It was a bright cold day in April, and " % (index, turn) for index in range(streams)]


@dataclass(frozen=True)
class Clock:
    """Seconds of one process so far: on a core by its main thread and by its others, and waiting for one (main)."""

    main: float
    others: float
    queued: float

    @classmethod
    def of(cls, pid: int) -> Clock:
        main, others, queued = 0, 0, 0
        for thread in Path(f"/proc/{pid}/task").iterdir():
            used, waited, _ = map(int, (thread / "schedstat").read_text(encoding="ascii").split())
            if int(thread.name) == pid:
                main, queued = used, waited
            else:
                others += used
        return cls(main / 1e9, others / 1e9, queued / 1e9)

    def __sub__(self, earlier: Clock) -> Clock:
        return Clock(self.main - earlier.main, self.others - earlier.others, self.queued - earlier.queued)


class EngineAlone:
    """An engine in a process that does nothing else; idle between turns."""

    def __init__(self, model: str, max_num_seqs: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run_engine, args=(theirs, model, max_num_seqs), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        self._connection.close()  # which it takes for the end
        self._process.join()

    def serve(self, asked: Sequence[bytes], max_tokens: int, pause: float) -> Served:
        """Asks for a completion of each prompt, `pause` seconds after the one before."""
        before = Clock.of(self._process.pid or 0)
        self._connection.send((asked, max_tokens, pause))
        generated, seconds, first = self._connection.recv()
        used = Clock.of(self._process.pid or 0) - before
        return Served(generated, seconds, 0, first, {"engine": used.main + used.others}, used.queued)


def _run_engine(connection: Connection, model: str, max_num_seqs: int) -> None:
    from hnet_runtime.engine.config import EngineConfig
    from hnet_runtime.engine.engine import Engine
    from hnet_runtime.engine.messages import Request, SamplingParams

    config = EngineConfig(max_num_seqs=max_num_seqs, max_model_len=MAX_MODEL_LEN)
    engine = Engine.from_pretrained(None if model == "demo" else model, engine_config=config)
    while True:
        try:
            asked, max_tokens, pause = connection.recv()
        except EOFError:
            return
        params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
        generated, first = 0, {}
        began = time.perf_counter()
        ahead = [Request(request_id=str(index), prompt=prompt, params=params) for index, prompt in enumerate(asked)]
        while ahead or engine.has_work:
            while ahead and time.perf_counter() - began >= (len(asked) - len(ahead)) * pause:
                engine.submit(ahead.pop(0))
            for output in engine.tick().outputs:
                generated += len(output.data)
                if output.data and output.request_id not in first:
                    first[output.request_id] = time.perf_counter() - began
        seconds = time.perf_counter() - began
        connection.send((generated, seconds, median(first.values())))


class Streams:
    """Completions streamed over sockets of our own; what comes is only kept while it is timed."""

    def __init__(self, port: int, asked: Sequence[bytes], max_tokens: int) -> None:
        self._received: dict[int, list[bytes]] = {}
        self._first: dict[int, float] = {}
        self._began = time.perf_counter()
        with _connected(port, len(asked)) as sockets:
            used = time.thread_time()
            self._began = time.perf_counter()
            for connection, prompt in zip(sockets, asked, strict=True):
                connection.sendall(_request(prompt, max_tokens))
                self._received[connection.fileno()] = []
            self._read(sockets)
            self.seconds = time.perf_counter() - self._began
            self.cpu = time.thread_time() - used
        self.first = median(self._first.values())
        self.events, self.generated = 0, 0
        for pieces in self._received.values():
            events, generated = _counted(b"".join(pieces))
            self.events += events
            self.generated += generated

    def _read(self, sockets: Sequence[socket.socket]) -> None:
        by_number = {connection.fileno(): connection for connection in sockets}
        poll = select.epoll()
        for number in by_number:
            poll.register(number, select.EPOLLIN)
        received, first = self._received, self._first
        while by_number:
            ready = poll.poll(PATIENCE)
            if not ready:
                raise RuntimeError(f"{len(by_number)} streams have been silent for {PATIENCE:g} s")
            for number, _ in ready:
                data = by_number[number].recv(READ_BYTES)
                received[number].append(data)
                if number not in first and b"data: " in data:
                    first[number] = time.perf_counter() - self._began
                if not data or data.endswith(END):
                    poll.unregister(number)
                    del by_number[number]
        poll.close()


@contextmanager
def _connected(port: int, count: int) -> Iterator[list[socket.socket]]:
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    try:
        yield sockets
    finally:
        for connection in sockets:
            connection.close()


def _request(prompt: bytes, max_tokens: int) -> bytes:
    asked = {"prompt": list(prompt), "max_tokens": max_tokens, "seed": 1, "ignore_eos": True, "stream": True}
    body = json.dumps({**asked, "stream_options": {"include_usage": True}}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _counted(response: bytes) -> tuple[int, int]:
    """Events that carry text, and the bytes of it, which have to be what the usage says."""
    lines = [line[6:] for line in response.split(b"\n") if line.startswith(b"data: {")]
    documents = [json.loads(line) for line in lines]
    text = "".join(choice["text"] for document in documents for choice in document.get("choices", ()))
    if not documents or not documents[-1].get("usage"):
        raise RuntimeError(f"a stream has not come to its end: {response[-500:]!r}")
    told = documents[-1]["usage"]["completion_tokens"]
    if len(text.encode()) != told:
        raise RuntimeError(f"a stream carried {len(text.encode())} bytes of text, and its usage says {told}")
    return len(documents) - 1, told


def serve_over_http(server: ServerProcess, asked: Sequence[bytes], max_tokens: int) -> Served:
    pids = server.pids()
    before = [Clock.of(pid) for pid in pids]
    streams = Streams(server.port, asked, max_tokens)
    http, engine = (Clock.of(pid) - clock for pid, clock in zip(pids, before, strict=True))
    cpu = {"model": engine.main, "sender": engine.others, "http": http.main + http.others, "client": streams.cpu}
    return Served(streams.generated, streams.seconds, streams.events, streams.first, cpu, engine.queued)


def rows_of(
    streams: int, alone: Sequence[Served], in_turn: Sequence[Served], http: Sequence[Served]
) -> tuple[list[Row], list[str]]:
    """The figures of one number of streams, and its line of the table, where ratios are medians of the rounds' own."""
    name = f"streams={streams}"
    ratio, to_turn = (median(h.rate / a.rate for a, h in zip(by, http, strict=True)) for by in (alone, in_turn))
    rates = [median(one.rate for one in served) for served in (alone, in_turn, http)]
    report = [
        Row(f"{name} engine", rates[0], "bytes/s"),
        Row(f"{name} engine in turn", rates[1], "bytes/s", f"{name} engine", rates[1] / rates[0]),
        Row(f"{name} http", rates[2], "bytes/s", f"{name} engine", rates[2] / rates[0]),
        Row(f"{name} http ÷ engine", ratio, "median of rounds"),
        Row(f"{name} http ÷ engine in turn", to_turn, "median of rounds"),
        Row(f"{name} events", median(h.generated / h.events for h in http), "bytes/event"),
        Row(f"{name} first event", 1e3 * median(h.first for h in http), "ms"),
        Row(f"{name} first byte in turn", 1e3 * median(t.first for t in in_turn), "ms"),
    ]
    base = median(a.cpu["engine"] / a.generated for a in alone)
    turn = median(t.cpu["engine"] / t.generated for t in in_turn)
    report += [
        Row(f"{name} CPU alone", 1e6 * base, "s/MB"),
        Row(f"{name} CPU in turn", 1e6 * turn, "s/MB", f"{name} CPU alone", turn / base),
    ]
    used = {who: median(h.cpu[who] / h.generated for h in http) for who in http[0].cpu}
    report += [
        Row(f"{name} CPU {who}", 1e6 * cpu, "s/MB", f"{name} CPU alone", cpu / base) for who, cpu in used.items()
    ]
    shares = {
        "runs": median(h.cpu["model"] / h.seconds for h in http),
        "waits for a core": median(h.queued / h.seconds for h in http),
        "waits for others": median(1 - (h.cpu["model"] + h.queued) / h.seconds for h in http),
    }
    report += [Row(f"{name} model's thread {what}", share, "share of time") for what, share in shares.items()]
    line = [str(streams), *(f"{rate:.0f}" for rate in rates), f"{ratio:.2f}", f"{to_turn:.2f}"]
    line += [f"{1e6 * base:.0f}/{1e6 * turn:.0f}", "+".join(f"{1e6 * cpu:.0f}" for cpu in used.values())]
    line += ["/".join(f"{100 * share:.0f}" for share in shares.values())]
    return report, [*line, f"{median(h.generated / h.events for h in http):.1f}"]


def main(arguments: list[str] | None = None) -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--max-tokens", type=int, default=512, help="bytes a stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server-option", action="append", default=[], help="passed to hnet serve; may be given again")
    options = parser.parse_args(arguments)
    counts = numbers(options.streams)
    report: list[Row] = []
    for model in options.model or ["demo"]:
        alone, in_turn, http = ({count: list[Served]() for count in counts} for _ in range(3))
        engine = EngineAlone(model, max(counts))
        flags = ["--max-num-seqs", str(max(counts)), *options.server_option]
        with our_server(model, free_port(), *flags) as server:
            server.wait()
            for turn, count in enumerate(counts * (1 + options.rounds)):
                asked = [prompts(count, 3 * turn + part) for part in range(3)]
                alone[count].append(engine.serve(asked[0], options.max_tokens, 0.0))
                http[count].append(serve_over_http(server, asked[1], options.max_tokens))
                in_turn[count].append(engine.serve(asked[2], options.max_tokens, IN_TURN))
        engine.close()
        lines = []
        for count in counts:
            # The first round warms up.
            rows, line = rows_of(count, alone[count][1:], in_turn[count][1:], http[count][1:])
            report += rows
            lines.append(line)
        title = (
            f"{model}: bytes/s; CPU seconds per MB; % of its time that the model's thread runs/waits for a core/others"
        )
        columns = [
            "streams",
            "engine",
            "in turn",
            "HTTP",
            "÷ engine",
            "÷ in turn",
            "CPU",
            "+".join(http[counts[0]][0].cpu),
        ]
        print_table(title, [*columns, "model's %", "B/event"], lines)
    finish("http", report, options.json)


if __name__ == "__main__":
    main()
