"""Tiny IDX files, as MNIST's."""

import gzip
import struct

import numpy as np


def idx(array, kind=8):
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, part="train", count=6, side=4, packed=False):
    """A tiny pair of files; the images and labels in them."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(len(part))
    images = generator.integers(0, 256, (count, side, side), dtype=np.uint8)
    labels = (np.arange(count) % 3).astype(np.uint8)
    for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        content = idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return images, labels
