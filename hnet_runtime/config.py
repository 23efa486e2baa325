"""The official H-Net configuration, flattened into a list of stages.

Knows the shape of a model and nothing of its weights: no torch, no files but the
six official configurations that ship with the package. The recursion of
`arch_layout` is undone here, once, so that everything else is a loop over stages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

VOCAB_SIZE = 256
BOS, EOS = 254, 255
SSM_HEAD_DIM = 64  # Mamba-2's head dim in the released models; not in their JSON
MLP_MULTIPLE = 128  # the released SwiGLU rounds its inner width up to this
NORM_EPS = 1e-5

_STACK = re.compile(r"(?:[mMtT][0-9]{1,3})+")  # a thousand layers of one letter are a typing error
_LAYERS = re.compile(r"([mMtT])([0-9]+)")
_SSM_KEYS = {"chunk_size", "d_conv", "d_state", "expand"}
_ATTENTION_KEYS = {"num_heads", "rotary_emb_dim", "window_size"}
_CONFIG_KEYS = {
    "arch_layout",
    "d_model",
    "d_intermediate",
    "vocab_size",
    "ssm_cfg",
    "attn_cfg",
    "tie_embeddings",
}


class ConfigError(ValueError):
    """A configuration that does not describe an H-Net; the message names the key."""


@dataclass(frozen=True)
class LayerConfig:
    """One block: a mixer, and a SwiGLU MLP where the layout's letter is upper case."""

    mixer: Literal["mamba2", "attention"]
    has_mlp: bool


@dataclass(frozen=True)
class AttentionConfig:
    """Causal attention of one stage; `window` positions before the query are seen, −1 sees all."""

    num_heads: int
    head_dim: int
    rotary_dim: int
    window: int


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2 of one stage, one group: H heads of P channels, N states a channel."""

    d_inner: int
    d_state: int
    d_conv: int
    head_dim: int = SSM_HEAD_DIM

    @property
    def num_heads(self) -> int:
        return self.d_inner // self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels that pass the depthwise convolution: x, B and C."""
        return self.d_inner + 2 * self.d_state

    @property
    def in_proj_width(self) -> int:
        """Rows of `in_proj`: z, x, B, C, dt in that order."""
        return 2 * self.d_inner + 2 * self.d_state + self.num_heads


@dataclass(frozen=True)
class StackConfig:
    """An isotropic stack of blocks; `prefix` is where its tensors live in a checkpoint."""

    name: Literal["encoder", "decoder", "main"]
    prefix: str
    layers: tuple[LayerConfig, ...]


@dataclass(frozen=True)
class StageConfig:
    """One stage: an encoder and a decoder around the next stage, or the main network alone.

    `d_outer` is the width the stage is entered with (the previous stage's width); the
    vector `pad_dimension` widens it to `d_model`. `attention` and `mamba2` are None
    where no layer of the stage uses them.
    """

    index: int
    prefix: str
    d_model: int
    d_outer: int
    d_mlp: int
    attention: AttentionConfig | None
    mamba2: Mamba2Config | None
    stacks: tuple[StackConfig, ...]

    @property
    def is_main(self) -> bool:
        return len(self.stacks) == 1

    @property
    def pad_width(self) -> int:
        return self.d_model - self.d_outer

    def stack(self, name: str) -> StackConfig:
        return next(stack for stack in self.stacks if stack.name == name)


@dataclass(frozen=True)
class ModelConfig:
    """An H-Net as a list of stages, outermost first; the last one is the main network."""

    stages: tuple[StageConfig, ...]
    tie_embeddings: bool
    # The official JSON it was read from, for writing it again.
    source: Mapping[str, Any] = field(hash=False, repr=False)

    @property
    def num_routed_stages(self) -> int:
        return len(self.stages) - 1

    @property
    def d_model(self) -> int:
        """Width of stage 0, the width of embeddings and head."""
        return self.stages[0].d_model

    @cached_property
    def num_parameters(self) -> int:
        return sum(self.parameters_per_stage) + self.embedding_parameters

    @property
    def embedding_parameters(self) -> int:
        return VOCAB_SIZE * self.d_model * (1 if self.tie_embeddings else 2)

    @cached_property
    def parameters_per_stage(self) -> tuple[int, ...]:
        """Parameters of each stage's own stacks, router and projections, without embeddings."""
        counts = [0] * len(self.stages)
        for stage, _, shape in stage_tensor_shapes(self):
            size = 1
            for extent in shape:
                size *= extent
            counts[stage.index] += size
        return tuple(counts)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], name: str = "config") -> ModelConfig:
        """Reads an official configuration.

        Raises ConfigError, naming `name` and the key, for anything that is not one.
        """
        return _Reader(document, name).read()

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads an official configuration from a JSON file; raises ConfigError naming it."""
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from error
        return cls.from_dict(document, str(path))

    @classmethod
    def official(cls, name: str) -> ModelConfig:
        """One of the six published configurations by its name, such as `hnet_1stage_L`."""
        if name not in official_names():
            known = ", ".join(official_names())
            raise ConfigError(f"{name}: no such official configuration; there are {known}")
        file = resources.files("hnet_runtime") / "configs" / f"{name}.json"
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")), name)


def official_names() -> tuple[str, ...]:
    """Names of the configurations that ship with the package."""
    folder = resources.files("hnet_runtime") / "configs"
    return tuple(sorted(f.name[: -len(".json")] for f in folder.iterdir() if f.name.endswith(".json")))


class _Reader:
    """Checks a document key by key while it flattens the nesting."""

    def __init__(self, document: Mapping[str, Any], name: str) -> None:
        self.document = document
        self.name = name

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.name}: {message}")

    def read(self) -> ModelConfig:
        if not isinstance(self.document, Mapping):
            raise self.fail("must be a JSON object")
        for key in ("arch_layout", "d_model", "d_intermediate"):
            if key not in self.document:
                raise self.fail(f"missing key {key!r}")
        unknown = sorted(set(self.document) - _CONFIG_KEYS)
        if unknown:
            raise self.fail(f"unknown key {unknown[0]!r}")
        vocab_size = self.document.get("vocab_size", VOCAB_SIZE)
        if vocab_size != VOCAB_SIZE or not isinstance(vocab_size, int):
            raise self.fail(f"vocab_size is {vocab_size!r}; a byte-level H-Net has {VOCAB_SIZE}")
        tied = self.document.get("tie_embeddings", False)
        if not isinstance(tied, bool):
            raise self.fail(f"tie_embeddings must be true or false, not {tied!r}")

        layouts = self.unnest(self.document["arch_layout"])
        widths = self.per_stage("d_model", self.document["d_model"], len(layouts))
        stages = []
        for index, layout in enumerate(layouts):
            d_outer = widths[index - 1] if index else widths[0]
            if widths[index] < d_outer:
                raise self.fail(f"d_model[{index}] is {widths[index]}, narrower than the stage around it ({d_outer})")
            stages.append(self.stage(index, len(layouts), layout, widths[index], d_outer))
        return ModelConfig(tuple(stages), tied, dict(self.document))

    def unnest(self, layout: Any) -> list[tuple[str, ...]]:
        """`["m4", ["T1m4", ["T26"], "m4T1"], "m4"]` → [("m4", "m4"), ("T1m4", "m4T1"), ("T26",)]."""
        flat: list[tuple[str, ...]] = []
        where = "arch_layout"
        while True:
            if not isinstance(layout, list) or len(layout) not in (1, 3):
                raise self.fail(f"{where} must be [encoder, [inner], decoder] or [main], not {layout!r}")
            for at in (0, 2)[: 1 if len(layout) == 1 else 2]:
                if not isinstance(layout[at], str) or not _STACK.fullmatch(layout[at]):
                    raise self.fail(f"{where}[{at}] must be layers such as 'm4' or 'T1m4', not {layout[at]!r}")
            if len(layout) == 1:
                flat.append((layout[0],))
                return flat
            flat.append((layout[0], layout[2]))
            layout, where = layout[1], f"{where}[1]"

    def layers(self, text: str) -> tuple[LayerConfig, ...]:
        layers: list[LayerConfig] = []
        for letter, count in _LAYERS.findall(text):
            mixer: Literal["mamba2", "attention"] = "mamba2" if letter in "mM" else "attention"
            layers += [LayerConfig(mixer, has_mlp=letter.isupper())] * int(count)
        if not layers:
            raise self.fail(f"arch_layout has a stack without layers: {text!r}")
        return tuple(layers)

    def stage(self, index: int, depth: int, layout: tuple[str, ...], width: int, d_outer: int) -> StageConfig:
        prefix = "backbone" + ".main_network" * index
        names: tuple[Literal["encoder", "decoder", "main"], ...] = (
            ("main",) if len(layout) == 1 else ("encoder", "decoder")
        )
        stacks = tuple(
            StackConfig(name, f"{prefix}.{'main_network' if name == 'main' else name}", self.layers(text))
            for name, text in zip(names, layout, strict=True)
        )
        layers = [layer for stack in stacks for layer in stack.layers]
        mixers = {layer.mixer for layer in layers}
        return StageConfig(
            index=index,
            prefix=prefix,
            d_model=width,
            d_outer=d_outer,
            d_mlp=self.mlp_width(index, depth, width) if any(layer.has_mlp for layer in layers) else 0,
            attention=self.attention(index, depth, width) if "attention" in mixers else None,
            mamba2=self.mamba2(index, depth, width) if "mamba2" in mixers else None,
            stacks=stacks,
        )

    def mlp_width(self, index: int, depth: int, width: int) -> int:
        values = self.document["d_intermediate"]
        if not isinstance(values, list) or len(values) < depth:
            raise self.fail(f"d_intermediate must be a list with a value for each of {depth} stages, not {values!r}")
        value = values[index]
        if value is None:
            value = 8 * width // 3
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.fail(f"d_intermediate[{index}] is {value!r}, but arch_layout has MLPs in stage {index}")
        return -(-value // MLP_MULTIPLE) * MLP_MULTIPLE

    def attention(self, index: int, depth: int, width: int) -> AttentionConfig:
        section = self.section("attn_cfg", _ATTENTION_KEYS)
        heads = self.setting(section, "attn_cfg", "num_heads", index, depth, minimum=1)
        rotary = self.setting(section, "attn_cfg", "rotary_emb_dim", index, depth, minimum=0, default=0)
        window = self.setting(section, "attn_cfg", "window_size", index, depth, minimum=-1, default=-1)
        if width % heads:
            raise self.fail(f"attn_cfg.num_heads[{index}] is {heads}, which does not divide d_model {width}")
        head_dim = width // heads
        if rotary > head_dim or rotary % 2:
            raise self.fail(
                f"attn_cfg.rotary_emb_dim[{index}] is {rotary}; it must be even and at most the head dim {head_dim}"
            )
        return AttentionConfig(heads, head_dim, rotary, window)

    def mamba2(self, index: int, depth: int, width: int) -> Mamba2Config:
        section = self.section("ssm_cfg", _SSM_KEYS)
        expand = self.setting(section, "ssm_cfg", "expand", index, depth, minimum=1, default=2)
        d_inner = expand * width
        if d_inner % SSM_HEAD_DIM:
            raise self.fail(
                f"ssm_cfg.expand × d_model[{index}] is {d_inner}; it must be a multiple of the head dim {SSM_HEAD_DIM}"
            )
        return Mamba2Config(
            d_inner=d_inner,
            d_state=self.setting(section, "ssm_cfg", "d_state", index, depth, minimum=1, default=128),
            d_conv=self.setting(section, "ssm_cfg", "d_conv", index, depth, minimum=2, default=4),
        )

    def section(self, key: str, known: set[str]) -> Mapping[str, Any]:
        section = self.document.get(key)
        if not isinstance(section, Mapping):
            raise self.fail(f"{key} must be an object, since arch_layout uses it")
        unknown = sorted(set(section) - known)
        if unknown:
            raise self.fail(f"unknown key {f'{key}.{unknown[0]}'!r}")
        return section

    def setting(
        self,
        section: Mapping[str, Any],
        of: str,
        key: str,
        index: int,
        depth: int,
        minimum: int,
        default: int | None = None,
    ) -> int:
        """A number for stage `index`: the reference takes a list per stage or one value for all."""
        value = section.get(key, default)
        if value is None:
            raise self.fail(f"missing key {of}.{key}")
        if isinstance(value, list):
            return self.per_stage(f"{of}.{key}", value, depth, minimum)[index]
        return self.number(f"{of}.{key}", value, minimum)

    def per_stage(self, key: str, values: Any, depth: int, minimum: int = 1) -> list[int]:
        if not isinstance(values, list) or len(values) < depth:
            raise self.fail(f"{key} must be a list with a value for each of {depth} stages, not {values!r}")
        return [self.number(f"{key}[{i}]", value, minimum) for i, value in enumerate(values)]

    def number(self, key: str, value: Any, minimum: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.fail(f"{key} must be a whole number of at least {minimum}, not {value!r}")
        return value


# ── the tensors a configuration calls for, under the official names ─────────────────────────────


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of an official checkpoint of this model: key → shape.

    With tied embeddings `lm_head.weight` is the same tensor as `embeddings.weight` and
    is not listed.
    """
    embedding = (VOCAB_SIZE, config.d_model)
    shapes: dict[str, tuple[int, ...]] = {"embeddings.weight": embedding}
    shapes.update({key: shape for _, key, shape in stage_tensor_shapes(config)})
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = embedding
    return shapes


def stage_tensor_shapes(config: ModelConfig) -> Iterator[tuple[StageConfig, str, tuple[int, ...]]]:
    """(stage, key, shape) of every tensor that belongs to a stage."""
    for stage in config.stages:
        width = stage.d_model
        if stage.pad_width:
            yield stage, f"{stage.prefix}.pad_dimension", (stage.pad_width,)
        for stack in stage.stacks:
            for index, layer in enumerate(stack.layers):
                for name, shape in _layer_shapes(stage, layer).items():
                    yield stage, f"{stack.prefix}.layers.{index}.{name}", shape
            yield stage, f"{stack.prefix}.rmsnorm.weight", (width,)
        if not stage.is_main:
            yield stage, f"{stage.prefix}.routing_module.q_proj_layer.weight", (width, width)
            yield stage, f"{stage.prefix}.routing_module.k_proj_layer.weight", (width, width)
            yield stage, f"{stage.prefix}.residual_proj.weight", (width, width)
            yield stage, f"{stage.prefix}.residual_proj.bias", (width,)


def _layer_shapes(stage: StageConfig, layer: LayerConfig) -> dict[str, tuple[int, ...]]:
    width = stage.d_model
    shapes: dict[str, tuple[int, ...]] = {"norm1.weight": (width,)}
    if layer.mixer == "mamba2":
        assert stage.mamba2 is not None
        ssm = stage.mamba2
        shapes |= {
            "mixer.dt_bias": (ssm.num_heads,),
            "mixer.A_log": (ssm.num_heads,),
            "mixer.D": (ssm.num_heads,),
            "mixer.in_proj.weight": (ssm.in_proj_width, width),
            "mixer.conv1d.weight": (ssm.conv_channels, 1, ssm.d_conv),
            "mixer.conv1d.bias": (ssm.conv_channels,),
            "mixer.norm.weight": (ssm.d_inner,),
            "mixer.out_proj.weight": (width, ssm.d_inner),
        }
    else:
        shapes |= {"mixer.Wqkv.weight": (3 * width, width), "mixer.out_proj.weight": (width, width)}
    if layer.has_mlp:
        shapes |= {
            "norm2.weight": (width,),
            "mlp.fc1.weight": (2 * stage.d_mlp, width),
            "mlp.fc2.weight": (width, stage.d_mlp),
        }
    return shapes
