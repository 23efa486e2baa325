"""What the models of all requests have in common. Knows no parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class StrictModel(BaseModel):
    """Null means the default; names nobody knows are remembered, not refused."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: item for key, item in value.items() if item is not None}
        return value


def utf8(text: str, where: str = "") -> bytes:
    """The bytes of a text; a lone surrogate is an error."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise invalid_value(f"{where}has a lone surrogate, which no text can contain") from None


def invalid_value(what: str) -> PydanticCustomError:
    # The text may hold braces of the client's, which the template must not see.
    return PydanticCustomError("value", "{what}", {"what": what})


def wrong(name: str, what: str) -> PydanticCustomError:
    """An error that names the parameter at fault itself, for models that check several fields together."""
    return PydanticCustomError("parameter", "{name}: {what}", {"name": name, "what": what})
