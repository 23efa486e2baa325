"""What is asked of a server under load, as data: kinds of requests, how they arrive, and what is promised of them.

Knows no server and no clock. A scenario is a TOML (or JSON) file; `scenarios/` has those that come with the project.
Request `variant` of a scenario is always the same request, so that its bytes can be asked for again, alone.
"""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

FOLDER = Path(__file__).parent / "scenarios"
WORDS = (  # noqa: SIM905
    "river stone window morning letter garden the a of and with under over slowly bright small old winter road "
    "harbour clock paper lantern bridge field yellow silent carried opened followed became remembered between"
).split()
SYMBOLS = "=!"
MAX_BYTES = 65536  # of a prompt or a completion
MAX_SECONDS = 3600.0

Bytes = Annotated[int, Field(ge=1, le=MAX_BYTES)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Range(_Data):
    """Whole numbers, both ends included."""

    least: Bytes
    most: Bytes

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least} is more than most {self.most}")
        return self

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.least, self.most)


class Kind(_Data):
    """One kind of request, drawn by its weight among the others.

    prompt_bytes: without `shared_bytes`, those that all prompts of the kind begin with. text: words, or one symbol
    again and again, each on a line of its own: the demo model opens a chunk with every byte of that. turns: of a
    chat, the last one to be answered. abort_share: of the streams that their client closes midway. With ends, a
    completion may end before max_tokens.
    """

    name: str
    weight: PositiveFloat = 1.0
    endpoint: Literal["completions", "chat"] = "completions"
    prompt_bytes: Range
    max_tokens: Range
    text: Literal["words", "symbols"] = "words"
    shared_bytes: Annotated[int, Field(ge=0, le=MAX_BYTES)] = 0
    turns: Annotated[int, Field(ge=1, le=64)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    abort_share: Share = 0.0
    ends: bool = False

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.turns > 1 and self.endpoint != "chat":
            raise ValueError("only a chat has turns")
        return self


class Arrivals(_Data):
    """When requests come: at random, at even intervals, or `size` of them at once at random."""

    kind: Literal["poisson", "steady", "bursts"] = "poisson"
    size: Annotated[int, Field(ge=1, le=1024)] = 1

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if (self.kind == "bursts") != (self.size > 1):
            raise ValueError("bursts have a size of 2 or more, and nothing else has one")
        return self

    def interval(self, rate: float, rng: random.Random) -> float:
        """Seconds to the next arrival, at `rate` requests a second."""
        mean = self.size / rate
        return mean if self.kind == "steady" else rng.expovariate(1 / mean)

    def first(self, rate: float, rng: random.Random) -> float:
        """Seconds to the first arrival; sources that keep time do not keep it together."""
        return rng.random() * self.size / rate if self.kind == "steady" else self.interval(rate, rng)


class Objective(_Data):
    """What a stream is promised: seconds to its first byte, from when it was due; the longest silence between two
    events; and the share of the requests offered of which that has to hold."""

    first_byte: PositiveFloat
    gap: PositiveFloat
    share: Annotated[float, Field(gt=0, le=1)]


class Asked(_Data):
    """One request. prompt: text, or a chat's messages. only: the characters of its completion, empty for all."""

    kind: str
    variant: int
    endpoint: Literal["completions", "chat"]
    prompt: str | tuple[tuple[str, str], ...]
    max_tokens: int
    temperature: float
    only: str
    is_shared: bool
    ends: bool

    def body(self, *, salt: str | None = None, peer: str | None = None) -> dict[str, Any]:
        """The JSON of the request, streamed.

        salt: keeps it from prompts that are in a cache, unless it is one that shares. peer: the model's name at a
        server that is not ours, which is sent no field of ours.
        """
        body: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.variant,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if isinstance(self.prompt, str):
            body["prompt"] = self.prompt
        else:
            body["messages"] = [{"role": role, "content": content} for role, content in self.prompt]
        if peer is not None:
            return {**body, "model": peer}
        if salt is not None and not self.is_shared:
            body["cache_salt"] = salt
        if self.only:
            body["allowed_token_ids"] = list(self.only.encode())
        return {**body, "ignore_eos": not self.ends}


class Scenario(_Data):
    """rates: requests a second offered, level after level; seconds: of each, of which the first warm_up are not
    counted; variants: how many different requests there are."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    description: str
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=32, strict=False)]
    seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)]
    warm_up: NonNegativeFloat = 0.0
    arrivals: Arrivals = Arrivals()
    objective: Objective
    requests: Annotated[tuple[Kind, ...], Field(min_length=1, strict=False)]
    variants: PositiveInt = 1024

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if list(self.rates) != sorted(set(self.rates)):
            raise ValueError("rates have to rise")
        if self.warm_up >= self.seconds:
            raise ValueError("warm_up leaves nothing to count")
        names = [kind.name for kind in self.requests]
        if len(set(names)) < len(names):
            raise ValueError("two kinds of requests have the same name")
        return self

    def with_changes(self, **changes: Any) -> Scenario:
        """Another one, validated; changes that are None are none."""
        chosen = {name: value for name, value in changes.items() if value is not None}
        return Scenario.model_validate({**self.model_dump(), **chosen})

    def kind(self, name: str) -> Kind:
        return next(kind for kind in self.requests if kind.name == name)

    def request(self, variant: int) -> Asked:
        """Request `variant`, the same at every call."""
        rng = random.Random(f"{self.name} {variant}")
        (kind,) = rng.choices(self.requests, [kind.weight for kind in self.requests])
        length, max_tokens = kind.prompt_bytes.draw(rng), kind.max_tokens.draw(rng)
        shared = words(kind.shared_bytes, random.Random(kind.name))
        own = words(length, rng) if kind.text == "words" else symbols(length, rng)
        return Asked(
            kind=kind.name,
            variant=variant,
            endpoint=kind.endpoint,
            prompt=_turns(shared, own, kind.turns) if kind.endpoint == "chat" else shared + own,
            max_tokens=max_tokens,
            temperature=kind.temperature,
            only="" if kind.text == "words" else "".join(sorted(set(own))),
            is_shared=kind.shared_bytes > 0,
            ends=kind.ends,
        )


def words(length: int, rng: random.Random) -> str:
    """A text of so many bytes."""
    found: list[str] = []
    missing = length
    while missing > 0:
        found.append(rng.choice(WORDS))
        missing -= len(found[-1]) + 1
    return " ".join(found)[:length].ljust(length)


def symbols(length: int, rng: random.Random) -> str:
    """As many characters, every second one the end of a line."""
    return (f"{rng.choice(SYMBOLS)}\n" * length)[:length]


def _turns(shared: str, own: str, turns: int) -> tuple[tuple[str, str], ...]:
    """A chat of user and assistant in turns, a user's last, behind what all chats of the kind begin with."""
    parts = 2 * turns - 1
    cuts = [len(own) * part // parts for part in range(parts + 1)]
    said = [("user" if part % 2 == 0 else "assistant", own[cuts[part] : cuts[part + 1]]) for part in range(parts)]
    return ((("system", shared),) if shared else ()) + tuple(said)


def names() -> list[str]:
    """Those that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Scenario:
    """By name, or a file's path; raises ValueError in words where it is none."""
    path = FOLDER / f"{name}.toml" if name in names() else Path(name)
    if not path.is_file():
        raise ValueError(f"{name} is no scenario (there are {', '.join(names())}) and no file")
    text = path.read_text(encoding="utf-8")
    try:
        return Scenario.model_validate(json.loads(text) if path.suffix == ".json" else tomllib.loads(text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
