"""Fixtures for every folder of tests: the golden cases, and models drawn at random.

A golden case is what the authors' implementation computed for a small model (see its
`meta.json`); a generated case has no recorded truth beside `hnet_runtime.model.reference`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hnet_runtime.config import ModelConfig

TESTS = Path(__file__).parent
FP32_GOLDEN = ("a_1stage", "b_2stage", "e_iso_T2")
BF16_GOLDEN = "g_2stage_bf16"


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt of a golden case and the 64 greedy bytes after it.

    `probabilities[s]` and `boundaries[s]` belong to the prompt alone; the `decode_` arrays to
    the 64 steps, where −1 and NaN mark steps that did not reach the stage.
    """

    index: int
    ids: Tensor  # [L] int64
    prefill_logits: Tensor  # [L, 256]
    probabilities: tuple[Tensor, ...]  # [L_s] each
    boundaries: tuple[Tensor, ...]  # [L_s] bool each
    decode_tokens: Tensor  # [65] int64; the first follows the prompt, the last is never fed
    decode_logits: Tensor  # [64, 256]
    decode_probabilities: Tensor  # [64, S]
    decode_boundaries: Tensor  # [64, S] int8

    @property
    def fed_ids(self) -> Tensor:
        """The prompt and the 64 greedy bytes that were fed after it, [L + 64]."""
        return torch.cat([self.ids, self.decode_tokens[:64]])

    @property
    def fed_logits(self) -> Tensor:
        """Logits at every position of `fed_ids`, [L + 64, 256]."""
        return torch.cat([self.prefill_logits, self.decode_logits])

    @property
    def fed_probabilities(self) -> tuple[Tensor, ...]:
        """Boundary probabilities over `fed_ids`, one vector for each routed stage."""
        return tuple(
            torch.cat([prefill, self.decode_probabilities[self.decode_boundaries[:, s] >= 0, s]])
            for s, prefill in enumerate(self.probabilities)
        )

    @property
    def fed_boundaries(self) -> tuple[Tensor, ...]:
        """Boundary masks over `fed_ids`, one vector for each routed stage."""
        return tuple(
            torch.cat([prefill, self.decode_boundaries[self.decode_boundaries[:, s] >= 0, s] == 1])
            for s, prefill in enumerate(self.boundaries)
        )


@dataclass(frozen=True)
class GoldenCase:
    """One folder of `tests/golden`, loaded."""

    name: str
    path: Path
    config: ModelConfig
    weights: Mapping[str, Tensor]
    arrays: Mapping[str, Tensor]
    meta: Mapping[str, Any]

    @property
    def logits_atol(self) -> float:
        return float(self.meta["suggested_tolerance"]["logits_atol"])

    @property
    def probability_atol(self) -> float:
        return float(self.meta["suggested_tolerance"]["boundary_prob_atol"])

    def prompts(self) -> list[GoldenPrompt]:
        return [self.prompt(index) for index in range(len(self.meta["prompts"]))]

    def prompt(self, index: int) -> GoldenPrompt:
        def array(name: str) -> Tensor:
            return self.arrays[f"p{index}_{name}"]

        routed = range(self.config.num_routed_stages)
        return GoldenPrompt(
            index=index,
            ids=array("input_ids"),
            prefill_logits=array("prefill_logits"),
            probabilities=tuple(array(f"stage{s}_boundary_prob") for s in routed),
            boundaries=tuple(array(f"stage{s}_boundary_mask") for s in routed),
            decode_tokens=array("decode_tokens"),
            decode_logits=array("decode_logits"),
            decode_probabilities=array("decode_boundary_prob") if routed else torch.zeros(64, 0),
            decode_boundaries=array("decode_boundary_mask") if routed else torch.zeros(64, 0, dtype=torch.int8),
        )

    def hidden(self) -> dict[str, Tensor]:
        """Module path → that module's output over prompt 1."""
        mark = "p1_hidden::"
        return {key.removeprefix(mark): array for key, array in self.arrays.items() if key.startswith(mark)}


@cache
def load_golden(name: str) -> GoldenCase:
    path = TESTS / "golden" / name
    with np.load(path / "golden.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    return GoldenCase(
        name=name,
        path=path,
        config=ModelConfig.from_file(path / "config.json"),
        weights=torch.load(path / "model.pt", weights_only=True),
        arrays=arrays,
        meta=json.loads((path / "meta.json").read_text(encoding="utf-8")),
    )


def _load_cases() -> ModuleType:
    """`tests/model/cases.py` under a name of its own: test folders are not packages."""
    name = "hnet_test_cases"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / "model" / "cases.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


cases = _load_cases()
load_generated = cache(cases.make_named_case)


@pytest.fixture(params=[*FP32_GOLDEN, BF16_GOLDEN])
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    """Each golden case in turn, of either dtype."""
    return load_golden(request.param)


@pytest.fixture(params=FP32_GOLDEN)
def fp32_golden(request: pytest.FixtureRequest) -> GoldenCase:
    """Each golden case whose weights are float32, in turn."""
    return load_golden(request.param)


@pytest.fixture
def bf16_golden() -> GoldenCase:
    return load_golden(BF16_GOLDEN)


@pytest.fixture
def golden_case() -> Callable[[str], GoldenCase]:
    """Loads one golden case by its name."""
    return load_golden


@pytest.fixture(params=list(cases.CASE_SHAPES))
def generated(request: pytest.FixtureRequest) -> Any:
    """Each of the random models of `tests/model/cases.py` in turn, float32: .name, .config, .weights."""
    return load_generated(request.param)


@pytest.fixture
def make_case() -> Callable[..., tuple[ModelConfig, dict[str, Tensor]]]:
    """`make_case(seed, layout, widths, **options)` of `tests/model/cases.py`."""
    return cases.make_case


@pytest.fixture
def make_named_case() -> Callable[..., Any]:
    """`make_named_case(name, seed=1, dtype=float32)` of `tests/model/cases.py`, cached."""
    return load_generated


@pytest.fixture
def sample_ids() -> Tensor:
    """BOS and a text of about 250 bytes on which generated models have sensible boundary rates."""
    return cases.sample_ids()
