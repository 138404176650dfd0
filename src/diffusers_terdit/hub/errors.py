"""Turn what goes wrong with a Hub repository into an error that names it and says what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from safetensors import SafetensorError

from ..storage.saving import UnwritableError


@contextmanager
def hub_errors(name: str | os.PathLike, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Name the repository or folder in the errors that a file, a disk or the Hub causes; leave other errors alone.

    What the Hub answers becomes an `OSError` that says what to do, and so does a file that cannot be read. A
    `ValueError` about the contents of a file gets the name if it lacks it. A `TypeError` or another programming error
    surfaces as itself.

    Args:
        name (`str` or `os.PathLike`): Repository or folder.
        revision (`str`, *optional*): Branch, tag or commit.
        writing (`bool`): Whether this is an upload.
    """
    try:
        yield
    except UnwritableError:
        raise
    except (OSError, SafetensorError, httpx.TransportError, RuntimeError) as error:
        upload = isinstance(error, RuntimeError)  # what huggingface_hub makes of a failed upload of a large file
        if upload and not writing:
            raise
        message = None if os.path.isdir(name) else _hub_message(str(name), revision, writing, error)
        damaged = next((cause for cause in _causes(error)[1:] if isinstance(cause, SafetensorError)), None)
        if message is None and not writing and damaged and str(damaged) not in str(error):
            message = f"{str(error).strip()} It is damaged ({damaged}). Download or save it again."
        if message is None and not writing and str(name) not in str(error):
            message = f"{name}: a file cannot be read ({error}). Download or save it again."
        if message is None:
            raise
        raise OSError(message) from error
    except ValueError as error:
        if writing or str(name) in str(error):
            raise
        raise ValueError(f"{name}: {error}") from error


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and what caused it, the last first."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes


def _hub_message(name: str, revision: str | None, writing: bool, error: BaseException) -> str | None:
    """Return what the Hub, or the way to it, had against a request; `None` where it did not cause the error."""
    causes = _causes(error)
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
        return (
            f"{name} is not in the cache as a whole, and HF_HUB_OFFLINE forbids downloading it. Load it once online."
        )
    if status == 429 or status >= 500 or (writing and status):
        return f"The Hub answered {status} for {name} ({reason}). Try again later."
    broken = found(httpx.TransportError)
    if broken:
        way = "complete files are not sent twice" if writing else "if you meant a folder, check its name"
        return f"The connection to the Hub broke off at {name} ({type(broken).__name__}: {broken}). Try again; {way}."
    if found(LocalEntryNotFoundError):
        return f"{name} is not in the cache as a whole. Load it once without `local_files_only`."
    return None
