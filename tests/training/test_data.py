import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_terdit import training
from diffusers_terdit.storage.weights import state_dict_digest


@pytest.fixture
def image_folder(tmp_path):
    """Three plain images of two labels, in shades of 0, 10, 20 and 100, 110, 120."""
    for label, base in (("ant", 0), ("bee", 100)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 12), (base + 10 * i,) * 3).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def parquet(image_folder, tmp_path, monkeypatch):
    """The same images in a file of `datasets`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    files = sorted(image_folder.rglob("*.png"))
    rows = [{"image": {"bytes": f.read_bytes(), "path": None}, "label": f.parent.name} for f in files]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    return tmp_path / "data.parquet"


class TestPairs:
    """Data sets in memory."""

    arrays = [np.full((4, 4), 60 * i, np.uint8) for i in range(4)]

    @pytest.mark.parametrize(
        ("image", "channels"),
        [
            (Image.fromarray, 1),
            (lambda array: Image.fromarray(array).convert("RGB"), 3),
            (lambda array: array, 1),
            (lambda array: array[..., None], 1),
            (lambda array: np.stack([array] * 3, axis=-1), 3),
            (lambda array: torch.from_numpy(array)[None], 1),
            (lambda array: torch.from_numpy(array).expand(3, 4, 4), 3),
        ],
    )
    def test_images_of_any_kind_are_the_same_pixels(self, image, channels):
        pairs = [(image(array), np.int64(i % 2)) for i, array in enumerate(self.arrays)]
        samples = training.data.ImageSamples.from_pairs(pairs)
        assert len(samples) == 4
        assert samples.id2label == {0: "0", 1: "1"}
        for index, array in enumerate(self.arrays):
            pixels, label = samples[index]
            assert label == index % 2
            assert torch.equal(pixels, torch.from_numpy(array).expand(channels, 4, 4).float() / 127.5 - 1)

    def test_any_object_with_a_length_and_indices_trains(self):
        class Shades:
            def __len__(self):
                return 40

            def __getitem__(self, index):
                return np.full((6, 8, 3), 6 * index, np.uint8), torch.tensor(index % 3)

        names = {0: "dark", 1: "gray", 2: "light"}
        samples = training.data.ImageSamples.from_pairs(Shades(), names, resolution=4, channels=1, flip=True)
        examples = training.data.TrainingExamples(samples, 0, (1, 4, 4), len(names), 0.5)
        found = [examples[position] for position in range(40)]
        assert {tuple(example["samples"].shape) for example in found} == {(1, 4, 4)}
        assert {example["class_labels"] for example in found} == {0, 1, 2, 3}
        assert len({example["samples"].mean().item() for example in found}) == 40
        assert samples.id2label is names

    def test_a_label_without_a_name_is_refused(self):
        with pytest.raises(ValueError, match=r"Label 3 is 1, expected an int, one of \[0\]"):
            training.data.ImageSamples.from_pairs([(a, i // 3) for i, a in enumerate(self.arrays)], {0: "only"})


class TestImages:
    def test_labels_come_from_folder_names_in_order(self, image_folder):
        samples = training.data.ImageSamples.from_folder(image_folder, resolution=8)
        assert samples.id2label == {0: "ant", 1: "bee"}
        assert samples.labels == [0, 0, 0, 1, 1, 1]
        shade, label = samples[4]
        assert label == 1
        torch.testing.assert_close(shade, torch.full((3, 8, 8), 110 / 127.5 - 1))

    @pytest.mark.parametrize("fits", [True, False])
    def test_images_that_fit_the_memory_are_read_once(self, image_folder, monkeypatch, fits):
        monkeypatch.setattr(training.data, "KEPT_BYTES", 6 * 4 * 3 * 8 * 8 - (not fits))
        samples = training.data.ImageSamples.from_folder(image_folder, resolution=8)
        first, second = samples[0], samples[1]
        (image_folder / "ant" / "0.png").unlink()
        assert torch.equal(samples[0][0], (first if fits else second)[0])

    def test_threads_may_read_images_that_are_kept_and_change_what_they_get(self):
        arrays = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
        for _ in range(50):
            samples = training.data.ImageSamples.from_pairs([(array, 0) for array in arrays])
            with ThreadPoolExecutor(4) as threads:
                found = [image for image, _ in threads.map(samples.__getitem__, [*range(24), *range(24)])]
            for image, array in zip(found, [*arrays, *arrays], strict=True):
                assert torch.equal(image, torch.from_numpy(array)[None] / 127.5 - 1)
                image.zero_()
            assert torch.equal(samples[3][0], torch.from_numpy(arrays[3])[None] / 127.5 - 1)

    def test_images_that_are_kept_take_the_memory_they_are_counted_with(self):
        arrays = np.random.default_rng(0).integers(0, 256, (40_000, 16, 16), dtype=np.uint8)
        samples = training.data.ImageSamples.from_pairs([(array, 0) for array in arrays])
        before = psutil.Process().memory_info().rss
        for i in range(0, len(samples), 40):
            torch.stack([samples[j][0] for j in range(i, i + 40)])
            torch.randn(100_000)  # what a step allocates in between
        grown = psutil.Process().memory_info().rss - before
        assert samples.kept_bytes == 40_000 * 4 * 16 * 16
        assert grown < 1.5 * samples.kept_bytes

    def test_a_corrupt_image_is_logged_and_the_next_one_taken(self, image_folder, caplog):
        (image_folder / "ant" / "1.png").write_bytes(b"not an image")
        samples = training.data.ImageSamples.from_folder(image_folder, resolution=8)
        with pytest.raises(OSError, match=r"image 1 .*1\.png.* cannot be read"):
            samples.read(1)
        diffusers_logger = logging.getLogger("diffusers")
        diffusers_logger.addHandler(caplog.handler)
        try:
            assert torch.equal(samples[1][0], samples[2][0])
            samples[1]
        finally:
            diffusers_logger.removeHandler(caplog.handler)
        assert caplog.text.count("Skipped") == 1

    @pytest.mark.parametrize(
        ("names", "order", "expected"),
        [
            (["0", "1", "2", "10", "9"], "value", ["0", "1", "2", "9", "10"]),
            (["0", "1", "2", "10", "9"], "text", ["0", "1", "10", "2", "9"]),
            (["01", "10", "9", "1"], "value", ["01", "1", "9", "10"]),
            (["10", "9", "cat"], "value", ["10", "9", "cat"]),
            (["-1", "1.5", "10", "9"], "value", ["-1", "1.5", "10", "9"]),
        ],
    )
    def test_numbered_folders_and_columns_are_sorted_by_value(self, tmp_path, names, order, expected):
        datasets = pytest.importorskip("datasets")
        for name in names:
            (tmp_path / name).mkdir()
            Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
        samples = training.data.ImageSamples.from_folder(tmp_path, order, resolution=8)
        assert list(samples.id2label.items()) == list(enumerate(expected))
        assert [samples.id2label[label] for label in samples.labels] == expected
        assert [path.parent.name for path in samples.sources] == expected
        table = datasets.Dataset.from_dict({"image": [{"path": None, "bytes": b""}] * len(names), "label": names})
        columns = training.data.ImageSamples.from_dataset(table, label_order=order, resolution=8)
        assert columns.id2label == samples.id2label
        assert [columns.id2label[label] for label in columns.labels] == names

    @pytest.mark.parametrize(
        ("names", "note"),
        [
            (["ant", "bee"], ""),
            (["0", "1", "2"], ""),
            (["00", "01", "02"], ""),
            (["3", "7", "20"], "differ from the names of the classes: id 0 is '3', id 1 is '7', id 2 is '20'."),
            (["0", "1", "10", "2"], "id 2 is '10', id 3 is '2'."),
            (["10", "9", "cat"], "Some class names are numbers and some are not, so all are sorted as text: id 0 is"),
            ([str(i + 1) for i in range(100)], "id 9 is '10', ..., id 99 is '100'."),
        ],
    )
    def test_a_note_says_which_id_is_which_number(self, names, note):
        found = training.data.numbering_note(dict(enumerate(names)))
        assert note in found
        assert bool(note) == bool(found)

    def test_what_is_no_picture_is_no_class_and_no_sample(self, image_folder, caplog):
        for name in (".cache/1.png", "__MACOSX/ant/1.png", "ant/._0.png", "ant/__MACOSX/1.png", "bee/.trash/1.png"):
            (image_folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(image_folder / name)
        for name in ("ant/1.pdf", "bee/1.eps", "notes/readme.txt", "._ant", ".DS_Store", "Thumbs.db"):
            (image_folder / name).parent.mkdir(exist_ok=True)
            (image_folder / name).write_bytes(b"%PDF-1.7")
        diffusers_logger = logging.getLogger("diffusers")
        diffusers_logger.addHandler(caplog.handler)
        try:
            samples = training.data.ImageSamples.from_folder(image_folder, resolution=8)
        finally:
            diffusers_logger.removeHandler(caplog.handler)
        assert samples.id2label == {0: "ant", 1: "bee"}
        assert [path.relative_to(image_folder).as_posix() for path in samples.sources] == [
            f"{label}/{i}.png" for label in ("ant", "bee") for i in range(3)
        ]
        assert "no class is made of folders without images: notes." in caplog.text

    def test_images_without_class_folders_have_one_class_without_a_name(self, image_folder):
        samples = training.data.ImageSamples.from_folder(image_folder / "ant", resolution=8)
        assert (samples.labels, samples.id2label) == ([0, 0, 0], {})
        assert samples[2][1] == 0
        (image_folder / "cover.png").write_bytes(b"")
        with pytest.raises(ValueError, match=r"such as cover\.png, and in folders, such as ant"):
            training.data.ImageSamples.from_folder(image_folder, resolution=8)

    @pytest.mark.parametrize(("background", "tone"), [("white", 1), ("black", -1)])
    def test_transparent_pixels_show_the_background_wherever_images_come_from(self, tmp_path, background, tone):
        datasets = pytest.importorskip("datasets")
        (tmp_path / "ant").mkdir()
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "ant" / "1.png")  # an invisible red
        options = {"resolution": 8, "background": background}
        samples = [training.data.ImageSamples.from_folder(tmp_path, **options)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant"])})
        rows = {"image": [str(tmp_path / "ant" / "1.png")], "label": [0]}
        table = datasets.Dataset.from_dict(rows, features)
        samples += [training.data.ImageSamples.from_dataset(table, name=tmp_path, **options)]
        stream = table.to_iterable_dataset()
        samples += [training.data.ShardedStream(stream, "image", "label", 0, tmp_path, flip=False, **options)]
        for found in (samples[0][0], samples[1][0], next(iter(samples[2].samples([0])))):
            assert torch.equal(found[0], torch.full((3, 8, 8), float(tone)))

    def test_a_background_that_is_no_color_is_not_blamed_on_an_image(self, image_folder):
        samples = training.data.ImageSamples.from_folder(image_folder, resolution=8, background="whit")
        with pytest.raises(ValueError, match="unknown color specifier: 'whit'"):
            samples[0]


class TestDatasets:
    def test_a_parquet_file_gives_the_images_of_its_folder(self, image_folder, parquet):
        dataset = training.data.open_dataset(str(parquet))
        samples = training.data.ImageSamples.from_dataset(dataset, resolution=8)
        expected = training.data.ImageSamples.from_folder(image_folder, resolution=8)
        assert samples.id2label == expected.id2label
        assert all(
            torch.equal(a[0], b[0]) and a[1] == b[1]
            for a, b in zip((samples[i] for i in range(6)), (expected[i] for i in range(6)), strict=True)
        )

    def test_labels_without_names_are_numbered(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        dataset = datasets.Dataset.from_dict({"image": [{"path": None, "bytes": b""}] * 3, "kind": [30, 10, 30]})
        samples = training.data.ImageSamples.from_dataset(dataset, label_column="kind", resolution=8)
        assert samples.labels == [1, 0, 1]
        assert samples.id2label == {0: "10", 1: "30"}

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_folder_of_save_to_disk_is_loaded(self, parquet, tmp_path, streaming):
        datasets = pytest.importorskip("datasets")
        dataset = training.data.open_dataset(str(parquet))
        dataset.save_to_disk(tmp_path / "one", num_shards=2)
        datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
        for name in ("one", "splits"):
            loaded = training.data.open_dataset(str(tmp_path / name), streaming=streaming)
            if streaming:
                stream = training.data.ShardedStream(loaded, "image", "label", 0, resolution=8, flip=False)
                assert sorted(label for _, label in stream.samples(range(6))) == [0, 0, 0, 1, 1, 1]
            else:
                samples = training.data.ImageSamples.from_dataset(loaded, resolution=8)
                assert [label for _, label in (samples[i] for i in range(6))] == [0, 0, 0, 1, 1, 1]
        with pytest.raises(ValueError, match=r"split 'test'\) cannot be loaded: Directory .*splits.test not found"):
            training.data.open_dataset(str(tmp_path / "splits"), split="test")

    def test_a_data_set_that_brings_a_script_is_one_error(self, tmp_path):
        pytest.importorskip("datasets")
        (tmp_path / "faces").mkdir()
        (tmp_path / "faces" / "faces.py").write_text("import datasets\n")
        with pytest.raises(ValueError, match=r"cannot be loaded: .*scripts are no longer supported.* Check name"):
            training.data.open_dataset(str(tmp_path / "faces"))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_images_without_a_label_column_have_one_class(self, parquet, streaming):
        loaded = training.data.open_dataset(str(parquet), streaming=streaming)
        if streaming:
            samples = training.data.ShardedStream(loaded, "image", None, 0, resolution=8, flip=False)
            assert [label for _, label in samples.samples(range(6))] == [0] * 6
        else:
            samples = training.data.ImageSamples.from_dataset(loaded, label_column=None, resolution=8)
            assert [samples[i][1] for i in range(6)] == [0] * 6
        assert samples.id2label == {}

    def test_columns_of_bytes_and_of_paths_are_images(self, image_folder):
        datasets = pytest.importorskip("datasets")
        files = sorted((image_folder / "ant").iterdir())
        expected = training.data.ImageSamples.from_folder(image_folder / "ant", resolution=8)
        for column in ([file.read_bytes() for file in files], list(map(str, files))):
            table = datasets.Dataset.from_dict({"image": column})
            samples = training.data.ImageSamples.from_dataset(table, "image", None, image_folder, resolution=8)
            assert all(torch.equal(samples.read(i), expected.read(i)) for i in range(3))
        stranger = training.data.ImageSamples.from_dataset(table, "image", None, resolution=8)
        with pytest.raises(OSError, match="not in the data set's folder"):
            stranger.read(0)

    def test_a_damaged_file_is_one_error(self, parquet):
        pytest.importorskip("datasets")
        parquet.write_bytes(parquet.read_bytes()[:-8] + b"\0" * 8)
        with pytest.raises(ValueError, match=r"data\.parquet' .* cannot be loaded"):
            training.data.open_dataset(str(parquet))

    @pytest.mark.parametrize("label", [-1, None])
    def test_a_row_without_one_of_the_classes_is_named(self, label):
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
        rows = {"image": [{"path": None, "bytes": b""}] * 3, "label": [0, 1, label]}
        table = datasets.Dataset.from_dict(rows, features)
        with pytest.raises(ValueError, match=rf"Row 2 of the data set has the label {label}, expected 0 to 1\."):
            training.data.ImageSamples.from_dataset(table, resolution=8)

    @pytest.mark.parametrize("labels", [[1.0, math.nan], ["a", None], [[1], [2]]])
    def test_a_label_that_is_no_name_or_number(self, labels):
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict({"image": [{"path": None, "bytes": b""}] * 2, "label": labels})
        with pytest.raises(ValueError, match=r"Row \d of the data set has the label .*, expected one like"):
            training.data.ImageSamples.from_dataset(table, resolution=8)

    def test_files_that_rows_name_are_opened_in_the_folder_of_the_data_set_alone(
        self, image_folder, tmp_path, monkeypatch
    ):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        secret = tmp_path / "secret.png"
        Image.new("RGB", (8, 8)).save(secret)
        rows = {"image": [{"path": str(secret), "bytes": None}, {"path": "../secret.png", "bytes": None}]}
        dataset = datasets.Dataset.from_dict(rows | {"label": [0, 0]}, datasets.Features(
            {"image": datasets.Image(decode=False), "label": datasets.Value("int64")}))  # fmt: skip
        monkeypatch.chdir(image_folder)
        for name in (None, image_folder, "me/pictures"):
            samples = training.data.ImageSamples.from_dataset(dataset, name=name, resolution=8)
            for index in range(2):
                with pytest.raises(OSError, match=r"secret\.png\) cannot be read: .* not in the data set's folder"):
                    samples.read(index)
        for streaming in (False, True):  # datasets itself gives absolute paths of a folder
            dataset = training.data.open_dataset(str(image_folder), streaming=streaming)
            if streaming:
                stream = training.data.ShardedStream(
                    dataset, "image", "label", 0, image_folder, resolution=8, flip=False
                )
                assert len(list(stream.samples(range(6)))) == 6
            else:
                samples = training.data.ImageSamples.from_dataset(dataset, name=image_folder, resolution=8)
                assert [samples.read(i).shape for i in range(6)] == [(3, 8, 8)] * 6


class TestStream:
    rows = ((0, 1, 2), (10, 11), (), (20, 21, 22, 23))

    def take(self, positions, sizes=None, reads=None):
        def read(shard):
            if reads is not None:
                reads.append(shard)
            return self.rows[shard]

        sizes = {} if sizes is None else sizes
        return list(training.data.stream_samples(4, read, positions, seed=5, shard_sizes=sizes))

    def test_every_row_comes_once_per_epoch_in_a_new_order(self):
        rows = self.take(range(27))
        every = sorted(sum(self.rows, ()))
        assert [sorted(rows[i : i + 9]) for i in (0, 9, 18)] == [every] * 3
        assert rows[:9] != rows[9:18]

    @pytest.mark.parametrize("start", [0, 4, 8, 9, 14])
    def test_a_process_that_starts_anywhere_and_skips_sees_the_same_rows(self, start):
        everything = self.take(range(40))
        assert self.take(range(start, 40, 3)) == everything[start::3]

    def test_a_resumed_run_reads_only_the_shards_it_needs(self):
        sizes, reads = {}, []
        everything = self.take(range(9), sizes)
        assert sizes == {i: len(rows) for i, rows in enumerate(self.rows)}
        assert self.take([8], sizes, reads) == [everything[8]]
        assert len(reads) == 1

    def test_a_streamed_data_set_holds_every_image_once_per_epoch(self, parquet):
        stream = training.data.ShardedStream(
            training.data.open_dataset(str(parquet), streaming=True), "image", "label", 0, resolution=8, flip=False
        )
        shades = [round(image.mean().item() * 127.5 + 127.5) for image, _ in stream.samples(range(12))]
        assert sorted(shades[:6]) == sorted(shades[6:]) == [0, 10, 20, 100, 110, 120]
        assert stream.id2label == {0: "ant", 1: "bee"}
        assert stream.shard_sizes == {0: 6}


@pytest.fixture
def cache(tmp_path):
    """Cached latents of five images of two classes, in two shards."""
    config = {"latent_shape": [4, 2, 2], "scaling_factor": 0.5, "flip": True, "id2label": {"0": "ant", "1": "bee"}}
    text = json.dumps(config, sort_keys=True)
    shards = []
    for number, labels in enumerate(([0, 0, 1], [1, 0])):
        moments = training.random.normal(number, "moments", range(len(labels)), (8, 2, 2))
        moments[:, 4:].abs_()
        tensors = {"moments": moments.half(), "moments_flipped": moments.flip(-1).half().contiguous()}
        tensors["labels"] = torch.tensor(labels)
        name = f"latents-{number:05}.safetensors"
        sha = state_dict_digest(tensors)
        save_file(tensors, tmp_path / name, {"format": "pt", "terdit.sha256": sha, "terdit.config": text})
        shards.append({"name": name, "num_samples": len(labels), "sha256": sha})
    (tmp_path / "latents.json").write_text(json.dumps({**config, "shards": shards}))
    return tmp_path


def edit_index(folder, change):
    path = folder / "latents.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_shard(folder, change, metadata=None):
    """Change the tensors of the first shard, which keeps no digest."""
    path = folder / "latents-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    edit_index(folder, lambda info: [shard.pop("sha256") for shard in info["shards"]])


INDEX_EDITS = {
    "no scaling factor": lambda info: info.pop("scaling_factor"),
    "a scaling factor of text": lambda info: info.update(scaling_factor="0.5"),
    "another scaling factor": lambda info: info.update(scaling_factor=0.25),
    "moments for latents": lambda info: info.update(latent_shape=[8, 2, 2]),
    "no latents": lambda info: info.update(latent_shape=[4, 2]),
    "a class without a name": lambda info: info["id2label"].pop("0"),
    "one class fewer": lambda info: info["id2label"].pop("1"),
    "another name": lambda info: info["id2label"].update({"1": "fly"}),
    "no shards": lambda info: info.update(shards=[]),
    "a path": lambda info: info["shards"][0].update(name="../latents-00000.safetensors"),
    "shards in another order": lambda info: info["shards"].reverse(),
    "a shard twice": lambda info: info["shards"].append(info["shards"][1]),
    "more rows": lambda info: info["shards"][0].update(num_samples=4),
    "very many rows": lambda info: info["shards"][0].update(num_samples=2**40),
    "no rows": lambda info: info["shards"][0].update(num_samples=0),
    "another digest": lambda info: info["shards"][0].update(sha256="0" * 64),
}
SHARD_EDITS = {
    "bytes": lambda tensors: tensors.update(moments=tensors["moments"].to(torch.int8)),
    "NaN": lambda tensors: tensors["moments"][1, 2].fill_(math.nan),
    "negative deviations": lambda tensors: tensors["moments_flipped"][2, 5].fill_(-1),
    "the null label": lambda tensors: tensors["labels"][0].fill_(2),
    "a negative label": lambda tensors: tensors["labels"][0].fill_(-1),
    "no labels": lambda tensors: tensors.pop("labels"),
    "another tensor": lambda tensors: tensors.update(more=torch.zeros(1)),
}


class TestCachedLatents:
    def test_give_what_was_cached_also_without_a_digest(self, cache):
        samples = training.data.LatentSamples(cache)
        assert [samples[i][1] for i in range(len(samples))] == [0, 0, 1, 1, 0]
        assert (samples.id2label, samples.flip) == ({0: "ant", 1: "bee"}, True)
        edit_shard(cache, lambda tensors: None)
        before = training.data.LatentSamples(cache)
        assert all(torch.equal(before.get(i, True)[0], samples.get(i, True)[0]) for i in range(5))

    @pytest.mark.parametrize("change", INDEX_EDITS)
    def test_an_edited_index_is_refused_at_opening(self, cache, change):
        edit_index(cache, INDEX_EDITS[change])
        with pytest.raises(ValueError, match=r"latents(-00000|-00001)?\.(json|safetensors)"):
            training.data.LatentSamples(cache)

    @pytest.mark.parametrize("change", SHARD_EDITS)
    def test_an_edited_shard_is_refused_at_opening(self, cache, change):
        edit_shard(cache, SHARD_EDITS[change])
        with pytest.raises(ValueError, match=r"latents-00000\.safetensors"):
            training.data.LatentSamples(cache)

    def test_a_flipped_bit_a_cut_and_a_swap_are_found(self, cache):
        first, second = (cache / f"latents-0000{i}.safetensors" for i in range(2))
        whole = first.read_bytes()
        first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match="do not match the digest"):
            training.data.LatentSamples(cache)
        first.write_bytes(whole[:-1])
        with pytest.raises(OSError, match="not a readable safetensors file"):
            training.data.LatentSamples(cache)
        edit_index(cache, lambda info: info["shards"][0].update(num_samples=2))
        edit_index(cache, lambda info: info["shards"][1].update(num_samples=3))
        first.write_bytes(second.read_bytes())
        second.write_bytes(whole)
        with pytest.raises(ValueError, match=r"was not written with its latents\.json"):
            training.data.LatentSamples(cache)


class TestLatents:
    def test_latents_are_drawn_from_what_the_vae_says(self, tiny_vae):
        codec = training.data.LatentCodec(tiny_vae)
        assert codec.latent_shape(16, 3) == (4, 8, 8)
        images = training.random.normal(0, "images", range(2), (3, 16, 16)).clamp(-1, 1)
        noise = training.random.normal(0, "posterior", range(2), (4, 8, 8))
        with torch.no_grad():
            distribution = tiny_vae.encode(images).latent_dist
        expected = (distribution.mean + distribution.std * noise) * tiny_vae.config.scaling_factor
        batch = codec.encode({"samples": images, "posterior_noise": noise, "class_labels": torch.zeros(2)})
        torch.testing.assert_close(batch["samples"], expected)
        assert set(batch) == {"samples", "class_labels"}

    def test_decoding_undoes_the_scale_as_the_pipeline_does(self, tiny_vae, tiny_pipeline):
        pipe = tiny_pipeline(vae=True)
        call = {"num_inference_steps": 2, "class_labels": [1]}
        latents = pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **call).images
        images = pipe(generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
        torch.testing.assert_close(training.data.LatentCodec(pipe.vae).decode(latents), images)

    def test_pixels_stay_as_they_are(self):
        codec = training.data.LatentCodec()
        batch = {"samples": torch.ones(1, 1, 8, 8)}
        assert codec.encode(batch)["samples"] is batch["samples"]
        assert codec.latent_shape(8, 1) == (1, 8, 8)


class TestExamples:
    def examples(self, **kwargs):
        return training.data.TrainingExamples(training.data.Digits(train=True), 3, (1, 8, 8), 10, **kwargs)

    def test_an_example_is_a_function_of_its_position(self):
        first, again = self.examples(), self.examples()
        later = [again[position] for position in (4000, 10, 1497)]
        for example, position in zip(later, (4000, 10, 1497), strict=True):
            assert all(np.array_equal(example[key], value) for key, value in first[position].items())

    def test_an_epoch_holds_every_digit_once(self):
        examples = self.examples(class_dropout_prob=0.0)
        labels = [examples[position]["class_labels"] for position in range(1497)]
        assert sorted(labels) == sorted(examples.samples.labels)

    def test_labels_are_dropped_as_often_as_asked(self):
        examples = self.examples(class_dropout_prob=0.25)
        dropped = np.mean([examples[position]["class_labels"] == 10 for position in range(1497)])
        assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 1497)

    def test_timesteps_cover_their_range(self):
        examples = self.examples()
        times = [examples[position]["time"] for position in range(300)]
        assert all(isinstance(time, int) and 0 <= time < 1000 for time in times)
        assert min(times) < 30
        assert max(times) > 970
        examples = self.examples(continuous_time=True)
        times = [examples[position]["time"] for position in range(300)]
        assert all(time.dtype == np.float32 and 0 <= time <= 1 for time in times)

    def test_logits_of_the_time_are_normal_where_that_is_asked_for(self):
        examples = self.examples(continuous_time=True, logit_normal=(-0.5, 2.0))
        times = np.array([examples[position]["time"] for position in range(1000)])
        logits = np.log(times / (1 - times))
        assert abs(logits.mean() + 0.5) < 5 * 2 / math.sqrt(1000)
        assert abs(logits.std() - 2) < 5 * 2 / math.sqrt(2000)
        examples.logit = NormalDist(0, 1e6)
        assert {examples[position]["time"].item() for position in range(20)} == {0.0, 1.0}

    def test_half_of_the_images_are_mirrored_where_that_is_allowed(self, image_folder):
        samples = training.data.ImageSamples.from_folder(image_folder, resolution=8, flip=True)
        samples.read = lambda index: torch.arange(8.0).expand(3, 8, 8)
        examples = training.data.TrainingExamples(samples, 0, (3, 8, 8), 2)
        mirrored = np.mean([examples[position]["samples"][0, 0, 0].item() == 7 for position in range(400)])
        assert abs(mirrored - 0.5) < 5 * math.sqrt(0.25 / 400)
        samples.flip = False
        assert not any(examples[position]["samples"][0, 0, 0] == 7 for position in range(50))

    def test_a_stream_gives_batches_of_the_same_kind(self, parquet):
        stream = training.data.ShardedStream(
            training.data.open_dataset(str(parquet), streaming=True), "image", "label", 0, resolution=8, flip=True
        )
        examples = training.data.TrainingExamples(stream, 0, (3, 8, 8), 2)
        batches = list(examples.stream(iter([range(0, 3), range(6, 9)])))
        assert batches[1]["samples"].shape == (3, 3, 8, 8)
        assert torch.equal(batches[1]["noise"], training.random.normal(0, "noise", range(6, 9), (3, 8, 8)))

    def test_the_last_digits_are_held_out(self):
        train, held_out = training.data.Digits(train=True), training.data.Digits(train=False)
        assert (len(train), len(held_out)) == (1497, 300)
        assert not (train.images[:, None] == held_out.images).flatten(2).all(2).any()
        assert train.images.min() == -1
        assert train.images.max() == 1
