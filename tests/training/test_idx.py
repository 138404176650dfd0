import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from diffusers_terdit import training
from idx_files import write_idx


@pytest.mark.parametrize("packed", [False, True])
def test_a_pair_of_files_is_read_plain_and_packed(tmp_path, packed):
    for part in ("train", "t10k"):
        assert not training.idx.holds(tmp_path, part)
        images, labels = write_idx(tmp_path, part, packed=packed)
        assert training.idx.holds(tmp_path, part)
        assert training.idx.resolution(tmp_path, part) == 4
        found = training.idx.read_pairs(tmp_path, part)
        assert np.array_equal(found[0], images)
        assert found[1:] == (labels.tolist(), {0: "0", 1: "1", 2: "2"})


def test_samples_are_the_bytes_of_the_file_from_minus_one_to_one(tmp_path):
    images, labels = write_idx(tmp_path)
    samples = training.data.ImageSamples.from_idx(tmp_path)
    assert len(samples) == 6
    for index in range(6):
        pixels, label = samples[index]
        assert torch.equal(pixels, torch.from_numpy(images[index])[None].float() / 127.5 - 1)
        assert label == labels[index]
    assert training.data.ImageSamples.from_idx(tmp_path, resolution=8, channels=3)[0][0].shape == (3, 8, 8)


def test_fashion_mnist_is_known_by_its_labels(tmp_path, monkeypatch):
    _, labels = write_idx(tmp_path)
    monkeypatch.setattr(training.idx, "_FASHION", {hashlib.sha256(labels.tobytes()).hexdigest()})
    names = training.idx.read_pairs(tmp_path)[2]
    assert names[0] == "T-shirt, top"
    assert len(names) == 10


def huge(content):
    return content[:4] + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + content[16:]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "says that it holds 6 x 4 x 4 bytes, but it holds fewer"),
        (lambda content: content + b"x", "but it holds more"),
        (huge, "4294967295 x 4294967295 x 4294967295 bytes, but it holds fewer"),
        (lambda content: content[:10], "is damaged: it ends in its header"),
        (lambda content: b"", "begins with ''"),
        (lambda content: b"\x89PNG" + content[4:], "begins with '89504e47', expected 00000801"),
        (lambda content: content[:2] + b"\x0d" + content[3:], "expected 00000801 .labels. or 00000803"),  # floats
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path, damage, message, packed):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    content = damage(path.read_bytes())
    path.unlink()
    path = path.with_name(path.name + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=message):
        training.idx.read(path)


@pytest.mark.parametrize("cut", [slice(0, -9), slice(0, 40), slice(5, None)])
def test_a_damaged_archive_is_refused(tmp_path, cut):
    write_idx(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(ValueError, match=r"ubyte\.gz is damaged"):
        training.idx.read(path)
