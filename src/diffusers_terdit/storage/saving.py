"""Write files and folders that are whole or absent, one process at a time.

A killed process, a full disk or a second writer never leaves half of a model that loads. Three kinds of names are
temporary: `*.partial` folders hold what is being written, a `*.saving` file says that files are being exchanged, and a
process holds a `*.lock`. What a killed process leaves of them is removed by the next one that writes there.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError


# What to do about an error of the disk.
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
    """Turn the error of a full, read-only or broken disk into an `UnwritableError` that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code is None and isinstance(error, (SafetensorError, shutil.Error)):
            found = re.search(r"(?:os error|Errno) (\d+)", str(error))
            code = int(found[1]) if found else None
        if code not in _ADVICE:
            raise
        message = f"{path} cannot be written: {os.strerror(code)}. {_ADVICE[code]}, and try again."
        raise UnwritableError(message, code) from error


@contextmanager
def _locked(path: Path, seconds: float, refusal: str) -> Iterator[None]:
    """Hold a lock file that is removed on exit; the system frees the lock of a process that is killed.

    Raises:
        OSError: With the message `refusal`: after `seconds` another process, or thread, still has it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise OSError(refusal) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file; the release removes it there
            path.unlink()  # while it is held: a process that waits for it notices, and makes another
        lock.release()


_OWNER = "owner.lock"  # of a partial folder; held by the process that writes there


@contextmanager
def partial_path(path: Path) -> Iterator[Path]:
    """A path with the name of `path`, in a folder next to it that is no other writer's and is removed at the end."""
    while True:
        folder = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        lock = FileLock(folder / _OWNER)
        folder.mkdir(parents=True)
        try:
            lock.acquire(blocking=False)
            break
        except (Timeout, FileNotFoundError, FileExistsError):
            continue  # `remove_partials` of another process came between the two lines, or into the second
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    try:
        yield folder / path.name
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def remove_partials(folder: Path, name: str = "*") -> None:
    """Remove what killed processes have left half-written in a folder: the partial folders that nobody holds."""
    for left in folder.glob(f"{name}.{'[0-9a-f]' * 8}.partial"):
        if left.is_symlink():
            continue
        with suppress(OSError):  # such as a `Timeout`: its process runs
            with FileLock(left / _OWNER, blocking=False):
                shutil.rmtree(left, ignore_errors=True)
            left.rmdir()  # on Windows, where the lock stayed


_WEIGHTS_FILE = re.compile(
    r"(?P<name>\w+?)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(\.(?P<listed>[^.]+))?\.json)?"
)


def weights_name(file: str) -> tuple[str, str] | None:
    """The name and variant that all weights files of one model share, shards and their index; `None` for other files.

    `"diffusion_pytorch_model.fp16-00001-of-00002.safetensors"` gives `("diffusion_pytorch_model", "fp16")`.
    """
    found = _WEIGHTS_FILE.fullmatch(file)
    return (found["name"], found["variant"] or found["listed"] or "") if found else None


@contextmanager
def replacing(folder: Path, marker: Path, clear: bool = True, seconds: float = 10.0) -> Iterator[Path]:
    """Write files of a folder so that it holds the old ones, the new ones, or a marker that says it holds neither.

    Yields an empty folder to write them into. Then, within moments, the marker is set, the files are moved to where
    they belong, weights files that they replace are removed, and the marker is removed. A process that is killed
    before leaves the old files; one that is killed in those moments leaves the marker, which `refuse_interrupted`
    looks for. An error, such as a full disk, leaves the old files.

    Args:
        folder (`Path`): Made if it does not exist.
        marker (`Path`): In the folder, or in one of its folders, that every loader of the files looks for.
        clear (`bool`): Whether to remove the weights that are replaced.
        seconds (`float`): How long to wait for another process that is moving its files.

    Raises:
        OSError: The files cannot be written, one of the folders or the marker is a symbolic link, or another process
            moves its files for too long.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder)
        with partial_path(folder / "new") as partial:
            partial.mkdir()
            yield partial
            files = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
            parents = {folder / file.parent for file in files} | {marker.parent}
            _refuse_links([marker, *(parents - {folder})])
            for parent in parents:
                parent.mkdir(exist_ok=True)
            busy = f"Another process is saving into {marker.parent}. Save elsewhere, or try again."
            with _locked(marker.parent / "terdit-saving.lock", seconds, busy):
                marker.touch()
                for file in files:
                    _set_mode(partial / file)
                    os.replace(partial / file, folder / file)
                written = {(file.parent, weights_name(file.name)) for file in files if clear}
                for parent in {parent for parent, name in written if name}:
                    for path in (folder / parent).iterdir():
                        name = weights_name(path.name)
                        if name and (parent, name) in written and parent / path.name not in files:
                            path.unlink(missing_ok=True)
                marker.unlink(missing_ok=True)


def _refuse_links(paths: Iterable[Path]) -> None:
    """Raise an `OSError` at a symbolic link: a folder from elsewhere may have one to any file of this user."""
    for path in paths:
        if path.is_symlink():
            raise OSError(
                f"{path} is a symbolic link, which is not written through. Remove it, or choose another folder."
            )


def refuse_interrupted(folder: Path) -> None:
    """Raise an `OSError` if a save into a folder was killed half-way, or is under way."""
    for marker in folder.glob("*.saving"):
        raise OSError(
            f"A save into {folder} was interrupted, or is under way: it may hold files of two models. Save the"
            f" {marker.stem.split('_')[-1]} there again, or take another copy. ({marker.name})"
        )


@contextmanager
def undisturbed(*folders: Path) -> Iterator[None]:
    """Raise an `OSError` if the files of a model are replaced while they are read: it would be a mixture of two.

    Args:
        folders: Those whose configs and weights are read in the context; what does not exist is no folder of files.

    Raises:
        OSError: A save is under way, was interrupted, or ended meanwhile, also where something else was raised first.
    """

    def look() -> dict[Path, tuple[int, int, int]]:
        found = {}
        for folder in folders:
            refuse_interrupted(folder)
            for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
                with suppress(FileNotFoundError):  # replaced since it was listed, which the second look finds
                    status = path.stat()
                    found[path] = (status.st_ino, status.st_mtime_ns, status.st_size)
        return found

    def compare(cause: BaseException | None) -> None:
        if look() != before:
            raise OSError(f"Another process saved into {folders[0]} while it was read. Load it again.") from cause

    before = look()
    try:
        yield
    except Exception as error:
        compare(error)
        raise
    compare(None)


@contextmanager
def output_folder(path: str | os.PathLike, is_main_process: bool = True, seconds: float = 10.0) -> Iterator[None]:
    """Keep a folder for one run: make it, try to write there, and remove what killed runs left half-written.

    A second run waits, then is refused. The system releases the lock however the process ends.

    Args:
        path (`str` or `os.PathLike`): The folder.
        is_main_process (`bool`): Of the processes of a run, one keeps the folder.
        seconds (`float`): How long to wait for another run.

    Raises:
        OSError: Another run has the folder, nothing can be written there, or a file in it is a symbolic link: what a
            run appends to, such as its log, would be written elsewhere.
    """
    path = Path(path)
    with ExitStack() as stack:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            if is_main_process:
                busy = f"Another run is writing into {path}. Wait for its end, or choose another folder."
                stack.enter_context(_locked(path / "terdit-run.lock", seconds, busy))
                _refuse_links(found for found in path.iterdir() if not found.is_dir())
                for folder in (path, *(found for found in path.iterdir() if found.is_dir())):
                    remove_partials(folder)
        yield


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file that appears whole or not at all: yield another path, which is renamed to `path` at the end.

    It is in a separate folder, because safetensors creates temporary files next to it while it writes.

    Raises:
        OSError: The disk is full or not writable; what was at `path` is still there.
    """
    path = Path(path)
    with writing(path), partial_path(path) as partial:
        partial.touch()
        yield partial
        _set_mode(partial)
        _sync(partial)
        os.replace(partial, path)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Write a folder that appears whole or not at all: yield another one, which is renamed to `path` at the end.

    A folder that was at `path` is replaced. On an error the new folder is removed.

    Raises:
        OSError: The disk is full or not writable; what was at `path` is still there.
    """
    path = Path(path)
    with writing(path), partial_path(path) as partial:
        partial.mkdir()
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _set_mode(file)
            _sync(file)
        old = partial.with_name(f"{path.name}.old")
        if path.exists():  # moved as a whole: a folder that is removed file by file may look whole
            os.replace(path, old)
        try:
            os.replace(partial, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        _sync(path.parent)


def _set_mode(path: Path) -> None:
    """Give a file the mode that the user's umask asks for, as its new folder has it; safetensors gives 0600."""
    if path.is_file():
        path.chmod(path.parent.stat().st_mode & 0o666)


def _sync(path: Path) -> None:
    """Have the system write a file or folder to its disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs no file opened to read
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scrub_paths(folder: str | os.PathLike) -> None:
    """Take `_name_or_path`, a path of this machine, out of the configs in a saved model or pipeline."""
    for path in [*Path(folder).glob("*config.json"), *Path(folder).glob("*/*config.json")]:
        config = json.loads(path.read_text("utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            write_json(path, config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as diffusers writes its configs, whole or not at all."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
