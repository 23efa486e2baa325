from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import fields
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest

import hnet_runtime
from hnet_runtime import EngineConfig
from server.cli import serve as command
from server.cli.main import main
from server.engine_loop import EngineLaunch
from server.settings import Batching, ServerSettings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerSettings, EngineLaunch]]:
    """What the command would have started."""
    calls: list[tuple[ServerSettings, EngineLaunch]] = []

    def run(settings: ServerSettings, launch: EngineLaunch) -> int:
        calls.append((settings, launch))
        return 0

    monkeypatch.setattr(command, "run_server", run)
    for name in fields(ServerSettings):
        monkeypatch.delenv(f"HNET_{name.name.upper()}", raising=False)
    return calls


def invoke(*arguments: str, **environment: str) -> Any:
    """Runs `hnet serve` and gives exit code and output."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as output:
        for name, value in environment.items():
            patch.setenv(name, value)
        return SimpleNamespace(exit_code=main(["serve", *arguments]), output=output.getvalue())


def test_options_and_settings_are_one_to_one() -> None:
    options = {parameter.name for parameter in command.serve.params}
    assert options == {field.name for field in fields(ServerSettings)}


def test_every_option_has_the_environment_variable_of_its_name() -> None:
    for parameter in command.serve.params:
        assert parameter.name is not None
        assert parameter.envvar == f"HNET_{parameter.name.upper()}"


def test_the_defaults_are_those_of_the_settings(started: list[tuple[ServerSettings, EngineLaunch]]) -> None:
    assert invoke().exit_code == 0
    assert started[0][0] == ServerSettings()


def test_options_reach_the_settings_and_the_engine(started: list[tuple[ServerSettings, EngineLaunch]]) -> None:
    line = "some/dir --port 9000 --max-num-seqs 8 --kv-memory 1.5G --max-body-bytes 64K --api-key k --drain-timeout 2"
    assert invoke(*line.split()).exit_code == 0
    settings, launch = started[0]
    assert (settings.model, settings.port, settings.max_num_seqs, settings.drain_timeout) == ("some/dir", 9000, 8, 2.0)
    assert (settings.kv_memory, settings.max_body_bytes, settings.api_key) == (3 << 29, 1 << 16, ("k",))
    assert launch.arguments["model"] == "some/dir"
    assert launch.arguments["kv_memory"] == 3 << 29
    assert "api_key" not in launch.arguments


@pytest.mark.parametrize(
    ("line", "environment"),
    [("--kernels native --quantization int8", {}), ("", {"HNET_KERNELS": "native", "HNET_QUANTIZATION": "int8"})],
)
def test_kernels_and_quantization_reach_the_engine(
    started: list[tuple[ServerSettings, EngineLaunch]], line: str, environment: dict[str, str]
) -> None:
    assert invoke(*line.split(), **environment).exit_code == 0
    arguments = started[0][1].arguments
    assert (arguments["kernels"], arguments["quantization"]) == ("native", "int8")


@pytest.mark.parametrize(
    ("line", "environment"),
    [
        (
            "--batching aligned --max-park-ticks 7 --max-park-seconds 0.5 --prefill-share 0.3 --prefix-cache-memory 2G "
            "--prefix-cache-interval 96 --debug-checks",
            {},
        ),
        (
            "",
            {
                "HNET_BATCHING": "aligned",
                "HNET_MAX_PARK_TICKS": "7",
                "HNET_MAX_PARK_SECONDS": "0.5",
                "HNET_PREFILL_SHARE": "0.3",
                "HNET_PREFIX_CACHE_MEMORY": "2G",
                "HNET_PREFIX_CACHE_INTERVAL": "96",
                "HNET_DEBUG_CHECKS": "1",
            },
        ),
    ],
)
def test_batching_and_prefix_cache_reach_the_engine(
    started: list[tuple[ServerSettings, EngineLaunch]], line: str, environment: dict[str, str]
) -> None:
    assert invoke(*line.split(), **environment).exit_code == 0
    asked = {
        "batching": "aligned",
        "max_park_ticks": 7,
        "max_park_seconds": 0.5,
        "prefill_share": 0.3,
        "prefix_cache_memory": 2 << 30,
        "prefix_cache_interval": 96,
        "debug_checks": True,
    }
    assert started[0][1].arguments.items() >= asked.items()


@pytest.mark.parametrize(
    ("line", "environment", "overlap"),
    [
        ("", {}, None),
        ("--overlap", {}, True),
        ("--no-overlap", {}, False),
        ("", {"HNET_OVERLAP": "1"}, True),
        ("", {"HNET_OVERLAP": "0"}, False),
    ],
)
def test_overlap_is_on_off_or_as_the_engine_has_it(
    started: list[tuple[ServerSettings, EngineLaunch]], line: str, environment: dict[str, str], overlap: bool | None
) -> None:
    assert invoke(*line.split(), **environment).exit_code == 0
    assert started[0][1].arguments["overlap"] is overlap


@pytest.mark.parametrize(
    ("line", "environment"),
    [
        ("--api-key one --api-key two,three --allowed-origins http://a --allowed-origins http://b", {}),
        ("", {"HNET_API_KEY": "one, two", "HNET_ALLOWED_ORIGINS": "http://a,http://b"}),
    ],
)
def test_keys_and_origins_may_be_several(
    started: list[tuple[ServerSettings, EngineLaunch]], line: str, environment: dict[str, str]
) -> None:
    assert invoke(*line.split(), **environment).exit_code == 0
    settings = started[0][0]
    assert settings.api_key == (("one", "two,three") if line else ("one", "two"))
    assert settings.allowed_origins == ("http://a", "http://b")


def test_limits_and_files_reach_the_settings(
    started: list[tuple[ServerSettings, EngineLaunch]], tmp_path: Path
) -> None:
    keys, template = tmp_path / "some_keys", tmp_path / "template.jinja"
    keys.write_text("k\n")
    template.write_text("{{ messages }}")
    line = (
        f"--engine-timeout 5 --max-engine-restarts 3 --request-timeout 2.5 --header-timeout 7 --max-waiting-bytes 64K "
        f"--api-key-file {keys} --chat-template {template}"
    )
    assert invoke(*line.split()).exit_code == 0
    settings = started[0][0]
    assert (settings.engine_timeout, settings.max_engine_restarts, settings.request_timeout) == (5, 3, 2.5)
    assert (settings.header_timeout, settings.max_waiting_bytes) == (7, 1 << 16)
    assert (settings.api_key_file, settings.chat_template) == (str(keys), str(template))


@pytest.mark.parametrize("batching", get_args(Batching))
def test_every_way_of_batching_can_be_had(
    started: list[tuple[ServerSettings, EngineLaunch]], batching: Batching
) -> None:
    assert invoke("--batching", batching).exit_code == 0
    assert started[0][0].batching == batching


@pytest.mark.parametrize(
    ("memory", "reaches"), [(None, None), ("off", 0), ("OFF", 0), ("0", 0), ("1", 1), ("1.5M", 3 << 19)]
)
def test_a_prefix_cache_is_off_only_when_that_is_said(
    started: list[tuple[ServerSettings, EngineLaunch]],
    monkeypatch: pytest.MonkeyPatch,
    memory: str | None,
    reaches: int | None,
) -> None:
    assert invoke(*([] if memory is None else ["--prefix-cache-memory", memory])).exit_code == 0
    built: list[EngineConfig] = []
    monkeypatch.setattr(
        hnet_runtime.Engine, "from_pretrained", lambda *_, engine_config, **__: built.append(engine_config)
    )
    launch = msgspec.json.decode(msgspec.json.encode(started[0][1]), type=EngineLaunch)  # as a child is told
    launch.build()
    assert built[0] == EngineConfig(prefix_cache_memory=reaches)


def test_the_environment_sets_what_the_command_line_does_not(
    started: list[tuple[ServerSettings, EngineLaunch]],
) -> None:
    environment = {"HNET_PORT": "9001", "HNET_HOST": "::1", "HNET_MODEL": "m", "HNET_METRICS_PUBLIC": "true"}
    assert invoke("--host", "127.0.0.2", **environment).exit_code == 0
    settings = started[0][0]
    assert (settings.port, settings.host, settings.model, settings.metrics_public) == (9001, "127.0.0.2", "m", True)


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--port", "http"], {}, "--port"),
        (["--port", "65536"], {}, "--port"),
        (["--max-num-seqs", "0"], {}, "--max-num-seqs"),
        (["--kv-memory", "lots"], {}, "--kv-memory"),
        (["--kv-memory", "-1G"], {}, "--kv-memory"),
        (["--max-body-bytes", "nan"], {}, "--max-body-bytes"),
        (["--drain-timeout", "-1"], {}, "--drain-timeout"),
        (["--dtype", "float8"], {}, "--dtype"),
        (["--kernels", "cuda"], {}, "--kernels"),
        (["--quantization", "int4"], {}, "--quantization"),
        (["--batching", "clever"], {}, "--batching"),
        ([], {"HNET_BATCHING": "clever"}, "--batching"),
        (["--prefill-share", "0"], {}, "--prefill-share"),
        (["--prefill-share", "1.1"], {}, "--prefill-share"),
        (["--prefill-share", "nan"], {}, "--prefill-share"),
        (["--max-park-ticks", "0"], {}, "--max-park-ticks"),
        (["--max-park-ticks", "1.5"], {}, "--max-park-ticks"),
        (["--max-park-seconds", "0"], {}, "--max-park-seconds"),
        (["--max-park-seconds", "nan"], {}, "--max-park-seconds"),
        (["--max-park-seconds", "inf"], {}, "--max-park-seconds"),
        (["--prefix-cache-memory", "much"], {}, "--prefix-cache-memory"),
        (["--prefix-cache-memory", "-1G"], {}, "--prefix-cache-memory"),
        (["--prefix-cache-memory", "0.5"], {}, "--prefix-cache-memory"),
        (["--prefix-cache-interval", "0"], {}, "--prefix-cache-interval"),
        ([], {"HNET_DEBUG_CHECKS": "perhaps"}, "--debug-checks"),
        (["--kv-memory", "off"], {}, "--kv-memory"),
        (["--drain-timeout", "nan"], {}, "--drain-timeout"),
        (["--api-key", " "], {}, "--api-key"),
        (["--api-key", "a", "--api-key", ""], {}, "--api-key"),
        ([], {"HNET_API_KEY": "a,,b"}, "--api-key"),
        (["--allowed-origins", ""], {}, "--allowed-origins"),
        (["--engine-timeout", "0"], {}, "--engine-timeout"),
        (["--engine-timeout", "nan"], {}, "--engine-timeout"),
        (["--request-timeout", "0"], {}, "--request-timeout"),
        (["--request-timeout", "inf"], {}, "--request-timeout"),
        (["--header-timeout", "-1"], {}, "--header-timeout"),
        (["--max-engine-restarts", "-1"], {}, "--max-engine-restarts"),
        (["--max-waiting-bytes", "some"], {}, "--max-waiting-bytes"),
        (["--api-key-file", "no/such_file"], {}, "--api-key-file no/such_file: No such file or directory"),
        (["--api-key-file", "/"], {}, "--api-key-file /: Is a directory"),
        (["--api-key-file", "/dev/null"], {}, "--api-key-file /dev/null: holds no key"),
        (["--chat-template", "no/such_file"], {}, "--chat-template no/such_file: No such file or directory"),
        (["--ssl-certfile", "no/such_file"], {}, "--ssl-certfile no/such_file: No such file or directory"),
        (["--ssl-keyfile", __file__], {}, "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", __file__], {}, "--ssl-certfile"),
        (["--ssl-certfile", __file__, "--ssl-keyfile", "gone"], {}, "--ssl-keyfile gone: No such file or directory"),
        (["--log-level", "loud"], {}, "--log-level"),
        (["--no-such-option"], {}, "--no-such-option"),
        (["one", "two"], {}, "two"),
        ([], {"HNET_PORT": "eighty"}, "--port"),
        ([], {"HNET_IN_PROCESS": "perhaps"}, "--in-process"),
    ],
)
def test_a_wrong_option_is_one_line_and_starts_nothing(
    started: list[tuple[ServerSettings, EngineLaunch]], arguments: list[str], environment: dict[str, str], named: str
) -> None:
    result = invoke(*arguments, **environment)
    assert result.exit_code == 2
    assert named in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert started == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"max_model_len": 0},
        {"stream_flush_ms": -1},
        {"api_key": ("",)},
        {"api_key": "one text"},
        {"allowed_origins": "https://a.example"},
        {"engine_timeout": 0.0},
        {"request_timeout": float("inf")},
        {"header_timeout": float("nan")},
        {"max_engine_restarts": -1},
        {"max_waiting_bytes": 0},
        {"ssl_keyfile": __file__},
        {"max_park_ticks": 0},
        {"prefill_share": 0.0},
        {"prefill_share": 1.5},
        {"prefill_share": float("nan")},
        {"max_park_seconds": 0.0},
        {"max_park_seconds": float("nan")},
        {"prefix_cache_memory": -1},
        {"prefix_cache_interval": 0},
        {"drain_timeout": float("nan")},
    ],
)
def test_settings_out_of_range_name_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerSettings(**wrong)
