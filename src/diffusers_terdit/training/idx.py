"""IDX files, the form of MNIST and of the data sets that took its place: arrays of bytes, plain or gzipped."""

import gzip
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


_UBYTE = 8  # the code of the only type that images and labels have
# sha256 of the labels of Fashion-MNIST, training and test: what its classes are called is in no file.
_FASHION = {
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
_FASHION_NAMES = ["T-shirt, top", "trouser", "pullover", "dress", "coat"]
_FASHION_NAMES += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]


def _path(folder: str | os.PathLike, part: str, kind: str) -> Path | None:
    plain = Path(folder) / f"{part}-{kind}-ubyte"
    return next((path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()), None)


def holds(folder: str | os.PathLike, part: str = "train") -> bool:
    """Return whether a folder has the images of a part, "train" or "t10k", plain or with .gz."""
    return _path(folder, part, "images-idx3") is not None


def resolution(folder: str | os.PathLike, part: str = "train") -> int:
    """Return the shorter side of the images of a part, which the folder `holds`, in pixels; the rest is not read.

    Raises:
        ValueError: The file is no IDX file of images.
        OSError: It cannot be read.
    """
    path = _path(folder, part, "images-idx3")
    assert path is not None
    with _opened(path) as (_, shape):
        if len(shape) != 3 or not min(shape):
            raise ValueError(f"{path} holds {list(shape)}, expected images: N x rows x columns. Take another file.")
        return min(shape[1:])


def read(path: str | os.PathLike) -> np.ndarray:
    """Read the array of an IDX file, uint8 in its shape; a name that ends in .gz is unpacked.

    Raises:
        ValueError: It is no such file, of another type, damaged, or of another length than it says.
        OSError: It cannot be read.

    Source: https://yann.lecun.com/exdb/mnist (the format).
    """
    path = Path(path)
    with _opened(path) as (file, shape):
        count = math.prod(shape)
        possible = path.stat().st_size * (1032 if path.suffix == ".gz" else 1)  # as far as deflate can expand
        content = file.read(count + 1) if count <= possible else b""
    if len(content) != count:
        raise ValueError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes, but it holds"
            f" {'more' if len(content) > count else 'fewer'}. Get it again."
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Open an IDX file, and yield it behind its header with the shape that this says."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UBYTE or not 1 <= head[3] <= 4:
                raise ValueError(
                    f"{path} begins with {head.hex()!r}, expected 00000801 (labels) or 00000803 (images): an IDX file"
                    " of bytes. Take another file."
                )
            sizes = file.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise EOFError("it ends in its header")
            yield file, struct.unpack(f">{head[3]}I", sizes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Get it again.") from error


def read_pairs(folder: str | os.PathLike, part: str = "train") -> tuple[np.ndarray, list[int], dict[int, str]]:
    """Read the images of a folder, their labels, and the names of the classes: numbers, or Fashion-MNIST's.

    Args:
        folder (`str` or `os.PathLike`): Holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or the same
            with .gz.
        part (`str`): "train", or "t10k" for the test images.

    Returns:
        Images (N, h, w) uint8, N labels, and the names by label.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file is damaged, or the two do not belong together.
    """
    pictures, numbers = (_path(folder, part, kind) for kind in ("images-idx3", "labels-idx1"))
    if pictures is None or numbers is None:
        missing = f"{part}-{'images-idx3' if pictures is None else 'labels-idx1'}-ubyte"
        raise FileNotFoundError(
            f"{folder} holds no {missing}, neither plain nor .gz. Fashion-MNIST is in Debian's package"
            " dataset-fashion-mnist (in /usr/share/datasets/fashion-mnist) and at"
            " https://github.com/zalandoresearch/fashion-mnist; nothing is downloaded for you."
        )
    images, labels = read(pictures), read(numbers)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not images.size:
        raise ValueError(
            f"{pictures} holds {list(images.shape)} and {numbers.name} {list(labels.shape)}, expected N images of rows"
            " and columns, and N labels. Take two files of one data set."
        )
    names = [str(number) for number in range(int(labels.max()) + 1)]
    if hashlib.sha256(labels.tobytes()).hexdigest() in _FASHION:
        names = _FASHION_NAMES
    return images, labels.tolist(), dict(enumerate(names))
