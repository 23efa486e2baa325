"""`hnet serve`: options and environment variables → settings → a server, and one line for every mistake."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import click

from server.cli.options import Bytes, Item, engine_options, option
from server.engine_loop import EngineLaunch
from server.service import Service
from server.serving import Server
from server.settings import MIB, ServerSettings

ENGINE_FACTORY = "server.engine_launch:load_engine"
ENGINE_OPTIONS = (
    *("model", "config", "revision", "device", "dtype", "kernels", "quantization", "threads"),
    *("max_num_seqs", "max_model_len", "kv_memory", "prefill_bytes_per_tick", "weight_cache"),
    *("prefill_share", "batching", "max_park_ticks", "max_park_seconds"),
    *("prefix_cache_memory", "prefix_cache_interval", "debug_checks"),
    *("enforce_eager", "overlap", "max_graphs", "gpu_memory_utilization"),
)


@click.command("serve")
@click.argument("model", required=False, envvar="HNET_MODEL")
@engine_options
@option("--host", default="127.0.0.1", help="Address to listen on.")
@option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 takes a free one.")
@option("--max-num-seqs", type=click.IntRange(1), help="Rows: requests that run at once. [default: 64; GPU: to 256]")
@option("--max-model-len", type=click.IntRange(2), default=8192, help="Bytes of prompt and completion together.")
@option("--kv-memory", type=Bytes(), help="Memory for keys and values, such as 2G.")
@option("--weight-cache", help="Directory for packed weights of large models, or off. [default: the user's cache]")
@option("--prefill-bytes-per-tick", type=click.IntRange(1), help="Prompt bytes read between two steps of decoding.")
@option(
    "--prefill-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    help="Most of the time that prompts take while rows decode.",
)
@option(
    "--batching",
    type=click.Choice(["lockstep", "aligned", "adaptive"]),
    default="adaptive",
    help="When rows that open a chunk run the stages above: at once, when most wait, or as measured costs say.",
)
@option("--max-park-ticks", type=click.IntRange(1), default=64, help="Most steps that a row waits at a chunk's start.")
@option(
    "--max-park-seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Longest that a row waits at a chunk's start.",
)
@option(
    "--prefix-cache-memory",
    type=Bytes(can_be_off=True),
    help="Memory for prefixes that prompts share, such as 2G, or off. [default: an eighth, at most 8G]",
)
@option(
    "--prefix-cache-interval",
    type=click.IntRange(1),
    help="Prompt bytes between two states kept for the prefix cache. [default: 64, or more for large models]",
)
@option("--enforce-eager", is_flag=True, help="On a GPU, run steps operation by operation, not as captured graphs.")
@option(
    "--overlap/--no-overlap",
    default=None,
    help="Give a GPU the next captured step before the last one's bytes are read. [default: on, on a GPU]",
)
@option("--max-graphs", type=click.IntRange(1), default=128, help="Most steps that are captured on a GPU.")
@option(
    "--gpu-memory-utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    help="Share of a GPU's memory that weights, rows, keys and values may take together.",
)
@option("--debug-checks", is_flag=True, help="Check after every step that no row and no page is lost.")
@option(
    "--api-key",
    type=Item(),
    multiple=True,
    help="Key that clients must send as a Bearer token; may be given again, or with commas in the environment.",
)
@option("--api-key-file", help="File with a key a line, read again when it changes.")
@option("--ssl-certfile", help="Certificate in PEM form: serve HTTPS.")
@option("--ssl-keyfile", help="The certificate's key, where it is in a file of its own.")
@option(
    "--allowed-origins",
    type=Item(),
    multiple=True,
    help="Origin whose pages may call from a browser, or *; may be given again. [default: none]",
)
@option("--chat-template", help="Jinja template for chat. [default: the model's, else a plain transcript]")
@option("--served-model-name", help="Name clients call the model by.")
@option("--stream-flush-ms", type=click.FloatRange(0), default=20.0, help="Longest a stream gathers under load.")
@option("--drain-timeout", type=click.FloatRange(0), default=30.0, help="Seconds that open requests get at the end.")
@option(
    "--header-timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    help="Seconds a request may be in coming.",
)
@option("--request-timeout", type=click.FloatRange(0, min_open=True), help="Seconds a request may take. [default: any]")
@option(
    "--engine-timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    help="Seconds of silence after which an engine is ended and started again.",
)
@option(
    "--max-engine-restarts",
    type=click.IntRange(0),
    help="Restarts in a row before the engine is given up. [default: any number]",
)
@option("--max-body-bytes", type=Bytes(), default=4 * MIB, help="Largest request body.")
@option("--max-waiting-requests", type=click.IntRange(0), default=1024, help="Longest queue before 429.")
@option("--max-waiting-bytes", type=Bytes(), help="Prompt bytes that may wait to be read before 503. [default: any]")
@option("--metrics-public", is_flag=True, help="Serve /metrics without the API key.")
@option("--metrics-compat", type=click.Choice(["vllm"]), help="Also serve metrics under another server's names.")
@option("--otlp-traces-endpoint", help="URL of a collector that takes OTLP over HTTP. [default: no traces]")
@option("--in-process", is_flag=True, help="Run the engine in a thread, not in a process of its own.")
@option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info")
def serve(**options: Any) -> int:
    """Serve MODEL over HTTP to any OpenAI client, many requests at once."""
    try:
        settings = ServerSettings(**options)
    except ValueError as error:
        raise _usage_error(error) from error
    log_to_stderr(settings.log_level)
    return run_server(settings, launch_of(settings))


def settings_of(options: Mapping[str, Any]) -> ServerSettings:
    """Settings as this command's options make them, by their names (`max_num_seqs`), with values as one would type
    them, lists for those that may be given again; the environment's variables count too. Raises ClickException."""
    known = {parameter.name: parameter for parameter in serve.params}
    arguments: list[str] = []
    for name, value in options.items():
        parameter = known.get(name)
        if parameter is None:
            raise click.UsageError(f"There is no setting {name}.")
        if isinstance(parameter, click.Argument):
            arguments.append(str(value))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            arguments += (parameter.opts if _truth(name, value) else parameter.secondary_opts)[:1]
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                arguments.append(f"{parameter.opts[0]}={each}")
    with serve.make_context("serve", arguments) as context:
        try:
            return ServerSettings(**context.params)
        except ValueError as error:
            raise _usage_error(error) from error


def launch_of(settings: ServerSettings) -> EngineLaunch:
    """How to make the engine that these settings ask for."""
    return EngineLaunch(factory=ENGINE_FACTORY, arguments=engine_arguments(settings))


def _truth(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return value == "true"
    raise click.UsageError(f"{name} must be true or false, not {value!r}.")


def _usage_error(error: ValueError) -> click.UsageError:
    """Of a message that begins with the setting's name: with the option's."""
    name, _, message = str(error).partition(" ")
    return click.UsageError(f"--{name.replace('_', '-')} {message}")


def run_server(settings: ServerSettings, launch: EngineLaunch) -> int:
    """Runs a server to its end, says where it is and how to call it; the exit code of the process.

    Raises OSError for a port that cannot be had, ClickException for a model that cannot be loaded.
    """
    server = Server(settings, launch)
    click.echo(f"hnet serve: loading {settings.model or 'the demo model'}; will answer at {server.url}", err=True)
    code = server.run(lambda service: click.echo(_welcome(server.url, service), err=True))
    if server.failure:
        raise click.ClickException(server.failure)
    return code


def engine_arguments(settings: ServerSettings) -> dict[str, Any]:
    """The settings that are the engine's."""
    return {name: getattr(settings, name) for name in ENGINE_OPTIONS}


def _welcome(url: str, service: Service) -> str:
    info = service.info
    body = '{"prompt": "Once upon a time", "max_tokens": 64}'
    has_keys = bool(service.settings.api_key) or service.settings.api_key_file is not None
    key = ' -H "Authorization: Bearer $HNET_API_KEY"' if has_keys else ""
    return (
        f"hnet serve: {service.model_name} ({info.dtype} on {info.device}, {info.kernels}) is ready at {url}\n"
        f"  try: curl {url}/v1/completions{key} -d {shlex.quote(body)}"
    )


def log_to_stderr(level: str) -> None:
    """Logs of this process go to its standard error, in lines that say when and who."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr, force=True
    )
