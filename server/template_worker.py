"""`python -m server.template_worker`: a process that renders one Jinja template, and may be killed for it.

A template is a program of whoever made the model. Jinja's sandbox keeps it from the machine; nothing in one process
bounds its time and memory, so it runs here, under limits of the system, and the parent ends it when it takes too long.
Knows Jinja and a socket; knows no messages, no HTTP and nothing else of the server.

Frames of four bytes of length, then JSON. The parent is told `{}` once, sends the template's source, and gets
`{"text"}` or `{"error"}` for each job of variables.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

MEMORY_BYTES = 1 << 29  # that a rendering may take
CPU_SECONDS = 10  # that one may take where no parent is left to end it
MAX_RENDERED = 1 << 23  # characters
MAX_MESSAGE = 500  # characters of an error


def send_frame(connection: socket.socket, document: Any) -> None:
    data = json.dumps(document).encode()
    connection.sendall(len(data).to_bytes(4, "big") + data)


def receive_frame(connection: socket.socket) -> Any:
    """One document; raises EOFError when the other side is gone."""
    size = int.from_bytes(_receive(connection, 4), "big")
    return json.loads(_receive(connection, size))


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


class Renderer:
    """One template in Jinja's sandbox, with what chat templates expect to find there."""

    def __init__(self, source: str) -> None:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class GenerationBlock(Extension):
            """`{% generation %}` marks what a model wrote, for those who train; rendered, it is its content."""

            tags = {"generation"}  # noqa: RUF012  Jinja's own attribute

            def parse(self, parser: Parser) -> list[nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises whatever the template's code does, and ValueError for a text that is too long."""
        parts: list[str] = []
        length = 0
        for part in self._template.generate(variables):
            length += len(part)
            if length > MAX_RENDERED:
                raise ValueError(f"the text has more than {MAX_RENDERED} characters")
            parts.append(part)
        return "".join(parts)


def explain(error: Exception) -> str:
    """What went wrong and on which line of the template, in one line."""
    from jinja2 import TemplateError, TemplateSyntaxError

    line = error.lineno if isinstance(error, TemplateSyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, MemoryError):
        text = "takes too much memory"
    else:
        text = str(error) if isinstance(error, (TemplateError, ValueError)) else f"{type(error).__name__}: {error}"
    shown = " ".join(text.split())[:MAX_MESSAGE]
    return shown if line is None else f"line {line}: {shown}"


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is: Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, resource.RLIM_INFINITY))


def _limit_time() -> None:
    if sys.platform != "win32":
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_SECONDS, most))


def main() -> None:
    import jinja2.sandbox  # noqa: F401  before the limits, and before the parent begins to count

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole service at once; the server drains first
    connection = socket.socket(fileno=os.dup(0))
    send_frame(connection, {})
    source = receive_frame(connection)
    _limit_memory()
    renderer: Renderer | None = None
    while True:
        try:
            variables = receive_frame(connection)
        except (EOFError, OSError):  # the parent is gone
            return
        _limit_time()
        try:
            renderer = renderer or Renderer(source)
            answer = {"text": renderer.render(variables)}
        except Exception as error:  # noqa: BLE001  a template can raise anything
            answer = {"error": explain(error)}
        try:
            send_frame(connection, answer)
        except OSError:
            return


if __name__ == "__main__":
    main()
