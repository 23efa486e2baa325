"""An H-Net over rows: the loop down through encoders and routers, the main network, the loop up.

Knows weights, rows and their state; nothing of requests or text. Prefill and decoding are one
forward: each row gives the next bytes of its sequence, many for a prompt's span, one for a step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.config import ModelConfig, StageConfig
from hnet_runtime.model.blocks import IsotropicStack, StageContext
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.model.results import Result, StageWork, Verdicts
from hnet_runtime.ops.attention import KeyGrid
from hnet_runtime.ops.ema import smooth
from hnet_runtime.ops.linear import linear
from hnet_runtime.ops.rotary import rotary_table
from hnet_runtime.ops.router import BOUNDARY_THRESHOLD, boundary_probability
from hnet_runtime.ops.spans import Ints, Spans
from hnet_runtime.state.arenas import ModelState, StageState
from hnet_runtime.state.rows import RingSlots


@dataclass(frozen=True)
class Forward:
    """hidden: [T, D] the last decoder's output in packed order; verdicts of each routed stage, and work of each
    stage, that was reached."""

    spans: Spans
    order: Ints
    hidden: Tensor
    verdicts: tuple[Verdicts, ...]
    work: tuple[StageWork, ...]

    @property
    def last(self) -> Tensor:
        """[R] packed places of the spans' last positions, in the order of the caller's rows."""
        places = np.empty(len(self.order), dtype=np.int64)
        places[self.order] = self.spans.last
        return self.spans.tensor(places)

    def places(self, index: int) -> Tensor:
        """Packed places of all positions of the caller's span `index`, in time."""
        return self.spans.tensor(self._places(index))

    def last_places(self, counts: Sequence[int]) -> Tensor:
        """Packed places of the last `counts` positions of each of the caller's spans, span after span."""
        if self.spans.is_step:
            return self.spans.tensor(np.flatnonzero(counts))
        wanted = [self._places(index) for index in range(len(counts))]
        return self.spans.tensor(
            np.concatenate([places[len(places) - count :] for places, count in zip(wanted, counts, strict=True)])
        )

    def _places(self, index: int) -> Ints:
        span = int(np.flatnonzero(self.order == index)[0])
        places: Ints = self.spans.offsets[: self.spans.lengths[span]] + span
        return places


class _Stage:
    """The weights of one stage."""

    def __init__(self, config: StageConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config

        def stack(name: str) -> IsotropicStack:
            prefix = config.stack(name).prefix
            return IsotropicStack(config, name, lambda key: weights[f"{prefix}.{key}"])

        self.pad = weights[f"{config.prefix}.pad_dimension"] if config.pad_width else None
        if config.is_main:
            self.main = stack("main")
        else:
            self.encoder, self.decoder = stack("encoder"), stack("decoder")
            # The router compares and the residual adds in fp32, whatever the model's dtype.
            self.q_proj = weights[f"{config.prefix}.routing_module.q_proj_layer.weight"].float()
            self.k_proj = weights[f"{config.prefix}.routing_module.k_proj_layer.weight"].float()
            self.residual_weight = weights[f"{config.prefix}.residual_proj.weight"].float()
            self.residual_bias = weights[f"{config.prefix}.residual_proj.bias"].float()

    def widen(self, h: Tensor) -> Tensor:
        """[T, d_outer] → [T, D]."""
        return h if self.pad is None else torch.cat((h, self.pad.expand(h.shape[0], -1)), -1)

    def context(self, spans: Spans, state: StageState) -> StageContext:
        attention = self.config.attention
        if attention is None or state.slots is None:
            return StageContext(spans, None, None)
        capacity = state.slots.capacity if isinstance(state.slots, RingSlots) else None
        grid = KeyGrid(spans, attention.window, state.slots.slots, capacity)
        positions = spans.tensor(spans.position_of)
        return StageContext(
            spans, grid, rotary_table(positions, attention.rotary_dim) if attention.rotary_dim else None
        )


@dataclass(frozen=True)
class _Descent:
    """What the way down leaves for the way up: the encoder's output, and which chunk each position is in."""

    stage: _Stage
    arenas: StageState
    context: StageContext
    encoded: Tensor  # [T, D]
    inner: Spans
    p: Tensor  # [C] of the positions that opened the chunks
    newest: Ints  # [T] place of a position's chunk in [R carried, then C]


class HNet:
    """The runtime's model: `weights` under the official key names, see config.tensor_shapes."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], override: RouterOverride | None = None
    ) -> None:
        self.config = config
        self._override = override
        self.embeddings = weights["embeddings.weight"]
        self.head = self.embeddings if config.tie_embeddings else weights["lm_head.weight"]
        self.dtype, self.device = self.embeddings.dtype, self.embeddings.device
        self._stages = [_Stage(stage, weights) for stage in config.stages]

    def new_state(self, *, num_rows: int, kv_positions: int, max_positions: int) -> ModelState:
        return ModelState(
            self.config,
            num_rows=num_rows,
            kv_positions=kv_positions,
            max_positions=max_positions,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def forward(self, state: ModelState, rows: list[int], pieces: list[bytes]) -> Forward:
        """Runs the next bytes of each row (distinct rows, at least one byte each) and advances its state."""
        starts = state.stages[0].positions[rows]
        spans, order = Spans.of(rows, starts, [len(piece) for piece in pieces], self.device)
        if spans.is_step:
            data = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        else:
            data = np.empty(spans.total, dtype=np.uint8)
            for span, index in enumerate(order):
                data[spans.offsets[: spans.lengths[span]] + span] = np.frombuffer(pieces[index], dtype=np.uint8)
        h = self.embeddings[spans.tensor(data.astype(np.int64))]
        return self._run(state, spans, order, h)

    def run(self, state: ModelState, rows: Sequence[int], pieces: Sequence[bytes], num_logits: Sequence[int]) -> Result:
        """Runs the next bytes of each row (distinct rows, at least one byte each), advances its state, and gives logits
        of the last `num_logits` positions of each."""
        forward = self.forward(state, list(rows), list(pieces))
        return Result(self.logits(forward.hidden[forward.last_places(num_logits)]), forward.verdicts, forward.work)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[T, D] → [T, V] fp32, rounded to the model's dtype before as the released model does."""
        return linear(hidden, self.head).float()

    def _run(self, state: ModelState, outermost: Spans, order: Ints, h: Tensor) -> Forward:
        spans, offsets = outermost, outermost.position_of
        descents: list[_Descent] = []
        verdicts: list[Verdicts] = []
        positions: list[int] = []
        clock = _StageClock()
        for stage, arenas in zip(self._stages, state.stages, strict=True):
            positions.append(spans.total)
            context = stage.context(spans, arenas)
            h = stage.widen(h)
            if stage.config.is_main:
                h = stage.main(h, arenas.stacks["main"], context)
                _advance(arenas, spans)
                clock.lap(stage.config.index)
                break
            h = stage.encoder(h, arenas.stacks["encoder"], context)
            assert arenas.router is not None
            p = boundary_probability(h, arenas.router, spans, stage.q_proj, stage.k_proj)
            if self._override is not None:
                p = spans.tensor(self._override.p(stage.config.index, spans.rows[spans.span_of], spans.position_of))
            _advance(arenas, spans)
            said = p.cpu().numpy()
            boundary = said > BOUNDARY_THRESHOLD
            verdicts.append(Verdicts(spans.rows[spans.span_of], offsets, said, boundary))
            inner, places, newest = spans.select(boundary, state.stages[stage.config.index + 1].positions[spans.rows])
            chosen = spans.tensor(places)
            descents.append(_Descent(stage, arenas, context, h, inner, p[chosen], newest))
            spans, offsets, h = inner, offsets[places], h[chosen]
            clock.lap(stage.config.index)
            if not len(spans):
                break
        for descent in reversed(descents):
            h = self._ascend(descent, h)
            clock.lap(descent.stage.config.index)
        work = tuple(StageWork(stage, count, clock.seconds[stage]) for stage, count in enumerate(positions))
        return Forward(outermost, order, h, tuple(verdicts), work)

    def _ascend(self, descent: _Descent, z: Tensor) -> Tensor:
        """Chunk outputs z [C, ≥ D] back to the positions of the stage that opened the chunks: [T, d_outer]."""
        stage, arenas, spans = descent.stage, descent.arenas, descent.context.spans
        assert arenas.ema is not None
        carried = arenas.ema.index_select(0, spans.row_index)
        if len(descent.inner):
            smoothed = smooth(z[:, : stage.config.d_model], descent.p, arenas.ema, descent.inner)
            carried = torch.cat((carried, smoothed))
        z_bar = carried[spans.tensor(descent.newest)]  # [T, D] fp32
        residual = linear(descent.encoded.float(), stage.residual_weight, stage.residual_bias)
        h = stage.decoder((z_bar + residual).to(self.dtype), arenas.stacks["decoder"], descent.context)
        return h[:, : stage.config.d_outer]


class _StageClock:
    """Adds up the time between laps to the stage each lap names."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: int) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def _advance(arenas: StageState, spans: Spans) -> None:
    arenas.positions[spans.rows] += spans.lengths
