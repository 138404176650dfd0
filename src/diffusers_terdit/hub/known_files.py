"""What leaves a folder: the files of a model that this package knows, read through no link that leads elsewhere.

A folder that was cloned or unpacked may hold links to any file of its reader, such as a token; one that is worked in
holds notes, checkpoints and settings of other programs. A hard link cannot be told from a file.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from diffusers.utils import logging

from ..storage.saving import weights_name
from ..storage.weights import read_json


logger = logging.get_logger(__name__)

PICTURES = "card_images"  # folder of the repository

CARD, _INDEX, _LOG = "README.md", "model_index.json", {"log.jsonl", "log.png"}
_WEIGHTS = "diffusion_pytorch_model"
_CONFIG = re.compile(r"(\w+_)?config\.json")
_CODE = re.compile(r"(pipeline_terdit|transformer_terdit|ternary_linear)_[0-9a-f]{12}\.py")
_LICENSE = re.compile(r"(LICENSE|NOTICE)(\.\w+)?")
_PICTURE = re.compile(r".+\.(png|jpe?g|webp|gif)", re.IGNORECASE)
_SHOWN = re.compile(r"!\[[^\[\]]*\]\(([^()\s]+)\)")  # no bracket in brackets: the time is linear in the card


def open_inside(folder: str | os.PathLike, name: str) -> BinaryIO:
    """Open a file of a folder to read it. No part of its name may be a link, wherever it leads.

    In the Hub's cache a file is a link from `models--*/snapshots/*` to `blobs` of the same `models--*`; that is read.

    Args:
        folder (`str` or `os.PathLike`): May be a link itself: its user named it.
        name (`str`): Path in it.

    Raises:
        OSError: It is, or is in, a link; it is no file; or it cannot be read.
    """
    start = Path(os.path.realpath(folder))
    path, parts = start / name, PurePosixPath(name).parts
    if path.is_symlink():
        caches = [place.parent for place in start.parents if place.name == "snapshots"]
        blobs = [cache / "blobs" for cache in caches if cache.name.startswith("models--")]
        target = Path(os.path.realpath(path))
        if target.parent in blobs:
            start, parts = target.parent, (target.name,)
    try:
        descriptor = _open_without_links(start, parts)
    except OSError as error:
        if Path(os.path.realpath(path)) != path or start not in path.parents:
            raise OSError(
                f"{path} is a link, or in a folder that is one. It may lead to any file of yours, so nothing is read"
                " through it. Put the file itself there, or remove the link."
            ) from None
        raise OSError(error.errno, error.strerror, str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file. Put one there, or remove it.")
    return os.fdopen(descriptor, "rb")


def _open_without_links(start: Path, parts: tuple[str, ...]) -> int:
    """Open a path below a folder, each part in the folder that was opened before, so that none can be exchanged."""
    path = start.joinpath(*parts)
    if ".." in parts or start not in path.parents:
        raise OSError
    if os.open not in os.supports_dir_fd:  # Windows, where making links takes a privilege
        if Path(os.path.realpath(path)) != path:
            raise OSError
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    descriptor = os.open(start, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    for i, part in enumerate(parts, 1):
        kind = os.O_DIRECTORY if i < len(parts) else os.O_NONBLOCK  # which does not wait for the writer of a pipe
        try:
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def known_files(folder: str | os.PathLike, whole: bool = False) -> list[str]:
    """Return the names of the files in a folder that belong to its model; one log line names what else is there.

    These are configs, weights with their index, and exported code, in a pipeline those of its components; the card,
    the pictures that it shows, and a license; the log of a training, its curves and its samples.

    Args:
        folder (`str` or `os.PathLike`): Of a pipeline, model or layer.
        whole (`bool`): Whether every file of a component counts but hidden ones, as in pipelines of other classes.

    Raises:
        OSError: There is no such folder, or a file cannot be read, or only through a link.
        ValueError: `model_index.json` holds something else.
    """
    folder = Path(folder)
    os.scandir(folder).close()  # which raises where there is none; `os.walk` does not
    names = list(_names(folder))
    homes = {""}
    if _INDEX in names:
        open_inside(folder, _INDEX).close()
        parts = read_json(folder / _INDEX).items()
        homes = {name for name, value in parts if isinstance(value, list) and value and value[0]}
    known = set()
    if CARD in names:
        with open_inside(folder, CARD) as file:
            shown = (PurePosixPath(name) for name in _SHOWN.findall(file.read().decode("utf-8", "replace")))
        inside = (path for path in shown if not path.is_absolute() and not any(p.startswith(".") for p in path.parts))
        known = {str(path) for path in inside if _PICTURE.fullmatch(path.name) and (folder / path).is_file()}
    for name in names:
        home, _, file_name = name.rpartition("/")
        stem, _ = weights_name(file_name) or ("", "")
        if (
            name in {_INDEX, CARD, *_LOG}
            or (name in homes and os.path.islink(folder / name))  # refused when it is opened
            or (home in homes and (_CONFIG.fullmatch(file_name) or stem == _WEIGHTS))
            or (home in {"", *homes} and _CODE.fullmatch(file_name))
            or (home == "" and _LICENSE.fullmatch(file_name))
            or (home in ("samples", PICTURES) and _PICTURE.fullmatch(file_name))
            or (whole and home and home.split("/")[0] in homes and not file_name.startswith("."))
        ):
            known.add(name)
    heads = {name.split("/")[0] for name in known}
    unknown = [name for name in names if name not in known and not name.startswith(".git")]
    left = {name if name.split("/")[0] in heads else name.split("/")[0] for name in unknown}
    if left:
        listed = ", ".join(map(repr, sorted(left)[:10])) + (f" and {len(left) - 10} more" if len(left) > 10 else "")
        logger.warning(f"Left out of what is taken from {folder}, as no part of the model: {listed}")
    return sorted(known)


def _names(folder: Path) -> Iterator[str]:
    """Yield the names of files, links and hidden folders, by their paths in a folder."""
    for here, folders, files in os.walk(folder):
        closed = [name for name in folders if name.startswith(".") or os.path.islink(os.path.join(here, name))]
        folders[:] = [name for name in folders if name not in closed]
        yield from (Path(here, name).relative_to(folder).as_posix() for name in sorted([*files, *closed]))
