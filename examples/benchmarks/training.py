"""`training`: an optimizer step of a ternary model and of a full-precision one, in turns, with few layers.

On a CPU full precision runs as torch computes it, and with each product of a linear layer, the output and both
gradients, by what is fastest there.
The peak of memory of each is measured in a separate process.
"""

import argparse
import copy
import itertools
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from torch.utils.data import default_collate

import peers
import shared
from diffusers_terdit import losses
from diffusers_terdit.training import recipes
from diffusers_terdit.training.data import TrainingExamples
from shared import Results


BEST = "full precision, best dense"
BASES = {"over_full_precision": "full precision", "over_best_dense": BEST}
MODELS = {
    **{name: {"ternary": False} for name in BASES.values()},
    **{"ternary": {}, "ternary, 8-bit activations": {"activation_bits": 8}},
}
# What a profiler calls the operations of a network on a CPU.
KINDS = {
    "attention": r"scaled_dot_product",
    "layers": r"diffusers_terdit|_BestProducts|aten::(linear|addmm|mm)$|(Linear|Addmm|Mm)Backward",
}


def add_arguments(commands) -> None:
    parser = commands.add_parser("training", help="cost of a training step, ternary and full precision")
    parser.add_argument("--preset", choices=shared.PRESETS, default="terdit-600m-256")
    parser.add_argument("--layers", type=shared.positive, default=2)
    parser.add_argument("--batch_size", type=shared.positive, default=4, help="images, of 256 tokens in 256 px")
    parser.add_argument("--dtype", choices=shared.DTYPES, default="float32", help="of autocast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=shared.positive, default=7)
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results = Results(args, "training", page)
    if not args.render:
        settings = {key: getattr(args, key) for key in ("preset", "layers", "batch_size", "dtype", "device")}
        results.resume(args.fresh, place=shared.place(args.device), settings=settings | {"repeats": args.repeats})
        names = [name for name in MODELS if name != BEST or args.device == "cpu"]
        if results.missing({"model": name} for name in names):
            results.data["records"] = []  # a ratio is one of steps in turns
            steps = {name: training_step(name, **settings) for name in names}
            parts = shared.by_clock(shared.in_turns(steps, args.repeats, clock=lambda step: step()))
            splits = {name: split(step, args.repeats) for name, step in steps.items() if args.device == "cpu"}
            del steps  # before the processes need memory
            results.collect(record_of(name, parts, settings, splits.get(name, {})) for name in names)
    results.finish()


def split(step: Callable[[], dict[str, float]], repeats: int) -> dict[str, dict[str, float]]:
    """Return the shares of layers, attention and the rest in the forward and in the backward pass, by a profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            step()
    seconds: dict[str, Counter] = {"forward": Counter(), "backward": Counter()}
    for event in profiler.events():
        names, above = [], event
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        found = (kind for name in names for kind, pattern in KINDS.items() if re.search(pattern, name))
        if any(name.startswith("autograd::engine") for name in names):
            seconds["backward"][next(found, "rest")] += event.self_cpu_time_total
        elif "forward" in names:
            seconds["forward"][next(found, "rest")] += event.self_cpu_time_total
    return {part: {kind: found[kind] / found.total() for kind in (*KINDS, "rest")} for part, found in seconds.items()}


def record_of(name: str, parts: dict[str, dict[str, list[float]]], settings: dict, shares: dict) -> dict:
    memory = shared.in_a_process(__file__, name=name, **settings)
    medians = {part: shared.rounded(1e3 * statistics.median(found[name])) for part, found in parts.items()}
    times, milliseconds = parts["step"], medians.pop("step")
    over = {key: shared.ratios(times[name], times[base]) for key, base in BASES.items() if base in times}
    return {"model": name, "milliseconds": milliseconds, "parts": medians, "shares": shares, **over, **memory}


def training_step(
    name: str, preset: str, layers: int, batch_size: int, dtype: str, device: str
) -> Callable[[], dict[str, float]]:
    """Return a function that runs one optimizer step of a fresh model, and gives the seconds of its parts."""
    torch.manual_seed(0)
    model = shared.new_model(preset, num_layers=layers, **MODELS[name]).to(device).train()
    if name == BEST:
        peers.train_on_best_dense(model)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    alphas = DDPMScheduler(beta_schedule="linear").alphas_cumprod.to(device)
    side = model.config.sample_size
    shape, classes = (model.config.in_channels, side, side), model.config.num_classes
    samples = [(torch.randn(shape), label % classes) for label in range(batch_size)]
    examples = TrainingExamples(samples, 0, shape, classes)

    def step() -> dict[str, float]:
        marks = [("begin", clock())]

        def mark(part: str) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            marks.append((part, clock()))

        batch = default_collate([examples.example(i, *sample) for i, sample in enumerate(samples)])
        clean, labels, noise, timesteps = (
            batch[key].to(device) for key in ("samples", "class_labels", "noise", "time")
        )
        mark("data")
        autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")
        with torch.profiler.record_function("forward"), autocast:
            output = model(clean, timesteps, labels).sample.float()
        mark("forward")
        losses.diffusion_loss(output, clean, noise, timesteps, alphas).mean().backward()
        mark("backward")
        recipes.clip_grad_norm(model, 2.0)
        mark("clip")
        optimizer.step()
        optimizer.zero_grad()
        mark("optimize")
        recipes.update_average(average, model, 0.999)
        mark("average")
        parts = {part: end - begin for (_, begin), (part, end) in itertools.pairwise(marks)}
        return {**parts, "step": marks[-1][1] - marks[0][1]}

    return step


def measure(**settings) -> dict[str, float]:
    """Return the peak memory of two steps, in GiB."""
    step = training_step(**settings)
    for _ in range(2):
        step()
    on_gpu = settings["device"] == "cuda"
    return {"memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else shared.peak_memory()}


def page(data: dict) -> str:
    lines = [
        [
            r["model"],
            f"{r['milliseconds']:g}",
            *(shared.spread(r.get(key)) for key in BASES),
            f"{r['memory_gib'] * shared.GIB:.2f}",
        ]
        for r in data["records"]
    ]
    names = [*data["records"][0]["parts"]]
    parts = [[r["model"], *(f"{r['parts'][name]:g}" for name in names)] for r in data["records"]]
    columns = [(part, kind) for part in ("forward", "backward") for kind in (*KINDS, "rest")]
    shares = [
        [r["model"], *(f"{r['shares'][part][kind] * r['parts'][part]:.3g}" for part, kind in columns)]
        for r in data["records"]
        if r["shares"]
    ]
    return shared.render(
        "training",
        **data,
        lines=lines,
        parts=parts,
        names=[f"{name}, ms" for name in names],
        shares=shares,
        columns=[f"{part}: {kind}, ms" for part, kind in columns],
    )


if __name__ == "__main__":
    shared.answer(measure)
