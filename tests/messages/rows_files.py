"""What stands in files and repositories: loading, conversion, export, the card, the command."""

import json
import os
import struct
import zipfile

import diffusers
import torch
from diffusers import ModelMixin
from filelock import FileLock
from message_table import PTH, REASON, WEIGHTS, Fixed, Row, edit_json, edit_pth, edit_tensors
from safetensors.torch import load_file, save_file

from diffusers_terdit import (
    TerDiTPipeline,
    TerDiTTransformer2DModel,
    TernaryLinear,
    conversion,
    convert_original_checkpoint,
    export_remote_code,
    modeling,
)
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.conversion import convert_dense_checkpoint, swap_bitnet_order
from diffusers_terdit.hub import model_card
from diffusers_terdit.storage import inspection, saving, weights


INDEX = f"{WEIGHTS}.index.json"
AGAIN = "Download or save it again."
TOGETHER = "Download or save config.json and weights again, together."
NAN = torch.full((8,), float("nan"))
CODE_3 = torch.full((2, 8), 255, dtype=torch.uint8)
WQ = "layers__0__attention__wq__weight"
Q = "transformer_blocks.0.attn1.to_q"


def layer(metadata=None, config=None, kind="layer", **changes):
    """Load a layer, after a change of its file or config."""

    def provoke(w):
        folder = w.saved(kind)
        if changes or metadata:
            edit_tensors(folder / WEIGHTS, metadata, **changes)
        if config:
            edit_json(folder / "config.json", **config)
        TernaryLinear.from_pretrained(folder)

    return provoke


def index(text):
    def provoke(w):
        (w.saved("layer") / INDEX).write_text(text if isinstance(text, str) else json.dumps(text))
        TernaryLinear.from_pretrained(w.tmp / "layer")

    return provoke


def pipeline(file="model_index.json", **changes):
    """Load a pipeline, after a change of one of its configs."""

    def provoke(w):
        edit_json(w.saved("pipe") / file, **changes)
        TerDiTPipeline.from_pretrained(w.tmp / "pipe")

    return provoke


def other_digest(w):
    path = w.saved("layer") / WEIGHTS
    with weights.safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "bias": torch.ones(8)}, path, metadata)
    TernaryLinear.from_pretrained(path.parent)


def cut(w):
    path = w.saved("layer") / WEIGHTS
    path.write_bytes(path.read_bytes()[:40])
    inspection.inspect_weights(path)


def interrupted(w):
    (w.saved("layer") / "layer.saving").touch()
    TernaryLinear.from_pretrained(w.tmp / "layer")


def busy(w):
    with FileLock(w.tmp / "terdit-saving.lock"), saving.replacing(w.tmp, w.tmp / "x.saving", seconds=0):
        pass


def deep(w):
    (w.saved("layer") / "config.json").write_text("[" * 10**5)
    TernaryLinear.from_pretrained(w.tmp / "layer")


def no_hook(w):
    w.saved("layer")
    w.monkeypatch.setattr(TernaryLinear, "_load_pretrained_model", ModelMixin._load_pretrained_model)
    TernaryLinear.from_pretrained(w.tmp / "layer")


def sharded(w, seed=0):
    """A folder of a model in several files."""
    folder = w.tmp / f"model-{seed}"
    model = w.model("packed")
    model.proj_in.weight.data += seed
    model.save_pretrained(folder, max_shard_size="4KB")
    return folder


def shard_twice(w):
    folder = sharded(w)
    first, second = sorted(folder.glob("*-of-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    edit_tensors(second, **{name: tensor})
    TerDiTTransformer2DModel.from_pretrained(folder)


def shards_of_two(w):
    folder, other = sharded(w), sharded(w, 1)
    path = next(p for p in sorted(other.glob("*-of-*.safetensors")) if "proj_in.weight" in load_file(p))
    (folder / path.name).write_bytes(path.read_bytes())
    TerDiTTransformer2DModel.from_pretrained(folder)


def index_differs(w):
    folder = sharded(w)
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={name: file for name, file in names.items() if name != "proj_in.bias"})
    TerDiTTransformer2DModel.from_pretrained(folder)


def pickled(w):
    TernaryLinear(8, 8).save_pretrained(w.tmp, safe_serialization=False)


def only_a_pickle(w):
    (w.saved("layer") / WEIGHTS).rename(w.tmp / "layer" / "diffusion_pytorch_model.bin")
    TernaryLinear.from_pretrained(w.tmp / "layer")


def flip(path):
    """Another byte in the middle of a record of numbers."""
    with zipfile.ZipFile(path) as archive:
        record = max((r for r in archive.infolist() if "/data/" in r.filename), key=lambda r: r.file_size)
    data = bytearray(path.read_bytes())
    lengths = struct.unpack("<HH", data[record.header_offset + 26 :][:4])  # of the name and what follows it
    data[record.header_offset + 30 + sum(lengths)] ^= 1
    path.write_bytes(data)


def compress(path):
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def original(damage=None, arguments=None, options=None, **changes):
    """Convert the authors' files, after a change of one of them."""

    def provoke(w):
        folder = w.saved("original")
        if changes:
            edit_pth(folder, **changes)
        if arguments is not None:
            torch.save(arguments, folder / "model_args.pth")
        if damage:
            damage(folder / PTH)
        convert_original_checkpoint(folder, **(options or {}))

    return provoke


class Payload:
    def __reduce__(self):
        return os.mkdir, ("never",)


def cut_pth(path):
    path.write_bytes(path.read_bytes()[:1000])


def few_layers(w):
    w.monkeypatch.setattr(conversion.terdit, "MAX_BLOCKS", 1)
    original()(w)


def no_arguments(w):
    (w.saved("original") / "model_args.pth").unlink()
    convert_original_checkpoint(w.tmp / "original")


def no_checkpoint_on_the_hub(w):
    w.hub.upload_folder("user/layer", w.saved("layer"))
    convert_original_checkpoint("user/layer")


def dense(kind="dense", config=None, file=WEIGHTS, options=None, **changes):
    """Convert a model of diffusers, after a change of its file or config."""

    def provoke(w):
        folder = w.saved(kind)
        if changes:
            edit_tensors(folder / file, **changes)
        if config:
            edit_json(folder / "config.json", **config)
        convert_dense_checkpoint(folder, w.tmp / "out", **(options or {}))

    return provoke


def onto_files(w):
    (w.tmp / "out").mkdir()
    (w.tmp / "out" / "notes.txt").touch()
    convert_dense_checkpoint(w.tmp, w.tmp / "out")


def no_dense_file(w):
    (w.saved("dense") / WEIGHTS).unlink()
    convert_dense_checkpoint(w.tmp / "dense", w.tmp / "out")


def export(kind="pipe", file="model_index.json", **changes):
    def provoke(w):
        folder = w.saved(kind)
        if changes:
            edit_json(folder / file, **changes)
        export_remote_code(folder)

    return provoke


def export_without_config(w):
    (w.saved("pipe") / "transformer" / "config.json").unlink()
    export_remote_code(w.tmp / "pipe")


def export_broken(w):
    (w.tmp / "config.json").write_text("[]")
    export_remote_code(w.tmp)


def broken_card(w):
    (w.tmp / "README.md").write_text("---\na: [\n---\nold")
    model_card.read_card(w.tmp / "README.md")


def odd_scale(w):
    inspection.inspect_weights(edit_tensors(w.saved("layer") / WEIGHTS, weight_scale=torch.ones(8, 9)))


def terdit(*arguments):
    """A command; `TMP` in it is the row's folder."""
    return lambda w: w.terdit(*(str(argument).replace("TMP", str(w.tmp)) for argument in arguments))


def generate(*arguments):
    return terdit("generate", *arguments, "--num_inference_steps", 1, "--output", "TMP/x.png")


def picture_in_a_file(w):
    (w.tmp / "file").touch()
    w.terdit("generate", "--output", w.tmp / "file" / "x.png")


def picture_is_a_folder(w):
    (w.tmp / "x.png").mkdir()
    w.terdit("generate", "--output", w.tmp / "x.png")


def picture_not_allowed(w):
    w.monkeypatch.setattr(os, "access", lambda path, mode: False)  # the administrator may write everywhere
    w.terdit("generate", "--output", w.tmp / "x.png")


def info_of(kind, *arguments, **changes):
    def provoke(w):
        folder = w.saved(kind)
        if changes:
            edit_json(folder / "model_index.json", **changes)
        w.terdit("info", folder, *arguments)

    return provoke


def broken_index(w):
    (w.tmp / "model_index.json").write_text("{")
    w.terdit("info", w.tmp)


def push_from_the_hub(w):
    w.hub.upload_folder("user/digits", bundled())
    w.terdit("push", "user/digits", "user/other")


def converts(kind, *arguments):
    return lambda w: w.terdit("convert", w.saved(kind), w.tmp / "out", *arguments)


# fmt: off
ROWS = [
    # saving and loading
    Row("load-interrupted", interrupted, OSError, "TMP/layer", "was interrupted, or is under way", "there again"),
    Row("save-busy", busy, OSError, "TMP", "Another process is saving into", "Save elsewhere, or try again"),
    Row("save-pickle", pickled, ValueError,
        "safe_serialization=False", "Ternary weights are saved as safetensors only", "Leave it out."),
    Row("load-pickle", only_a_pickle, OSError,
        "TMP/layer has its weights in a pickle", "are read from safetensors only", "take a copy with"),
    Row("index-json", index("{"), ValueError, f"TMP/layer/{INDEX}", "is not JSON", AGAIN),
    Row("index-list", index([]), ValueError, "holds list", f"TMP/layer/{INDEX}", AGAIN),
    Row("index-no-map", index({"metadata": {}}), ValueError, f"TMP/layer/{INDEX}", "has no `weight_map`", AGAIN),
    Row("index-no-metadata", index({"weight_map": {"bias": WEIGHTS}}), ValueError,
        f"TMP/layer/{INDEX}", "has no `metadata`", AGAIN),
    Row("index-outside", index({"metadata": {}, "weight_map": {"bias": "../x"}}), ValueError,
        "'../x'", "a shard is a plain file name", "in the folder of the index"),
    Row("index-absent", index({"metadata": {}, "weight_map": {"bias": "x.safetensors"}}), OSError,
        "names x.safetensors", "which is not there", "Download or save the model again."),
    Row("index-differs", index_differs, ValueError,
        "['proj_in.bias']", "the index and the files differ", "Save the model again."),
    Row("config-list", lambda w: modeling.check_config(w.tmp / "config.json", []), ValueError,
        "config is list", "expected an object", REASON),
    Row("config-deep", deep, ValueError, "TMP/layer/config.json", "is not JSON: maximum recursion", AGAIN),
    Row("config-size", layer(config={"in_features": 0}), ValueError,
        "in_features=0", "TMP/layer/config.json: the config has", "expected a positive int"),
    Row("config-float", pipeline("scheduler/scheduler_config.json", beta_end=1e300), ValueError,
        "beta_end=1e+300", "TMP/pipe/scheduler/scheduler_config.json: the config has", "more than a float32 holds"),
    Row("config-quantization", layer(config={"quantization_config": "int8"}), ValueError,
        "quantization_config='int8'", "TMP/layer/config.json: the config has", "expected one with a `quant_method`"),
    Row("config-memory", pipeline("transformer/config.json", num_attention_heads=2**30, attention_head_dim=2**30),
        ValueError, "TMP/pipe", "the config asks for tensors that cannot be", TOGETHER),
    Row("index-component", pipeline(vae=["diffusers"]), ValueError,
        "['diffusers']", "`vae` is", "expected the names of a library and a class"),
    Row("index-class", pipeline(_class_name=5), ValueError,
        "`_class_name` is 5", "expected the name of a class", REASON),
    Row("index-transformer", pipeline(transformer=["diffusers", "DiTTransformer2DModel"]), ValueError,
        "DiTTransformer2DModel", "`transformer` is", "expected a TerDiTTransformer2DModel"),
    Row("index-vae", pipeline(vae="sd"), ValueError,
        "`vae` is 'sd'", "expected the names of a library and a class", REASON),
    Row("index-labels", pipeline(id2label={"0": 5}), ValueError, "{'0': 5}", "expected names by class id", REASON),
    Row("scheduler-steps", pipeline("scheduler/scheduler_config.json", num_train_timesteps=0), ValueError,
        "num_train_timesteps=0", "expected a positive int", REASON),
    Row("scheduler-schedule", pipeline("scheduler/scheduler_config.json", beta_schedule="steep"), ValueError,
        "steep", "these settings make no DDPMScheduler", "Save it again, or update diffusers."),
    Row("file-cut", cut, OSError, f"TMP/layer/{WEIGHTS}", "is not a readable safetensors file", AGAIN),
    Row("file-digest", other_digest, ValueError,
        f"TMP/layer/{WEIGHTS}", "do not match the digest", "download or save it again"),
    Row("file-code-3", layer(weight_packed=CODE_3), ValueError, "`weight_packed`", "holds code 3", AGAIN),
    Row("file-nan", layer(bias=NAN), ValueError,
        "`bias`", "holds NaN or infinity", "download it again, or take an earlier one"),
    Row("file-unexpected", layer(ghost=NAN), ValueError, "`ghost`", "TernaryLinear has no such weight", TOGETHER),
    Row("file-shape", layer(bias=NAN[:5]), ValueError, "`bias` has shape [5]", "the config asks for [8]", TOGETHER),
    Row("file-dtype", layer(bias=torch.zeros(8, dtype=torch.int32)), ValueError,
        "is stored as I32", "expected floating point", TOGETHER),
    Row("file-missing", layer(bias=None), ValueError, "`bias`", "1 missing tensor(s) of TernaryLinear", TOGETHER),
    Row("file-version", layer({"terdit.version": "2"}), ValueError,
        "version '2'", "reads version 1", "Update diffusers-terdit."),
    Row("file-packing", layer({"terdit.packing": "columns"}), ValueError,
        "'columns'", "this release reads 'row-chunk-2bit'", "Update diffusers-terdit."),
    Row("file-format", layer(config={"weight_format": "float"}), ValueError,
        f"TMP/layer/{WEIGHTS}", "but the config says weight_format='float'", 'Load it as weight_format="packed"'),
    Row("file-packed-tensor", layer(kind="float_layer", metadata={"terdit.version": "1"}, weight_packed=CODE_3),
        ValueError,
        "tensor `weight_packed`", "is packed", 'Load it as weight_format="packed"'),
    Row("shards-twice", shard_twice, ValueError, "TMP/model-0", "stands in both", "Save the model again."),
    Row("shards-of-two", shards_of_two, ValueError,
        "TMP/model-0", "holds shards of several models", "Download all of them again"),
    Row("load-hook", no_hook, RuntimeError,
        f"diffusers {diffusers.__version__} no longer", "the weights were not checked",
        "Update diffusers-terdit or install diffusers 0.42.1."),
    Row("load-other-class", lambda w: TernaryLinear.from_pretrained(bundled() / "transformer"), ValueError,
        "digits/transformer", "has no in_features, which a TernaryLinear needs",
        "load it as what it says it is: 'TerDiTTransformer2DModel'"),
    Row("load-repository", lambda w: (w.hub, TerDiTPipeline.from_pretrained("user/nothing")), OSError,
        "user/nothing", "no repository", "check the name, or log in with `hf auth login`"),
    Row("pth-pickle", original(arguments={"x": Payload()}), ValueError,
        "TMP/original/model_args.pth", "holds more than tensors and plain values", "do not trust this file"),
    Row("pth-cut", original(cut_pth), OSError, f"TMP/original/{PTH}", "truncated or damaged?", "Download it again."),
    Row("pth-compressed", original(compress), OSError,
        f"TMP/original/{PTH}", "a record is compressed, or marked as a folder", "Download it again."),
    Row("pth-checksum", original(flip), OSError,
        f"TMP/original/{PTH}", "does not have its checksum", "Download it again."),
    Row("pth-list", original(lambda path: torch.save([1], path)), ValueError,
        f"TMP/original/{PTH}", "does not hold a dict of tensors", AGAIN),
    Row("pth-memory", original(x=torch.zeros(()).expand(8)), ValueError,
        "tensor `x` has shape [8]", "memory for fewer numbers", AGAIN),
    Row("pth-sparse", original(x=torch.zeros(3).to_sparse()), ValueError,
        "tensor `x` is torch.sparse_coo", "expected a dense one on the CPU", "Save it again."),

    # conversion of the authors' files
    Row("convert-name", original(x__weight=NAN), ValueError,
        "`x.weight`", "does not belong to a TerDiT", "only files of its authors are converted"),
    Row("convert-option", original(arguments={"ntk_factor": 2.0}), ValueError,
        "ntk_factor=2.0", "which this package does not implement", "take another file"),
    Row("convert-missing", original(x_embedder__weight=None), ValueError,
        "`x_embedder.weight`", "so this is not a TerDiT", "download the file again"),
    Row("convert-vector", original(x_embedder__weight=NAN), ValueError,
        "has shape [8]", "expected a matrix", "download the file again"),
    Row("convert-heads", original(options={"num_attention_heads": 7}), ValueError,
        "7 heads", "does not divide into", "pass `num_attention_heads`"),
    Row("convert-no-heads", original(options={"num_attention_heads": 0}), ValueError,
        "got 0", "`num_attention_heads` must be a positive int", REASON),
    Row("convert-patch", original(arguments={"model": "DiT_patch0"}), ValueError,
        "patches of 0", "which do not fit `x_embedder.weight`", "take the model_args.pth that belongs to it"),
    Row("convert-image-size", original(arguments={"image_size": "256"}), ValueError,
        "image_size='256'", "expected pixels", "take the model_args.pth that belongs to it"),
    Row("convert-layers", few_layers, ValueError, "2 layers", "more than 1", "download the file again"),
    Row("convert-kv-heads", original(layers__0__attention__wk__weight=torch.zeros(1, 128)), ValueError,
        "into 0 of keys", "heads do not divide", "pass `num_attention_heads`"),
    Row("convert-ints", original(layers__0__ffn_norm__weight=torch.zeros(128, dtype=torch.int32)), ValueError,
        "is torch.int32", "expected floats or packed codes", "download the file again"),
    Row("convert-nan", original(layers__0__ffn_norm__weight=NAN), ValueError,
        "`layers.0.ffn_norm.weight`", "holds NaN or infinity", "download the file again"),
    Row("convert-codes", original(layers__0__ffn_norm__weight=torch.zeros(128, dtype=torch.uint8)), ValueError,
        "`layers.0.ffn_norm.weight`", "does not hold packed ternary codes", "download the file again"),
    Row("convert-misshapen", original(layers__0__ffn_norm__weight=torch.zeros(7)), ValueError,
        "(7,)", "1 tensors do not fit a TerDiT of these sizes", "download the file again"),
    Row("convert-no-arguments", no_arguments, FileNotFoundError,
        f"TMP/original holds {PTH}", "but no model_args.pth", "both are needed"),
    Row("convert-nothing", lambda w: convert_original_checkpoint(w.tmp), FileNotFoundError,
        "TMP", "holds none of", "Pass the folder that holds one, or its `weights_name`."),
    Row("convert-hub", no_checkpoint_on_the_hub, FileNotFoundError,
        "user/layer", "holds no TerDiT checkpoint", "Pass one as `subfolder`."),
    Row("convert-format", original(options={"weight_format": "int8"}), ValueError,
        "'int8'", 'must be "float", "packed" or None', REASON),
    Row("convert-folder", lambda w: convert_original_checkpoint(w.tmp / "x"), FileNotFoundError,
        "TMP/x", "is not a folder", "Pass that of a checkpoint, or a Hub id."),
    Row("convert-arguments", original(arguments=[1]), ValueError,
        "holds list", "expected the arguments of a training run", "Download it again."),

    # conversion of other models
    Row("dense-output", onto_files, FileExistsError,
        "TMP/out", "is not an empty folder", "choose another, or remove it"),
    Row("dense-folder", lambda w: convert_dense_checkpoint(w.tmp / "x", w.tmp / "out"), FileNotFoundError,
        "TMP/x", "is not a folder", "Pass that of a diffusers pipeline or model"),
    Row("dense-no-config", dense("pipe", options={"component": "unet"}), OSError,
        "TMP/pipe/unet", "has no config.json", "`path` must be a diffusers pipeline or model"),
    Row("dense-class", dense(config={"_class_name": "Nothing"}), ValueError,
        "'Nothing'", "which diffusers has not", "Pass a model of diffusers, or update it."),
    Row("dense-quantized", dense("quantized"), ValueError,
        "TMP/quantized", "is quantized already (ternary)", "convert the repository of dense weights"),
    Row("dense-build", dense(config={"num_attention_heads": 2**30, "attention_head_dim": 2**30}), ValueError,
        "TMP/dense/config.json", "does not build", "Download it again."),
    Row("dense-no-weight", dense(**{f"{Q}.weight": None}), ValueError,
        f"{Q}.weight", "1 dense weights are missing", "Download it again."),
    Row("dense-no-bias", dense(**{f"{Q}.bias": None}), ValueError,
        f"{Q}.bias", "1 weights are missing", "Download it again."),
    Row("dense-int-bias",
        dense(pos_embed__proj__bias=torch.zeros(32, dtype=torch.int32), options={"scale_granularity": "row"}),
        ValueError, "torch.int32", "the config asks for floats of shape [32]", "Download both again."),
    Row("dense-file", no_dense_file, OSError,
        f"TMP/dense/{WEIGHTS}", "only safetensors files are converted", "Save the model as such."),
    Row("dense-mlx", dense(x__scales=torch.ones(1), x__biases=torch.zeros(1)), ValueError,
        "TMP/dense", "is quantized for Apple's MLX", "Convert the repository of dense weights"),
    Row("dense-ternary", dense(x__weight_packed=torch.zeros(2, 8, dtype=torch.uint8)), ValueError,
        "TMP/dense", "holds ternary layers already", "it needs no conversion"),
    Row("dense-gemlite", dense(x__W_q=torch.zeros(2, 8, dtype=torch.uint8)), ValueError,
        "TMP/dense", "is packed for gemlite", "Convert the repository of dense weights"),
    Row("bitnet-floats", lambda w: swap_bitnet_order(torch.ones(2, 8)), ValueError,
        "torch.float32", "are a uint8 matrix", REASON),
    Row("bitnet-code-3", lambda w: swap_bitnet_order(CODE_3), ValueError,
        Fixed("code 3"), "which is not a ternary value", "Load it from an undamaged file."),

    # export, inspection, bundled checkpoints
    Row("export-empty", lambda w: export_remote_code(w.tmp), FileNotFoundError,
        "TMP", "holds neither model_index.json nor config.json", "Pass a folder that `save_pretrained` wrote."),
    Row("export-pipeline", export(_class_name="DiTPipeline"), ValueError,
        "DiTPipeline", "which this package does not have the code of", "Pass the folder of a TerDiTPipeline"),
    Row("export-transformer", export(transformer=["diffusers", "DiTTransformer2DModel"]), ValueError,
        "is a DiTTransformer2DModel", "says `transformer`", "expected a TerDiTTransformer2DModel"),
    Row("export-model", export("dense", "config.json"), ValueError,
        "DiTTransformer2DModel", "which this package does not have the code of",
        "Pass the folder of a TerDiTPipeline"),
    Row("export-no-config", export_without_config, OSError,
        "TMP/pipe/transformer/config.json", "cannot be read", AGAIN),
    Row("export-json", export_broken, ValueError, "holds list", "TMP/config.json", AGAIN),
    Row("inspect-nothing", lambda w: inspection.inspect_weights(w.tmp), OSError,
        "TMP", f"has no {WEIGHTS}. It holds no weights.", "Pass the folder of a pipeline, model or layer."),
    Row("inspect-scale", odd_scale, ValueError, "[8, 9]", "which is no ternary layer", "Save it again."),
    Row("bundled", lambda w: bundled("cifar"), ValueError,
        "'cifar'", "No bundled checkpoint", "there are 'digits', 'emoji'"),

    # the card
    Row("card", broken_card, ValueError, "TMP/README.md", "cannot be read as a model card", "Correct it first."),
    Row("card-pictures", lambda w: model_card.CardOptions(images={"a cat": "cat.png"}), ValueError,
        "got str for 'a cat'", "must hold PIL images", "as a list or by caption"),

    # the command
    Row("terdit-folder", terdit("info", "TMP/x"), FileNotFoundError,
        "TMP/x", "is not a folder", "Pass that of a saved pipeline, or a Hub id."),
    Row("terdit-model", terdit("info", "cifar"), ValueError,
        "'cifar'", "No bundled checkpoint", "there are 'digits', 'emoji'"),
    Row("terdit-device", generate("--device", "toaster"), ValueError,
        "'toaster'", "cannot be used here", "`cpu` always can."),
    Row("terdit-scheduler", generate("--scheduler", "DDIM"), ValueError,
        "'DDIM'", "diffusers has no scheduler", "Close matches: DDIMScheduler"),
    Row("terdit-flow", generate("--scheduler", "FlowMatchEulerDiscreteScheduler"), ValueError,
        "FlowMatchEulerDiscreteScheduler", "which was trained for noise prediction", "Try DDIMScheduler"),
    Row("terdit-picture", terdit("generate", "--output", "TMP/x.txt"), ValueError,
        "TMP/x.txt", "does not name a picture", "end it in .png, .jpg, .webp"),
    Row("terdit-picture-folder", picture_is_a_folder, IsADirectoryError,
        "TMP/x.png", "is a folder", "name a picture in it"),
    Row("terdit-picture-in-a-file", picture_in_a_file, NotADirectoryError,
        "TMP/file/x.png", "TMP/file is a file", "Choose another --output."),
    Row("terdit-picture-not-allowed", picture_not_allowed, PermissionError,
        "TMP/x.png", "no permission to write to TMP", "Choose another --output."),
    Row("terdit-seeds", generate("--seed", 1, 2, "--num_images_per_label", 3), ValueError,
        "2 seeds", "but 3 were asked for", "Leave out --num_images_per_label"),
    Row("terdit-seed", generate("--seed", 2**70), ValueError, f"got {2**70}", "from -2**63 to 2**63 - 1", REASON),
    Row("terdit-images", generate("--num_images_per_label", -2), ValueError,
        "got -2", "--num_images_per_label must be 1 or more", REASON),
    Row("terdit-convert-vae", converts("dense", "--vae", "auto"), ValueError,
        "TMP/dense", "--vae is for the files of TerDiT's authors", "Leave it out."),
    Row("terdit-convert-granularity", converts("original", "--scale_granularity", "row"), ValueError,
        "TMP/original", "--scale_granularity is for diffusers models with dense weights", "Leave it out."),
    Row("terdit-labels", info_of("layer", "--labels"), ValueError,
        "TMP/layer", "names no labels", "Leave out --labels."),
    Row("terdit-kernels", info_of("dense", "--kernels"), ValueError,
        "TMP/dense", "has no ternary layers", "Leave out --kernels."),
    Row("terdit-info-pipeline", info_of("pipe", _class_name="DiTPipeline"), ValueError,
        "holds a DiTPipeline", "not a TerDiTPipeline", "Pass the folder of a model in it."),
    Row("terdit-info-json", broken_index, ValueError, "TMP/model_index.json", "is not JSON", AGAIN),
    Row("terdit-push-hub", push_from_the_hub, NotADirectoryError,
        "user/digits", "is no folder here", "what is on the Hub needs no push"),
]
