"""`python -m server.template_worker`: a process that renders one Jinja template, and may be killed for it.

A template is a program of whoever made the model. Jinja's sandbox keeps it from the machine, the limits of
`server.limited_process` from its time and memory. Knows Jinja, and nothing of the server.

The subject is the template's source; a job is its variables, answered by `{"text"}` or `{"error"}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from server.limited_process import serve

MAX_RENDERED = 1 << 23  # characters
MAX_MESSAGE = 500  # characters of an error


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


def prepare(source: str) -> Callable[[Mapping[str, Any]], dict[str, str]]:
    """What renders a template. One that cannot be read is found out by the first job."""
    renderer: Renderer | None = None

    def answer(variables: Mapping[str, Any]) -> dict[str, str]:
        nonlocal renderer
        try:
            renderer = renderer or Renderer(source)
            return {"text": renderer.render(variables)}
        except Exception as error:  # noqa: BLE001  a template can raise anything
            return {"error": explain(error)}

    return answer


def main() -> None:
    import jinja2.sandbox  # noqa: F401  before the limits, and before the parent begins to count

    serve(prepare)


if __name__ == "__main__":
    main()
