"""`memory`: peak resident memory of loading a packed model of random codes, of a guided forward pass, and of a VAE."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL

import shared
from diffusers_terdit import TerDiTTransformer2DModel


def add_arguments(commands) -> None:
    parser = commands.add_parser("memory", help="peak resident memory of loading, a guided forward pass, and a VAE")
    parser.add_argument("--presets", choices=shared.PRESETS, nargs="+", default=shared.PAPER_PRESETS)
    parser.add_argument("--sizes", type=shared.positive, nargs="+", default=[32, 64], help="sides of the latents")
    parser.add_argument("--dtypes", choices=shared.DTYPES, nargs="+", default=["float32"])
    parser.add_argument("--folder", help="where to write the models for a while; default the system's")
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure what the JSON does not hold for this machine, each case in a separate process."""
    results = shared.Results(args, "memory", page)
    if not args.render:
        results.resume(args.fresh, machine=shared.machine())
        for preset in args.presets:
            cases = [{"preset": preset, "size": size, "dtype": dtype} for dtype in args.dtypes for size in args.sizes]
            if missing := results.missing(cases):
                results.collect(measured(missing, args.folder))
    results.finish()


def measured(cases: list[dict], folder: str | None) -> Iterator[dict]:
    """Yield the records of one model."""
    with tempfile.TemporaryDirectory(dir=folder) as saved:
        preset = cases[0]["preset"]
        transformer = Path(saved, "transformer")
        shared.random_model(preset).save_pretrained(transformer)
        shared.new_vae(small=preset == "toy").save_pretrained(Path(saved, "vae"))
        size = sum(path.stat().st_size for path in transformer.iterdir())
        for case in cases:
            settings = {"folder": saved, "size": case["size"], "dtype": case["dtype"]}
            yield {**case, "bytes": size, **shared.in_a_process(__file__, **settings)}


@torch.inference_mode()
def measure(folder: str, size: int, dtype: str) -> dict:
    """Load and run the transformer, then the VAE; every peak is that of the process so far."""
    imports = shared.peak_memory()
    model = TerDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=getattr(torch, dtype))
    loaded = shared.peak_memory()
    _, timestep, labels = shared.guided_input(model, model.dtype)
    sample = torch.randn(2, model.config.in_channels, size, size).to(model.dtype)
    output = model(sample, timestep, labels).sample
    if not output.isfinite().all():
        raise RuntimeError(f"The forward pass in {dtype} gave numbers that are not finite. Try --dtypes float32.")
    peak = shared.peak_memory()
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=model.dtype)
    decoding = shared.both_clocks(lambda: vae.decode(sample[:1]))
    peaks = {"imports_gib": imports, "loaded_gib": loaded, "peak_gib": peak, "decoded_gib": shared.peak_memory()}
    return {**peaks, "decoding_cpu_seconds": decoding["cpu_seconds"]}


def page(data: dict) -> str:
    rows = [
        [
            *(record["preset"].removesuffix("-256"), f"{8 * record['size']} px", record["dtype"]),
            *(f"{record[key] * shared.GIB:.2f}" for key in ("imports_gib", "loaded_gib", "peak_gib", "decoded_gib")),
            f"{record['decoding_cpu_seconds']:.0f}",
        ]
        for record in data["records"]
    ]
    sizes = {record["preset"]: f"{record['bytes'] / 1e6:,.0f}" for record in data["records"]}
    return shared.render("memory", rows=rows, sizes=sizes, machine=data["machine"], commands=data["command"])


if __name__ == "__main__":
    shared.answer(measure)
