"""`memory`: peak resident memory of loading a packed model of random codes and of one guided forward pass."""

import argparse
import tempfile
from pathlib import Path

import torch

import shared
from diffusers_terdit import TerDiTTransformer2DModel


BITS: dict[str, int | str | None] = {"none": None, "16": 16, "8": 8, "auto": "auto"}


def add_arguments(commands) -> None:
    parser = commands.add_parser("memory", help="peak resident memory of loading and one guided forward pass")
    parser.add_argument("--preset", choices=shared.PRESETS, default="terdit-4.2b-256")
    parser.add_argument("--sizes", type=shared.positive, nargs="+", default=[32, 64], help="sides of the latents")
    parser.add_argument("--folder", help="where to write the model for a while; default the system's")
    parser.add_argument("--dtype", choices=shared.DTYPES, default="float32")
    parser.add_argument("--activation_bits", choices=BITS, default="auto")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Save the model, then print a table; each size is measured in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        shared.random_model(args.preset).save_pretrained(folder)
        megabytes = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        for size in args.sizes:
            settings = {"folder": folder, "size": size, "dtype": args.dtype, "bits": BITS[args.activation_bits]}
            found = shared.in_a_process(__file__, **settings)
            rows.append([f"{size} x {size}", *(f"{value:.2f}" for value in found.values())])
    mode = f"{args.dtype}, activation bits: {args.activation_bits}"
    print(f"{args.preset}, packed, random codes, {mode}: {megabytes:,.0f} MB on disk. {shared.machine()}\n")
    print(shared.table(["latents", "imports, GiB", "loaded, GiB", "peak, GiB", "forward, s"], rows))


@torch.inference_mode()
def measure(folder: str, size: int, dtype: str, bits: int | str | None) -> dict:
    imported = shared.peak_memory()
    model = TerDiTTransformer2DModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.set_activation_bits(bits)
    loaded = shared.peak_memory()
    _, timestep, labels = shared.guided_input(model, model.dtype)
    sample = torch.randn(2, model.config.in_channels, size, size).to(model.dtype)
    outputs = []
    seconds = shared.both_clocks(lambda: outputs.append(model(sample, timestep, labels).sample))["seconds"]
    if not outputs[0].isfinite().all():
        raise RuntimeError(f"The forward pass in {dtype} gave numbers that are not finite. Try --dtype float32.")
    return {"imported": imported, "loaded": loaded, "peak": shared.peak_memory(), "seconds": seconds}


if __name__ == "__main__":
    shared.answer(measure)
