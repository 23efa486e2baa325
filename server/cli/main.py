"""`hnet`: finds the subcommand, and turns every mistake into one line.

Knows no subcommand's options. Imports a subcommand only when it is called, and the runtime only
when that needs it, so that `hnet --help` is immediate.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any

import click

from hnet_runtime import __version__

INTERRUPTED = 130  # what a shell reports for SIGINT

# name → (module, attribute, summary)
COMMANDS = {
    "serve": ("server.cli.serve", "serve", "Serve a model over HTTP to any OpenAI client."),
    "generate": ("server.cli.generate", "generate", "Stream a completion to the terminal."),
    "segment": ("server.cli.segment", "segment", "Show where a model cuts a text into chunks."),
    "score": ("server.cli.score", "score_file", "Say how well a model predicts a text, in bits per byte."),
    "convert": ("server.cli.convert", "convert", "Write a checkpoint as safetensors and config.json."),
    "train": ("server.cli.train", "train", "Train a small model: data and settings in one TOML file."),
    "doctor": ("server.cli.doctor", "doctor", "Report what this machine can run, and whether it runs right."),
    "bench": ("server.cli.bench", "bench", "Measure, from a checkout: roofline, decode, prefill, peers."),
}


class LazyGroup(click.Group):
    """Subcommands by name, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hnet", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Serve and explore H-Nets: byte-level language models that learn where to chunk their input.

    Every option of a command has an environment variable of the same name, such as HNET_MAX_TOKENS for
    --max-tokens. MODEL is a directory, a .pt or .safetensors file with --config, a hub id, random:NAME, or
    nothing: the bundled demo model.
    """
    logging.basicConfig(level=logging.WARNING, format="hnet: %(message)s")
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Runs `hnet`; returns the exit code: 1 for an error, 2 for wrong usage, each said in one line."""
    try:
        result: Any = cli.main(arguments, prog_name="hnet", standalone_mode=False)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error))
    except (ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, _mistakes()):
            return _fail(str(error))
        if not _is_out_of_memory(error):
            raise
        return _fail("not enough memory for this model; try --dtype bfloat16 or a smaller one")
    return result if isinstance(result, int) else 0


def _fail(message: str, exit_code: int = 1) -> int:
    click.echo(f"hnet: error: {' '.join(message.split())}", err=True)
    return exit_code


def _mistakes() -> tuple[type[Exception], ...]:
    """Errors whose message is meant for the person at the terminal."""
    from hnet_runtime.checkpoint import CheckpointError
    from hnet_runtime.config import ConfigError
    from hnet_runtime.engine.config import EngineError
    from hnet_runtime.engine.request import RequestError
    from hnet_runtime.ops.native.binding import NativeError

    return CheckpointError, ConfigError, EngineError, NativeError, RequestError


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text


if __name__ == "__main__":
    sys.exit(main())
