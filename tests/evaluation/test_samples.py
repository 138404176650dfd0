"""Files of images are mapped, not read; damaged ones and pickles are refused."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from diffusers_terdit.evaluation import fingerprint, open_samples


SAVE = {"a.npy": np.save, "b.npz": np.savez, "c.npz": np.savez_compressed}


def test_a_named_array_of_an_npz_is_mapped(digits, tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, labels=np.arange(1797), arr_0=digits, arr_1=np.arange(5))
    images = open_samples(path)
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable
    np.testing.assert_array_equal(images, digits)


def test_an_npz_of_another_writer_is_mapped(digits, tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array(content, digits, version=(2, 0))
    path = tmp_path / "samples.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "numbers")
        archive.writestr("arr_0.npy", content.getvalue())  # without numpy's zip64 field
    images = open_samples(path)
    assert isinstance(images, np.memmap)
    np.testing.assert_array_equal(images, digits)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", SAVE)
def test_npy_fortran_order_and_compression(digits, tmp_path, name, order):
    SAVE[name](tmp_path / name, np.asarray(digits, order=order))
    images = open_samples(tmp_path / name)
    assert isinstance(images, np.memmap) is (name != "c.npz")
    np.testing.assert_array_equal(images, digits)
    assert fingerprint(images) == fingerprint(digits)


@pytest.mark.parametrize("name", SAVE)
def test_other_arrays_and_objects_are_refused_before_they_are_read(tmp_path, name):
    objects = np.array([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)], dtype=object)
    for array, message in (
        (np.zeros((4, 8, 8, 3)), r"uint8 images \(N, H, W, C\), got float64 \(4, 8, 8, 3\)"),
        (np.zeros((4, 8, 8), np.uint8), r"got uint8 \(4, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no images"),
        (objects, "got object"),
    ):
        SAVE[name](tmp_path / name, array)
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            open_samples(tmp_path / name)


def test_of_a_compressed_array_no_more_is_read_than_its_header_says(tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.zeros((4, 8, 8, 1), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", content.getvalue() + bytes(10**8))
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match=r"a\.npz is damaged or cut short .its images take 256 bytes, it holds more"):
            open_samples(tmp_path / "a.npz")
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", SAVE)
def test_files_that_are_cut_short_or_damaged_are_refused(digits, tmp_path, name):
    path = tmp_path / name
    SAVE[name](path, digits)
    content = path.read_bytes()
    damaged = [content[:length] for length in (5, 20, 100, len(content) // 2, len(content) - 1)]
    if name == "c.npz":  # the others are mapped, and their pixels not checked
        middle = len(content) // 2
        damaged.append(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(OSError, match=r"\.np. is damaged or cut short"):
            open_samples(path)
