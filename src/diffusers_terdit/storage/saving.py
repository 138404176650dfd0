"""Write files and folders that are whole or absent, one process at a time.

A killed process, a full disk or a second writer never leaves half of a model that loads.
"""

import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


# Not an import statement: diffusers refuses remote code where one of its imports, wherever it stands, is missing.
fcntl: Any = None if os.name == "nt" else import_module("fcntl")


def is_running(process: str) -> bool:
    """Whether a process of this machine, by number, still runs."""
    if os.name == "nt":
        return process.isdigit()  # not known: there `os.kill(n, 0)` would interrupt the process
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except OSError:  # of another user
        return True
    return True


# What a disk answers to writing, beside being full: what to do about it.
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there, or choose another folder"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Allow writing there, or choose another folder"),
    errno.EIO: "Look at the disk, or choose another folder",
}


class UnwritableError(OSError):
    """A disk is full, read-only or broken; the message names the path and says what to do."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.errno = code


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn what a full, read-only or broken disk answers into an `UnwritableError` of `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        code = getattr(error, "errno", None)
        if code is None and isinstance(error, (SafetensorError, shutil.Error)):
            found = re.search(r"(?:os error|Errno) (\d+)", str(error))
            code = found and int(found[1])
        pickled = isinstance(error, RuntimeError) and re.search("inline_container|StreamWriter|iostream", str(error))
        if pickled:  # torch does not say why
            code = errno.ENOSPC
        if code not in _ADVICE or not (pickled or isinstance(error, (OSError, SafetensorError))):
            raise
        reason = "the disk is full, or does not take the file" if pickled else os.strerror(code)
        raise UnwritableError(f"{path} cannot be written: {reason}. {_ADVICE[code]}, and try again.", code) from error


_partials: set[str] = set()  # of this process


@contextmanager
def partial_path(path: Path) -> Iterator[Path]:
    """A path beside `path` that no other process or thread writes to; what is left there at the end is removed."""
    name = f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    _partials.add(name)
    try:
        yield path.with_name(name)
    finally:
        remove(path.with_name(name))
        _partials.discard(name)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_partials(folder: Path, name: str = "*") -> None:
    """Remove what processes that were killed have left half-written in a folder."""
    for left in folder.glob(f"{name}.*.partial"):
        found = re.search(r"\.(\d+)-[0-9a-f]{8}\.partial$", left.name)
        if found and left.name not in _partials and (found[1] == str(os.getpid()) or not is_running(found[1])):
            remove(left)


_WEIGHTS = re.compile(
    r"(?P<name>\w+?)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(\.(?P<listed>[^.]+))?\.json)?"
)


def _weights_of(file: Path) -> tuple[Path, str, str] | None:
    """Folder, name and variant that weights files of one model share, in one file or in shards."""
    found = _WEIGHTS.fullmatch(file.name)
    return found and (file.parent, found["name"], found["variant"] or found["listed"] or "")


@contextmanager
def replacing(folder: Path, marker: Path, clear: bool = True) -> Iterator[Path]:
    """Write files of a folder so that it holds the old ones, the new ones, or a marker that says it holds neither.

    Gives an empty folder to write them into. Then, within moments, a marker is set, the files are moved to where they
    belong, weights files that they replace are removed (`clear`), and the marker goes. A process that is killed before
    leaves the old files; one that is killed in those moments leaves the marker, which `refuse_interrupted` looks for.
    An error, such as a full disk, leaves the old files.
    """
    with writing(folder):
        remove_partials(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with partial_path(folder / "new") as partial:
            partial.mkdir()
            yield partial
            files = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
            for parent in {folder / file.parent for file in files} | {marker.parent}:
                parent.mkdir(exist_ok=True)
            with marked(marker):
                for file in files:
                    os.replace(partial / file, folder / file)
                models = {_weights_of(folder / file) for file in files if clear} - {None}
                for parent in {model[0] for model in models if model}:
                    for path in parent.iterdir():
                        if _weights_of(path) in models and path.relative_to(folder) not in files:
                            path.unlink(missing_ok=True)


def locked(descriptor: int) -> bool:
    """Take the lock of an open file or folder, which ends with the process; False where another one has it."""
    if fcntl is None:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has no locks
        return True
    return True


def _take(marker: Path, seconds: float = 10.0) -> int:
    """Make a marker, open and locked; wait for a process that has it, take over from one that was killed."""
    end = time.monotonic() + seconds
    while True:
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
        owner = os.read(descriptor, 100).decode("ascii", "replace")
        free = locked(descriptor) if fcntl is not None else not is_running(owner)
        # Whoever had it may have removed it since it was opened.
        if free and marker.exists() and os.path.samestat(os.fstat(descriptor), marker.stat()):
            with suppress(OSError):  # the number is for people; a full disk does not take it
                os.truncate(marker, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)
        if time.monotonic() > end:
            raise OSError(
                f"Process {owner or 'unknown'} is saving into {marker.parent}. Save elsewhere, or try again;"
                f" if it is gone, delete {marker.name} there."
            )
        time.sleep(0.05)


@contextmanager
def marked(marker: Path) -> Iterator[None]:
    """Set a marker in a folder while files around it are replaced; it stays when that fails or is killed."""
    descriptor = _take(marker)
    try:
        yield
        if os.name != "nt":
            marker.unlink(missing_ok=True)  # before it is let go: then nobody removes another's
    except BaseException:
        with suppress(OSError):
            os.truncate(descriptor, 0)  # no process's number: where there are no locks, the next save takes over
        raise
    finally:
        os.close(descriptor)
    if os.name == "nt":
        marker.unlink(missing_ok=True)


def refuse_interrupted(folder: Path) -> None:
    """Raise an `OSError` if a save into a folder was killed half-way, or is under way."""
    for marker in folder.glob("*.saving"):
        raise OSError(
            f"A save into {folder} was interrupted, or is under way: it may hold files of two models. Save the"
            f" {marker.stem.split('_')[-1]} there again, or take another copy. ({marker.name})"
        )


@contextmanager
def output_folder(path: str | os.PathLike, is_main_process: bool = True, seconds: float = 10.0) -> Iterator[None]:
    """Keep a folder for one run: make it, try to write there, and remove what killed runs left half-written.

    Another run that wants the folder meanwhile waits, and is refused in the end. The system ends this with the
    process, however it ends; Windows, and file systems without locks, let both run.

    Args:
        path (`str` or `os.PathLike`): The folder.
        is_main_process (`bool`): Of the processes of a run, one keeps the folder.
        seconds (`float`): How long to wait for another run.

    Raises:
        OSError: Another run has the folder, or nothing can be written there.
    """
    path = Path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    if not is_main_process or os.name == "nt":  # Windows opens no folders
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = time.monotonic() + seconds
        while not locked(descriptor):
            if time.monotonic() > end:
                raise OSError(f"Another run is writing into {path}. Wait for its end, or choose another folder.")
            time.sleep(0.1)
        with writing(path), partial_path(path / "new") as partial:
            partial.touch()
        for folder in (path, *(found for found in path.iterdir() if found.is_dir())):
            remove_partials(folder)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file that appears whole or not at all: yields another path, which is renamed to `path` at the end.

    It lies in a folder of its own, since safetensors has files beside it while it writes.

    Raises:
        OSError: The disk is full or not writable; what was at `path` is still there.
    """
    path = Path(path)
    with writing(path), partial_path(path) as folder:
        folder.mkdir()
        partial = folder / path.name
        partial.touch()
        mode = partial.stat().st_mode  # safetensors would leave the file to its owner alone
        yield partial
        partial.chmod(mode)
        _sync(partial)
        os.replace(partial, path)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that appears whole or not at all: yields a folder beside it, which is renamed to `path` at the end.

    A folder that was at `path` is replaced. On an error the new folder is removed.

    Raises:
        OSError: The disk is full or not writable; what was at `path` is still there.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_path(path) as partial, partial_path(path) as old:
            partial.mkdir()
            yield partial
            for file in [*partial.rglob("*"), partial]:
                _sync(file)
            if path.exists():
                os.replace(path, old)  # in one step: a folder that is removed file by file may look whole
            os.replace(partial, path)
            _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scrub_paths(folder: str | os.PathLike) -> None:
    """Take `_name_or_path`, a path of this machine, out of the configs in a saved model or pipeline."""
    for path in [*Path(folder).glob("*config.json"), *Path(folder).glob("*/*config.json")]:
        config = json.loads(path.read_text("utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as diffusers writes its configs."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
