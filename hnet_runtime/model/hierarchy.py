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
from numpy.typing import NDArray
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE, ModelConfig, StageConfig
from hnet_runtime.model.blocks import IsotropicStack, StageContext
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.model.results import Result, StageWork, StepResult, Verdicts
from hnet_runtime.ops.boundary import widened
from hnet_runtime.ops.linear import linear
from hnet_runtime.ops.prefill import PrefillOps
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


class StageWeights:
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
        return widened(h, self.pad)

    def context(self, ops: PrefillOps, spans: Spans, state: StageState) -> StageContext:
        attention, slots = self.config.attention, state.slots
        if attention is None or slots is None:
            return StageContext(ops, spans, None, None)
        table, capacity = (None, slots.capacity) if isinstance(slots, RingSlots) else (slots.table, None)
        keys = ops.keys(spans, attention.window, slots.slots, table, capacity)
        positions = spans.tensor(spans.position_of)
        rotary = rotary_table(positions, attention.rotary_dim) if attention.rotary_dim else None
        return StageContext(ops, spans, keys, rotary)


@dataclass(frozen=True)
class _Descent:
    """What the way down leaves for the way up: the encoder's output, and which chunk each position is in."""

    stage: StageWeights
    arenas: StageState
    context: StageContext
    encoded: Tensor  # [T, D]
    inner: Spans
    p: Tensor  # [C] of the positions that opened the chunks
    newest: Ints  # [T] place of a position's chunk in [R carried, then C]


class HNet:
    """The runtime's model: `weights` under the official key names, see config.tensor_shapes.

    `prefill` is what its forwards run on; another form takes its place before the first of them.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], override: RouterOverride | None = None
    ) -> None:
        self.config = config
        self._override = override
        self.embeddings = weights["embeddings.weight"]
        self.head = self.embeddings if config.tie_embeddings else weights["lm_head.weight"]
        self.dtype, self.device = self.embeddings.dtype, self.embeddings.device
        self.prefill = PrefillOps.torch()
        self._stages = [StageWeights(stage, weights) for stage in config.stages]

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

    @torch.inference_mode()
    def step(
        self, state: ModelState, rows: Sequence[int], data: bytes, *, stage: int = 0, parks: bool = True
    ) -> StepResult:
        """One position of each row at `stage`: its next byte where that is 0, else what it was parked with.

        rows: distinct; data: [B] bytes, at stage 0 only. A row whose router at `stage` opens a chunk goes on to the
        next stage at once where `parks` is false. Else it is parked, due there: its position counts, and nothing is
        written of any decoder or EMA until `step` of that stage takes it up. In every other way this is `run` with one
        byte a row, number for number.
        """
        row_array, outer = np.asarray(rows, dtype=np.int64), state.stages[0]
        spans, _ = Spans.of(row_array, state.stages[stage].positions[row_array], np.ones_like(row_array), self.device)
        if stage:
            parked = state.stages[stage - 1].parked
            assert parked is not None
            offsets, h = outer.positions[row_array] - 1, parked[spans.row_index]
        else:
            offsets = spans.position_of
            h = self.embeddings[spans.tensor(np.frombuffer(data, dtype=np.uint8).astype(np.int64))]
        way = _Way(spans, offsets, h)
        finished = self._descend(state, way, stage, parks)
        ended = row_array[finished]
        if len(ended):
            outermost = [self._surface(state, index, ended) for index in range(stage)]
            way.descents = [*outermost, *way.descents]
            self._ascend_all(way)
            logits = self.logits(way.h)
        else:
            logits = torch.empty(0, VOCAB_SIZE, device=self.device)
        verdicts = tuple(enumerate(way.verdicts, start=stage))
        return StepResult(finished, logits, verdicts, way.work())

    def _run(self, state: ModelState, outermost: Spans, order: Ints, h: Tensor) -> Forward:
        way = _Way(outermost, outermost.position_of, h)
        self._descend(state, way, 0, parks=False)
        self._ascend_all(way)
        return Forward(outermost, order, way.h, tuple(way.verdicts), way.work())

    def _descend(self, state: ModelState, way: _Way, first: int, parks: bool) -> NDArray[np.bool_]:
        """Encoders and routers from stage `first` on, until a stage has no positions or those that go on are parked.

        Returns [R] which of the spans were not parked.
        """
        finished = np.ones(len(way.spans), dtype=np.bool_)
        for stage, arenas in zip(self._stages[first:], state.stages[first:], strict=True):
            spans, index = way.spans, stage.config.index
            way.positions[index] = spans.total
            context = stage.context(self.prefill, spans, arenas)
            h = stage.widen(way.h)
            if stage.config.is_main:
                way.h = stage.main(h, arenas.stacks["main"], context)
                _advance(arenas, spans)
                way.lap(index)
                break
            h = stage.encoder(h, arenas.stacks["encoder"], context)
            assert arenas.router is not None
            p = boundary_probability(h, arenas.router, spans, stage.q_proj, stage.k_proj)
            if self._override is not None:
                p = spans.tensor(self._override.p(index, spans.rows[spans.span_of], spans.position_of))
            _advance(arenas, spans)
            said = _on_host(p)
            boundary = said > BOUNDARY_THRESHOLD
            way.verdicts.append(Verdicts(spans.rows[spans.span_of], way.offsets, said, boundary))
            if parks and boundary.any():
                assert arenas.parked is not None
                assert arenas.parked_p is not None
                parked = spans.tensor(spans.rows[boundary])
                arenas.parked[parked], arenas.parked_p[parked] = h[spans.tensor(boundary)], p[spans.tensor(boundary)]
                finished = ~boundary
                h, p, boundary = h[spans.tensor(finished)], p[spans.tensor(finished)], boundary[finished]
                spans = Spans(spans.rows[finished], spans.starts[finished], spans.lengths[finished], self.device)
                way.offsets = way.offsets[finished]
                context = stage.context(self.prefill, spans, arenas) if len(spans) else context
            inner, places, newest = spans.select(boundary, state.stages[index + 1].positions[spans.rows])
            chosen = spans.tensor(places)
            way.descents.append(_Descent(stage, arenas, context, h, inner, p[chosen], newest))
            way.spans, way.offsets, way.h = inner, way.offsets[places], h[chosen]
            way.lap(index)
            if not len(inner):
                break
        return finished

    def _surface(self, state: ModelState, index: int, rows: Ints) -> _Descent:
        """A stage above the one a step began at, as these rows left it when they parked: each with a chunk open."""
        stage, arenas = self._stages[index], state.stages[index]
        assert arenas.parked is not None
        assert arenas.parked_p is not None
        ones = np.ones_like(rows)
        spans = Spans(rows, arenas.positions[rows] - 1, ones, self.device)
        inner = Spans(rows, state.stages[index + 1].positions[rows] - 1, ones, self.device)
        encoded, p = arenas.parked[spans.row_index], arenas.parked_p[spans.row_index]
        newest = len(rows) + np.arange(len(rows))
        return _Descent(stage, arenas, stage.context(self.prefill, spans, arenas), encoded, inner, p, newest)

    def _ascend_all(self, way: _Way) -> None:
        for descent in reversed(way.descents):
            way.h = self._ascend(descent, way.h)
            way.lap(descent.stage.config.index)

    def _ascend(self, descent: _Descent, z: Tensor) -> Tensor:
        """Chunk outputs z [C, ≥ D] back to the positions of the stage that opened the chunks: [T, d_outer]."""
        stage, arenas, spans = descent.stage, descent.arenas, descent.context.spans
        assert arenas.ema is not None
        carried = arenas.ema.index_select(0, spans.row_index)
        if len(descent.inner):
            smoothed = self.prefill.smooth(z[:, : stage.config.d_model], descent.p, arenas.ema, descent.inner)
            carried = torch.cat((carried, smoothed))
        z_bar = carried[spans.tensor(descent.newest)]  # [T, D] fp32
        residual = linear(descent.encoded.float(), stage.residual_weight, stage.residual_bias)
        h = stage.decoder((z_bar + residual).to(self.dtype), arenas.stacks["decoder"], descent.context)
        return h[:, : stage.config.d_outer]


class _Way:
    """A forward on its way: where it stands, what each stage it passed left for the way up, and the time each took."""

    def __init__(self, spans: Spans, offsets: Ints, h: Tensor) -> None:
        self.spans, self.offsets, self.h = spans, offsets, h
        self.descents: list[_Descent] = []
        self.verdicts: list[Verdicts] = []
        self.positions: dict[int, int] = {}
        self._seconds: dict[int, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: int) -> None:
        """Counts the time since the last lap as the stage's."""
        now = time.perf_counter()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def work(self) -> tuple[StageWork, ...]:
        seconds = sorted(self._seconds.items())
        return tuple(StageWork(stage, self.positions.get(stage, 0), each) for stage, each in seconds)


def _on_host(p: Tensor) -> NDArray[np.float32]:
    """The one thing in a forward that the host waits for: how many positions the next stage has."""
    said: NDArray[np.float32] = p.cpu().numpy()
    return said


def _advance(arenas: StageState, spans: Spans) -> None:
    arenas.positions[spans.rows] += spans.lengths
