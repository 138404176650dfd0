"""Files and repositories: loading, conversion, export, the card, the command."""

import json
import os
import struct
import sys
import warnings
import zipfile
from argparse import ArgumentTypeError
from functools import partial

import diffusers
import torch
from diffusers import DDPMScheduler, ModelMixin
from filelock import FileLock
from message_table import PTH, WEIGHTS, Fixed, Row, changed, dit, edit, terdit
from safetensors.torch import load_file, save_file

from diffusers_terdit import (
    TerDiTPipeline,
    TerDiTTransformer2DModel,
    TernaryLinear,
    arguments,
    conversion,
    convert_original_checkpoint,
    export_remote_code,
)
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.conversion import convert_ternary_checkpoint, swap_bitnet_order
from diffusers_terdit.export import export_pipeline, trace, write_onnx, write_openvino
from diffusers_terdit.hub import known_files, model_card
from diffusers_terdit.hub.push import push_saved
from diffusers_terdit.storage import configs, inspection, saving, weights
from diffusers_terdit.training import checkpointing
from published_forms import GROUP, in_gemlite, in_mlx, write
from tiny import make_ternary


INDEX = f"{WEIGHTS}.index.json"
SCHEDULER = "scheduler/scheduler_config.json"
AGAIN = "Download or save it again."
TOGETHER = "Download or save config.json and weights again, together."
SHARED = torch.ones(8)
NAN = torch.full((8,), float("nan"))
CODE_3 = torch.full((2, 8), 255, dtype=torch.uint8)
HUGE = {"num_attention_heads": 2**30, "attention_head_dim": 2**30}
Q = "transformer_blocks.0.attn1.to_q"

load = TernaryLinear.from_pretrained
layer = partial(changed, "layer", load, WEIGHTS)
config = partial(changed, "layer", load, "config.json")
index = partial(changed, "layer", load, INDEX)
model_index = partial(changed, "pipe", TerDiTPipeline.from_pretrained, "model_index.json")
scheduler = partial(changed, "pipe", TerDiTPipeline.from_pretrained, SCHEDULER)
export = partial(changed, "pipe", export_remote_code)


def without(package, write):
    """Write a traced model where a package is missing."""

    def provoke(w):
        w.monkeypatch.setitem(sys.modules, package, None)
        write(None, w.tmp / "model")

    return provoke


def other_digest(w):
    path = w.saved("layer") / WEIGHTS
    with weights.safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "bias": torch.ones(8)}, path, metadata)
    load(path.parent)


def busy(w):
    with FileLock(w.tmp / "terdit-saving.lock"), saving.replacing(w.tmp, w.tmp / "x.saving", seconds=0):
        pass


def no_hook(w):
    w.monkeypatch.setattr(TernaryLinear, "_load_pretrained_model", ModelMixin._load_pretrained_model)
    load(w.saved("layer"))


def only_a_pickle(w):
    (w.saved("layer") / WEIGHTS).rename(w.tmp / "layer" / "diffusion_pytorch_model.bin")
    load(w.tmp / "layer")


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
    edit(second, **dict([next(iter(load_file(first).items()))]))
    TerDiTTransformer2DModel.from_pretrained(folder)


def shards_of_two(w):
    folder, other = sharded(w), sharded(w, 1)
    path = next(p for p in sorted(other.glob("*-of-*.safetensors")) if "proj_in.weight" in load_file(p))
    (folder / path.name).write_bytes(path.read_bytes())
    TerDiTTransformer2DModel.from_pretrained(folder)


def index_differs(w):
    folder = sharded(w)
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map={name: file for name, file in names.items() if name != "proj_in.bias"})
    TerDiTTransformer2DModel.from_pretrained(folder)


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


def name_twice(path):
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, of the name
        archive.writestr(archive.namelist()[0], b"")


def cut_a_record(path):
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data[:-1] if name.endswith("/data/0") else data)


def original(damage=None, arguments=None, options=None, **changes):
    """Convert the authors' files, after a change of one of them."""

    def provoke(w):
        folder = w.saved("original")
        if changes:
            edit(folder / PTH, **changes)
        if arguments is not None:
            torch.save(arguments, folder / "model_args.pth")
        if damage:
            damage(folder / PTH)
        convert_original_checkpoint(folder, **(options or {}))

    return provoke


class Payload:
    def __reduce__(self):
        return os.mkdir, ("never",)


def few_layers(w):
    w.monkeypatch.setattr(conversion.terdit, "MAX_BLOCKS", 1)
    convert_original_checkpoint(w.saved("original"))


def no_checkpoint_on_the_hub(w):
    w.hub.upload_folder("user/layer", w.saved("layer"))
    convert_original_checkpoint("user/layer")


def dense(kind="dense", file=WEIGHTS, options=None, **changes):
    """Convert a model of diffusers, after a change of one of its files."""

    def convert(folder):
        convert_ternary_checkpoint(folder, folder.parent / "out", **(options or {}))

    return changed(kind, convert, file, **changes)


def form(kind, file=None, options=None, **changes):
    """Convert a model packed for MLX or gemlite, after a change of its first layer or of a file."""
    pack, name = {"mlx": (in_mlx, WEIGHTS), "gemlite": (in_gemlite, "state_dict.pt")}[kind]

    def provoke(w):
        folder = write(w.tmp / kind, make_ternary(dit(), GROUP), pack, torch.float32, name)
        keys = changes if file else {key if "." in key else f"{Q}.{key}": new for key, new in changes.items()}
        edit(folder / (file or name), **keys)
        convert_ternary_checkpoint(folder, w.tmp / "out", **(options or {}))

    return provoke


def stored_as_16_bits(w):
    save_file({"bias": torch.ones(2, dtype=torch.uint16)}, w.tmp / "x.safetensors")
    weights.WeightsFile(w.tmp / "x.safetensors").read("bias")


def two_models(w):
    (w.tmp / "models").mkdir()
    for name in "ab":
        w.saved("dense").rename((w.tmp / "models").joinpath(f"transformer-{name}"))
    convert_ternary_checkpoint(w.tmp / "models", w.tmp / "out")


def with_pipeline(kind):
    return lambda w: convert_ternary_checkpoint(w.saved("dense"), w.tmp / "out", pipeline=w.saved(kind))


def several_checkpoints(w):
    (w.tmp / "several").mkdir()
    for name in "ab":
        w.saved("original").rename(w.tmp / "several" / name)
    convert_original_checkpoint(w.tmp / "several", size="600m")


def no_pipeline(w):
    TerDiTPipeline.from_pretrained(w.saved("original"))


def onto_files(w):
    (w.tmp / "out").mkdir()
    (w.tmp / "out" / "notes.txt").touch()
    convert_ternary_checkpoint(w.tmp, w.tmp / "out")


def broken_card(w):
    (w.tmp / "README.md").write_text("---\na: [\n---\nold")
    model_card.read_card(w.tmp / "README.md")


def link(w):
    (w.saved("layer") / "diffusion_pytorch_model.saving").symlink_to(w.tmp / "elsewhere")
    w.model().save_pretrained(w.tmp / "layer")


def saved_meanwhile(w):
    folder = w.saved("layer")
    with saving.undisturbed(folder):
        load(folder).save_pretrained(folder)


def command(*arguments):
    """A `terdit` command; `TMP` in it is the row's folder."""
    return lambda w: terdit(*(str(argument).replace("TMP", str(w.tmp)) for argument in arguments))


def generate(*arguments):
    return command("generate", *arguments, "--num_inference_steps", 1, "--output", "TMP/x.png")


def labels_without_classes(w):
    pipe = TerDiTPipeline(w.model(num_classes=1), DDPMScheduler())
    pipe.save_pretrained(w.tmp / "alone")
    terdit("generate", w.tmp / "alone", "--labels", 0)


def picture_in_a_file(w):
    (w.tmp / "file").touch()
    terdit("generate", "--output", w.tmp / "file" / "x.png")


def picture_is_a_folder(w):
    (w.tmp / "x.png").mkdir()
    terdit("generate", "--output", w.tmp / "x.png")


def picture_is_there(w):
    (w.tmp / "x.png").touch()
    terdit("generate", "--output", w.tmp / "x.png")


def folder_is_there(w):
    (w.tmp / "mine").touch()
    terdit("pack", "digits", w.tmp)


def run_without_a_pipeline(w):
    for step in (4, 5):
        (w.tmp / f"checkpoint-{step}").mkdir()
        (w.tmp / f"checkpoint-{step}" / checkpointing.STATE_NAME).touch()
    terdit("generate", w.tmp)


def info_of_a_checkpoint(w):
    (w.tmp / "checkpoint-4").mkdir()
    (w.tmp / "checkpoint-4" / checkpointing.STATE_NAME).touch()
    terdit("info", w.tmp / "checkpoint-4")


def picture_not_allowed(w):
    w.monkeypatch.setattr(os, "access", lambda path, mode: False)  # the administrator may write everywhere
    terdit("generate", "--output", w.tmp / "x.png")


def info(kind, *arguments, **changes):
    return changed(kind, lambda folder: terdit("info", folder, *arguments), **changes)


def opened(make):
    """Open a known file that `make` puts there."""

    def provoke(w):
        make(w.tmp / "LICENSE")
        known_files.open_inside(w.tmp, "LICENSE")

    return provoke


def push_a_config_that_is_none(w):
    (w.saved("layer") / "config.json").write_text("{")
    push_saved(TernaryLinear(8, 8), w.tmp / "layer", model_card.CardOptions(), "user/layer")


def push_from_the_hub(w):
    w.hub.upload_folder("user/digits", bundled())
    terdit("push", "user/digits", "user/other")


def converts(kind, *arguments):
    return lambda w: terdit("convert", w.saved(kind), w.tmp / "out", *arguments)


# fmt: off
ROWS = [
    # saving and loading
    Row(changed("layer", load, "layer.saving", text=""), "TMP/layer", "was interrupted, or is under way",
        "there again", error=OSError),
    Row(lambda w: weights.WeightsFile(w.tmp), "TMP", "it is no regular file", "Download or save it again.",
        error=OSError),
    Row(busy, "TMP", "Another process is saving into", "Save elsewhere, or try again", error=OSError),
    Row(lambda w: TernaryLinear(8, 8).save_pretrained(w.tmp, safe_serialization=False), "safe_serialization=False",
        "Ternary weights are saved as safetensors only", "Leave it out."),
    Row(only_a_pickle, "TMP/layer has its weights in a pickle", "are read from safetensors only", "take a copy with",
        error=OSError),
    Row(index(text="{"), f"TMP/layer/{INDEX}", "is not JSON", AGAIN),
    Row(index(text="[]"), "holds list", f"TMP/layer/{INDEX}", AGAIN),
    Row(index(text='{"metadata": {}}'), f"TMP/layer/{INDEX}", "has no `weight_map`", AGAIN),
    Row(index(text=json.dumps({"weight_map": {"bias": WEIGHTS}})), f"TMP/layer/{INDEX}", "has no `metadata`", AGAIN),
    Row(index(text='{"metadata": {}, "weight_map": {"bias": "../x"}}'), "'../x'", "a shard is a plain file name",
        "in the folder of the index"),
    Row(index(text='{"metadata": {}, "weight_map": {"bias": "x.safetensors"}}'), "names x.safetensors",
        "which is not there", "Download or save the model again.", error=OSError),
    Row(index_differs, "['proj_in.bias']", "the index and the files differ", "Save the model again."),
    Row(link, "TMP/layer/diffusion_pytorch_model.saving", "is a symbolic link", "or choose another folder.",
        error=OSError),
    Row(saved_meanwhile, "TMP/layer", "Another process saved into", "Load it again.", error=OSError),
    Row(lambda w: configs.check_config(w.tmp / "config.json", []), "config is list", "expected an object"),
    Row(config(text="[" * 10**5), "TMP/layer/config.json", "is not JSON: maximum recursion", AGAIN),
    Row(config(_converted_from=5), "_converted_from=5", "expected a Hub id, and sha256 by file"),
    Row(config(in_features=0), "in_features=0", "TMP/layer/config.json: the config has", "expected a positive int"),
    Row(scheduler(beta_end=1e300), "beta_end=1e+300", "TMP/pipe/scheduler/scheduler_config.json: the config has",
        "more than a float32 holds"),
    Row(config(quantization_config="int8"), "quantization_config='int8'", "TMP/layer/config.json: the config has",
        "expected one with a `quant_method`"),
    Row(changed("pipe", TerDiTPipeline.from_pretrained, "transformer/config.json", **HUGE), "TMP/pipe",
        "the config asks for tensors that cannot be", TOGETHER),
    Row(model_index(vae=["diffusers"]), "['diffusers']", "`vae` is", "expected the names of a library and a class"),
    Row(model_index(_class_name=5), "`_class_name` is 5", "expected the name of a class"),
    Row(model_index(transformer=["diffusers", "DiTTransformer2DModel"]), "DiTTransformer2DModel", "`transformer` is",
        "expected a TerDiTTransformer2DModel"),
    Row(model_index(vae="sd"), "`vae` is 'sd'", "expected an autoencoder of diffusers"),
    Row(model_index(id2label={"0": 5}), "{'0': 5}", "expected names by class id"),
    Row(scheduler(num_train_timesteps=0), "num_train_timesteps=0", "expected a positive int"),
    Row(scheduler(beta_schedule="steep"), "steep", "these settings make no DDPMScheduler",
        "Save it again, or update diffusers."),
    Row(scheduler(trained_betas=[]), "0 betas for 1000 timesteps", "these settings make no DDPMScheduler",
        "Save it again, or update diffusers."),
    Row(changed("layer", inspection.inspect_weights, WEIGHTS, text="cut"), f"TMP/layer/{WEIGHTS}",
        "is not a readable safetensors file", AGAIN, error=OSError),
    Row(changed("layer", TernaryLinear.from_pretrained, WEIGHTS, text="cut"), f"TMP/layer/{WEIGHTS}",
        "It is damaged (Error while deserializing header", AGAIN, error=OSError),
    Row(other_digest, f"TMP/layer/{WEIGHTS}", "do not match the digest", "download or save it again"),
    Row(layer(weight_packed=CODE_3), "`weight_packed`", "holds code 3", AGAIN),
    Row(layer(bias=NAN), "`bias`", "holds NaN or infinity", "download it again, or take an earlier one"),
    Row(layer(ghost=NAN), "`ghost`", "TernaryLinear has no such weight", TOGETHER),
    Row(layer(bias=NAN[:5]), "`bias` has shape [5]", "the config asks for [8]", TOGETHER),
    Row(layer(bias=torch.zeros(8, dtype=torch.int32)), "is stored as I32", "expected floating point", TOGETHER),
    Row(layer(bias=None), "`bias`", "1 missing tensor(s) of TernaryLinear", TOGETHER),
    Row(layer(metadata={"terdit.version": "2"}), "version '2'", "reads version 1", "Update diffusers-terdit."),
    Row(layer(metadata={"terdit.config": "[1]"}), "`terdit.config` is '[1]'", "expected a JSON object",
        "Download it again."),
    Row(layer(metadata={"terdit.packing": "columns"}), "'columns'", "this release reads 'row-chunk-2bit'",
        "Update diffusers-terdit."),
    Row(config(weight_format="float"), f"TMP/layer/{WEIGHTS}", "but the config says weight_format='float'",
        'Load it as weight_format="packed"'),
    Row(changed("float_layer", load, WEIGHTS, metadata={"terdit.version": "1"}, weight_packed=CODE_3),
        "tensor `weight_packed`", "is packed", 'Load it as weight_format="packed"'),
    Row(shard_twice, "TMP/model-0", "is in both", "Save the model again."),
    Row(shards_of_two, "TMP/model-0", "holds shards of several models", "Download all of them again"),
    Row(no_hook, f"diffusers {diffusers.__version__} no longer", "the weights were not checked",
        "Update diffusers-terdit or install diffusers 0.42.1.", error=RuntimeError),
    Row(lambda w: TernaryLinear.from_pretrained(bundled() / "transformer"), "digits/transformer",
        "has no in_features, which a TernaryLinear needs",
        "load it as what it says it is: 'TerDiTTransformer2DModel'"),
    Row(lambda w: (w.hub, TerDiTPipeline.from_pretrained("user/nothing")), "user/nothing", "no repository",
        "check the name, or log in with `hf auth login`", error=OSError),
    Row(original(arguments={"x": Payload()}), "TMP/original/model_args.pth",
        "holds more than tensors and plain values, such as posix.mkdir", "do not trust this file"),
    Row(original(lambda path: path.write_bytes(path.read_bytes()[:1000])), f"TMP/original/{PTH}",
        "truncated or damaged?", "Download it again.", error=OSError),
    Row(original(compress), f"TMP/original/{PTH}", "a record is compressed, or marked as a folder",
        "Download it again.", error=OSError),
    Row(original(flip), f"TMP/original/{PTH}", "does not have its checksum", "Download it again.", error=OSError),
    Row(original(name_twice), f"TMP/original/{PTH}", "two records have one place or one name", "Download it again.",
        error=OSError),
    Row(original(cut_a_record), f"TMP/original/{PTH}", "its records are not as long as its tensors",
        "Download it again.", error=OSError),
    Row(original(lambda path: torch.save([1], path)), f"TMP/original/{PTH}", "does not hold a dict of tensors", AGAIN),
    Row(original(x=torch.zeros(()).expand(8)), "tensor `x` has shape [8]", "memory for fewer numbers", AGAIN),
    Row(original(x=torch.zeros(3).to_sparse()), "tensor `x` is torch.sparse_coo", "expected a dense one on the CPU",
        "Save it again."),

    # conversion of the authors' files
    Row(original(x__weight=NAN), "`x.weight`", "does not belong to a TerDiT",
        "only files of its authors are converted"),
    Row(original(arguments={"ntk_factor": 2.0}), "ntk_factor=2.0", "which this package does not implement",
        "take another file"),
    Row(original(arguments={"model": 5}), "model=5", "expected a name", "take the model_args.pth that belongs to it"),
    Row(original(arguments={"vae": "../x"}, options={"vae": "auto"}), "vae='../x'", 'expected "ema" or "mse"',
        "Pass a VAE, or its Hub id."),
    Row(original(layers__0__attention__wq__weight_scale=torch.ones(1)), "`layers.0.attention.wq.weight_scale`",
        "is a second `transformer_blocks.0.attn.to_q.weight_scale`", "download the file again"),
    Row(original(x=torch.zeros(3, dtype=torch.complex64).conj().imag), "`x`", "a view with the signs changed",
        "download the file again"),
    Row(original(x=SHARED, y=SHARED), "`y` shares its memory with `x`", "download the file again"),
    Row(original(x_embedder__weight=None), "`x_embedder.weight`", "so this is not a TerDiT",
        "download the file again"),
    Row(original(x_embedder__weight=NAN), "has shape [8]", "expected a matrix", "download the file again"),
    Row(original(options={"num_attention_heads": 7}), "7 heads", "does not divide into", "pass `num_attention_heads`"),
    Row(original(options={"num_attention_heads": 0}), "got 0", "`num_attention_heads` must be a positive int"),
    Row(original(arguments={"model": "DiT_patch0"}), "patches of 0", "which do not fit `x_embedder.weight`",
        "take the model_args.pth that belongs to it"),
    Row(original(arguments={"image_size": "256"}), "image_size='256'", "expected pixels",
        "take the model_args.pth that belongs to it"),
    Row(few_layers, "2 layers", "more than 1", "download the file again"),
    Row(original(layers__0__attention__wk__weight=torch.zeros(1, 128)), "into 0 of keys", "heads do not divide",
        "pass `num_attention_heads`"),
    Row(original(layers__0__ffn_norm__weight=torch.zeros(128, dtype=torch.int32)), "is torch.int32",
        "expected floats or packed codes", "download the file again"),
    Row(original(layers__0__ffn_norm__weight=NAN), "`layers.0.ffn_norm.weight`", "holds NaN or infinity",
        "download the file again"),
    Row(original(layers__0__ffn_norm__weight=torch.zeros(128, dtype=torch.uint8)), "`layers.0.ffn_norm.weight`",
        "does not hold packed ternary codes", "download the file again"),
    Row(original(layers__0__ffn_norm__weight=torch.zeros(7)), "(7,)", "1 tensors do not fit a TerDiT of these sizes",
        "download the file again"),
    Row(changed("original", convert_original_checkpoint, "model_args.pth", remove=True), f"TMP/original holds {PTH}",
        "but no model_args.pth", "both are needed", error=FileNotFoundError),
    Row(lambda w: convert_original_checkpoint(w.tmp), "TMP", "holds none of",
        "Pass the folder or repository that holds one, or its `weights_name`.", error=FileNotFoundError),
    Row(no_checkpoint_on_the_hub, "user/layer", "holds none of",
        "Pass the folder or repository that holds one, or its `weights_name`.", error=FileNotFoundError),
    Row(several_checkpoints, "of size 600m", "There are: a (600m, 64 px",
        "Pass `size` and `resolution`, or the `subfolder`, of one.", error=FileNotFoundError),
    Row(no_pipeline, "TMP/original", "holds checkpoints of TerDiT's authors",
        "Convert one of them: `terdit convert TMP/original FOLDER`.", error=OSError),
    Row(original(options={"weight_format": "int8"}), "'int8'", 'must be "float", "packed" or None'),
    Row(lambda w: convert_original_checkpoint(w.tmp / "x"), "TMP/x", "is not a folder",
        "Pass that of a checkpoint, or a Hub id.", error=FileNotFoundError),
    Row(original(arguments=[1]), "holds list", "expected the arguments of a training run", "Download it again."),

    # conversion of other models
    Row(onto_files, "TMP/out", "is not an empty folder", "choose another, or remove it", error=FileExistsError),
    Row(lambda w: convert_ternary_checkpoint(w.tmp / "x", w.tmp / "out"), "TMP/x", "is not a folder",
        "Pass that of a diffusers pipeline or model", error=FileNotFoundError),
    Row(dense("pipe", options={"component": "unet"}), "TMP/pipe/unet", "has no config.json",
        "`path` must be a diffusers pipeline or model", error=OSError),
    Row(dense(file="config.json", _class_name="Nothing"), "'Nothing'", "which diffusers has not",
        "Pass a model of diffusers, or update it."),
    Row(dense("quantized"), "TMP/quantized", "is quantized already (ternary)",
        "convert the repository of dense weights"),
    Row(dense(file="config.json", **HUGE), "TMP/dense/config.json", "does not build", "Download it again."),
    Row(dense(**{f"{Q}.weight": None}), f"{Q}.weight", "1 weights are missing", "Download it again."),
    Row(dense(**{f"{Q}.bias": None}), f"{Q}.bias", "1 weights are missing", "Download it again."),
    Row(form("mlx", **{"pos_embed.proj.bias": torch.zeros(32, dtype=torch.int32)}), "torch.int32",
        "the config asks for floats of shape [32]", "Download both again."),
    Row(dense(remove=True), f"TMP/dense/{WEIGHTS}", "only safetensors files are converted", "Save the model as such.",
        error=OSError),
    Row(dense(x__weight_packed=torch.zeros(2, 8, dtype=torch.uint8)), "TMP/dense", "holds ternary layers already",
        "it needs no conversion"),
    Row(dense(file="config.json", rotation="hadamard"), "rotation='hadamard'", "so it may compute something else",
        "Update diffusers"),
    Row(dense(x__y=torch.ones(1)), "x.y", "1 tensor(s) that DiTTransformer2DModel does not have",
        "Download config and weights"),
    Row(stored_as_16_bits, "tensor `bias` is U16", "which is not read", "Save it as float16."),
    Row(form("mlx", scales=None), Q, "has no `scales`", "Download the file again."),
    Row(form("mlx", scales=torch.ones(8)), f"{Q} is shape (32, 2), torch.uint32", "MLX's two-bit layers are",
        "Download the file again."),
    Row(form("mlx", scales=torch.ones(32, 3), biases=-torch.ones(32, 3)), f"{Q} has codes for 32 rows of 32 inputs",
        "which do not fit together", "Download the file again."),
    Row(form("mlx", biases=torch.ones(32, 1)), f"{Q} is not ternary: row 0, group 0", "values that are not -scale",
        "Only ternary models are converted."),
    Row(form("mlx", weight=torch.zeros(32, 4, dtype=torch.uint32)), f"{Q} has [32, 64] weights", "ask for [32, 32]",
        "Download both again."),
    Row(form("mlx", file="quantization_config.json", rotation=True), "rotation=True", "would load as noise",
        "Convert the repository of dense weights."),
    Row(form("mlx", file="quantization_config.json", bits=1), "has 1 bits per weight",
        "two-bit ternary models are read", "Take the ternary repository."),
    Row(form("mlx", options={"scale_granularity": "row"}), "TMP/mlx is packed for MLX", "which says what is ternary",
        "Leave out `scale_granularity`"),
    Row(form("gemlite", zeros=None), Q, "has no `zeros`", "Download the file again."),
    Row(form("gemlite", meta_scale=torch.tensor(0.5)), f"{Q} is shape (8, 32), torch.uint8",
        "a scale of scales of [0.5]", "Convert the repository of dense weights"),
    Row(form("gemlite", scales=torch.full((1, 32), float("nan"))), f"TMP/gemlite/state_dict.pt: tensor `{Q}.scales`",
        "holds NaN", "Download it again."),
    Row(two_models, "transformer-a, transformer-b", "holds several models", "Pass one of them as `component`."),
    Row(with_pipeline("layer"), "TMP/layer", "has no model_index.json", "Pass the folder or Hub id of a pipeline",
        error=FileNotFoundError),
    Row(with_pipeline("pipe"), "TMP/dense is 'DiTTransformer2DModel'", "as its transformer",
        "Pass the pipeline that this model was made for."),
    Row(lambda w: swap_bitnet_order(torch.ones(2, 8)), "torch.float32", "are a uint8 matrix"),
    Row(lambda w: swap_bitnet_order(CODE_3), Fixed("code 3"), "which is not a ternary value",
        "Load it from an undamaged file."),

    # export, inspection, bundled checkpoints
    Row(lambda w: trace(w.model()), Fixed("float format"), "what is exported is packed", "Call `pack()` first."),
    Row(lambda w: trace(w.model("packed").bfloat16()), "torch.bfloat16 on cpu", "from the CPU, in float32",
        'Call `to("cpu").float()`.'),
    Row(without("onnxscript", write_onnx), Fixed("onnxscript"), "Writing ONNX needs", "pip install onnxscript",
        error=ImportError),
    Row(without("openvino", write_openvino), Fixed("openvino"), "Writing for OpenVINO needs", "pip install openvino",
        error=ImportError),
    Row(lambda w: export_pipeline(w.pipe("packed"), w.tmp / "out", "gguf"), "'gguf'", "must be 'onnx' or 'openvino'"),
    Row(lambda w: export_remote_code(w.tmp), "TMP", "holds neither model_index.json nor config.json",
        "Pass a folder that `save_pretrained` wrote.", error=FileNotFoundError),
    Row(export("model_index.json", _class_name="DiTPipeline"), "DiTPipeline",
        "which this package does not have the code of", "Pass the folder of a TerDiTPipeline"),
    Row(export("model_index.json", transformer=["diffusers", "DiTTransformer2DModel"]), "is a DiTTransformer2DModel",
        "says `transformer`", "expected a TerDiTTransformer2DModel"),
    Row(changed("dense", export_remote_code), "DiTTransformer2DModel", "which this package does not have the code of",
        "Pass the folder of a TerDiTPipeline"),
    Row(export("transformer/config.json", remove=True), "TMP/pipe/transformer/config.json", "cannot be read", AGAIN,
        error=OSError),
    Row(changed("layer", export_remote_code, "config.json", text="[]"), "holds list", "TMP/layer/config.json", AGAIN),
    Row(lambda w: inspection.inspect_weights(w.tmp), "TMP", f"has no {WEIGHTS}. It holds no weights.",
        "Pass the folder of a pipeline, model or layer.", error=OSError),
    Row(changed("layer", inspection.inspect_weights, WEIGHTS, weight_scale=torch.ones(8, 9)), "[8, 9]",
        "which is no ternary layer", "Save it again."),
    Row(lambda w: bundled("cifar"), "'cifar'", "No bundled checkpoint", "there are 'digits', 'emoji', 'fashion'"),

    # the card
    Row(broken_card, "TMP/README.md", "cannot be read as a model card", "Correct it first."),
    Row(opened(lambda path: path.symlink_to("/etc/hosts")), "TMP/LICENSE", "is a link, or in a folder that is one",
        "Put the file itself there, or remove the link.", error=OSError),
    Row(opened(os.mkfifo), "TMP/LICENSE", "is not a regular file", "Put one there, or remove it.", error=OSError),
    Row(opened(str), "TMP/LICENSE", "No such file or directory", error=FileNotFoundError),
    Row(push_a_config_that_is_none, "config.json is not JSON", "Expecting property name", "Save the model again."),
    Row(lambda w: model_card.CardOptions(images={"a cat": "cat.png"}), "got str for 'a cat'", "must hold PIL images",
        "as a list or by caption"),

    # the command
    Row(command("info", "TMP/x"), "TMP/x", "is not a folder", "Pass that of a saved pipeline, or a Hub id.",
        error=FileNotFoundError),
    Row(command("info", "cifar"), "'cifar'", "no bundled checkpoint (digits, emoji", "no Hub id (owner/name)"),
    Row(generate("--device", "toaster"), "'toaster'", "cannot be used here", "`cpu` always can."),
    Row(generate("--scheduler", "DDIN"), "'DDIN'", "diffusers has no scheduler", "Close matches: DDIMScheduler"),
    Row(generate("emoji", "--labels", "gost"), "'gost'", "is not a label of emoji",
        "All labels: `terdit info emoji --labels`."),
    Row(generate("--scheduler", "FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler",
        "which was trained for noise prediction", "Try DDIMScheduler"),
    Row(command("generate", "--output", "TMP/x.txt"), "TMP/x.txt", "does not name a picture",
        "end it in .png, .jpg, .webp"),
    Row(picture_is_a_folder, "TMP/x.png", "is a folder", "name a picture in it", error=IsADirectoryError),
    Row(command("generate", "x.pth"), "x.pth", "No file", "a model is a folder or a Hub id", error=FileNotFoundError),
    Row(changed("layer", lambda folder: terdit("generate", folder / WEIGHTS)), f"TMP/layer/{WEIGHTS}", "is a file",
        "Pass the folder of a saved pipeline.", error=NotADirectoryError),
    Row(picture_is_there, "TMP/x.png", "exists", "Pass --overwrite", error=FileExistsError),
    Row(folder_is_there, "TMP", "exists and is not empty", "Pass --overwrite", error=FileExistsError),
    Row(run_without_a_pipeline, "TMP/checkpoint-5", "holds checkpoints of a run, and no pipeline yet",
        "Pass the newest checkpoint", error=FileNotFoundError),
    Row(changed("pipe", lambda folder: terdit("export", folder, folder.parent / "out")), "TMP/pipe",
        "is a pipeline already", "Use it as it is"),
    Row(changed("pipe", lambda folder: terdit("convert", folder, folder.parent / "out")), "TMP/pipe",
        "is a pipeline of this package", "`terdit pack` packs float weights."),
    Row(labels_without_classes, "TMP/alone", "has no classes", "Leave out --labels."),
    Row(lambda w: terdit("generate", "digits", "--labels", ","), "','", "names no label", "Pass names or class ids"),
    Row(info_of_a_checkpoint, "TMP/checkpoint-4", "is a checkpoint of a training run", "by `terdit export TMP/"),
    Row(picture_in_a_file, "TMP/file/x.png", "TMP/file is a file", "Choose another --output.",
        error=NotADirectoryError),
    Row(picture_not_allowed, "TMP/x.png", "no permission to write to TMP", "Choose another --output.",
        error=PermissionError),
    Row(generate("--seed", 1, 2, "--num_images_per_label", 3), "2 seeds", "but 3 were asked for",
        "Leave out --num_images_per_label"),
    Row(generate("--num_images_per_label", 10**11), "1,000,000,000,000 images of 8 x 8 pixels",
        "Pillow opens none of more than", "Ask for fewer or smaller images."),
    Row(lambda w: arguments.at_least(1)("0"), "'0'", "expected an integer, 1 or more", error=ArgumentTypeError),
    Row(lambda w: arguments.color("whit"), "'whit'", "expected a color, such as white", error=ArgumentTypeError),
    Row(lambda w: arguments.share("1.5"), "'1.5'", "expected a number, 0 to 1", error=ArgumentTypeError),
    Row(converts("dense", "--vae", "auto"), "TMP/dense", "--vae is for the files of TerDiT's authors",
        "Leave it out."),
    Row(converts("original", "--scale_granularity", "row"), "TMP/original",
        "--scale_granularity applies to models of diffusers", "leave it out."),
    Row(info("layer", "--labels"), "TMP/layer", "names no labels", "Leave out --labels."),
    Row(info("dense", "--kernels"), "TMP/dense", "has no ternary layers", "Leave out --kernels."),
    Row(info("pipe", file="model_index.json", text='{"_class_name": "DiTPipeline"}'), "holds a 'DiTPipeline'",
        "without ternary parts", "Pass the folder of a model in it"),
    Row(info("pipe", file="model_index.json", text="{"), "TMP/pipe/model_index.json", "is not JSON", AGAIN),
    Row(push_from_the_hub, "user/digits", "There is no folder", "A model on the Hub is already there.",
        error=NotADirectoryError),
]
