"""What the routes share: the engine's client, the gate, the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from hnet_runtime.engine.messages import Constraint, EngineInfo
from server.admission import Admission
from server.engine_client import EngineClient
from server.errors import model_not_found
from server.schemas import GenerationRequest
from server.settings import ServerSettings
from server.structured import ConstraintChecker

if TYPE_CHECKING:
    from server.tracing import Tracing


@dataclass(frozen=True)
class Service:
    """One per server; lives in `app.state.service`."""

    settings: ServerSettings
    client: EngineClient
    admission: Admission
    constraints: ConstraintChecker
    tracing: Tracing | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine said of itself; only after the gate has let a request in."""
        assert self.client.info is not None
        return self.client.info

    @property
    def model_name(self) -> str:
        """The name clients call the model by: the one set, else the model's own, without its folders."""
        if self.settings.served_model_name is not None:
            return self.settings.served_model_name
        name = self.info.model
        return PurePath(name).name if PurePath(name).is_absolute() or name.startswith(".") else name

    async def constraint(self, request: GenerationRequest) -> Constraint | None:
        """What a completion has to be. Raises ApiError: 400 for what cannot be enforced, 429."""
        asked = request.constraint()
        if asked is None:
            return None
        await self.constraints.check(*asked)
        return asked[0]

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for a name that is not served here; no name means the served one."""
        if name is not None and name != self.model_name:
            raise model_not_found(name)
