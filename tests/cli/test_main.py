"""`hnet` itself: help at once, environment variables for every option, one line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

from hnet_runtime import __version__
from server.cli import main as main_module
from server.cli.main import COMMANDS, cli, main

ROOT = Path(__file__).parents[2]


def test_help_names_every_command(hnet):
    result = hnet("--help")
    assert result.code == 0
    for name, (_, _, summary) in COMMANDS.items():
        assert name in result.text
        assert summary in result.text


def test_no_command_shows_the_help(hnet):
    assert hnet().text == hnet("--help").text


def test_version(hnet):
    assert hnet("--version").text == f"hnet {__version__}\n"


def test_help_imports_neither_model_nor_server():
    code = "import sys; from server.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    modules = done.stdout.decode().splitlines()[-1]
    assert "'click'" in modules
    for heavy in ("torch", "numpy", "fastapi", "pydantic", "huggingface_hub", "rich"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"bench"}))  # whose arguments are the benchmark's own
def test_every_command_explains_itself(hnet, name):
    result = hnet(name, "--help")
    assert result.code == 0
    assert f"hnet {name}" in result.text


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"bench"}))  # whose arguments are the benchmark's own
def test_every_option_has_the_environment_variable_of_its_name(name):
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert options
    for option in options:
        flag = max(option.opts, key=len)
        assert option.envvar == "HNET_" + flag.removeprefix("--").replace("-", "_").upper()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["bench", "nonsense"], 2, "'nonsense'"),
        (["generate", "--nonsense"], 2, "No such option '--nonsense'"),
        (["generate", "--max-tokens", "many", "x"], 2, "'many' is not a valid integer"),
        (["generate", "--max-tokens", "0", "x"], 2, "'--max-tokens'"),
        (["generate", "--top-p", "0", "x"], 2, "'--top-p'"),
        (["generate", "--dtype", "int3", "x"], 2, "'--dtype'"),
        (["generate", "--kernels", "abacus", "x"], 2, "'--kernels'"),
        (["generate", "--quantization", "int3", "x"], 2, "'--quantization'"),
        (["generate", "--kernels", "torch", "--quantization", "int8", "x"], 1, "int8 needs native kernels"),
        (["generate", "a", "b", "c"], 2, "put the prompt in quotes"),
        (["generate", "--device", "abacus", "x"], 1, "'abacus'"),
        (["generate", "--temperature", "nan", "x"], 1, "temperature"),
        (["generate", "./nowhere", "x"], 1, "'./nowhere'"),
        (["generate", "random:nothing", "x"], 1, "nothing"),
        (["segment", "nowhere.txt"], 1, "nowhere.txt: No such file or directory"),
        (["segment", "a", "b", "c"], 2, "takes a MODEL and a FILE"),
        (["convert", "one"], 2, "'DST'"),
        (["convert", "nowhere", "out"], 1, "'nowhere'"),
        (["doctor", "nowhere"], 1, "'nowhere'"),
        (["serve", "--port", "99999"], 2, "'--port'"),
    ],
)
def test_every_mistake_is_one_line(hnet, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    result = hnet(*arguments)
    assert result.code == code
    assert result.raw == b""
    assert result.errors.startswith("hnet: error: ")
    assert result.errors.count("\n") == 1
    assert said in result.errors


def test_wrong_environment_variable_is_named(hnet, monkeypatch):
    monkeypatch.setenv("HNET_MAX_TOKENS", "many")
    result = hnet("generate", "x")
    assert result.code == 2
    assert "HNET_MAX_TOKENS" in result.errors


@pytest.mark.parametrize("command", [("generate", "x"), ("segment", "-"), ("doctor",)])
def test_kernels_that_cannot_be_had_are_one_line(hnet, monkeypatch, command):
    monkeypatch.setenv("HNET_NATIVE", "off")
    wanted = hnet(*command, "--kernels", "native")
    monkeypatch.setenv("HNET_NATIVE", "abacus")
    unknown = hnet(*command)
    for result, said in ((wanted, "kernels native: there are none"), (unknown, "HNET_NATIVE=abacus")):
        assert result.code == 1
        assert result.errors.startswith("hnet: error: ")
        assert result.errors.count("\n") == 1
        assert said in result.errors


def _copy(golden, directory: Path) -> Path:
    directory.mkdir()
    for name in ("config.json", "model.pt"):
        (directory / name).write_bytes((golden.path / name).read_bytes())
    return directory


def _missing_key(directory: Path) -> None:
    weights = torch.load(directory / "model.pt", weights_only=True)
    del weights["lm_head.weight"]
    torch.save(weights, directory / "model.pt")


def _truncated(directory: Path) -> None:
    data = (directory / "model.pt").read_bytes()
    (directory / "model.pt").write_bytes(data[: len(data) // 2])


def _wrong_config(directory: Path) -> None:
    document = json.loads((directory / "config.json").read_text())
    document["ssm_cfg"]["d_state"] = 16
    (directory / "config.json").write_text(json.dumps(document))


def _does_not_nest(directory: Path) -> None:
    document = json.loads((directory / "config.json").read_text())
    document["arch_layout"] = ["m2", "T2", "m2"]
    (directory / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("command", ["generate", "segment", "convert", "doctor"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_missing_key, "model.pt: missing key 'lm_head.weight'"),
        (_truncated, "model.pt: truncated"),
        (_wrong_config, "model.pt: key 'backbone.encoder.layers.0.mixer.in_proj.weight' has shape [322, 64]"),
        (_does_not_nest, "config.json: arch_layout"),
    ],
)
def test_bad_checkpoint_is_one_line_in_every_command(hnet, golden_case, tmp_path, command, damage, said):
    model = _copy(golden_case("a_1stage"), tmp_path / "model")
    damage(model)
    rest = {"generate": ["x"], "segment": ["-"], "convert": [tmp_path / "out"], "doctor": []}[command]
    result = hnet(command, model, *rest)
    assert result.code == 1
    assert result.errors.count("\n") == 1
    assert said in result.errors
    assert str(model) in result.errors


def test_a_defect_of_ours_is_not_hidden(monkeypatch):
    def defect(*arguments, **options):
        raise ValueError("a defect")

    monkeypatch.setattr(main_module, "cli", type("Broken", (), {"main": staticmethod(defect)}))
    with pytest.raises(ValueError, match="a defect"):
        main(["generate"])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")]
)
def test_lack_of_memory_is_one_line(hnet, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("hnet_runtime.engine.building.load_weights", fail)
    result = hnet("generate", "x")
    assert result.code == 1
    assert result.errors == "hnet: error: not enough memory for this model; try --dtype bfloat16 or a smaller one\n"


def test_interrupt_ends_quietly(hnet_process):
    process = hnet_process("generate", "x", "--max-tokens", "8000")
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read().strip() == b""


def test_closed_pipe_ends_quietly(hnet_process):
    process = hnet_process("generate", "x", "--max-tokens", "8000")
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr.read() == b""
