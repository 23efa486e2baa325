"""What crosses the border of the engine: requests in, bytes and verdicts out.

Plain typed data (msgspec), the same in-process and between processes. Knows no text,
no HTTP and no tensors; importing it never imports torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
Utf8Mode = Literal["strict", "raw"]
MAX_CONSTRAINT_BYTES = 1 << 16
ConstraintKind = Literal["json", "regex", "choice", "grammar"]


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What a completion has to be from its first byte to its last.

    `source` is a JSON schema, a regular expression, a JSON list of texts, or a grammar in Lark's or GBNF's notation.
    `whitespace`: of JSON, a regular expression of what may stand between its parts; "" for nothing, None for any white
    space. `closed`: objects have no properties but those that their schema names, unless it says so.
    """

    kind: ConstraintKind
    source: str
    whitespace: str | None = None
    closed: bool = False


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one choice of one request is decoded. Bytes are their numbers, 0–255.

    `temperature` 0 is greedy, ties to the lowest byte. `top_k` 0 keeps all 256 bytes.
    `seed` and `choice` key the counter-based random numbers; the counter is the index
    of the output byte, so they alone fix the bytes. `stop` are byte strings; a match ends
    the row and is left out of the output. `logprobs` and `prompt_logprobs` ask for that many
    alternatives beside each byte's own log-probability (0–256; None asks for nothing).

    Logits are changed in this order before a byte is drawn: `logit_bias` is added; `repetition_penalty` divides
    positive logits of bytes that are in prompt or completion and multiplies negative ones; and a byte's logit loses
    `frequency_penalty` for each time that it is in the completion and `presence_penalty` if it is there at all.

    `allowed_token_ids` are the only bytes that may come (EOS among them, or not), and none that would complete one of
    `bad_words` in the completion does. Neither EOS nor one of `stop_token_ids` comes before `min_tokens` bytes, and no
    stop string that ends within them counts. A byte of `stop_token_ids` ends the row; it and a stop string are
    in the output only with `include_stop_str_in_output`, EOS never. Where no byte may come the row ends with an error.

    `constraint` is what the completion has to be; EOS comes only where it is, and where nothing more may come the row
    ends. What cuts it short (`max_tokens`, a stop string or byte) leaves a beginning of it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[bytes, ...] = ()
    min_tokens: int = 0
    stop: tuple[bytes, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    utf8: Utf8Mode = "strict"
    constraint: Constraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_chunks: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, one completion. `prompt` is taken verbatim: BOS, where wanted, is in it.

    `cache_salt`: only requests of the same salt share what the prefix cache holds. `priority`: of those that wait, the
    lowest goes first.
    """

    request_id: str
    prompt: bytes
    params: SamplingParams = SamplingParams()
    cache_salt: str = ""
    priority: int = 0


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A chunk of `stage` (1…S) opens at byte offset `start` (prompt and completion counted
    from 0) because the router of the stage below said `p`."""

    stage: int
    start: int
    p: float


class ByteLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities of one byte under the model itself (no temperature, no mask).

    `byte` is the byte that came, `logprob` its own; `top` lists (byte, logprob) of the most
    probable ones, best first, ties by lowest byte; `rank` is the byte's own place in that order, from 1.
    """

    byte: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished request took: bytes, chunks per stage (stage 1 first), seconds.

    `cached_bytes` of the prompt came from the prefix cache; `chunks` counts theirs too. `park_seconds`, a part of
    `decode_seconds`, is how long its row waited at chunk boundaries; `preemptions` how often it gave up its row.
    """

    prompt_bytes: int
    completion_bytes: int
    chunks: tuple[int, ...]
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    cached_bytes: int = 0
    park_seconds: float = 0.0
    preemptions: int = 0


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one request gained since its last Output.

    `data` never holds back a byte except a possible beginning of a stop string. The entries of
    `logprobs` belong to the bytes of `data`, one each, where asked for. `prompt_logprobs` come
    once, before any data: an entry for each prompt byte but the first. `chunks` are the verdicts that became
    known, in order of (start, stage), where asked for; `opened` counts, always, the chunks of stage 1 that bytes of the
    completion opened. `finish_reason` is set in the last Output of a request;
    `stop_reason` is the stop string that matched, or the number of the byte (EOS or a stop byte) that
    ended it; `error` says why where the reason is `error`.
    """

    request_id: str
    data: bytes = b""
    logprobs: tuple[ByteLogprobs, ...] = ()
    prompt_logprobs: tuple[ByteLogprobs, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    opened: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: bytes | int | None = None
    error: str | None = None
    usage: Usage | None = None  # set with finish_reason


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """What one stage did in one piece of work of a tick.

    kind: `prefill` (any stage), `byte` (a decoding step of stage 0) or `stage` (of a stage above it, at once or for
    rows that had waited; then with the decoders that finished their bytes); rows: rows it covered, or for a prefill
    positions of that stage; seconds it took.
    """

    kind: Literal["prefill", "byte", "stage"]
    stage: int
    rows: int
    seconds: float


class GraphReplays(msgspec.Struct, frozen=True, array_like=True):
    """How often static steps of one kind (`byte` or `stage`, as in StepRecord) and number of rows, padding included,
    ran in a tick: as captured graphs, or operation by operation."""

    kind: Literal["byte", "stage"]
    bucket: int
    mode: Literal["graph", "eager"]
    count: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's state after a tick. Counts that end in `_total` only grow.

    `waiting` have no row: they have not begun, or were preempted. `parked` rows wait for stage 1, 2, …; `park_waits`
    are (stage, seconds) of those that waited and were taken up in this tick.
    """

    running: int = 0
    waiting: int = 0
    parked: tuple[int, ...] = ()  # stage 1 first
    rows_in_use: float = 0.0  # share of rows, 0–1
    kv_in_use: float = 0.0  # share of KV positions of full-attention stages, 0–1
    prompt_bytes_total: int = 0
    generation_bytes_total: int = 0
    chunks_total: tuple[int, ...] = ()  # stage 1 first
    preemptions_total: int = 0
    overlapped_ticks_total: int = 0  # whose step a GPU was given before the bytes of the one before were read
    prefix_cache_queries_bytes_total: int = 0  # of prompts looked up
    prefix_cache_hits_bytes_total: int = 0
    prefix_cache_bytes: int = 0  # held by snapshots, beside the pages they share with rows
    park_waits: tuple[tuple[int, float], ...] = ()
    steps: tuple[StepRecord, ...] = ()  # of this tick
    replays: tuple[GraphReplays, ...] = ()  # of this tick


class Tick(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The one message an engine sends a tick: what every row gained, and how the engine is."""

    outputs: tuple[Output, ...] = ()
    stats: EngineStats = EngineStats()


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What an engine says of itself once, when it is ready to serve.

    `kernels` is the code that runs the model: `torch`, `triton`, or `native` with its instruction set and quantization.
    `num_graphs` steps are captured, in so many seconds and bytes of the GPU's memory.
    """

    model: str
    device: str
    dtype: str
    kernels: str
    max_model_len: int
    max_num_seqs: int
    stages: tuple[StageInfo, ...]
    embedding_parameters: int
    load_seconds: float
    num_graphs: int = 0
    capture_seconds: float = 0.0
    capture_bytes: int = 0


class StageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of the model served: its layout, width and parameters."""

    stage: int
    d_model: int
    layout: str  # "m4 · m4" for encoder and decoder, "T22" for the main network
    parameters: int


class EngineFailure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot start or go on; `message` is one line that names the cause."""

    message: str


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The request's row is freed; its last Output has finish_reason `abort`."""

    request_id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """The engine ends after this message; rows still live are aborted."""


FromClient = Submit | Abort | Shutdown
FromEngine = EngineInfo | Tick | EngineFailure
