"""An H-Net whose forward runs in the native library: the same mathematics, state and verdicts as `hierarchy`.

Knows weights, arenas and the library's structs. Activations are fp32 whatever the weights' dtype; keys and values
are kept in the model's dtype. Every sum has one order, for any rows, spans and threads.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hnet_runtime.config import VOCAB_SIZE, LayerConfig, ModelConfig, StageConfig, tensor_shapes
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.model.results import Result, StageWork, StepResult, Verdicts
from hnet_runtime.ops.native import binding
from hnet_runtime.ops.native.packing import PackedMatrix, pack, quantize
from hnet_runtime.ops.rotary import rotary_table
from hnet_runtime.state.arenas import AttentionState, LayerState, Mamba2State, ModelState, StageState
from hnet_runtime.state.rows import PagePool, RingSlots

HEAD = "lm_head.weight"


class NativeHNet:
    """The model on a CPU through `library`. Takes the tensors out of `weights` as it packs them.

    packed: the packed tensors by name, to be kept in a cache; where they are given, no weights are needed.
    quantized: 8-bit weights and activations in the blocks' matrix products; the router, the residual and the head
        stay in the weights' dtype.
    isa: the library's instruction set, for `kernels`: what runs the model, in words.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        library: Any,
        threads: int,
        quantized: bool = False,
        override: RouterOverride | None = None,
        isa: str = "",
        packed: dict[str, Tensor] | None = None,
    ) -> None:
        self.config, self.threads = config, threads
        self.device = torch.device("cpu")
        self.library = library
        self.packed = {} if packed is None else packed
        self._weights = weights
        self._shapes = tensor_shapes(config)
        self._quantized, self._override = quantized, override
        self.kernels = " ".join(word for word in ("native", isa, "int8" if quantized else "") if word)
        if config.tie_embeddings and HEAD not in self.packed:
            weights[HEAD] = weights["embeddings.weight"]
        self._shapes[HEAD] = self._shapes["embeddings.weight"]
        self._head = self._matrix(HEAD)
        self.dtype = self.packed[HEAD].dtype  # the head is never quantised
        self._embeddings = self._vector("embeddings.weight")
        self._stages = [self._stage(stage) for stage in config.stages]
        self._forwards: weakref.WeakKeyDictionary[ModelState, _Session] = weakref.WeakKeyDictionary()

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights."""
        return sum(tensor.nbytes for tensor in self.packed.values())

    def new_state(self, *, num_rows: int, kv_positions: int, max_positions: int) -> ModelState:
        return ModelState(
            self.config,
            num_rows=num_rows,
            kv_positions=kv_positions,
            max_positions=max_positions,
            dtype=torch.float32,
            kv_dtype=self.dtype,
            device=self.device,
        )

    def run(self, state: ModelState, rows: Sequence[int], pieces: Sequence[bytes], num_logits: Sequence[int]) -> Result:
        """Runs the next bytes of each row and advances its state; see hierarchy.HNet.run."""
        return self._session(state).run(rows, pieces, num_logits)

    def _session(self, state: ModelState) -> _Session:
        session = self._forwards.get(state)
        if session is None:
            session = self._forwards[state] = _Session(self, state)
        return session

    def step(
        self, state: ModelState, rows: Sequence[int], data: bytes, *, stage: int = 0, parks: bool = True
    ) -> StepResult:
        """One position of each row at `stage`; see hierarchy.HNet.step."""
        return self._session(state).step(rows, data, stage, parks)

    # ── structs over the packed weights ──────────────────────────────────────────────────────────

    def _vector(self, key: str, make: Callable[[Tensor], Tensor] = Tensor.float) -> int:
        """Address of a tensor in fp32, as `make` has it."""
        if key not in self.packed:
            self.packed[key] = make(self._weights.pop(key)).contiguous()
        return self.packed[key].data_ptr()

    def _matrix(self, key: str, quantized: bool = False) -> binding.Matrix:
        packed = self.packed
        if key not in packed:
            weight = self._weights.pop(key)
            matrix = quantize(weight, self.library) if quantized else pack(weight, self.library)
            packed[key] = matrix.data
            if matrix.scale is not None and matrix.sums is not None:
                packed[f"{key}:scale"], packed[f"{key}:sums"] = matrix.scale, matrix.sums
        outputs, inputs = self._shapes[key]
        scale, sums = packed.get(f"{key}:scale"), packed.get(f"{key}:sums")
        return PackedMatrix(outputs, inputs, packed[key], scale=scale, sums=sums).struct()

    def _stage(self, config: StageConfig) -> binding.Stage:
        stage = binding.Stage(d_model=config.d_model, d_outer=config.d_outer, d_mlp=config.d_mlp, window=-1)
        if config.attention is not None:
            stage.heads, stage.head_dim = config.attention.num_heads, config.attention.head_dim
            stage.rotary_half, stage.window = config.attention.rotary_dim // 2, config.attention.window
        if config.mamba2 is not None:
            stage.ssm_heads, stage.d_state = config.mamba2.num_heads, config.mamba2.d_state
            stage.d_conv = config.mamba2.d_conv
        if config.pad_width:
            stage.pad = self._vector(f"{config.prefix}.pad_dimension")
        stage.encoder = self._stack(config, "main" if config.is_main else "encoder")
        if not config.is_main:
            stage.decoder = self._stack(config, "decoder")
            router = f"{config.prefix}.routing_module"
            stage.q_proj = self._matrix(f"{router}.q_proj_layer.weight")
            stage.k_proj = self._matrix(f"{router}.k_proj_layer.weight")
            if self._override is not None:
                stage.override_rate = self._override.rate(config.index)
                stage.override_key = (self._override.seed + (config.index << 56)) % 2**64
            residual = f"{config.prefix}.residual_proj"
            stage.residual = self._matrix(f"{residual}.weight")
            stage.residual.bias = self._vector(f"{residual}.bias")
        return stage

    def _stack(self, stage: StageConfig, name: str) -> binding.Stack:
        config = stage.stack(name)
        layers = (binding.Layer * len(config.layers))()
        for index, layer in enumerate(config.layers):
            self._fill_layer(layers[index], f"{config.prefix}.layers.{index}", layer)
        return binding.Stack(len(config.layers), layers, self._vector(f"{config.prefix}.rmsnorm.weight"))

    def _fill_layer(self, struct: binding.Layer, prefix: str, layer: LayerConfig) -> None:
        def matrix(key: str) -> binding.Matrix:
            return self._matrix(f"{prefix}.{key}", quantized=self._quantized)

        def vector(key: str, make: Callable[[Tensor], Tensor] = Tensor.float) -> int:
            return self._vector(f"{prefix}.{key}", make)

        struct.is_attention, struct.has_mlp = layer.mixer == "attention", layer.has_mlp
        struct.norm1 = vector("norm1.weight")
        struct.in_proj = matrix("mixer.Wqkv.weight" if layer.mixer == "attention" else "mixer.in_proj.weight")
        struct.out_proj = matrix("mixer.out_proj.weight")
        if layer.mixer == "mamba2":
            struct.conv_weight = vector("mixer.conv1d.weight", lambda weight: weight.squeeze(1).t().float())
            struct.conv_bias, struct.dt_bias = vector("mixer.conv1d.bias"), vector("mixer.dt_bias")
            struct.a = vector("mixer.A_log", lambda a_log: -torch.exp(a_log.float()))
            struct.d, struct.ssm_norm = vector("mixer.D"), vector("mixer.norm.weight")
        if layer.has_mlp:
            struct.norm2 = vector("norm2.weight")
            struct.fc1, struct.fc2 = matrix("mlp.fc1.weight"), matrix("mlp.fc2.weight")


class _StepArrays:
    """What a step is given and gives, kept from one to the next, with its addresses: to ask for those takes longer than
    a copy of what is in them."""

    def __init__(self, room: int) -> None:
        self.rows = np.empty(room, dtype=np.int64)
        self.finished = np.empty(room, dtype=np.bool_)
        self.logits = np.empty((room, VOCAB_SIZE), dtype=np.float32)
        self.rows_at, self.finished_at = self.rows.ctypes.data, self.finished.ctypes.data
        self.logits_at = self.logits.ctypes.data


class _Session:
    """The library's forward over one ModelState: its structs with the arenas' addresses in them."""

    def __init__(self, model: NativeHNet, state: ModelState) -> None:
        self._keep: list[object] = []
        self._model = model
        self._num_positions = state.max_positions
        self._arrays = _StepArrays(state.num_rows)
        stages = (binding.Stage * len(model.config.stages))()
        for index, (config, arenas) in enumerate(zip(model.config.stages, state.stages, strict=True)):
            stages[index] = model._stages[index]
            self._point(stages[index], config, arenas)
        struct = binding.Model(
            num_stages=len(stages),
            stages=stages,
            embeddings=model._embeddings,
            head=model._head,
            bf16=model.dtype == torch.bfloat16,
        )
        self._keep += [stages, struct]
        library = model.library
        handle = library.hnet_open(ctypes.byref(struct), model.threads)
        if not handle:
            raise MemoryError("the native forward could not be opened")
        self._handle = handle
        self._forward, self._step = library.hnet_forward, library.hnet_step
        weakref.finalize(self, library.hnet_close, handle)
        self._room = 0

    def _point(self, stage: binding.Stage, config: StageConfig, arenas: StageState) -> None:
        stage.positions = arenas.positions.ctypes.data
        if isinstance(arenas.slots, RingSlots):
            stage.slots = binding.Slots(capacity=arenas.slots.capacity)
        elif isinstance(arenas.slots, PagePool):
            table = arenas.slots.table
            stage.slots = binding.Slots(table=table.ctypes.data, row_pages=table.shape[1])
        if config.attention is not None and config.attention.rotary_dim:
            cos, sin = rotary_table(torch.arange(self._num_positions), config.attention.rotary_dim)
            tables = cos.squeeze(1).contiguous(), sin.squeeze(1).contiguous()
            stage.rotary_cos, stage.rotary_sin = (table.data_ptr() for table in tables)
            self._keep.append(tables)
        if arenas.router is not None and arenas.ema is not None:
            stage.router, stage.ema = arenas.router.data_ptr(), arenas.ema.data_ptr()
        if arenas.parked is not None and arenas.parked_p is not None:
            stage.parked, stage.parked_p = arenas.parked.data_ptr(), arenas.parked_p.data_ptr()
        stage.encoder = self._pointed(stage.encoder, arenas.stacks["main" if config.is_main else "encoder"])
        if not config.is_main:
            stage.decoder = self._pointed(stage.decoder, arenas.stacks["decoder"])

    def _pointed(self, stack: binding.Stack, states: Sequence[LayerState]) -> binding.Stack:
        layers = (binding.Layer * stack.num_layers)()
        for index, state in enumerate(states):
            layers[index] = stack.layers[index]
            match state:
                case Mamba2State(conv, ssm):
                    layers[index].first_state, layers[index].second_state = conv.data_ptr(), ssm.data_ptr()
                case AttentionState(k, v):
                    layers[index].first_state, layers[index].second_state = k.data_ptr(), v.data_ptr()
        self._keep.append(layers)
        return binding.Stack(stack.num_layers, layers, stack.norm)

    def _make_room(self, positions: int) -> None:
        """Arrays that reports are written to, for that many positions."""
        if positions <= self._room:
            return
        self._room = max(positions, 2 * self._room)
        num_stages = len(self._model.config.stages)
        self._rows = np.empty((num_stages, self._room), dtype=np.int64)
        self._offsets = np.empty((num_stages, self._room), dtype=np.int64)
        self._p = np.empty((num_stages, self._room), dtype=np.float32)
        self._boundary = np.empty((num_stages, self._room), dtype=np.bool_)
        self._reports = (binding.StageReport * num_stages)()
        for index, report in enumerate(self._reports):
            report.rows, report.offsets = self._rows[index].ctypes.data, self._offsets[index].ctypes.data
            report.p, report.boundary = self._p[index].ctypes.data, self._boundary[index].ctypes.data

    def run(self, rows: Sequence[int], pieces: Sequence[bytes], num_logits: Sequence[int]) -> Result:
        lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._make_room(int(lengths.sum()))
        row_array, wanted = np.array(rows, dtype=np.int64), np.array(num_logits, dtype=np.int64)
        logits = np.empty((int(wanted.sum()), VOCAB_SIZE), dtype=np.float32)
        failed = self._forward(
            self._handle,
            len(row_array),
            row_array.ctypes.data,
            lengths.ctypes.data,
            b"".join(pieces),
            wanted.ctypes.data,
            logits.ctypes.data,
            self._reports,
        )
        if failed:
            raise MemoryError("the native forward ran out of memory")
        return Result(torch.from_numpy(logits), tuple(said for _, said in self._verdicts()), self._work())

    def step(self, rows: Sequence[int], data: bytes, stage: int, parks: bool) -> StepResult:
        count = len(rows)
        self._make_room(count)
        arrays = self._arrays
        arrays.rows[:count] = rows
        failed = self._step(
            self._handle,
            stage,
            count,
            arrays.rows_at,
            data,
            parks,
            arrays.finished_at,
            arrays.logits_at,
            self._reports,
        )
        if failed:
            raise MemoryError("the native forward ran out of memory")
        finished = arrays.finished[:count].copy()
        ended = torch.from_numpy(arrays.logits[: np.count_nonzero(finished)].copy())
        return StepResult(finished, ended, tuple(self._verdicts()), self._work())

    def _verdicts(self) -> Iterator[tuple[int, Verdicts]]:
        """What the router of each stage said in the last call, where it ran."""
        for index, report in enumerate(self._reports[:-1]):
            count = report.positions
            if count:
                yield (
                    index,
                    Verdicts(
                        self._rows[index, :count].copy(),
                        self._offsets[index, :count].copy(),
                        self._p[index, :count].copy(),
                        self._boundary[index, :count].copy(),
                    ),
                )

    def _work(self) -> tuple[StageWork, ...]:
        """Of the stages that ran in the last call; one that only decoded for a deeper one has no positions."""
        return tuple(
            StageWork(index, report.positions, report.seconds)
            for index, report in enumerate(self._reports)
            if report.positions or report.seconds
        )
