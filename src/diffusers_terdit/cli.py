"""The `terdit` command: parse, call one function, print."""

import argparse
import importlib
import inspect
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub import snapshot_download
from PIL import Image

from .arguments import Parser, at_least, granularity, not_negative
from .checkpoints import resolve_model
from .conversion import convert_dense_checkpoint, convert_original_checkpoint, is_diffusers_checkpoint
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
from .training.export import image_grid
from .training.images import formats


# Commands that are programs with a parser of their own, by the file in `programs`.
PROGRAMS = {
    "train": ("train_terdit", "Train a model on your images, or on a data set of the Hub."),
    "train-lora": ("train_lora", "Teach a model new classes with a small adapter, also a packed model."),
    "cache-latents": ("cache_latents", "Encode images once, so that training with a VAE reads latents."),
    "evaluate": ("evaluate", "Sample many images, and measure them as papers do."),
    "app": ("app", "Open a page to sample a model by hand, and to watch it denoise."),
}
DTYPES = ("float32", "bfloat16", "float16")


def load_pipeline(model: str, dtype: str = "float32") -> TerDiTPipeline:
    """A pipeline by folder, Hub id, or name of a bundled checkpoint.

    Raises:
        ValueError: No such checkpoint, or files that are not what they should be.
        OSError: No such folder or repository.
    """
    return TerDiTPipeline.from_pretrained(resolve_model(model), dtype=getattr(torch, dtype))


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: There is no such device, here or anywhere.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs by device
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"Device {name!r} cannot be used here ({reason}). `cpu` always can.") from error
    return device


def _check_picture(output: Path) -> None:
    """Raise before any work when the picture could not be written at the end."""
    Image.init()
    suffix = output.suffix.lower()
    if Image.EXTENSION.get(suffix) not in Image.SAVE:
        raise ValueError(f"{output} does not name a picture: end it in .png, .jpg, .webp or another of Pillow's.")
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; name a picture in it.")
    place = next(path for path in output.absolute().parents if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{output} cannot be written: {place} is a file. Choose another --output.")
    if not os.access(place, os.W_OK):
        raise PermissionError(
            f"{output} cannot be written: no permission to write to {place}. Choose another --output."
        )


def _check_size(images: int, width: int, height: int) -> None:
    """Raise before any work when the picture would be larger than Pillow opens; the images might not fit memory."""
    pixels, most = images * max(width, 64) * max(height, 64), 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
    if pixels > most:
        raise ValueError(
            f"{images:,} images of {width:,} x {height:,} pixels make a picture of {pixels:,}; Pillow opens none"
            f" of more than {most:,}. Ask for fewer or smaller images."
        )


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


def generate(args: argparse.Namespace) -> None:
    """Sample images into one labelled grid."""
    output = Path(args.output)
    _check_picture(output)
    device = usable_device(args.device)
    pipe = load_pipeline(args.model, args.dtype).to(device)
    pipe.set_progress_bar_config(disable=None)  # shown on a terminal, not in a log
    if args.activation_bits:
        pipe.transformer.set_activation_bits(args.activation_bits)
    if args.scheduler:
        pipe.scheduler = scheduler_by_name(args.scheduler, pipe.scheduler, pipe.prediction_type)
    config, names = pipe.transformer.config, pipe.labels
    labels = [label if label in names or not label.isdecimal() else int(label) for label in args.labels]
    labels = labels or list(range(min(config.num_classes, 10)))
    side = config.sample_size * pipe.vae_scale_factor
    _check_size(len(labels) * max(args.num_images_per_label, len(args.seed)), args.width or side, args.height or side)
    seeds = _seeds(args.seed, len(labels), args.num_images_per_label)
    per_label = len(seeds[0])
    start = time.perf_counter()
    images = pipe(
        labels,
        height=args.height,
        width=args.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=per_label,
        generator=[torch.Generator().manual_seed(seed) for row in seeds for seed in row],
    ).images
    seconds = time.perf_counter() - start
    id2label = pipe.config.id2label or {}
    titles = [id2label.get(str(label), str(label)).split(",")[0] for label in labels for _ in range(per_label)]
    # One column per label when each has several images, read top to bottom.
    columns = len(labels) if per_label > 1 else None
    if columns:
        order = [column * per_label + row for row in range(per_label) for column in range(columns)]
        images, titles = [images[i] for i in order], [titles[i] for i in order]
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_file(output) as partial:
        image_grid(images, columns, titles).save(partial)
    weights = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    bits = f", {args.activation_bits}-bit activations" if args.activation_bits else ""
    first, last = seeds[0][0], seeds[-1][-1]
    shown = ", ".join(map(str, args.seed)) if len(args.seed) > 1 else f"{first} to {last}" if first < last else first
    print(
        f"{len(images)} images of {images[0].width} x {images[0].height} pixels from {args.model} "
        f"({human_bytes(weights)} of weights, {args.dtype}{bits}, {pipe.device}): {args.num_inference_steps} steps of "
        f"{type(pipe.scheduler).__name__}, guidance {args.guidance_scale:g}, seeds {shown}, {seconds:.1f} s.\n"
        f"Written to {output}"
    )


def convert(args: argparse.Namespace) -> None:
    """Save a checkpoint of TerDiT's authors, or a ternary model published as dense tensors, as a packed folder."""
    if is_diffusers_checkpoint(args.path):
        unused = [n for n in ("subfolder", "weights_name", "weight_format", "vae") if getattr(args, n)]
        if unused:
            raise ValueError(
                f"{args.path} is a diffusers model: --{', --'.join(unused)} is for the files of TerDiT's authors."
                " Leave it out."
            )
        folder = convert_dense_checkpoint(args.path, args.output, args.scale_granularity, component=args.component)
        model = folder / args.component if (folder / args.component).is_dir() else folder
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        settings = json.loads((model / "config.json").read_text("utf-8"))["quantization_config"]
        covers = settings["scale_granularity"]
        covers = f"{covers} inputs" if isinstance(covers, int) else covers
        print(
            f"Converted {args.path} to {folder}: one scale per {covers}, {human_bytes(size)} of weights in"
            f" {model.name}. It loads with its own class after `import diffusers_terdit`."
        )
        return
    if args.scale_granularity:
        raise ValueError(
            f"--scale_granularity is for diffusers models with dense weights; {args.path} is none. Leave it out."
        )
    pipe = convert_original_checkpoint(
        args.path,
        vae=args.vae,
        subfolder=args.subfolder,
        weights_name=args.weights_name,
        weight_format=args.weight_format,
        num_attention_heads=args.num_attention_heads,
    )
    pipe.save_pretrained(args.output, max_shard_size="2GB")  # a shard is in memory while it is written
    print(f"Converted {args.path} to {args.output}\n")
    _print_info(Path(args.output))


def info(args: argparse.Namespace) -> None:
    """Print sizes and statistics of a model or layer."""
    path = Path(args.model) if Path(args.model).is_file() else Path(resolve_model(args.model))
    path = path if path.exists() else _download_weights(args.model)
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
        rows.append(("vae", f"{human_bytes(vae)} besides" if vae else "not here"))
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
        for dtype in DTYPES:
            choices: Counter = Counter()
            for shape, layers in report.shapes.items():
                case = getattr(torch, dtype), *shape, packed
                choices[choose_kernel(torch.device(device), *case, trained_bits=trained)] += layers
            for (kernel, bits, reason), layers in choices.items():
                rounded = bits or trained
                inputs = f"{rounded}-bit" if rounded else "not rounded"
                table.append((device, dtype, str(layers), kernel, inputs, reason))
    _print_table(table, "<<><<<")


def pack(args: argparse.Namespace) -> None:
    """Save a pipeline with its ternary weights in two bits each."""
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
        raise NotADirectoryError(f"{args.model} is no folder here; what is on the Hub needs no push.")
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
    parser = Parser(prog="terdit", description="Ternary diffusion transformers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(function, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=help, description=help)
        sub.set_defaults(run=function, parser=sub)
        return sub

    sub = command(generate, "Sample images from a pipeline folder, a Hub id, or a bundled checkpoint.")
    sub.add_argument("model", nargs="?", default="digits", help="folder, Hub id, or name of a bundled checkpoint")
    sub.add_argument(
        "--labels",
        nargs="+",
        default=[],
        help="label names or class ids; a number that is a name means that name; default the first ten classes",
    )
    sub.add_argument("--num_images_per_label", type=at_least(1), default=1)
    sub.add_argument("--num_inference_steps", type=at_least(1), default=50)
    sub.add_argument("--guidance_scale", type=not_negative, default=4.0)
    sub.add_argument("--scheduler", help="name of a diffusers scheduler, such as DPMSolverMultistepScheduler")
    sub.add_argument(
        "--seed",
        type=at_least(-(2**63)),
        nargs="+",
        default=[0],
        help="of the first image, the next has the next seed; several seeds: an image of every label for each",
    )
    sub.add_argument("--height", type=at_least(1), help="pixels")
    sub.add_argument("--width", type=at_least(1), help="pixels")
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    sub.add_argument(
        "--activation_bits",
        type=int,
        choices=(16, 8),
        help="integer activations, for speed on a CPU: 16 (the default in bfloat16) or 8 (error of 1 %%)",
    )
    sub.add_argument("--device", default="cpu", help="as torch names them: cpu, cuda, cuda:1, mps, xpu")
    sub.add_argument("--output", default="terdit.png", help="picture to write, in a format of Pillow")

    sub = command(
        convert,
        "Convert a checkpoint of TerDiT's authors, or a ternary model published as dense tensors, to a folder.",
    )
    sub.add_argument("path", help="folder or Hub id: consolidated*.pth and model_args.pth, or a diffusers model")
    sub.add_argument("output", help="folder to write")
    sub.add_argument("--subfolder", help="folder inside `path`")
    sub.add_argument("--weights_name", help="file to read; default the packed EMA one where there is one")
    sub.add_argument("--weight_format", choices=("float", "packed"), help="default as in the file")
    sub.add_argument("--num_attention_heads", type=at_least(1), default=32)
    sub.add_argument(
        "--vae", help='"auto" (the one the checkpoint names, downloaded), a folder or a Hub id; default none'
    )
    sub.add_argument(
        "--scale_granularity",
        type=granularity,
        help='of dense weights: "tensor", "row" or inputs per scale; default found out',
    )
    sub.add_argument("--component", default="transformer", help="of a diffusers pipeline, the ternary one")

    sub = command(info, "Print sizes and statistics of a model or layer, and where its bytes go.")
    sub.add_argument(
        "model",
        nargs="?",
        default="digits",
        help="folder of a pipeline, model or layer, safetensors file, Hub id, or name of a bundled checkpoint",
    )
    sub.add_argument("--labels", action="store_true", help="print the class ids and their names instead")
    sub.add_argument("--kernels", action="store_true", help="print which kernels compute it here, and why, instead")

    sub = command(pack, "Save a pipeline with its ternary weights in two bits each.")
    sub.add_argument("model", help="pipeline folder or Hub id")
    sub.add_argument("output", help="folder to write")

    sub = command(push, "Upload a pipeline folder to the Hub. The token is that of `hf auth login`, or HF_TOKEN.")
    sub.add_argument("model", help="pipeline folder, or name of a bundled checkpoint")
    sub.add_argument("repo_id", help="such as user/name; made if it does not exist")
    sub.add_argument("--private", action="store_true", help="make a new repository private")
    sub.add_argument("--revision", help="branch, made if it does not exist; default main")
    sub.add_argument("--commit_message", help='default "Upload" and the class')
    sub.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    sub.add_argument("--license", help="for the card, an identifier as on the Hub, such as apache-2.0")
    sub.add_argument("--base_model", help="for the card, Hub id of what this was made from")
    sub.add_argument(
        "--images", nargs="+", default=[], help="pictures for the card; the names of the files are captions"
    )

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
    """`report_errors` for a program that ends at Ctrl-C by a handler of its own while it imports."""
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
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")  # argparse has the whole parser say it
    return report_errors("terdit", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(run_program("terdit", main))
