"""`gpu-pictures`: pictures from label to pixels on a GPU: time per step, how long of that the GPU had work, memory.

Models have random weights and a VAE of Stable Diffusion's size. Each setting is measured eagerly, then with compiled
blocks and the whole forward pass in a CUDA graph. `--device cpu` tries the code without CUDA graphs.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from diffusers import DPMSolverMultistepScheduler
from torch.profiler import ProfilerActivity, profile

import shared
from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit.pipelines.schedulers import default_scheduler
from shared import Results, rounded


PROFILED_STEPS = 5
SCHEDULERS = {
    "DDPM": default_scheduler,
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler.from_config(default_scheduler().config, variance_type=None),
}


def add_arguments(commands) -> None:
    parser = commands.add_parser("gpu-pictures", help="pictures from label to pixels on a GPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try the code")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--presets", choices=shared.PRESETS, nargs="+", default=shared.PAPER_PRESETS[::-1])
    parser.add_argument("--batch_sizes", type=shared.positive, nargs="+", default=[1, 8], help="guided images")
    parser.add_argument("--steps", type=shared.positive, default=25)
    parser.add_argument("--activation_bits", type=int, choices=[8, 16], help="default: exact")
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results = Results(args, "gpu_pictures", lambda data: shared.render("gpu_pictures", **data))
    if not args.render:
        results.resume(args.fresh, place=shared.place(args.device), device=args.device)
        results.collect(measure_all(args, results))
    results.finish()


def compile_model(model: TerDiTTransformer2DModel, device: str) -> AbstractContextManager:
    """Compile the blocks and, on a GPU, return a context that replays the forward pass as a CUDA graph."""
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "eager"
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    return model.cuda_graphs() if device == "cuda" else nullcontext()


def kernel_seconds(run: Callable[[], None]) -> float:
    """Return the seconds that the GPU spends in kernels, from the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in trace.key_averages()) / 1e6


def measure(pipe: TerDiTPipeline, batch: int, steps: int, device: str) -> dict:
    """Return time and memory of sampling a batch of latents, and of whole pictures."""
    cuda, generator = device == "cuda", torch.Generator(device).manual_seed(0)

    def seconds(output_type: str, steps: int = steps) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        pipe([0] * batch, num_inference_steps=steps, generator=generator, output_type=output_type)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds("pt")  # warms up: compiles, captures
    gc.collect()
    record = {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    record["milliseconds_per_step"] = rounded(1e3 * seconds("latent") / steps)
    if cuda:
        record["sampling_peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    record["picture_seconds"] = rounded(seconds("pt"))
    if cuda:
        record["picture_peak_bytes"] = torch.cuda.max_memory_allocated()
        record["reserved_bytes"] = torch.cuda.memory_reserved()
        kernels = kernel_seconds(lambda: seconds("latent", PROFILED_STEPS))
        record["kernel_milliseconds_per_step"] = rounded(1e3 * kernels / PROFILED_STEPS)
    return record


def measure_all(args: argparse.Namespace, results: Results) -> Iterator[dict]:
    """Yield a record per preset, mode, batch size and scheduler that is not held."""
    for preset in args.presets:
        common = {"preset": preset, "dtype": args.dtype, "bits": args.activation_bits}
        keys = ("compiled", "batch", "scheduler")
        settings = itertools.product((False, True), args.batch_sizes, SCHEDULERS)
        cases = results.missing(common | dict(zip(keys, values, strict=True)) for values in settings)
        if not cases:
            continue
        model = shared.random_model(preset, args.device).to(getattr(torch, args.dtype))
        model.set_activation_bits(args.activation_bits)
        vae = shared.new_vae(small=args.device != "cuda").to(args.device, model.dtype)
        compiled = False
        with ExitStack() as graphs:
            for case in cases:
                if case["compiled"] and not compiled:
                    graphs.enter_context(compile_model(model, args.device))
                    compiled = True
                pipe = TerDiTPipeline(transformer=model, scheduler=SCHEDULERS[case["scheduler"]](), vae=vae)
                pipe.set_progress_bar_config(disable=True)
                yield case | measure(pipe, case["batch"], args.steps, args.device)
        del model, vae, pipe, graphs
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
