"""`gpu-cards`: does a picture fit in a few GB of GPU memory, and how long does a step take there?

Every case runs in a separate process, whose CUDA memory is limited. `--device cpu` tries the code without a limit.
"""

import argparse
import itertools
import subprocess
from collections.abc import Iterator

import torch

import shared
from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.pipelines.schedulers import default_scheduler
from shared import Results


PLACEMENTS = ("resident", "model offload", "group offload")
WEIGHTS = {"packed": {"weight_format": "packed"}, "dense": {"ternary": False}}


def add_arguments(commands) -> None:
    parser = commands.add_parser("gpu-cards", help="what fits in 2, 4 and 8 GB of GPU memory")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try the code")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--preset", choices=shared.PRESETS, default="terdit-4.2b-256")
    parser.add_argument("--limits", type=float, nargs="+", default=[2, 4, 8], help="GB of memory")
    parser.add_argument("--placements", choices=PLACEMENTS, nargs="+", default=PLACEMENTS)
    parser.add_argument("--weights", choices=WEIGHTS, nargs="+", default=list(WEIGHTS))
    parser.add_argument("--steps", type=shared.positive, default=10)
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results = Results(args, "gpu_cards", lambda data: shared.render("gpu_cards", **data))
    if not args.render:
        results.resume(args.fresh, place=shared.place(args.device), device=args.device)
        results.collect(measure_all(args, results))
    results.finish()


def measure_all(args: argparse.Namespace, results: Results) -> Iterator[dict]:
    common = {"preset": args.preset, "dtype": args.dtype, "device": args.device, "steps": args.steps}
    cases = itertools.product([None, *args.limits], args.weights, args.placements)
    keys = ("limit", "weights", "placement")
    for case in results.missing(common | dict(zip(keys, values, strict=True)) for values in cases):
        try:
            yield case | shared.in_a_process(__file__, **case)
        except subprocess.CalledProcessError as error:  # its message is above; the next run tries again
            print(f"left out: {case}: code {error.returncode}")


def measure(
    preset: str, dtype: str, device: str, steps: int, limit: float | None, weights: str, placement: str
) -> dict:
    """Return peak memory and milliseconds per step of a pipeline, or that it does not fit. It draws no picture."""
    cuda = device == "cuda"
    if cuda and limit:
        torch.cuda.set_per_process_memory_fraction(limit * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    with torch.device("meta"):
        transformer = shared.new_model(preset, **WEIGHTS[weights]).to(getattr(torch, dtype))
    transformer = transformer.to_empty(device="cpu").eval()
    for name, parameter in transformer.named_parameters():
        parameter.data.fill_(0b01011001 if name.endswith("weight_packed") else 0.01)
    torch.manual_seed(0)
    vae = shared.new_vae(small=device != "cuda").to(transformer.dtype)
    pipe = TerDiTPipeline(transformer=transformer, scheduler=default_scheduler(), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    try:
        if placement == "resident":
            pipe.to(device)
        elif placement == "model offload":
            pipe.enable_model_cpu_offload(device=device)
        else:
            options = {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": cuda}
            transformer.enable_group_offload(torch.device(device), torch.device("cpu"), **options)
            vae.to(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # the first one warms up
            generator = torch.Generator().manual_seed(0)
            times = shared.both_clocks(lambda: pipe(0, num_inference_steps=steps, generator=generator))  # noqa: B023
    except torch.OutOfMemoryError:
        return {"fits": False}
    peaks = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    milliseconds = shared.rounded(1e3 * times["seconds"] / steps)
    return {"fits": True, "milliseconds_per_step": milliseconds} | (peaks if cuda else {"peak_bytes": 0})


if __name__ == "__main__":
    shared.answer(measure)
