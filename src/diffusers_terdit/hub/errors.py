"""Turn what goes wrong with a Hub repository into an error that names it and says what to do."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from ..storage.saving import UnwritableError
from ..storage.weights import BROKEN


@contextmanager
def hub_errors(name: str | os.PathLike, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Turn what goes wrong with a Hub repository into an `OSError` that names it and says what to do.

    What a file's contents bring about while reading is a `ValueError` with the name, for a local folder too.

    Args:
        name (`str` or `os.PathLike`): Repository or folder.
        revision (`str`, *optional*): Branch, tag or commit.
        writing (`bool`): Whether the token needs to write.
    """
    try:
        yield
    except UnwritableError:
        raise
    except (ValueError, *BROKEN) as error:
        if writing or isinstance(error, OSError) or (isinstance(error, ValueError) and str(name) in str(error)):
            raise
        reason = (
            str(error)
            if isinstance(error, ValueError)
            else f"a file is not what it should be ({error!r:.300}). Save it again."
        )
        raise ValueError(f"{name}: {reason}") from error
    except (OSError, HfHubHTTPError, httpx.TransportError, RuntimeError) as error:  # the last from LFS uploads
        message = None if os.path.isdir(name) else _hub_message(str(name), revision, writing, error)
        nameless = isinstance(error, OSError) and str(name) not in str(error)
        if isinstance(error, NotImplementedError) and _passes(error, "configuration_utils.py", "from_config"):
            raise ValueError(
                f"{name}: a config asks for what diffusers has not ({error}). Save it again, or update diffusers."
            ) from error
        if message is None and not writing and (nameless or _passes(error, "torch/serialization.py")):
            message = f"{name}: a file cannot be read ({error}). Download or save it again."
        if message is None:
            raise
        raise OSError(message) from error


def _passes(error: BaseException, file: str, function: str = "") -> bool:
    """Whether an error came through a function, or any function of a file."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).as_posix().endswith(file) and function in (frame.name, "") for frame in frames)


def _hub_message(name: str, revision: str | None, writing: bool, error: BaseException) -> str | None:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    verb = "write to" if writing else "read"
    access = f"log in with `hf auth login`, or pass the `token=` of an account that may {verb} it"

    def found(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if found(GatedRepoError):
        return f"{name} is gated: accept its terms on https://huggingface.co/{name}, then {access}."
    http = found(HfHubHTTPError)
    status = getattr(getattr(http, "response", None), "status_code", 0)
    reason = (str(http).strip().splitlines() or [""])[-1]
    if status in (401, 403) and (writing or not found(RepositoryNotFoundError)):
        return f"The Hub does not let you {verb} {name} ({status}: {reason}): {access}."
    if found(RevisionNotFoundError):
        return f"{name} has no branch, tag or commit {revision!r}; see https://huggingface.co/{name}/branches."
    if found(RepositoryNotFoundError):
        return f"There is no repository {name} on the Hub, or it is private: check the name, or {access}."
    if found(OfflineModeIsEnabled) and writing:
        return f"HF_HUB_OFFLINE is set, so nothing can be uploaded to {name}."
    if found(OfflineModeIsEnabled):
        return f"{name} is not in the cache as a whole, and HF_HUB_OFFLINE forbids to download. Load it once online."
    if status == 429 or status >= 500 or (writing and status):
        return f"The Hub answered {status} for {name} ({reason}). Try again later."
    broken = found(httpx.TransportError)
    if broken:
        return (
            f"The connection to the Hub broke off at {name} ({type(broken).__name__}: {broken}). Try again: files that"
            " had arrived whole are not sent twice."
        )
    if found(LocalEntryNotFoundError):
        return f"{name} is not in the cache as a whole. Load it once without `local_files_only`."
    return None
