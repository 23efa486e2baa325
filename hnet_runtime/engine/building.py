"""From a checkpoint to a model on a path: device, dtype, kernels, memory, and packed weights from a cache.

Knows machines and weights; no requests.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import torch
from torch import Tensor

from hnet_runtime.checkpoint import ModelSource, load_weights
from hnet_runtime.config import ModelConfig
from hnet_runtime.engine.config import DType, EngineConfig, EngineError, Kernels
from hnet_runtime.engine.gpu_memory import GpuMemory, MemoryPlan, check_weights, plan_memory
from hnet_runtime.engine.graphs import CudaGraphs, Eager, StepGraphs
from hnet_runtime.model.captured import CapturedHNet
from hnet_runtime.model.hierarchy import HNet
from hnet_runtime.model.native import NativeHNet
from hnet_runtime.model.override import RouterOverride
from hnet_runtime.model.step_ops import StepOps
from hnet_runtime.ops.native import binding, cache
from hnet_runtime.ops.native.library import NativeLibrary, open_library
from hnet_runtime.ops.prefill import OPS, Op, PrefillOps
from hnet_runtime.ops.triton.libraries import Choice, choose
from hnet_runtime.state.arenas import ModelState, kv_bytes_per_position
from hnet_runtime.state.rows import PAGE

log = logging.getLogger("hnet.engine")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FLOAT32_BELOW = 100_000_000  # parameters; smaller models run in fp32 on a CPU
_CACHED_FROM = 100_000_000  # parameters; smaller models are packed in no time
_ONE_THREAD_UP_TO = 256  # width; below it a second thread costs more than it brings
_CPU_ROWS = 64
_ON_GPUS = ("triton", "libraries")  # kernels that must be asked for there alone
_CACHE_SHARE = 0.125  # of the machine's memory, for snapshots of prefixes,
_CACHE_MOST = 8 << 30  # up to so many bytes
_SMALL_SNAPSHOT = 1 << 20  # bytes, for every 64 of a prompt
_KV_SHARE = 0.25  # of the machine's memory


def load_model(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    engine_config: EngineConfig,
    progress: Callable[[int, int], None] | None = None,
) -> HNet | NativeHNet:
    """The model of a checkpoint on the path that `engine_config` chooses.

    Packed weights of large models are kept in a cache (`weight_cache`) and mapped from there the next time.
    """
    library = choose_library(engine_config, device)
    if device.type == "cuda":
        check_weights(source.config, dtype, engine_config, gpu_memory(device))
    directory = cache.cache_directory(engine_config.weight_cache)
    if library is None or directory is None or not source.weights or source.config.num_parameters < _CACHED_FROM:
        weights = load_weights(source, dtype=dtype, device=device, progress=progress)
        return build_model(source.config, weights, engine_config, library)
    shape = json.dumps(dict(source.config.source), sort_keys=True)
    packing = (shape, str(dtype), str(engine_config.quantization), library.isa, f"interface {binding.INTERFACE}")
    key = cache.CacheKey.of(source.weights, *packing)
    packed = cache.load(directory, key)
    if packed is None:
        weights = load_weights(source, dtype=dtype, device=device, progress=progress)
        model = build_model(source.config, weights, engine_config, library)
        assert isinstance(model, NativeHNet)
        if not cache.store(directory, key, model.packed):
            return model
        del model  # the mapped form takes its place: weights are never held twice
        packed = cache.load(directory, key)
        if packed is None:
            raise EngineError(f"weight_cache {directory}: what was written there cannot be read back")
    elif progress is not None:
        size = sum(tensor.nbytes for tensor in packed.values())
        progress(size, size)
    return build_model(source.config, {}, engine_config, library, packed=packed)


def choose_library(config: EngineConfig, device: torch.device) -> NativeLibrary | None:
    """The native library that serves on a device, None for the torch path; EngineError where it must and cannot."""
    library = open_library() if device.type == "cpu" and config.kernels != "torch" else None
    if config.kernels in _ON_GPUS and device.type == "cpu":
        raise EngineError(f"kernels {config.kernels}: they need a GPU")
    if library is None and config.kernels == "native":
        raise EngineError("kernels native: there are none for this device, or they are not built (make native)")
    if library is None and config.quantization:
        raise EngineError(f"quantization {config.quantization} needs native kernels, and there are none here")
    return library


def build_model(
    config: ModelConfig,
    weights: dict[str, Tensor],
    engine_config: EngineConfig,
    library: NativeLibrary | None,
    override: RouterOverride | None = None,
    packed: dict[str, Tensor] | None = None,
) -> HNet | NativeHNet:
    """The model on a path. The native one takes the tensors out of `weights` as it packs them, or is given `packed`."""
    if library is None:
        device = weights["embeddings.weight"].device
        if device.type == "cuda":
            steps, prefill = gpu_ops(engine_config, device)
            model = CapturedHNet(config, weights, lambda: _step_graphs(engine_config, device), steps, override)
            model.prefill = prefill
            return model
        return HNet(config, weights, override)
    return NativeHNet(
        config,
        weights,
        library.calls,
        engine_config.threads or default_threads(config),
        quantized=engine_config.quantization == "int8",
        isa=library.isa,
        override=override,
        packed=packed,
    )


def gpu_ops(config: EngineConfig, device: torch.device) -> tuple[StepOps, PrefillOps]:
    """The operations of steps and of prefill on a GPU: Triton's where it is there, EngineError where it must be and is
    not. The steps' carry the name of both."""
    if config.kernels == "torch":
        return StepOps.torch(), PrefillOps.torch()
    try:
        steps = StepOps.triton()
    except ImportError as error:
        if config.kernels in _ON_GPUS:
            raise EngineError(f"kernels {config.kernels}: Triton cannot be imported: {error}") from error
        log.warning("Triton cannot be imported (%s): torch's operations run the model, which is slow", error)
        return StepOps.torch(), PrefillOps.torch()
    adapters = import_module("hnet_runtime.ops.triton.adapters")  # it imports Triton
    prefill: PrefillOps = adapters.prefill_ops(choose_prefill(config.kernels, device))
    others = ", ".join(f"{op} of prompts {form}" for op, form in prefill.forms.items() if form != steps.name)
    return (replace(steps, name=f"{steps.name}, {others}") if others else steps), prefill


def choose_prefill(kernels: Kernels, device: torch.device) -> dict[Op, Choice]:
    """What runs each op of prefill on a device, and why the others do not."""
    if kernels == "torch":
        return {op: Choice(op, "torch", declined={"triton": "torch is asked for"}) for op in OPS}
    return choose(device, libraries=kernels == "libraries")


def _step_graphs(config: EngineConfig, device: torch.device) -> StepGraphs:
    return StepGraphs(Eager() if config.enforce_eager else CudaGraphs(device), config.max_graphs)


def launches_ahead(config: EngineConfig, graphs: StepGraphs | None, device: torch.device) -> bool:
    """Whether steps are launched before the ones before are read: those that are captured alone, and where nothing is
    said of it those of a GPU."""
    is_captured = graphs is not None and graphs.mode == "graph"
    if config.overlap and not is_captured:
        log.error("overlap is ignored: on %s no steps are captured that could be launched ahead", device)
    return is_captured and (device.type == "cuda" if config.overlap is None else config.overlap)


def choose_device(name: str) -> torch.device:
    """The device of a name, CUDA before CPU for `auto`; raises EngineError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device {name!r} is not a device") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device {name!r} is not supported; there are cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"device {name!r} is not available: this PyTorch sees no CUDA GPU")
    return device


def choose_dtype(name: DType, source: ModelSource, device: torch.device) -> torch.dtype:
    """The dtype of a name; `auto` is fp32 for small models on a CPU, else bf16."""
    if name == "auto":
        small = source.config.num_parameters < _FLOAT32_BELOW
        return torch.float32 if small and device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise EngineError(f"dtype {name!r} is not supported; there are auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def default_threads(config: ModelConfig) -> int:
    """CPU threads worth having for a model: one for narrow ones, else all cores this process may use."""
    widest = max(stage.d_model for stage in config.stages)
    return 1 if widest <= _ONE_THREAD_UP_TO else _num_cores()


def _num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_memory(device: torch.device) -> GpuMemory:
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(total, free)


def memory_for(model: HNet | NativeHNet, config: EngineConfig) -> MemoryPlan:
    """What rows, keys and values and kept prefixes get; EngineError, with the numbers, where it is not enough."""
    if model.device.type == "cuda":
        return plan_memory(model.config, model.dtype, config, gpu_memory(model.device))
    num_rows = config.max_num_seqs or _CPU_ROWS
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cache = config.prefix_cache_memory
    if cache is None:
        cache = min(int(memory * _CACHE_SHARE), _CACHE_MOST)
    return MemoryPlan(num_rows, _kv_positions(model, num_rows, config, int(memory * _KV_SHARE)), cache)


def _kv_positions(model: HNet | NativeHNet, num_rows: int, config: EngineConfig, most: int) -> int:
    """KV positions of each full-attention stage: what all rows may need, within the memory set aside."""
    wanted = num_rows * (-(-config.max_model_len // PAGE) * PAGE)
    per_position = kv_bytes_per_position(model.config, model.dtype, config.max_model_len)
    if not per_position:
        return wanted
    budget = most if config.kv_memory is None else config.kv_memory
    positions = min(wanted, budget // per_position // PAGE * PAGE)
    if positions < config.max_model_len:
        # One chunk per byte is possible, so one request alone may need all of it.
        raise EngineError(
            f"kv_memory of {budget} bytes holds {positions} positions of {per_position} bytes; one request of "
            f"max_model_len {config.max_model_len} may need as many: lower max_model_len or set "
            f"kv_memory to {per_position * -(-config.max_model_len // PAGE) * PAGE}"
        )
    return positions


def open_state(
    model: HNet | NativeHNet, plan: MemoryPlan, config: EngineConfig
) -> tuple[ModelState, StepGraphs | None]:
    """The memory of rows, and what replays the model's steps over it, captured now; None where steps are not static."""
    try:
        state = model.new_state(
            num_rows=plan.num_rows, kv_positions=plan.kv_positions, max_positions=config.max_model_len
        )
        if not isinstance(model, CapturedHNet):
            return state, None
        # Before anything lives there: what is tried is tried on padding.
        _read_padding(model, state)
        graphs = model.open(state)
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"gpu_memory_utilization {config.gpu_memory_utilization}: the GPU ran out of memory with {plan.num_rows} "
            f"rows and {plan.kv_positions} KV positions, by others' use of it or while steps were captured: lower it, "
            f"max_num_seqs or max_graphs ({str(error).splitlines()[0]})"
        ) from error
    assert isinstance(graphs, StepGraphs)
    return state, graphs


def _read_padding(model: HNet, state: ModelState) -> None:
    """Runs a prompt through all stages, so that no request waits until its kernels are compiled."""
    began = time.perf_counter()
    model.run(state, [0], [bytes(min(PAGE, state.max_positions))], [1])
    for stage in state.stages:
        stage.positions[0] = 0
    log.info("a first prompt was read in %.1f s", time.perf_counter() - began)


def snapshot_interval(state: ModelState, config: EngineConfig) -> int:
    """Bytes of a prompt between two snapshots: 64, or so many more that they take no more than 1 MiB for each 64."""
    return config.prefix_cache_interval or 64 * max(-(-state.saved_bytes // _SMALL_SNAPSHOT), 1)
