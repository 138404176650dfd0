"""Training: checkpoints, data, recipes, what a run starts from."""

import json
import sys
import warnings

import numpy as np
import torch
from message_table import Fixed, Row, edit
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffusers_terdit import training
from diffusers_terdit.storage import saving
from diffusers_terdit.storage.weights import canonical_json


OPTIONS = "Resume with the options it was trained with, or from another checkpoint."

AGAIN = "Run cache_latents.py again, into another folder."


def resumed(file=None, **changes):
    """Load a checkpoint, after a change of one of its saving."""

    def provoke(w):
        model, ema = w.model(), w.model()
        optimizer = torch.optim.AdamW(training.recipes.parameter_groups(model))
        folder = w.tmp / "checkpoint-1"
        training.checkpointing.save(folder, model, ema, optimizer, {"step": 1})
        edit(folder / file, **changes)
        training.checkpointing.load(folder, model, ema, optimizer)

    return provoke


def unrecorded(w):
    """A checkpoint of a flow model whose config does not say so."""
    model = w.model(learn_sigma=False)
    folder = w.tmp / "checkpoint-1"
    optimizer = torch.optim.AdamW(training.recipes.parameter_groups(model))
    training.checkpointing.save(folder, model, model, optimizer, {"step": 1})
    training.export.checkpoint_pipeline(folder)


def no_file(w):
    def refuse(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    w.monkeypatch.setattr(training.checkpointing, "save_file", refuse)
    resumed("model.safetensors")(w)


IDX = b"\0\0\x08\x03" + bytes([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2])  # the header of one image of 2 x 2


def idx_files(contents, read=True):
    """Read a folder with these training files."""

    def provoke(w):
        for kind, content in {"labels-idx1": b"\0\0\x08\x01\0\0\0\x01a", **contents}.items() if contents else ():
            (w.tmp / f"train-{kind}-ubyte").write_bytes(content)
        if read:
            training.idx.read_pairs(w.tmp)

    return provoke


def no_matplotlib(w):
    w.monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    training.log.draw(w.tmp / "log.jsonl", w.tmp / "log.png")


def no_extra(w):
    w.monkeypatch.setitem(sys.modules, "datasets", None)
    training.data.open_dataset("x")


def second_run(w):
    with saving.output_folder(w.tmp / "run"), saving.output_folder(w.tmp / "run", seconds=0):
        pass


def no_images(w):
    (w.tmp / "cat").mkdir()
    training.data.ImageSamples.from_folder(w.tmp, resolution=8)


def mixed_images(w):
    (w.tmp / "cat").mkdir()
    for name in ("1.png", "cat/1.png"):
        Image.new("L", (8, 8)).save(w.tmp / name)
    training.data.ImageSamples.from_folder(w.tmp, resolution=8)


def large_image(w):
    Image.new("1", (10_000, 10_000)).save(w.tmp / "1.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        training.images.read_image(w.tmp / "1.png", 8)


def images(count):
    return lambda w: training.data.ImageSamples([w.tmp / "1.png"] * count, [0] * count, {0: "cat"}, 8)


def latents(text):
    def provoke(w):
        if text:
            (w.tmp / "latents.json").write_text(text)
        training.data.LatentSamples(w.tmp)

    return provoke


def cache(shard=None, **changes):
    """Cached latents of one image, with other entries in the index or tensors in the shard."""

    def provoke(w):
        moments = {"moments": torch.ones(1, 8, 2, 2).half(), "labels": torch.zeros(1, dtype=torch.int64)}
        index = {"latent_shape": [4, 2, 2], "scaling_factor": 1.0, "flip": False, "id2label": {"0": "cat"}}
        save_file(moments | (shard or {}), w.tmp / "a.safetensors", {"terdit.config": canonical_json(index)})
        index["shards"] = [{"name": "a.safetensors", "num_samples": 1}]
        latents(json.dumps(index | changes))(w)

    return provoke


def rows(**columns):
    """A data set of pictures, `labels` of them."""
    from datasets import Dataset

    return Dataset.from_dict({"image": [Image.new("L", (8, 8))] * len(columns["label"]), **columns})


def stream(dataset):
    return training.data.ShardedStream(dataset, "image", "label", 0, resolution=8, channels=1, flip=False)


def untyped_stream():
    from datasets import IterableDataset

    return IterableDataset.from_generator(lambda: iter([{"image": None, "label": 0}]))


def empty_stream(w):
    list(training.data.stream_samples(3, lambda shard: [], [0], 0, {}))


# fmt: off
ROWS = [
    Row(lambda w: training.checkpointing.load(w.tmp, None, None, None), "TMP", "it has no training_state.json",
        "Pass a `checkpoint-N` folder.", error=OSError),
    Row(unrecorded, "TMP", "did not record what the model predicts", "Resume it with the newest train_terdit.py"),
    Row(resumed("optimizer.safetensors", ghost__exp_avg=torch.zeros(3)), "`ghost.exp_avg`",
        "holds an unexpected tensor", OPTIONS),
    Row(resumed("model.safetensors", ghost=torch.zeros(3)), "`ghost`", "holds an unexpected tensor", OPTIONS),
    Row(resumed("ema.safetensors", proj_in__bias=torch.zeros(3)), "is F32 [3]", "expected F32 [16]", OPTIONS),
    Row(resumed("ema.safetensors", proj_in__bias=None), "`proj_in.bias`", "ema.safetensors lacks 1 tensor(s)",
        OPTIONS),
    Row(resumed("training_state.json", step=2), "TMP/checkpoint-1/model.safetensors", "was not saved with this",
        "Take another one."),
    Row(resumed("config.json", norm_eps=0.5), "norm_eps=0.5, not 1e-05", "TMP/checkpoint-1 was trained with",
        "Resume with the options it was trained with."),
    Row(lambda w: training.checkpointing.rotate(w.tmp, -2), "got -2", "must be at least 1", "or -1 to keep all"),
    Row(second_run, "TMP/run", "Another run is writing into", "Wait for its end, or choose another folder.",
        error=OSError),
    Row(no_file, "TMP/checkpoint-1", "cannot be written: No space left on device",
        "Make room there, or choose another folder", error=saving.UnwritableError),
    Row(lambda w: training.images.read_image(w.tmp, 8), Fixed("OSError"), "this is no regular file", error=OSError),
    Row(large_image, "it has 10000 x 10000 pixels", "more than 89478485", error=OSError),
    Row(no_images, "TMP", "holds no images, neither in folders named after their labels", "such as"),
    Row(lambda w: training.data.ImageSamples.from_folder(w.tmp / "x", resolution=8), "TMP/x is no folder",
        "Pass one that holds images", error=NotADirectoryError),
    Row(mixed_images, "such as 1.png", "holds images in itself", "Move all of them"),
    Row(lambda w: training.data.ordered_labels(["1"], "date"), "got 'date'", '`order` must be "value" or "text"'),
    Row(lambda w: images(3)(w)[5], "no number 5", "There are 3 images", "numbered from 0", error=IndexError),
    Row(lambda w: images(100)(w)[7], "from number 7", "100 images in a row", "The log names each of them.",
        error=OSError),
    Row(lambda w: images(1)(w).read(0), "image 0 (TMP/1.png)", "cannot be read", "Repair or remove it.",
        error=OSError),
    Row(latents(""), "TMP", "holds no whole latent cache", "Run cache_latents.py (again).", error=OSError),
    Row(latents("{}"), "id2label=None", "TMP/latents.json has", f"expected dict[str, str]. {AGAIN}"),
    Row(cache(shards=[{"name": "../a", "num_samples": 1}]), "the shards ['../a']", "expected plain names of files",
        AGAIN),
    Row(cache(id2label={"1": "cat"}), "names the classes '1'", "expected 0 to the last one", AGAIN),
    Row(cache(scaling_factor=2.0), "TMP/a.safetensors", "was not written with its latents.json", AGAIN),
    Row(cache({"labels": torch.ones(1, dtype=torch.int64)}), "`labels` has 1 to 1", "names 1 classes", AGAIN),
    Row(cache({"moments": -torch.ones(1, 8, 2, 2).half()}), "`moments`", "has a negative deviation", AGAIN),
    Row(lambda w: training.data.ImageSamples.from_pairs([]), "[]", "`pairs` holds none", "Pass at least one"),
    Row(lambda w: training.data.ImageSamples.from_pairs([(np.zeros((4, 4)), 0)]), "float64 of shape (4, 4)",
        "expected uint8, (h, w)", "Scale floats to 0 to 255"),
    Row(lambda w: training.data.ImageSamples.from_pairs([("cat.png", 0)]), "Image 0 is str", "expected a PIL image"),
    Row(lambda w: training.data.ImageSamples.from_pairs([(np.zeros((4, 4), np.uint8), "cat")]), "'cat'",
        "expected an int, 0 or more"),
    Row(lambda w: training.data.ImageSamples.from_pairs([(np.zeros((4, 6), np.uint8), 0)]), "6 x 4 pixels",
        "which is no square", "Pass a `resolution`"),
    Row(idx_files({}), "TMP", "holds no train-images-idx3-ubyte", "nothing is downloaded for you",
        error=FileNotFoundError),
    Row(idx_files({"images-idx3": b"PK\x03\x04"}), "504b0304", "expected 00000801", "Take another file."),
    Row(idx_files({"images-idx3": IDX + bytes(3)}), "1 x 2 x 2 bytes", "but it holds fewer", "Get it again."),
    Row(idx_files({"images-idx3": IDX[:6]}), "TMP/train-images-idx3-ubyte", "is damaged", "Get it again."),
    Row(idx_files({"images-idx3": IDX + bytes(4), "labels-idx1": b"\0\0\x08\x01\0\0\0\x02ab"}), "[1, 2, 2]",
        "expected N images", "Take two files of one data set."),
    Row(lambda w: (idx_files({"images-idx3": b"\0\0\x08\x01\0\0\0\x01a"}, read=False)(w),
                   training.idx.resolution(w.tmp)), "[1]", "expected images", "Take another file."),
    Row(no_matplotlib, Fixed("matplotlib"), "A picture of the log needs matplotlib", "pip install matplotlib",
        error=ImportError),
    Row(no_extra, Fixed("datasets"), "This needs datasets", "pip install datasets",
        error=ImportError),
    Row(lambda w: training.data.open_dataset(f"{w.tmp}/x.parquet"), "TMP/x.parquet", "cannot be loaded",
        "Check name, config and split."),
    Row(lambda w: training.data.ImageSamples.from_dataset(rows(label=[0]), "picture", resolution=8), "'picture'",
        "has no column", "its columns are image, label"),
    Row(lambda w: training.data.ImageSamples.from_dataset(rows(label=[0]), "label", resolution=8), "Column 'label'",
        "holds int64, not images", "Pass the one of the images as image_column."),
    Row(lambda w: training.data.ImageSamples.from_dataset(rows(label=[]), resolution=8), "the columns image, label",
        "but no rows", "Take another split."),
    Row(lambda w: training.data.ImageSamples.from_dataset(rows(label=[1, None]), resolution=8), "the label None",
        "Row 1 of the data set", "Take a split with labels"),
    Row(lambda w: training.data.ImageSamples([{"path": "/a.png"}], [0], {0: "cat"}, 8).read(0), "image 0 (/a.png)",
        "it is not in the data set's folder", "Repair or remove it.", error=OSError),
    Row(lambda w: training.data.TrainingExamples([], 0, (1, 8, 8), 10), "got []", "`samples` holds none",
        "Pass at least one."),
    Row(lambda w: training.data.TrainingExamples([0], 0, (1, 8, 8), 10, class_dropout_prob=5), "got 5",
        "`class_dropout_prob` must be a probability, 0 to 1"),
    Row(lambda w: training.data.TrainingExamples([0], 0, (1, 8, 8), 10, logit_normal=(0, 0)), "got (0, 0)",
        "`logit_normal` must be a mean and a positive deviation"),
    Row(empty_stream, "its 3 shards", "holds no samples", "Take another data set or split."),
    Row(lambda w: stream(untyped_stream()), Fixed("This stream"), "does not say its columns' types",
        "Load it without --streaming."),
    Row(lambda w: stream(rows(label=["cat"]).to_iterable_dataset()), "column 'label' is Value(",
        "needs labels of type ClassLabel", "Load it without --streaming."),
    Row(lambda w: training.export.packed_model(w.model(ternary=False)), Fixed("ternary=False"),
        "no ternary weights to pack", "Save it as it is."),
    Row(lambda w: training.export.image_grid([]), "got []", "needs at least one image"),
    Row(lambda w: training.recipes.learning_rate_factor(0, "linear", 10), "'linear'",
        'must be "constant", "cosine", "wsd" or "piecewise_constant"'),
    Row(lambda w: training.recipes.learning_rate_factor(0, "piecewise_constant", 10, step_rules="1:x,0.2"),
        "'1:x,0.2'", 'must look like "1:1550000,0.2"'),
    Row(lambda w: training.initialize.transfer_weights(w.model(), w.model(ffn_dim=32)),
        "transformer_blocks.0.ff.gate_proj.weight", "in the one to start from", "Give the new one its sizes."),
]
