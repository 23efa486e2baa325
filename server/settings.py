"""What an operator can set, one field an option of `hnet serve`; fixed once the server starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from server.files import check_certificate, check_readable, read_keys

DType = Literal["auto", "float32", "bfloat16"]
Kernels = Literal["auto", "native", "torch", "triton", "libraries"]
Quantization = Literal["int8"]
Batching = Literal["lockstep", "aligned", "adaptive"]
LogLevel = Literal["debug", "info", "warning", "error"]
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server. Raises ValueError, naming the field, for a value out of range.

    None leaves the choice to the engine (memory, rows, threads) or means "not set".
    """

    model: str | None = None
    config: str | None = None
    revision: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: DType = "auto"
    kernels: Kernels = "auto"
    quantization: Quantization | None = None
    max_num_seqs: int | None = None
    max_model_len: int = 8192
    kv_memory: int | None = None  # bytes
    weight_cache: str | None = None  # directory, or "off"
    prefill_bytes_per_tick: int | None = None
    prefill_share: float = 0.5  # of the time, while rows decode
    batching: Batching = "adaptive"
    max_park_ticks: int = 64
    max_park_seconds: float = 1.0
    prefix_cache_memory: int | None = None  # bytes; 0 is off
    prefix_cache_interval: int | None = None  # bytes of a prompt
    enforce_eager: bool = False
    overlap: bool | None = None
    max_graphs: int = 128
    gpu_memory_utilization: float = 0.9
    debug_checks: bool = False
    threads: int | None = None
    api_key: tuple[str, ...] = ()
    api_key_file: str | None = None  # a key a line
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None  # where the certificate's file does not hold the key
    allowed_origins: tuple[str, ...] = ()  # of browsers' pages; none is no CORS
    served_model_name: str | None = None
    chat_template: str | None = None  # file
    stream_flush_ms: float = 20.0
    drain_timeout: float = 30.0  # seconds
    header_timeout: float = 30.0  # seconds
    request_timeout: float | None = None  # seconds
    engine_timeout: float = 60.0  # seconds of silence
    max_engine_restarts: int | None = None  # in a row
    max_body_bytes: int = 4 * MIB
    max_waiting_requests: int = 1024
    max_waiting_bytes: int | None = None  # of prompts
    metrics_public: bool = False
    metrics_compat: Literal["vllm"] | None = None
    otlp_traces_endpoint: str | None = None  # URL
    in_process: bool = False
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_model_len", 2),
            ("kv_memory", 1),
            ("prefill_bytes_per_tick", 1),
            ("max_park_ticks", 1),
            ("prefix_cache_memory", 0),
            ("prefix_cache_interval", 1),
            ("threads", 1),
            ("max_graphs", 1),
            ("stream_flush_ms", 0),
            ("drain_timeout", 0),
            ("max_body_bytes", 1),
            ("max_engine_restarts", 0),
            ("max_waiting_requests", 0),
            ("max_waiting_bytes", 1),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:  # so that NaN is refused too
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if not 0 < self.prefill_share <= 1:
            raise ValueError(f"prefill_share must be above 0 and at most 1, not {self.prefill_share}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}")
        for name in ("max_park_seconds", "header_timeout", "request_timeout", "engine_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, not {value}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, not {self.port}")
        for name in ("api_key", "allowed_origins"):
            values = getattr(self, name)
            if isinstance(values, str):  # else every character would be one
                raise ValueError(f"{name} must be a list, not one text")
            object.__setattr__(self, name, tuple(values))
            if not all(value.strip() for value in values):
                raise ValueError(f"{name} must not be empty")
        if self.chat_template is not None:
            check_readable("chat_template", self.chat_template)
        if self.api_key_file is not None:
            read_keys(self.api_key_file)
        if self.ssl_certfile is not None:
            check_certificate(self.ssl_certfile, self.ssl_keyfile)
        elif self.ssl_keyfile is not None:
            raise ValueError("ssl_keyfile needs --ssl-certfile")
        if self.otlp_traces_endpoint is not None:
            _check_tracing(self.otlp_traces_endpoint)


def _check_tracing(endpoint: str) -> None:
    try:
        url = urlsplit(endpoint)
        is_url = url.scheme in ("http", "https") and bool(url.hostname)
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(
            f"otlp_traces_endpoint must be an HTTP URL such as http://127.0.0.1:4318/v1/traces, not {endpoint!r}"
        )
    try:
        import server.tracing  # noqa: F401
    except ImportError as error:
        raise ValueError("otlp_traces_endpoint needs the extra otel: pip install 'hnet-serve[otel]'") from error
