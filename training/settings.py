"""A training run as a TOML file: what is trained, on what, and how. Knows no tensors.

`load` gives everything checked; what is wrong is a SettingsError of one line that names the file and the setting.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hnet_runtime.config import ConfigError, ModelConfig

PositiveInt = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]


class SettingsError(ValueError):
    """A configuration that cannot be trained."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Section):
    """train, heldout: files of documents, each BOS + UTF-8 + EOS (docs/training-data.md says how they are made)."""

    train: Path
    heldout: Path
    window: Annotated[int, Field(ge=16)] = 1024
    """Bytes that the model sees at once, BOS included."""


class Batch(_Section):
    """A step sees `windows` windows, shared evenly among processes, each of which takes `micro` of them at a time."""

    windows: PositiveInt = 8
    micro: PositiveInt = 4
    processes: PositiveInt = 1
    bf16: bool = False
    """Matrix products under autocast; parameters, norms, recurrences and the router stay fp32."""

    @model_validator(mode="after")
    def _divisible(self) -> Batch:
        if self.windows % (self.processes * self.micro):
            raise ValueError(
                f"windows ({self.windows}) must be a multiple of processes × micro ({self.processes} × {self.micro})"
            )
        return self


class Optimizer(_Section):
    """AdamW. learning_rate is of stage 0; a stage's own is `multipliers[stage]` times it, a router's
    `router_multiplier` times its stage's. Decay of norms, biases, embeddings and Mamba-2's A, D and Δ is 0."""

    learning_rate: Rate = 2.4e-3
    multipliers: list[Annotated[float, Field(gt=0)]] | None = None
    router_multiplier: Annotated[float, Field(gt=0)] = 1.0
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    clip_each_network: bool = False
    """Whether each network's gradient is held to `clip` by itself, rather than all of them together."""


class Schedule(_Section):
    """In bytes seen: a linear rise over `warmup`, constant, and a linear fall to `floor` of the rate over the last
    `decay`."""

    total: PositiveInt
    warmup: Annotated[int, Field(ge=0)] = 1_200_000
    decay: Annotated[int, Field(ge=0)] = 0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.05

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.warmup + self.decay > self.total:
            raise ValueError(f"warmup and decay ({self.warmup} + {self.decay}) are more than total ({self.total})")
        return self


class Chunking(_Section):
    """ratio: bytes (or chunks) a chunk, N of equation (10), for each routed stage, alpha its weight in the loss.

    A ratio's `start`, if there is one, leads to it linearly over `annealing` bytes. guidance: weight of a loss that
    draws boundaries of stage 0 to the beginnings of white space; 0, and so none, unless a model says that it had it.
    """

    ratio: list[Annotated[float, Field(gt=1)]] = []
    start: list[Annotated[float, Field(gt=1)]] | None = None
    annealing: Annotated[int, Field(ge=0)] = 0
    alpha: Annotated[float, Field(ge=0)] = 0.03
    guidance: Annotated[float, Field(ge=0)] = 0.0


class Reporting(_Section):
    """How often, in bytes seen, what is done; `checkpoint` is in seconds."""

    log: PositiveInt = 65_536
    evaluate: PositiveInt = 4_000_000
    evaluation_windows: Annotated[int, Field(ge=2)] = 32
    checkpoint: Annotated[float, Field(gt=0)] = 180.0
    prompts: list[str] = ["The ", "It was a ", '"I do not know," said ']
    sample_bytes: PositiveInt = 200


class TrainingSettings(_Section):
    """name: of the run; model: an official configuration, as a table or a JSON file beside this one."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    model: Path | dict[str, Any]
    seed: int = 1
    vocabulary: Annotated[int, Field(ge=300, le=60_000)] | None = None
    """Tokens of a byte-pair encoding learned from the text, for a model without stages to be compared with; None is
    bytes. A window is then so many tokens, and nothing is exported: it is no H-Net."""
    data: Data
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    chunking: Chunking = Chunking()
    reporting: Reporting = Reporting()


def load(path: Path) -> tuple[TrainingSettings, ModelConfig]:
    """Reads a run's settings and its model's configuration; files it names are relative to it."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        settings = TrainingSettings.model_validate(document)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise SettingsError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from error
    base = path.parent
    try:
        if isinstance(settings.model, Path):
            model = ModelConfig.from_file(base / settings.model)
        else:
            model = ModelConfig.from_dict(settings.model, f"{path}: model")
    except ConfigError as error:
        raise SettingsError(str(error)) from error
    data = settings.data.model_copy(
        update={"train": base / settings.data.train, "heldout": base / settings.data.heldout}
    )
    settings = settings.model_copy(update={"data": data})
    _check_stages(path, settings, model)
    return settings, model


def _check_stages(path: Path, settings: TrainingSettings, model: ModelConfig) -> None:
    routed, stages = model.num_routed_stages, len(model.stages)
    if settings.vocabulary is not None and routed:
        raise SettingsError(f"{path}: vocabulary: only a model without routed stages is trained on tokens")
    for name, values, count, what in (
        ("chunking.ratio", settings.chunking.ratio, routed, "routed stage"),
        ("chunking.start", settings.chunking.start, routed, "routed stage"),
        ("optimizer.multipliers", settings.optimizer.multipliers, stages, "stage"),
    ):
        if values is not None and len(values) != count:
            raise SettingsError(f"{path}: {name}: one number for each {what}, which is {count}, not {len(values)}")
    for file in (settings.data.train, settings.data.heldout):
        if not file.is_file():
            raise SettingsError(f"{path}: data: no such file: {file}")
