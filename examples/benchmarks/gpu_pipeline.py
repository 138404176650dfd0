"""Pictures from label to pixels on a GPU: milliseconds per step, how long of that the GPU had work, and peak memory.

    PYTHONPATH=src:examples python examples/benchmarks/gpu_pipeline.py --output_dir outputs/gpu

Models have random weights and a VAE of Stable Diffusion's size. Each setting is measured eagerly, then with compiled
blocks and the whole forward pass in a CUDA graph. Every result goes to gpu_pipeline.json and its page at once; a run
that was stopped goes on when it is started again. `--device cpu` tries the code without CUDA graphs; such figures are
no measurement.
"""

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmark import machine
from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit.models.transformer_terdit import SIZES
from diffusers_terdit.pipelines.schedulers import default_scheduler
from gpu_benchmark import grouped, is_held, loaded, new_vae, place, random_model, resumed, save, script_command
from kernel_benchmark import rounded
from kernel_page import table


PROFILED_STEPS = 5
SCHEDULERS = {
    "DDPM": default_scheduler,
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler.from_config(default_scheduler().config, variance_type=None),
}


def graphed(model: TerDiTTransformer2DModel) -> Callable[..., tuple[Tensor]]:
    """The model's forward pass as CUDA graphs, one for each set of shapes.

    This is what `torch.compile(mode="reduce-overhead")` makes of the whole model, after compiling one block only.
    """
    forward, graphs = model.forward, {}

    def call(
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = False,
        modulation: Tensor | None = None,
    ) -> tuple[Tensor]:
        inputs = {"hidden_states": hidden_states, "timestep": timestep, "class_labels": class_labels}
        inputs |= {} if modulation is None else {"modulation": modulation}
        key = tuple((name, tensor.shape) for name, tensor in inputs.items())
        if key not in graphs:
            static = {name: tensor.clone() for name, tensor in inputs.items()}
            run = partial(forward, **static, return_dict=False)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = run()
            graphs[key] = static, graph, output
        static, graph, output = graphs[key]
        for name, tensor in inputs.items():
            static[name].copy_(tensor)
        graph.replay()
        return output

    return call


def compile_model(model: TerDiTTransformer2DModel, device: str) -> None:
    """Compile the blocks and, on a GPU, capture the forward pass."""
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "eager"
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    if device == "cuda":
        model.forward = graphed(model)


def kernel_seconds(run: Callable[[], None]) -> float:
    """Seconds that the GPU spends in kernels, from the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in trace.key_averages()) / 1e6


def measure(pipe: TerDiTPipeline, batch: int, steps: int, device: str) -> dict:
    """Time and memory of sampling a batch of latents, and of whole pictures."""
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


def measure_all(args: argparse.Namespace, held: list[dict]) -> Iterator[dict]:
    """A record per preset, mode, batch size and scheduler that is not held."""
    for preset in args.presets:
        model_of = {"preset": preset, "dtype": args.dtype, "bits": args.activation_bits}
        settings = itertools.product((False, True), args.batch_sizes, SCHEDULERS)
        cases = [model_of | dict(zip(("compiled", "batch", "scheduler"), values, strict=True)) for values in settings]
        cases = [case for case in cases if not is_held(held, **case)]
        if not cases:
            continue
        model = random_model(preset, args.device).to(getattr(torch, args.dtype))
        model.set_activation_bits(args.activation_bits)
        vae = new_vae(args.device).to(args.device, model.dtype)
        compiled = False
        for case in cases:
            if case["compiled"] and not compiled:
                compile_model(model, args.device)
                compiled = True
            pipe = TerDiTPipeline(transformer=model, scheduler=SCHEDULERS[case["scheduler"]](), vae=vae)
            pipe.set_progress_bar_config(disable=True)
            record = case | measure(pipe, case["batch"], args.steps, args.device)
            print(json.dumps(record), flush=True)
            yield record
        del model, vae, pipe
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def page(data: dict) -> str:
    parts = [
        "# Pictures on a GPU\n",
        "Milliseconds per guided sampling step (lower is better), with the part of it that the GPU spends in kernels;"
        " seconds for a whole picture or batch, VAE included; and peak memory in GB (10^9 bytes) of sampling and of"
        " the whole. Compiled: blocks compiled, the forward pass in a CUDA graph.\n",
        f"{data['place']}\n\n```bash\n{data['command']}\n```\n",
    ]

    def shown(record: dict, key: str, scale: float = 1.0) -> str:
        return f"{record[key] / scale:.4g}" if key in record else "-"

    for (preset, dtype, bits), found in grouped(data["records"], "preset", "dtype", "bits").items():
        lines = [
            [
                str(record["batch"]),
                record["scheduler"],
                "compiled" if record["compiled"] else "eager",
                shown(record, "milliseconds_per_step"),
                shown(record, "kernel_milliseconds_per_step"),
                shown(record, "picture_seconds"),
                shown(record, "sampling_peak_bytes", 1e9),
                shown(record, "picture_peak_bytes", 1e9),
            ]
            for record in found
        ]
        header = ["images", "scheduler", "mode", "step, ms", "kernels, ms", "pictures, s", "sampling, GB", "peak, GB"]
        arithmetic = f"int{bits}" if bits else "exact"
        parts.append(f"## {preset}, {dtype}, {arithmetic}\n\n{table(header, lines)}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try the code")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--presets", choices=SIZES, nargs="+", default=["terdit-4.2b-256", "terdit-600m-256"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="images of a call, guided")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--activation_bits", type=int, choices=[8, 16], help="default: exact")
    parser.add_argument("--output_dir", type=Path, default=Path("docs", "results"))
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON already holds")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page from the JSON")
    args = parser.parse_args()
    path = args.output_dir / "gpu_pipeline.json"
    data = loaded(path, args.render)
    if not args.render:
        data = resumed({} if args.fresh else data, place(args.device, machine()), script_command())
        for record in measure_all(args, data["records"]):
            data["records"].append(record)
            save(path, data, page(data))
    save(path, data, page(data))
    print(f"Written to {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
