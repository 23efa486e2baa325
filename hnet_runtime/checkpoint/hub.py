"""A model's files from the Hugging Face hub, into the hub's own cache.

Knows hub ids and revisions; the reading of the files is not its business. Downloads no
more than the configuration and one form of the weights, and reports nothing to anyone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hnet_runtime.checkpoint.directory import CONFIG_NAME, INDEX_NAME, weight_names
from hnet_runtime.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A directory that holds the files of one commit of a hub repository."""

    directory: Path
    commit: str


def fetch(model: str, revision: str | None = None) -> Snapshot:
    """Downloads what is needed of `model` at `revision` (default: main) unless the cache has it.

    Honours the hub client's own variables (`HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`, …).
    Without a connection the cached commit of that revision is used. Raises CheckpointError.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when the client is imported: nothing is reported home
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    wanted = revision or constants.DEFAULT_REVISION
    named = f"{model} at revision {wanted}" if revision else model
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="hnet-serve")
    try:
        return _download(api.model_info(model, revision=wanted), model, wanted, api.endpoint)
    except GatedRepoError as error:
        raise CheckpointError(f"{named}: gated: ask for access on the hub, then log in or set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{named}: no such file or directory, and no such repository on the hub ({api.endpoint}), or a private one"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: the hub has no revision {wanted!r}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{model}: not a hub id: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{named}: the hub ({api.endpoint}) answered: {_first_line(error)}") from error
    except (TransportError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        reason = f"the hub ({api.endpoint}) cannot be reached ({_first_line(error)})"
        if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set"
        try:
            directory = Path(snapshot_download(model, revision=wanted, local_files_only=True))
        except LocalEntryNotFoundError as missing:
            raise CheckpointError(
                f"{named}: no such file or directory; {reason} and the hub's cache does not have it"
            ) from missing
        _log.warning("%s: %s; using the cached commit %s", model, reason, directory.name)
        return Snapshot(directory, directory.name)
    except OSError as error:
        raise CheckpointError(f"{named}: cannot be downloaded: {_first_line(error)}") from error


def _download(info: ModelInfo, model: str, revision: str, endpoint: str) -> Snapshot:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    names = wanted_files([sibling.rfilename for sibling in info.siblings or []], model)
    if any(not isinstance(try_to_load_from_cache(model, name, revision=info.sha), str) for name in names):
        _say_licence(info, model)
    paths = [Path(hf_hub_download(model, name, revision=revision, endpoint=endpoint)) for name in names]
    directory = paths[0].parent
    if any(path.parent != directory for path in paths):
        raise CheckpointError(f"{model}: revision {revision} moved while it was downloaded; start again")
    return Snapshot(directory, directory.name)


def wanted_files(names: Collection[str], model: str) -> list[str]:
    """The files to download: `config.json` and one form of the weights, safetensors before pickles."""
    top = sorted(name for name in names if "/" not in name)
    weights = list(weight_names(top, model))
    if weights == [INDEX_NAME]:
        weights += [name for name in top if name.endswith(".safetensors")]
    return ([CONFIG_NAME] if CONFIG_NAME in top else []) + weights


def _say_licence(info: ModelInfo, model: str) -> None:
    licence = info.card_data.get("license") if info.card_data else None
    if licence:
        _log.warning("%s: downloading; its model card declares the licence %s", model, licence)
    else:
        _log.warning("%s: downloading; this checkpoint declares no licence, so check what you may do with it", model)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
