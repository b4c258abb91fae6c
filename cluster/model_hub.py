"""Fetches a model from the Hugging Face hub, or from whatever HF_ENDPOINT names.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean everywhere; the files lie in the hub's own cache,
which other tools share. Only weights, JSON, Jinja and the model card are taken: nothing that would be executed. Pickled
weights, which are opened with a restricted loader, are taken only from a repository that has no safetensors.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from cluster.model_directory import DESCRIBING_FILES
from cluster.model_progress import Progress
from workers.errors import ModelFileError
from workers.weights.directory import PICKLES, SAFETENSORS

NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")

WANTED = ["*.safetensors", SAFETENSORS.index, *DESCRIBING_FILES]
PICKLED = ["pytorch_model*.bin", PICKLES.index]
UNWANTED = ["*/*", "consolidated*"]
"""Sub-directories, and Mistral's second copy of the weights."""


class HubName(NamedTuple):
    repository: str
    revision: str | None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse(name: str) -> HubName | None:
    """Return what ORG/NAME[@revision] names, or None if `name` has another form."""
    found = NAME.fullmatch(name)
    return HubName(found["repository"], found["revision"]) if found else None


def snapshot(name: HubName, progress: Progress) -> Path:
    """Return the directory of `name` in the hub's cache, fetched or completed first. Raises ModelFileError."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    where = f"{name} at {constants.ENDPOINT}"
    progress.note(f"looking for {where}")
    try:
        folder = _download(name, WANTED)
        return folder if SAFETENSORS.is_in(folder) else _download(name, [*WANTED, *PICKLED])
    except hub.GatedRepoError as error:
        raise ModelFileError(
            f"{where}: is gated: accept the model's terms on its page, and set HF_TOKEN to a token of that account"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelFileError(f"{where}: the repository has no revision {name.revision!r}") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelFileError(
            f"{where}: no such repository, or a private one: check the name or set HF_TOKEN to a token that may read it"
        ) from error
    except hub.LocalEntryNotFoundError as error:
        raise ModelFileError(
            f"{where}: {_unreachable(error, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE)}"
        ) from error
    except hub.HFValidationError as error:
        raise ModelFileError(f"{name} is not a name of a repository: {error}") from error
    except Exception as error:  # whatever its HTTP library raises: another one in each of its releases
        raise ModelFileError(f"{where}: cannot be fetched: {_first_line(error)}") from error


def _download(name: HubName, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(name.repository, revision=name.revision, allow_patterns=wanted, ignore_patterns=UNWANTED)
    )


def _unreachable(error: Exception, is_offline: bool, cache: str) -> str:
    if is_offline:
        return f"not (completely) in the hub's cache {cache}, and HF_HUB_OFFLINE forbids to fetch it"
    cause = error.__cause__ or error
    return f"not (completely) in the hub's cache {cache}, and it cannot be fetched: {_first_line(cause)}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
