"""`training`: an optimizer step of a ternary model and of a full-precision one, in turns, with few layers.

On a CPU full precision runs as torch computes it, and with each product of a linear layer, the output and both
gradients, by what is fastest there.
The peak of memory of each is measured in a process of its own.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler

import peers
import shared
from diffusers_terdit import losses
from diffusers_terdit.training import recipes
from shared import Results


BEST = "full precision, best dense"
BASES = {"over_full_precision": "full precision", "over_best_dense": BEST}
MODELS = {
    **{name: {"ternary": False} for name in BASES.values()},
    **{"ternary": {}, "ternary, 8-bit activations": {"activation_bits": 8}},
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
            del steps  # before the processes need memory
            results.collect(record_of(name, parts, settings) for name in names)
    results.finish()


def record_of(name: str, parts: dict[str, dict[str, list[float]]], settings: dict) -> dict:
    memory = shared.in_a_process(__file__, name=name, **settings)
    medians = {part: shared.rounded(1e3 * statistics.median(found[name])) for part, found in parts.items()}
    times, milliseconds = parts["step"], medians.pop("step")
    over = {key: shared.ratios(times[name], times[base]) for key, base in BASES.items() if base in times}
    return {"model": name, "milliseconds": milliseconds, "parts": medians, **over, **memory}


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
    clean = torch.randn(batch_size, model.config.in_channels, side, side, device=device)
    noise, labels = torch.randn_like(clean), torch.randint(model.config.num_classes, (batch_size,), device=device)
    timesteps = torch.randint(1000, (batch_size,), device=device)

    def step() -> dict[str, float]:
        marks = [("begin", clock())]

        def mark(part: str) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            marks.append((part, clock()))

        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            output = model(clean, timesteps, labels).sample.float()
        mark("forward")
        losses.diffusion_loss(output, clean, noise, timesteps, alphas).mean().backward()
        mark("loss and backward")
        recipes.clip_grad_norm(model, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        mark("clip and optimize")
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
        [r["model"], f"{r['milliseconds']:g}", *(shared.spread(r.get(key)) for key in BASES), f"{r['memory_gib']:.2f}"]
        for r in data["records"]
    ]
    names = [*data["records"][0]["parts"]]
    parts = [[r["model"], *(f"{r['parts'][name]:g}" for name in names)] for r in data["records"]]
    return shared.render("training", **data, lines=lines, parts=parts, names=[f"{name}, ms" for name in names])


if __name__ == "__main__":
    shared.answer(measure)
