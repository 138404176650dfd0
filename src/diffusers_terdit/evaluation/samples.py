"""Files of images, opened without reading them."""

from __future__ import annotations

import lzma
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, BinaryIO, Literal, NamedTuple

import numpy as np


def open_samples(path: str | Path) -> np.ndarray:
    """The images in a file: uint8 (N, H, W, C).

    Args:
        path: A `.npy`, or a `.npz` with an `arr_0`, such as ADM's sample and reference files. Both are mapped into
            memory and read when a slice is; only a compressed `.npz` is loaded whole. A mapped `.npz` is not checked
            against its CRC: `fingerprint` says which bytes were used.

    Raises: ValueError if the file holds no such images; OSError if it does not exist or is cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Write it with `numpy.save` or `numpy.savez`.")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            if magic == b"\x93NUM":
                return _map(path, file, 0)
            if magic[:2] == b"PK":
                return _open_npz(path, file)
    except (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise OSError(f"{path} is damaged or cut short ({error}). Write or download it again.") from error
    raise ValueError(
        f"{path} is neither a .npz nor a .npy file: it begins with {magic!r}. Write it with `numpy.save` or"
        " `numpy.savez`."
    )


def check_images(images: np.ndarray | _Described, name: str = "`images`") -> None:
    """Raise ValueError unless this is uint8 (N, H, W, C) with at least one image, and 1 to 4 channels."""
    dtype, shape = getattr(images, "dtype", None), tuple(getattr(images, "shape", ()))
    if dtype != np.uint8 or len(shape) != 4:
        got = f"{dtype} {shape}" if dtype is not None else type(images).__name__
        raise ValueError(f"{name} must hold uint8 images (N, H, W, C), got {got}.")
    if 0 in shape:
        raise ValueError(f"{name} holds no images: its shape is {shape}.")
    if shape[3] > 4:
        hint = " This looks like (N, C, H, W): transpose it with (0, 2, 3, 1)." if shape[1] <= 4 else ""
        raise ValueError(f"{name} must have 1 to 4 channels in its last dimension, got {shape}.{hint}")


def _open_npz(path: Path, file: BinaryIO) -> np.ndarray:
    with zipfile.ZipFile(file) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(
                f"{path} has no `arr_0`, only {', '.join(archive.namelist()) or 'nothing'}. Write it with"
                " `numpy.savez(path, images)`."
            )
        member = archive.getinfo("arr_0.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as stream:
                shape, order = _read_header(path, stream)
                # One byte more than the header says: at its end the CRC is checked, and a file may hold much more
                pixels = np.frombuffer(stream.read(math.prod(shape) + 1), np.uint8)
            _check_length(len(pixels), shape, exact=True)
            return pixels.reshape(shape, order=order)
    # The member's own header repeats its name and extra field, whose lengths may differ from the directory's.
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no member at byte {member.header_offset}")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return _map(path, file, member.header_offset + 30 + lengths)


def _map(path: Path, file: BinaryIO, offset: int) -> np.ndarray:
    """The array whose `.npy` bytes begin at `offset`."""
    file.seek(offset)
    shape, order = _read_header(path, file)
    start = file.tell()
    _check_length(file.seek(0, 2) - start, shape)
    return np.memmap(path, np.uint8, "r", start, shape, order)


def _read_header(path: Path, stream: IO[bytes]) -> tuple[tuple[int, ...], Literal["C", "F"]]:
    """Shape and order of an array of images whose `.npy` bytes begin here; behind it lie the pixels."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    except ValueError as error:
        raise EOFError(f"its array has no readable header: {error}") from error
    check_images(_Described(shape, dtype), str(path))
    return shape, "F" if fortran else "C"


def _check_length(held: int, shape: tuple[int, ...], exact: bool = False) -> None:
    size = math.prod(shape)
    if held < size or (exact and held > size):
        raise EOFError(f"its images take {size:,} bytes, it holds {'more' if held > size else f'{held:,}'}")


class _Described(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
