"""An H-Net over whole windows, with gradients: the runtime's stages, their chunking made differentiable.

Knows weights and windows; nothing of optimizers or data. The stacks, their parameters' names and everything that
decides a boundary are `hnet_runtime.model`'s; what is here is the way down and up in parallel, and the two factors that
are 1 or nothing in inference: the confidence of equations (6), (7) and (9) of arXiv 2507.07955, and the ratio loss of
equation (10)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hnet_runtime.config import ModelConfig, StackConfig
from hnet_runtime.model.blocks import IsotropicStack, StageContext
from hnet_runtime.model.hierarchy import StageWeights
from hnet_runtime.ops.linear import linear
from hnet_runtime.ops.rotary import rotary_table
from hnet_runtime.ops.router import BOUNDARY_THRESHOLD, probability
from hnet_runtime.ops.spans import Ints, Spans
from hnet_runtime.state.arenas import AttentionState, LayerState, Mamba2State
from training.parallel_ops import equal_spans, parallel_ops


@dataclass(frozen=True)
class Route:
    """What the router of a stage said of its positions, and which chunk each is in.

    spans: of the stage's positions; inner: of its chunks; p: [T]; boundary: [T]; chunk: [T] the packed place among
    `inner`'s of the chunk a position is in.
    """

    spans: Spans
    inner: Spans
    p: Tensor
    boundary: NDArray[np.bool_]
    chunk: Ints


Alter = Callable[[int, Tensor, Route], Tensor]
"""(stage, z̄ [T, D] at the stage's positions, its route) → what the decoder is given in its place."""

Watch = Callable[[StackConfig, int, Tensor], None]
"""(stack, layer, residual stream [T, D] after it), layer by layer."""


@dataclass(frozen=True)
class Forwarded:
    """logits: [R, T, V] fp32; routes: of each routed stage, outermost first."""

    logits: Tensor
    routes: tuple[Route, ...]


class TrainableHNet:
    """`parameters`: fp32 tensors under the official key names, see config.tensor_shapes."""

    def __init__(self, config: ModelConfig, parameters: Mapping[str, Tensor]) -> None:
        self.config, self.parameters = config, parameters
        self._ops = parallel_ops()

    def forward(self, windows: Tensor, *, alter: Alter | None = None, watch: Watch | None = None) -> Forwarded:
        """windows: [R, T] int64 bytes, each from the beginning of its sequence."""
        # What a stage derives from its weights (exp(A_log), the convolution's layout) is derived anew, under autograd.
        stages = [StageWeights(stage, self.parameters) for stage in self.config.stages]
        embeddings = self.parameters["embeddings.weight"]
        head = embeddings if self.config.tie_embeddings else self.parameters["lm_head.weight"]
        count, length = windows.shape
        spans = equal_spans(count, length, windows.device)
        h = F.embedding(windows.t().reshape(-1), embeddings)
        routes: list[Route] = []
        h = self._stage(stages, 0, h, spans, routes, alter, watch)
        logits = linear(h, head).float().view(length, count, -1).transpose(0, 1)
        return Forwarded(logits, tuple(routes))

    def _stage(
        self,
        stages: Sequence[StageWeights],
        index: int,
        h: Tensor,
        spans: Spans,
        routes: list[Route],
        alter: Alter | None,
        watch: Watch | None,
    ) -> Tensor:
        """Stage `index` and everything inside it. h: [T, d_outer] packed → [T, d_outer]."""
        stage = stages[index]
        context = self._context(stage, spans)
        h = stage.widen(h)
        if stage.config.is_main:
            return _run(stage.main, stage, h, context, watch)[:, : stage.config.d_outer]
        encoded = _run(stage.encoder, stage, h, context, watch)
        p = boundary_probability(encoded, spans, stage.q_proj, stage.k_proj)
        boundary = p.detach().cpu().numpy() > BOUNDARY_THRESHOLD
        inner, places, newest = spans.select(boundary, np.zeros(len(spans), dtype=np.int64))
        chosen = spans.tensor(places)
        route = Route(spans, inner, p, boundary, newest - len(spans))
        routes.append(route)
        z_hat = self._stage(stages, index + 1, encoded.index_select(0, chosen), inner, routes, alter, watch)
        smoothed = self._ops.smooth(z_hat, p.index_select(0, chosen), z_hat, inner)
        z_bar = smoothed.index_select(0, spans.tensor(route.chunk))
        if alter is not None:
            z_bar = alter(index, z_bar, route)
        residual = linear(encoded.float(), stage.residual_weight, stage.residual_bias)
        z = z_bar * confidence(p, route.boundary).unsqueeze(-1) + residual
        return _run(stage.decoder, stage, z, context, watch)[:, : stage.config.d_outer]

    def _context(self, stage: StageWeights, spans: Spans) -> StageContext:
        attention = stage.config.attention
        if attention is None:
            return StageContext(self._ops, spans, None, None)
        positions = spans.tensor(spans.position_of)
        rotary = rotary_table(positions, attention.rotary_dim) if attention.rotary_dim else None
        return StageContext(self._ops, spans, (spans, attention.window), rotary)


def _run(network: IsotropicStack, stage: StageWeights, h: Tensor, context: StageContext, watch: Watch | None) -> Tensor:
    config = stage.config.stack(network.name)
    states = tuple(_no_memory(layer.mixer) for layer in config.layers)
    note = None if watch is None else partial(watch, config)
    return network(h, states, context, note)


def boundary_probability(h: Tensor, spans: Spans, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """p of every position, `hnet_runtime.ops.router`'s; the first of each span, which has nothing before it, is left
    out of the projections, so that no gradient is taken where a cosine has none. h: [T, D] → [T] fp32."""
    later = np.flatnonzero(spans.position_of > 0)
    opened = h.new_ones(spans.total, dtype=torch.float32)
    if not len(later):
        return opened
    now = spans.tensor(later)
    before = spans.predecessor.index_select(0, now) - len(spans)
    h = h.float()
    p = probability(
        linear(h, q_weight).index_select(0, before), linear(h, k_weight).index_select(0, now), torch.float32
    )
    return opened.index_copy(0, now, p)


def confidence(p: Tensor, boundary: NDArray[np.bool_]) -> Tensor:
    """Equations (6) and (7): 1, with the gradient of how sure the router was. p: [T], boundary: [T] → [T]."""
    sure = torch.where(torch.from_numpy(boundary).to(p.device), p, 1 - p)
    return 1 + (sure - sure.detach())


def ratio_loss(route: Route, ratio: float) -> Tensor:
    """Equation (10): least where one position in `ratio` opens a chunk. F is the share that did, G the mean of p."""
    share = float(route.boundary.mean())
    mean = route.p.mean()
    return ratio / (ratio - 1) * ((ratio - 1) * share * mean + (1 - share) * (1 - mean))


def _no_memory(mixer: str) -> LayerState:
    """What a layer is handed in place of its memory: windows begin with nothing, and leave nothing."""
    nothing = torch.empty(0)
    return Mamba2State(nothing, nothing) if mixer == "mamba2" else AttentionState(nothing, nothing)
