"""The `terdit` command: parse, call one function, print. Heavy imports stay inside the commands."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .pipelines.pipeline_terdit import TerDiTPipeline

DTYPES = ("float32", "bfloat16", "float16")


def human_bytes(size: float) -> str:
    """12345678 -> "12.3 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _resolve(model: str) -> str:
    """Folders and Hub ids as they are; the name of a bundled checkpoint becomes its folder."""
    from .checkpoints import bundled

    if Path(model).is_dir():
        return model
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"{model} is not a folder.")
    return model if "/" in model else str(bundled(model))


def _load(model: str, dtype: str = "float32", **kwargs: Any) -> "TerDiTPipeline":
    import torch

    from .pipelines.pipeline_terdit import TerDiTPipeline

    return TerDiTPipeline.from_pretrained(_resolve(model), dtype=getattr(torch, dtype), **kwargs)


def generate(args: argparse.Namespace) -> None:
    """Sample images into one labelled grid."""
    import time

    import diffusers
    import torch

    from .training import image_grid

    pipe = _load(args.model, args.dtype).to(args.device)
    if args.activation_bits:
        pipe.transformer.set_activation_bits(args.activation_bits)
    if args.scheduler:
        scheduler = getattr(diffusers, args.scheduler, None)
        if scheduler is None or not hasattr(scheduler, "set_timesteps"):
            raise ValueError(f"diffusers has no scheduler {args.scheduler!r}; try DPMSolverMultistepScheduler.")
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    num_classes = pipe.transformer.config.num_classes
    labels = [int(label) if label.isdigit() else label for label in args.labels] or list(range(min(num_classes, 10)))
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(labels) * args.num_images_per_label)]
    start = time.perf_counter()
    images = pipe(
        labels,
        height=args.height,
        width=args.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_images_per_label,
        generator=generators,
    ).images
    seconds = time.perf_counter() - start
    id2label = pipe.config.id2label or {}
    captions = [id2label.get(str(label), str(label)).split(",")[0] for label in labels]
    names = [caption for caption in captions for _ in range(args.num_images_per_label)]
    # One column per label when each has several images, read top to bottom.
    columns = len(labels) if args.num_images_per_label > 1 else None
    if columns:
        order = [c * args.num_images_per_label + r for r in range(args.num_images_per_label) for c in range(columns)]
        images, names = [images[i] for i in order], [names[i] for i in order]
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns, names).save(output)
    weights = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    bits = f", {args.activation_bits}-bit activations" if args.activation_bits else ""
    print(
        f"{len(images)} images of {images[0].width} x {images[0].height} pixels from {args.model} "
        f"({human_bytes(weights)} of weights, {args.dtype}{bits}, {pipe.device}): {args.num_inference_steps} steps of "
        f"{type(pipe.scheduler).__name__}, guidance {args.guidance_scale:g}, seeds {args.seed} to "
        f"{args.seed + len(images) - 1}, {seconds:.1f} s.\nWritten to {output}"
    )


def convert(args: argparse.Namespace) -> None:
    """Read a checkpoint of TerDiT's authors and save it as a pipeline folder."""
    from .conversion import convert_original_checkpoint

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
    _print_info(Path(args.output) / "transformer")


def info(args: argparse.Namespace) -> None:
    """Print sizes and statistics of a model."""
    from huggingface_hub import snapshot_download

    path = Path(_resolve(args.model))
    if not path.is_dir():
        path = Path(snapshot_download(args.model, allow_patterns=["*.json", "*.safetensors"], ignore_patterns="vae/*"))
    _print_info(path / "transformer" if (path / "transformer").is_dir() else path)


def _print_info(folder: Path) -> None:
    from .models.transformer_terdit import TerDiTTransformer2DModel
    from .training import ternary_statistics

    model = TerDiTTransformer2DModel.from_pretrained(folder)
    config, layers = model.config, model.ternary_layers()
    ternary = sum(layer.in_features * layer.out_features for layer in layers.values())
    scales = sum(layer.weight_scale.numel() for layer in layers.values())
    stored = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(("weight_packed", "weight_scale")))
    other = stored - (ternary if config.weight_format == "float" else 0)
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rows = [
        ("size", f"{config.num_layers} layers of width {config.num_attention_heads * config.attention_head_dim}"),
        ("latents", f"{config.in_channels} x {config.sample_size} x {config.sample_size}, patch {config.patch_size}"),
        ("classes", f"{config.num_classes}"),
        ("weights", f"{ternary + scales + other:,}"),
        ("  ternary", f"{ternary:,} in {len(layers)} layers"),
        ("  scales", f"{scales:,}"),
        ("  full precision", f"{other:,}"),
        (
            "format",
            f"{config.weight_format}, one scale per {config.scale_granularity}" if layers else "full precision",
        ),
        ("on disk", f"{human_bytes(on_disk)}, of them {human_bytes(ternary / 4)} ternary codes when packed"),
    ]
    if layers:
        statistics = ternary_statistics(model)
        rows += [
            ("zeros", f"{statistics['zero_share']:.1%} of the ternary weights"),
            ("scale", f"{statistics['scale_min']:.3g} to {statistics['scale_max']:.3g}"),
        ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def pack(args: argparse.Namespace) -> None:
    """Save a pipeline with its ternary weights in two bits each."""
    pipe = _load(args.model)
    pipe.transformer.pack()
    pipe.save_pretrained(args.output)
    print(f"Packed {args.model} to {args.output}\n")
    _print_info(Path(args.output) / "transformer")


def build_parser() -> argparse.ArgumentParser:
    """Commands and flags; each command's function is its `run`."""
    parser = argparse.ArgumentParser(prog="terdit", description="Ternary diffusion transformers.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(function, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            function.__name__, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=function)
        return sub

    sub = command(generate, "Sample images from a pipeline folder, a Hub id, or a bundled checkpoint.")
    sub.add_argument("model", nargs="?", default="digits", help="folder, Hub id, or name of a bundled checkpoint")
    sub.add_argument("--labels", nargs="+", default=[], help="class ids or label names; default the first ten classes")
    sub.add_argument("--num_images_per_label", type=int, default=1)
    sub.add_argument("--num_inference_steps", type=int, default=50)
    sub.add_argument("--guidance_scale", type=float, default=4.0)
    sub.add_argument("--scheduler", help="name of a diffusers scheduler, such as DPMSolverMultistepScheduler")
    sub.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next seed")
    sub.add_argument("--height", type=int, help="pixels")
    sub.add_argument("--width", type=int, help="pixels")
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    sub.add_argument(
        "--activation_bits",
        type=int,
        choices=(16, 8),
        help="integer activations, for speed on a CPU: 16 (the default in bfloat16) or 8 (error of 1 %%)",
    )
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--output", default="terdit.png", help="picture to write")

    sub = command(convert, "Convert a checkpoint of TerDiT's authors to a pipeline folder.")
    sub.add_argument("path", help="folder with consolidated*.pth and model_args.pth, or a Hub id")
    sub.add_argument("output", help="folder to write")
    sub.add_argument("--subfolder", help="folder inside `path`")
    sub.add_argument("--weights_name", help="file to read; default the packed EMA one where there is one")
    sub.add_argument("--weight_format", choices=("float", "packed"), help="default as in the file")
    sub.add_argument("--num_attention_heads", type=int, default=32)
    sub.add_argument(
        "--vae", help='"auto" (the one the checkpoint names, downloaded), a folder or a Hub id; default none'
    )

    sub = command(info, "Print sizes and statistics of a model.")
    sub.add_argument("model", nargs="?", default="digits", help="folder, Hub id, or name of a bundled checkpoint")

    sub = command(pack, "Save a pipeline with its ternary weights in two bits each.")
    sub.add_argument("model", help="pipeline folder or Hub id")
    sub.add_argument("output", help="folder to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it worked, 1 with a one-line message when it could not."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"terdit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
