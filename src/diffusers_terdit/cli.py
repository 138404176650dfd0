"""The `terdit` command: parse, call one function, print."""

import argparse
import contextlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from . import __version__
from .arguments import ACTIVATION_BITS, DTYPES, Parser, activation_bits, at_least, dtype, granularity, not_negative
from .checkpoints import BUNDLED, resolve_model
from .conversion import convert_original_checkpoint, convert_ternary_checkpoint, is_published_model
from .export import FORMATS, export_pipeline
from .hub.errors import hub_errors
from .hub.model_card import CardOptions, human_bytes, printable
from .hub.push import push_saved
from .layers import TernaryLinear
from .modeling import check_pipeline_config
from .models.transformer_terdit import TerDiTTransformer2DModel
from .ops import choose_kernel
from .pipelines.pipeline_terdit import TerDiTPipeline
from .pipelines.schedulers import scheduler_by_name
from .quantization import TernaryConfig, TernaryMethod
from .storage.configs import check_config
from .storage.inspection import HEADERS, WeightsReport, inspect_weights
from .storage.saving import new_file
from .storage.weights import read_json
from .training import checkpointing
from .training.export import checkpoint_pipeline, image_grid
from .training.images import formats


# Commands that are programs with their own parser, by the file in `programs`.
PROGRAMS = {
    "train": ("train_terdit", "Train a model on your images, or on a data set of the Hub."),
    "train-lora": ("train_lora", "Teach a model, packed or not, new classes with a small adapter."),
    "cache-latents": ("cache_latents", "Encode images once, so that training with a VAE reads latents."),
    "evaluate": ("evaluate", "Sample many images, and measure them as papers do."),
    "app": ("app", "Open a page to sample a model by hand, and to watch it denoise."),
}
LINE_SECONDS = 10.0  # between lines of progress where there is no terminal
TOKENS_AT_ONCE = 4096  # more at once take more memory, and on a CPU no less time each
# Distributions whose versions a report of a bug needs.
REPORTED = (
    *("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface-hub", "datasets"),
    *("matplotlib", "peft", "gradio", "numba", "triton"),
)


def load_pipeline(model: str, dtype: str = "float32") -> TerDiTPipeline:
    """Load a pipeline by folder, Hub id, name of a bundled checkpoint, or folder of a checkpoint of a training run.

    Raises:
        ValueError: No such checkpoint, or files that are not what they should be.
        OSError: No such folder or repository, or a folder of a run that has not ended.
    """
    folder = resolve_model(model)
    if checkpointing.is_checkpoint(folder):
        return checkpoint_pipeline(folder).to(getattr(torch, dtype))
    saved = checkpointing.find(folder)
    if saved and not Path(folder, "model_index.json").is_file():
        raise FileNotFoundError(
            f"{model} holds checkpoints of a run, and no pipeline yet. Pass the newest checkpoint, {saved[-1]}."
        )
    return TerDiTPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))


def usable_device(name: str) -> torch.device:
    """Return the device of this name; for "auto" the first of cuda, xpu and mps that can be used, else the CPU.

    Raises:
        ValueError: There is no such device, here or anywhere.
    """
    if name == "auto":
        for kind in ("cuda", "xpu", "mps"):
            with contextlib.suppress(ValueError):
                return usable_device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs by device
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"Device {name!r} cannot be used here ({reason}). `cpu` always can.") from error
    return device


def _check_picture(output: Path, overwrite: bool) -> None:
    """Raise before any work when the picture could not, or should not, be written at the end."""
    Image.init()
    suffix = output.suffix.lower()
    if Image.EXTENSION.get(suffix) not in Image.SAVE:
        raise ValueError(f"{output} does not name a picture: end it in .png, .jpg, .webp or another of Pillow's.")
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; name a picture in it.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists. Pass --overwrite to replace it, or choose another --output.")
    place = next(path for path in output.absolute().parents if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{output} cannot be written: {place} is a file. Choose another --output.")
    if not os.access(place, os.W_OK):
        raise PermissionError(
            f"{output} cannot be written: no permission to write to {place}. Choose another --output."
        )


def _check_size(images: int, width: int, height: int, scale: int | None) -> None:
    """Raise before any work when the picture would be larger than Pillow opens; the images might not fit memory."""
    factor = scale or 1
    pixels = images * max(width * factor, 64) * max(height * factor, 64)
    most = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
    if pixels > most:
        raise ValueError(
            f"{_count(images)} of {width:,} x {height:,} pixels make a picture of {pixels:,}; Pillow opens none"
            f" of more than {most:,}. Ask for fewer or smaller images."
        )


def _count(images: int) -> str:
    return f"{images:,} image{'s' if images != 1 else ''}"


def _free_name() -> Path:
    """Return terdit-1.png, or the next number that no picture here has."""
    return next(path for path in map(Path, map("terdit-{}.png".format, itertools.count(1))) if not path.exists())


def _seeds(seeds: list[int], labels: int, per_label: int) -> list[list[int]]:
    """The seeds of each label's images: counted up from one seed, or the given ones for every label."""
    if len(seeds) == 1:
        return [[seeds[0] + i * per_label + j for j in range(per_label)] for i in range(labels)]
    if per_label not in (1, len(seeds)):
        raise ValueError(
            f"{len(seeds)} seeds make {len(seeds)} images per label, but {per_label} were asked for. Leave out"
            " --num_images_per_label, or all seeds but the first."
        )
    return [seeds] * labels


def _read_labels(given: list[str], pipe: TerDiTPipeline) -> list[int]:
    """Return class ids of names, of numbers that are no name, and of several names joined by commas."""
    whole = {name: int(key) for key, name in (pipe.config.id2label or {}).items()}
    names = {name.casefold() for name in pipe.labels} | {name.casefold() for name in whole}

    def read(text: str) -> list[int]:
        text = text.strip()
        spaced = text.replace("_", " ")
        name = spaced if text.casefold() not in names and spaced.casefold() in names else text
        if name in whole:
            return [whole[name]]
        if name.casefold() not in names and name.isdecimal():
            return [int(name)]
        if name.casefold() not in names and "," in name:
            return [class_id for part in name.split(",") if part.strip() for class_id in read(part)]
        return pipe.get_label_ids(name)

    ids = [class_id for text in given for class_id in read(text)]
    if given and not ids:
        raise ValueError(f"--labels {' '.join(given)!r} names no label. Pass names or class ids, or leave it out.")
    return ids


@contextlib.contextmanager
def _in_flags(args: argparse.Namespace) -> Iterator[None]:
    """Put the pipeline's advice into the words of the command line."""
    words = {
        "`pipe.labels`": f"`terdit info {args.model} --labels`",
        "this model": args.model,
        'Pass `vae=` when loading, or `output_type="latent"`.': (
            "Convert it with `terdit convert --vae`, or train it with --pretrained_vae_model_name_or_path."
        ),
        "`height` and `width`": "--height and --width",
    }
    try:
        yield
    except ValueError as error:
        message = str(error)
        for word, flag in words.items():
            message = message.replace(word, flag)
        last = args.labels[-1] if args.labels else ""
        if "is not a label" in message and last and (last in BUNDLED or Path(last).is_dir()):
            message += f" Put the model first: `terdit generate {last} --labels ...`."
        raise ValueError(message) from error


class _Progress:
    """Stands in for the pipeline's bar: one for all batches on a terminal, elsewhere a line every few seconds."""

    def __init__(self, batches: int):
        self.batches = batches
        self.bar = tqdm(disable=None)
        self.started = self.said = time.monotonic()

    def __call__(self, total: int) -> "_Progress":
        self.bar.total = total * self.batches
        return self

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self) -> None:
        self.bar.update()
        if not self.bar.disable:
            return
        self.bar.n += 1
        now = time.monotonic()
        if now - self.said >= LINE_SECONDS and self.bar.n < self.bar.total:
            left = (now - self.started) * (self.bar.total / self.bar.n - 1)
            print(f"terdit: {self.bar.n / self.bar.total:.0%} done, {left:.0f} s left", file=sys.stderr, flush=True)
            self.said = now


def generate(args: argparse.Namespace) -> None:
    """Sample images into one labelled grid."""
    output = Path(args.output) if args.output else _free_name()
    _check_picture(output, args.overwrite)
    device = usable_device(args.device)
    pipe = load_pipeline(args.model, args.dtype)
    if args.lora:
        pipe.load_lora_weights(args.lora)
    pipe = pipe.to(device)
    if args.activation_bits:
        pipe.transformer.set_activation_bits(args.activation_bits)
    if args.scheduler:
        pipe.scheduler = scheduler_by_name(args.scheduler, pipe.scheduler, pipe.prediction_type)
    config, chosen = pipe.transformer.config, dict(pipe.sampling_defaults)
    for name in ("num_inference_steps", "guidance_scale"):
        if getattr(args, name) is not None:
            chosen[name] = getattr(args, name)
    if args.labels and config.num_classes == 1 and not pipe.config.id2label:
        raise ValueError(f"{args.model} has no classes, so it draws without a label. Leave out --labels.")
    with _in_flags(args):
        labels = _read_labels(args.labels, pipe) or list(range(min(config.num_classes, 10)))
    side = config.sample_size * pipe.vae_scale_factor
    width, height = args.width or side, args.height or side
    count = len(labels) * max(args.num_images_per_label, len(args.seed))
    _check_size(count, width, height, args.scale)
    seeds = _seeds(args.seed, len(labels), args.num_images_per_label)
    per_label = len(seeds[0])
    each = [(label, seed) for label, row in zip(labels, seeds, strict=True) for seed in row]
    tokens = width * height / (config.patch_size * pipe.vae_scale_factor) ** 2
    at_once = args.batch_size or max(1, int(TOKENS_AT_ONCE / tokens))
    pipe.progress_bar = _Progress(math.ceil(count / at_once))  # type: ignore[method-assign]
    images, start = [], time.perf_counter()
    for i in range(0, count, at_once):
        with _in_flags(args):
            images += pipe(
                [label for label, _ in each[i : i + at_once]],
                height=args.height,
                width=args.width,
                generator=[torch.Generator().manual_seed(seed) for _, seed in each[i : i + at_once]],
                **chosen,
            ).images
    pipe.progress_bar.bar.close()
    seconds = time.perf_counter() - start
    id2label = pipe.config.id2label or {}
    titles = [id2label.get(str(label), str(label)).split(",")[0] for label in labels]
    # Many images are shown smaller, so that the picture still fits a screen or two.
    grid = image_grid(images, None, titles, 128 if count <= 64 else 64, scale=args.scale, per_label=per_label)
    settings = {
        "model": args.model,
        **({"lora": args.lora} if args.lora else {}),
        "labels": json.dumps([id2label.get(str(label), str(label)) for label, _ in each], ensure_ascii=False),
        "seeds": json.dumps([seed for _, seed in each]),
        **{name: f"{value:g}" for name, value in chosen.items()},
        "scheduler": type(pipe.scheduler).__name__,
        "width": str(images[0].width),
        "height": str(images[0].height),
        "dtype": args.dtype,
        **({"activation_bits": str(args.activation_bits)} if args.activation_bits else {}),
        "device": str(pipe.device),
        "Software": f"diffusers-terdit {__version__}",
    }
    text = PngInfo()
    for key, value in settings.items():
        text.add_text(key, value)
    options: dict[str, Any] = {"pnginfo": text} if output.suffix.lower() == ".png" else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_file(output) as partial:
        grid.save(partial, **options)
    weights = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    kind = args.activation_bits if args.activation_bits == "fp8" else f"{args.activation_bits}-bit"
    bits = f", {kind} activations" if args.activation_bits else ""
    adapter = f" with {args.lora}" if args.lora else ""
    first, last = seeds[0][0], seeds[-1][-1]
    several = len(args.seed) > 1 or first < last
    shown = ", ".join(map(str, args.seed)) if len(args.seed) > 1 else f"{first} to {last}" if several else first
    print(
        f"{_count(count)} of {images[0].width} x {images[0].height} pixels from {args.model}{adapter} "
        f"({human_bytes(weights)} of weights in memory, {args.dtype}{bits}, {pipe.device}):"
        f" {chosen['num_inference_steps']} steps of {type(pipe.scheduler).__name__},"
        f" guidance {chosen['guidance_scale']:g}, seed{'s' if several else ''} {shown}, {seconds:.1f} s.\n"
        f"Written to {output}"
    )


def _check_folder(output: str, overwrite: bool) -> None:
    """Raise before any work when a folder to write holds something, which the user did not ask to replace."""
    if Path(output).is_dir() and any(Path(output).iterdir()) and not overwrite:
        raise FileExistsError(
            f"{output} exists and is not empty. Pass --overwrite to replace the model in it, or choose another folder."
        )


def convert(args: argparse.Namespace) -> None:
    """Save a checkpoint of TerDiT's authors, or a ternary model published in another form, as a packed folder."""
    _check_folder(args.output, args.overwrite)
    index = Path(args.path) / "model_index.json"
    if index.is_file() and read_json(index).get("_class_name") == "TerDiTPipeline":
        raise ValueError(
            f"{args.path} is a pipeline of this package, which needs no conversion. `terdit pack` packs float weights."
        )
    of_authors = ("subfolder", "size", "resolution", "weights_name", "weight_format", "vae")
    if is_published_model(args.path, args.component):
        if unused := [name for name in of_authors if getattr(args, name)]:
            raise ValueError(
                f"{args.path} is a diffusers model: --{', --'.join(unused)} is for the files of TerDiT's authors."
                " Leave it out."
            )
        folder = convert_ternary_checkpoint(
            args.path, args.output, args.scale_granularity, component=args.component, pipeline=args.pipeline
        )
        model = folder / args.component if (folder / args.component).is_dir() else folder
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        config = read_json(model / "config.json")
        covers = config["quantization_config"]["scale_granularity"]
        covers = f"{covers} inputs" if isinstance(covers, int) else covers
        print(
            f"Converted {args.path} to {folder}: one scale per {covers}, {human_bytes(weights)} of weights in"
            f" {model.name}. It loads with its own class after `import diffusers_terdit`."
        )
        if model == folder:
            print(
                f"It is a {config['_class_name']} alone. To draw with it, pass it as `transformer=` to"
                " `from_pretrained` of the dense pipeline, or convert again with --pipeline and that pipeline's folder"
                " or Hub id: the text encoders in two-bit repositories are in other forms, which are not read."
            )
        return
    if unused := [name for name in ("scale_granularity", "pipeline") if getattr(args, name)]:
        names = ", --".join(unused)
        raise ValueError(f"--{names} applies to models of diffusers. {args.path} is not one, so leave it out.")
    pipe = convert_original_checkpoint(
        args.path,
        vae=args.vae,
        subfolder=args.subfolder,
        weights_name=args.weights_name,
        weight_format=args.weight_format,
        num_attention_heads=args.num_attention_heads,
        size=args.size,
        resolution=args.resolution,
    )
    pipe.save_pretrained(args.output, max_shard_size="2GB")  # a shard is in memory while it is written
    print(f"Converted {args.path} to {args.output}")
    if pipe.vae is None:
        print("It has no VAE, so `terdit generate` cannot draw pictures with it. Convert again with --vae auto.")
    print()
    _print_info(Path(args.output))


def export(args: argparse.Namespace) -> None:
    """Save the averaged weights of a training run's checkpoint as a pipeline folder, or a model for other software."""
    _check_folder(args.output, args.overwrite)
    if args.format == "diffusers":
        if Path(args.model, "model_index.json").is_file():
            raise ValueError(f"{args.model} is a pipeline already, no checkpoint. Use it as it is, or `terdit pack`.")
        load_pipeline(args.model).save_pretrained(args.output)
        print(f"Exported {args.model} to {args.output}\n")
        _print_info(Path(args.output))
        return
    pipe = load_pipeline(args.model)
    if pipe.transformer.config.ternary:
        pipe.transformer.pack()
    file = export_pipeline(pipe, args.output, args.format)
    size = sum(path.stat().st_size for path in file.parent.glob(f"{file.stem}.*"))
    packed = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    print(f"Exported {args.model} to {file}: {human_bytes(size)}, {human_bytes(packed)} in this package's format")


def env(args: argparse.Namespace) -> None:
    """Print versions and hardware, for a bug report."""
    from .ops.cpu.choose import integer_kernels

    rows = [("diffusers-terdit", __version__), ("Python", platform.python_version()), ("system", platform.platform())]
    for name in REPORTED:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else []
    rows.append(("processor", f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"))
    kernels = integer_kernels()  # none without numba
    if kernels:
        from .ops.cpu.instructions import processor

        features = sorted(name[1:] for name in processor().features if name.startswith(("+avx", "+amx")))
        rows.append(("features", f"{processor().name}: {' '.join(features)}"))
    rows.append(("integer kernels", ", ".join(kernels) or "none"))
    device = usable_device("auto")
    named = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    rows.append(("device", f"{device}{named}"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {printable(value)}" for name, value in rows))


def info(args: argparse.Namespace) -> None:
    """Print sizes and statistics of a model or layer."""
    path = Path(args.model) if Path(args.model).is_file() else Path(resolve_model(args.model))
    path = path if path.exists() else _download_weights(args.model)
    if checkpointing.is_checkpoint(path):
        raise ValueError(
            f"{args.model} is a checkpoint of a training run. Make a pipeline of it by"
            f" `terdit export {args.model} FOLDER`."
        )
    if args.labels:
        id2label = _parts(path)[0].get("id2label")
        if not (id2label and isinstance(id2label, dict)):
            raise ValueError(f"{args.model} names no labels; its classes are numbers. Leave out --labels.")
        for key in sorted(id2label, key=lambda key: (len(key), key)):
            print(f"{printable(key):>5}  {printable(id2label[key])}")
    elif args.kernels:
        for part in _parts(path)[1]:
            _print_kernels(part)
    else:
        _print_info(path)


def _parts(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """The `model_index.json` of a pipeline folder and its ternary parts; else an empty one and the folder itself.

    Raises:
        ValueError: The index cannot be loaded, or names no ternary part.
    """
    where = path / "model_index.json"
    if not where.is_file():
        return {}, [path]
    index = read_json(where)
    if "TerDiTPipeline" in str(index.get("_class_name")):  # in a remote-code revision it is a list
        check_pipeline_config(where, index)
        return index, [path / "transformer"]
    files = {name: path / name / "config.json" for name in index if name.isidentifier()}
    configs = {name: read_json(file) for name, file in files.items() if file.is_file()}
    parts = [path / name for name, config in configs.items() if _ternary_settings(config) or _is_ours(config)]
    if not parts:
        raise ValueError(
            f"{path} holds a {index.get('_class_name')!r:.80} without ternary parts. Pass the folder of a model in it,"
            f" to see where its bytes go: {', '.join(n for n in configs if '_diffusers_version' in configs[n])}."
        )
    return index, parts


def _is_ours(config: dict[str, Any]) -> bool:
    return config.get("_class_name") in (TerDiTTransformer2DModel.__name__, TernaryLinear.__name__)


def _ternary_settings(config: dict[str, Any]) -> TernaryConfig | None:
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != TernaryMethod.TERNARY:
        return None
    return TernaryConfig.from_dict(settings)


def _inspect(path: Path) -> WeightsReport:
    """What the weights files of a model or layer hold, and its config, checked and with its defaults."""
    report = inspect_weights(path)
    for cls in (TerDiTTransformer2DModel, TernaryLinear):
        if report.config.get("_class_name") == cls.__name__:
            check_config(path / "config.json", report.config, cls)
            defaults = {key: value.default for key, value in inspect.signature(cls).parameters.items()}
            report.config = {**defaults, **report.config}
    return report


def _download_weights(repo_id: str) -> Path:
    """A Hub model's configs and the weights of its ternary parts: the files that `generate` uses, too."""
    configs = ["model_index.json", "config.json", "transformer/config.json"]
    with hub_errors(repo_id):
        folder = Path(snapshot_download(repo_id, allow_patterns=configs))
        index = folder / "model_index.json"
        if index.is_file() and "TerDiTPipeline" not in str(read_json(index).get("_class_name")):
            folder = Path(snapshot_download(repo_id, allow_patterns=["*/config.json"]))
        inside = ["" if part == folder else f"{part.name}/" for part in _parts(folder)[1]]
        patterns = [f"{part}diffusion_pytorch_model*.safetensors*" for part in inside]
        return Path(snapshot_download(repo_id, allow_patterns=[*configs, *patterns]))


def _print_info(path: Path) -> None:
    index, parts = _parts(path)
    for i, part in enumerate(parts):
        print("\n" if i else "", end="")
        _print_part(path, index, part)


def _print_part(path: Path, index: dict[str, Any], part: Path) -> None:
    report = _inspect(part)
    config, total, ternary, scales = (
        report.config, report.total(), report.total("ternary "), report.total("ternary scales"),
    )  # fmt: skip
    weights = ternary.weights - scales.weights
    rows = []
    settings = _ternary_settings(config)
    ours = "TerDiTPipeline" in str(index.get("_class_name"))
    if index and not ours:
        rows += [("pipeline", str(index.get("_class_name"))), ("part", part.name)]
    if config and not _is_ours(config):
        rows.append(("class", str(config.get("_class_name"))))
    if settings:
        chosen = {key: value for key, value in settings.to_dict().items() if value not in (None, False)}
        given = [f"{key}={value!r}" for key, value in chosen.items() if key not in ("quant_method", "version")]
        rows.append(("quantization", f"TernaryConfig({', '.join(given)})"))
    if config.get("_class_name") == TerDiTTransformer2DModel.__name__:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        side = config["sample_size"]
        rows += [
            ("size", f"{config['num_layers']} layers of width {width}, {config['num_attention_heads']} heads"),
            ("latents", f"{config['in_channels']} x {side} x {side}, patch {config['patch_size']}"),
            ("classes", f"{config['num_classes']}" + (", with names (--labels)" if index.get("id2label") else "")),
        ]
    elif config.get("_class_name") == TernaryLinear.__name__:
        rows += [("size", f"one layer, {config['in_features']} inputs, {config['out_features']} outputs")]
    if ours:
        rows.append(("scheduler", index["scheduler"][1]))
    covers = ", ".join(f"group of {g}" if isinstance(g, int) else g for g in sorted(report.granularities, key=str))
    packing = f"packed ({report.packing}, version {report.version})" if report.packing else "floats"
    others = total.weights - weights - scales.weights
    ratio = 4 * total.weights / total.bytes
    ternary_rows = [
        ("  ternary", f"{weights:,} in {report.layers} layers"),
        ("  scales", f"{scales.weights:,}, one per {covers}"),
        ("  full precision", f"{others:,}"),
    ]
    rows += [
        ("weights", f"{total.weights:,}"),
        *(ternary_rows if report.layers else []),
        ("format", packing if report.layers else "full precision"),
        ("on disk", human_bytes(total.bytes) + (f", {ratio:.1f} times less than in float32" if ratio > 1.05 else "")),
        ("digest", "matches" if report.has_digest else "none, so damage cannot be seen"),
    ]
    if report.layers:
        magnitudes = report.scales.abs()
        rows += [
            ("zeros", f"{(ternary.zeros or 0) / weights:.1%} of the ternary weights"),
            (
                "scale",
                f"{magnitudes.min():.3g} to {magnitudes.max():.3g}, median {magnitudes.median():.3g}; "
                f"{(report.scales < 0).float().mean():.0%} negative",
            ),
        ]
        if report.dead_layers:
            shown = ", ".join(report.dead_layers[:3])
            rows.append(
                ("all zero", shown + (f" and {more} more" if (more := len(report.dead_layers) - 3) > 0 else ""))
            )
    if ours and index.get("vae", [None, None])[1]:
        vae = sum(file.stat().st_size for file in (path / "vae").glob("*.safetensors"))
        rows.append(("vae", f"{human_bytes(vae)} more" if vae else "not here"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {printable(value)}" for name, value in rows))

    table = [("where the bytes go", "dtype", "weights", "bytes", "share", "zeros")]
    for name, group in report.groups.items():
        zeros = "" if group.zeros is None else f"{group.zeros / group.weights:.1%}"
        counted = "" if name == HEADERS else f"{group.weights:,}"
        dtypes = " ".join(sorted(group.dtypes))
        table.append((name, dtypes, counted, f"{group.bytes:,}", f"{group.bytes / total.bytes:.1%}", zeros))
    table.append(("total", "", f"{total.weights:,}", f"{total.bytes:,}", "100.0%", ""))
    print()
    _print_table(table, "<<>>>>")


def _print_table(table: Sequence[Sequence[str]], alignment: str) -> None:
    """Print columns, each aligned to the left (`<`) or right (`>`)."""
    table = [[printable(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True))
        print("  ".join(cells).rstrip())


def _print_kernels(path: Path) -> None:
    """Print which kernels compute the ternary layers on this machine, and why."""
    report = _inspect(path)
    if not report.layers:
        raise ValueError(f"{path} has no ternary layers, for which a kernel is chosen. Leave out --kernels.")
    packed, trained = "2-bit" in report.total("ternary ").dtypes, report.config.get("activation_bits")
    table = [("device", "dtype", "layers", "kernel", "inputs", "why")]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in DTYPES:
            choices: Counter = Counter()
            for shape, layers in report.shapes.items():
                case = getattr(torch, name), *shape, packed
                choices[choose_kernel(torch.device(device), *case, trained_bits=trained)] += layers
            for (kernel, bits, reason), layers in choices.items():
                rounded = bits or trained
                inputs = f"{rounded}-bit" if rounded else "not rounded"
                table.append((device, name, str(layers), kernel, inputs, reason))
    _print_table(table, "<<><<<")


def pack(args: argparse.Namespace) -> None:
    """Save a pipeline with its ternary weights in two bits each."""
    _check_folder(args.output, args.overwrite)
    pipe = load_pipeline(args.model)
    pipe.transformer.pack()
    pipe.save_pretrained(args.output)
    print(f"Packed {args.model} to {args.output}\n")
    _print_info(Path(args.output))


def push(args: argparse.Namespace) -> None:
    """Upload the files of a pipeline's folder to the Hub, as they are, with a model card."""
    pipe = load_pipeline(args.model)  # what does not load is not pushed
    source = Path(resolve_model(args.model))
    if not source.is_dir():
        raise NotADirectoryError(f"There is no folder {args.model} here to push. A model on the Hub is already there.")
    images = {path.stem: Image.open(path, formats=formats()) for path in map(Path, args.images)}
    commit = push_saved(
        pipe,
        source,
        CardOptions(args.license, args.base_model, images),
        args.repo_id,
        args.private or None,
        args.commit_message,
        create_pr=args.create_pr,
        revision=args.revision,
    )
    print(f"Pushed {args.model} to {commit.pr_url or commit.commit_url}")


def build_parser() -> argparse.ArgumentParser:
    """Commands and flags; each command's function is its `run`."""
    parser = Parser(prog="terdit", description="Ternary diffusion transformers: sample, train, convert, share.")
    parser.add_argument("--version", action="version", version=f"diffusers-terdit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(function, help: str) -> Callable[..., argparse.Action]:
        sub = commands.add_parser(function.__name__, help=help, description=help)
        sub.set_defaults(run=function, parser=sub)
        return sub.add_argument

    add = command(generate, "Sample images into one picture, each label's images together below its name.")
    add(
        "model",
        nargs="?",
        default="digits",
        help="The model: a pipeline folder, a checkpoint of a training run, a Hub id, or the name of a bundled model.",
    )
    add(
        "--labels",
        nargs="+",
        default=[],
        help="Label names or class ids. Underscores count as spaces, and commas may separate labels. A number that is"
        " also a name means the name. Without labels, the first ten classes are drawn.",
    )
    add("--lora", help="Load this LoRA adapter, a folder or Hub id, with the classes that it was taught.")
    add("--num_images_per_label", type=at_least(1), default=1, help="How many images of each label to draw.")
    add(
        "--num_inference_steps", type=at_least(1), help="Denoising steps. Without it, as many as the model recommends."
    )
    add(
        "--guidance_scale",
        type=not_negative,
        help="How strongly images are pulled to their label; 1 is not at all. Without it, as the model recommends.",
    )
    add(
        "--scheduler",
        help="A scheduler of diffusers instead of the model's own: dpm, unipc, euler, heun, ddim, or a class name.",
    )
    add(
        "--seed",
        type=at_least(-(2**63)),
        nargs="+",
        default=[0],
        help="Seed of the first image; each further image adds 1. With several seeds, every label is drawn with each.",
    )
    add("--height", type=at_least(1), help="Height of an image in pixels. Without it, the model's own.")
    add("--width", type=at_least(1), help="Width of an image in pixels. Without it, the model's own.")
    add(
        "--batch_size",
        type=at_least(1),
        help="Images drawn at a time. Without it, about 4,096 tokens of the model. The images are the same.",
    )
    add(
        "--dtype",
        type=dtype,
        choices=DTYPES,
        default="float32",
        help="Data type of the computation; fp32, bf16 and fp16 work, too.",
    )
    add(
        "--activation_bits",
        type=activation_bits,
        choices=ACTIVATION_BITS,
        help="Round inputs of ternary layers, for speed: to integers, or to fp8 on a GPU that has it. Without"
        " it, only bfloat16 on a CPU may do so.",
    )
    add(
        "--device",
        default="auto",
        help="Device as torch names it: cpu, cuda, cuda:1, xpu, mps. auto picks the first of cuda, xpu and mps"
        " that is available, else cpu.",
    )
    add(
        "--scale",
        type=at_least(1, 64),
        help="Enlarge each image by this whole factor, without smoothing; 1 keeps its size. Without it, small images"
        " are enlarged to 128 pixels, or to 64 if there are more than 64 images.",
    )
    add(
        "--output",
        help="Picture to write; its extension sets the format. Without it, terdit-1.png or the next free number.",
    )
    add("--overwrite", action="store_true", help="Replace the picture if it exists.")

    add = command(
        convert,
        "Convert a checkpoint of TerDiT's authors, or a ternary model published as dense tensors, for MLX or for"
        " gemlite, to a folder.",
    )
    add("path", help="Folder or Hub id with consolidated*.pth and model_args.pth, or with a diffusers model.")
    add("output", help="Folder to write. It must be new or empty, unless --overwrite is given.")
    add("--overwrite", action="store_true", help="Replace the model in a folder that is not empty.")
    add("--size", help="Which of the authors' checkpoints to take: 600m or 4.2b.")
    add("--resolution", type=at_least(1), help="Which of those to take: 256 or 512 pixels.")
    add("--subfolder", help="Folder inside `path` that holds the checkpoint. It replaces --size and --resolution.")
    add("--weights_name", help="File to read. Without it, the packed averaged weights, if there are any.")
    add("--weight_format", choices=("float", "packed"), help="Format to write. Without it, that of the file.")
    add(
        "--num_attention_heads",
        type=at_least(1),
        default=32,
        help="Number of attention heads, which the file does not record.",
    )
    add("--vae", help='The VAE: a folder, a Hub id, or "auto" to download the one that the checkpoint names.')
    add(
        "--scale_granularity",
        type=granularity,
        help='What a scale of dense weights covers: "tensor", "row" or a number of inputs. Without it, detected.',
    )
    add("--component", default="transformer", help="Component of a diffusers pipeline that is ternary, or its folder.")
    add(
        "--pipeline",
        help="Folder or Hub id of a diffusers pipeline, from which the text encoder and the other components are"
        " copied. Without it, they come from `path`, if that is a pipeline.",
    )

    add = command(export, "Save a checkpoint of a training run as a pipeline folder, or a model for other software.")
    add("model", help="A checkpoint, such as out/checkpoint-500. For other software, also what `generate` takes.")
    add("output", help="Folder to write. It must be new or empty, unless --overwrite is given.")
    add("--overwrite", action="store_true", help="Replace the model in a folder that is not empty.")
    add(
        "--format",
        choices=("diffusers", *FORMATS),
        default="diffusers",
        help="What to write: a pipeline folder of diffusers, or the transformer for ONNX Runtime or OpenVINO.",
    )

    add = command(info, "Print sizes and statistics of a model, and where its bytes go.")
    add(
        "model",
        nargs="?",
        default="digits",
        help="Folder of a pipeline, model or layer, a safetensors file, a Hub id, or the name of a bundled model.",
    )
    add("--labels", action="store_true", help="Print the class ids and their names instead.")
    add("--kernels", action="store_true", help="Print which kernels run it on this machine, and why, instead.")

    add = command(pack, "Save a pipeline with its ternary weights in two bits each.")
    add("model", help="The model: a pipeline folder, a Hub id, or the name of a bundled model.")
    add("output", help="Folder to write. It must be new or empty, unless --overwrite is given.")
    add("--overwrite", action="store_true", help="Replace the model in a folder that is not empty.")

    add = command(push, "Upload a pipeline folder to the Hub. It uses the token of `hf auth login`, or HF_TOKEN.")
    add("model", help="Pipeline folder, or the name of a bundled checkpoint.")
    add("repo_id", help="Repository, such as user/name. It is created if it does not exist.")
    add("--private", action="store_true", help="Make a new repository private.")
    add("--revision", help="Branch to write to. It is created if it does not exist. Without it, main.")
    add("--commit_message", help='Message of the commit. Without it, "Upload" and the class.')
    add("--create_pr", action="store_true", help="Open a pull request instead of committing.")
    add("--license", help="License for the card, as the Hub spells it, such as apache-2.0.")
    add("--base_model", help="Hub id of the model that this one was made from, for the card.")
    add("--images", nargs="+", default=[], help="Pictures for the card. File names become captions.")

    command(env, "Print versions and hardware, for a bug report.")

    for name, (_, text) in PROGRAMS.items():  # listed here; `main` hands their arguments on
        commands.add_parser(name, help=text, add_help=False)
    return parser


def report_errors(name: str, run: Callable[[], Any]) -> int:
    """Call a function; return 0 when it worked, else 1, or 130 after Ctrl-C, with one line that says why.

    Args:
        name (`str`): Of the program, which begins the line.
        run: What to call. A programming error in it surfaces as itself.
    """
    try:
        return run() or 0
    except KeyboardInterrupt:
        reason, code = "interrupted", 130
    except BrokenPipeError:  # `terdit info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        reason, code = str(error), 1
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        reason, code = f"not enough memory ({error}). Ask for less at once.", 1
    print(f"{name}: {printable(' '.join(reason.split()))}", file=sys.stderr)
    return code


def run_program(name: str, main: Callable[[], Any]) -> int:
    """`report_errors` for a program that ends at Ctrl-C by its own handler while it imports."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return report_errors(name, main)


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it worked, 1 with a one-line message when it could not."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in PROGRAMS:
        name = f"terdit {argv[0]}"
        sys.argv = [name, *argv[1:]]  # what its parser calls itself
        program = importlib.import_module(f"{__package__}.programs.{PROGRAMS[argv[0]][0]}")
        return report_errors(name, lambda: program.main(argv[1:]))
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # of diffusers' loading
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # argparse has the whole parser say it
    return report_errors("terdit", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(run_program("terdit", main))
