"""One position of each of some rows, as a function of memory that stays where it is: what a CUDA graph can hold.

Knows weights, arenas and buffers; no host array, no number of rows that is not a shape, and nothing of graphs. No shape
depends on data, nothing is read by the host, and what a step gives lies in its buffers afterwards. Padding is row 0, a
real row that runs like any other and never advances; a row that leaves a stage's batch is followed by padding.

In the order of its sums it is `hierarchy.HNet.step`, number for number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hnet_runtime.config import Mamba2Config
from hnet_runtime.model.blocks import AttentionMixer, Block, IsotropicStack, Mamba2Mixer, Mlp
from hnet_runtime.model.hierarchy import StageWeights
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.model.step_buffers import StepBuffers
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops.linear import linear
from hnet_runtime.state.arenas import AttentionState, LayerState, Mamba2State, ModelState, StageState
from hnet_runtime.state.rows import RingSlots


@dataclass(frozen=True)
class _Place:
    """Where rows are at one stage. rows, positions: [B]; slots: [B] where attention keeps this position's keys. Of a
    stage without attention nobody reads slots, nor positions on the way up."""

    rows: Tensor
    positions: Tensor
    slots: Tensor
    table: Tensor | None
    capacity: int | None


@dataclass(frozen=True)
class _Descent:
    """What the way down through a stage leaves for the way up. wide: [B, D] what the encoder gave, in fp32; p, opened:
    [B]; chunk: [B] where each row's chunk stands in the next stage's batch, None where nobody here opened one."""

    stage: int
    place: _Place
    wide: Tensor
    p: Tensor | None = None
    opened: Tensor | None = None
    chunk: Tensor | None = None


class StaticStep:
    """A model's step over one state and its buffers."""

    def __init__(
        self,
        stages: Sequence[StageWeights],
        embeddings: Tensor,
        head: Tensor,
        state: ModelState,
        buffers: StepBuffers,
        ops: StepOps,
        override: RouterOverride | None = None,
    ) -> None:
        self._stages, self._embeddings, self._head = stages, embeddings, head
        self._arenas, self._max_positions = state.stages, state.max_positions
        self._capacities = [
            stage.slots.capacity if isinstance(stage.slots, RingSlots) else None for stage in state.stages
        ]
        self._buffers, self._ops, self._override = buffers, ops, override

    def run(self, bucket: int, stage: int, parks: bool) -> None:
        """Steps `buffers.rows[:bucket]` at `stage`: with `buffers.data` where that is 0, else what they wait with.
        Rows that were to go on with a byte that they turned out not to have are left out, padding in their place.

        Writes who ran to `buffers.ran`, p of every routed stage it reaches to `buffers.verdicts`, in the order of that
        stage's batch, and of the rows whose byte came to its end, in order, logits to `buffers.logits` and the byte to
        come to `buffers.drawn`.
        """
        rows, h = self._input(stage, bucket)
        descents: list[_Descent] = []
        here, ended = rows, rows
        places: Tensor | None = None  # in this batch of those whose byte comes to its end, where not all do
        for index in range(stage, len(self._stages)):
            weights, arenas = self._stages[index], self._arenas[index]
            place = self._next(index, here)
            if weights.config.is_main:
                h = self._stack(weights.main, h, arenas.stacks["main"], place)
                break
            encoded = self._stack(weights.encoder, h, arenas.stacks["encoder"], place)
            assert arenas.router is not None
            p = self._ops.router_step(encoded, arenas.router, here, place.positions, weights.q_proj, weights.k_proj)
            if self._override is not None:
                p = self._override.static_p(index, here, place.positions)
            verdicts = self._buffers.verdicts(index, bucket)
            if parks:
                wide, ended, places = self._ops.park_step(p, here, encoded, *_parked(arenas), verdicts)
                descents.append(_Descent(index, self._last(index, ended), wide))
                break
            pad = self._stages[index + 1].pad
            h, inner, opened, chunk, wide = self._ops.descend_step(p, here, encoded, pad, verdicts)
            descents.append(_Descent(index, place, wide, p, opened, chunk))
            here = inner
        outermost = [self._surface(index, ended) for index in range(stage)]
        for descent in reversed([*outermost, *descents]):
            h = self._ascend(descent, h)
        logits, drawn = self._buffers.logits[:bucket], self._buffers.drawn(bucket)
        self._buffers.draws.draw(self._ops.draw_step, linear(h, self._head), ended, places, logits, drawn)

    def _input(self, stage: int, bucket: int) -> tuple[Tensor, Tensor]:
        """The rows that run, and what they run."""
        buffers = self._buffers
        rows, ran = buffers.rows[:bucket], buffers.ran(bucket)
        if not stage:
            next_bytes = buffers.draws.next_bytes
            return self._ops.enter_step(rows, buffers.data[:bucket], next_bytes, self._embeddings, ran)
        parked, _ = _parked(self._arenas[stage - 1])
        return rows, self._ops.resume_step(rows, parked, self._stages[stage].pad, ran)

    # ── where rows are ────────────────────────────────────────────────────────────────────────────

    def _next(self, index: int, rows: Tensor) -> _Place:
        """The rows' next position at a stage, from now on counted."""
        table, capacity = self._buffers.tables[index], self._capacities[index]
        at, slots = self._ops.next_places(rows, self._buffers.positions[index], table, capacity)
        return _Place(rows, at, slots, table, capacity)

    def _last(self, index: int, rows: Tensor) -> _Place:
        """The position at a stage that the rows ran last; a stage that keeps no keys does not ask for it."""
        table, capacity = self._buffers.tables[index], self._capacities[index]
        if table is None and capacity is None:
            return _Place(rows, rows, rows, None, None)
        at, slots = self._ops.last_places(rows, self._buffers.positions[index], table, capacity)
        return _Place(rows, at, slots, table, capacity)

    # ── down and up ───────────────────────────────────────────────────────────────────────────────

    def _surface(self, index: int, rows: Tensor) -> _Descent:
        """A stage above the one a step began at, as its rows left it when they parked: each with a chunk open."""
        return _Descent(index, self._last(index, rows), *self._ops.surface_step(rows, *_parked(self._arenas[index])))

    def _ascend(self, descent: _Descent, z: Tensor) -> Tensor:
        """Chunk outputs z [B, ≥ D] back to the rows that opened them, and through the decoder: [B, d_outer]."""
        weights, arenas = self._stages[descent.stage], self._arenas[descent.stage]
        assert arenas.ema is not None
        rows = descent.place.rows
        residual = linear(descent.wide, weights.residual_weight, weights.residual_bias)
        if descent.chunk is None or descent.p is None or descent.opened is None:
            h = self._ops.ema_kept(arenas.ema, rows, residual, self._embeddings.dtype)
        else:
            h = self._ops.ema_step(z, descent.chunk, descent.p, descent.opened, arenas.ema, rows, residual)
        h = self._stack(weights.decoder, h, arenas.stacks["decoder"], descent.place)
        return h[:, : weights.config.d_outer]

    # ── layers ────────────────────────────────────────────────────────────────────────────────────

    def _stack(self, stack: IsotropicStack, h: Tensor, states: Sequence[LayerState], place: _Place) -> Tensor:
        """h: [B, D] → [B, D], both in the model's dtype; the residual stream between is fp32."""
        residual = torch.empty_like(h, dtype=torch.float32)  # which the first norm begins
        for index, (block, state) in enumerate(zip(stack.blocks, states, strict=True)):
            x = self._ops.add_rms_norm(h, residual, block.norm1, not index)
            h = self._block(block, x, residual, state, place)
        return self._ops.add_rms_norm(h, residual, stack.norm, not stack.blocks)

    def _block(self, block: Block, x: Tensor, residual: Tensor, state: LayerState, place: _Place) -> Tensor:
        if isinstance(block.mixer, Mamba2Mixer):
            assert isinstance(state, Mamba2State)
            h = self._mamba2(block.mixer, x, state, place)
        else:
            assert isinstance(state, AttentionState)
            h = self._attention(block.mixer, x, state, place)
        if block.mlp is not None and block.norm2 is not None:
            h = self._mlp(block.mlp, self._ops.add_rms_norm(h, residual, block.norm2, False))
        return h

    def _mamba2(self, mixer: Mamba2Mixer, x: Tensor, state: Mamba2State, place: _Place) -> Tensor:
        ops, config = self._ops, mixer.config
        z, xbc, dt = _split(linear(x, mixer.in_proj), config)
        xbc = ops.conv_step(xbc, state.conv, place.rows, mixer.conv_weight, mixer.conv_bias)
        y = ops.ssm_step(xbc, dt, mixer.a, mixer.dt_bias, mixer.d, state.ssm, place.rows)
        return linear(ops.gated_norm_step(y, z, mixer.norm), mixer.out_proj)

    def _attention(self, mixer: AttentionMixer, x: Tensor, state: AttentionState, place: _Place) -> Tensor:
        ops, config = self._ops, mixer.config
        qkv = linear(x, mixer.qkv_proj).view(-1, 3, config.num_heads, config.head_dim)
        q = ops.rotate_and_keep(qkv, place.positions, place.slots, state.k, state.v, config.rotary_dim)
        out = ops.decode_attention(
            q,
            state.k,
            state.v,
            place.rows,
            place.positions,
            place.table,
            config.window,
            place.capacity,
            self._max_positions,
        )
        return linear(out.flatten(1), mixer.out_proj)

    def _mlp(self, mlp: Mlp, x: Tensor) -> Tensor:
        return linear(self._ops.swiglu(linear(x, mlp.fc1)), mlp.fc2)


def _parked(arenas: StageState) -> tuple[Tensor, Tensor]:
    """What rows wait with, and with what p."""
    assert arenas.parked is not None
    assert arenas.parked_p is not None
    return arenas.parked, arenas.parked_p


def _split(projected: Tensor, config: Mamba2Config) -> tuple[Tensor, ...]:
    """[B, …] → z, xbc, dt: views of it, which the operations read by their strides."""
    return torch.split(projected, [config.d_inner, config.conv_channels, config.num_heads], dim=-1)
