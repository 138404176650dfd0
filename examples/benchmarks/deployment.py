"""`deployment`: bytes of a checkpoint, peak memory and time of a guided step of the models of the paper's table.

The weights are random. Every model runs in a separate process; these take one step each in turns. On a CPU the second
model of a pair, a dense one, is then timed again with linear layers that are computed by what is fastest there.
"""

import argparse
import contextlib
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoModel, DDPMScheduler, DiTTransformer2DModel

import diffusers_terdit
import peers
import shared
from diffusers_terdit.evaluation.measured import now, sentence
from shared import DTYPES, Results, by_clock, in_turns, new_model, ratios


STEPS = 250  # of a run, as in the paper
NAMES = {"cpu": "CPU", "cuda": "GPU"}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {  # neighbors are compared
    "TerDiT-600M": partial(new_model, "terdit-600m-256", weight_format="packed"),
    "DiT-XL/2": partial(
        DiTTransformer2DModel,
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        sample_size=32,
        patch_size=2,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
    ),
    "TerDiT-4.2B": partial(new_model, "terdit-4.2b-256", weight_format="packed"),
    "Large-DiT-4.2B": partial(new_model, "terdit-4.2b-256", ternary=False),
    "toy": partial(new_model, "toy", weight_format="packed"),
    "dense toy": partial(new_model, "toy", ternary=False),
}
PAPER_MODELS = list(MODELS)[:4]
BEST = ", best dense"  # after the name of a model in a run
ADALN = re.compile(r"transformer_blocks\.\d+\.(adaln|norm1)\.linear\.weight(_packed)?")


def add_arguments(commands) -> None:
    parser = commands.add_parser("deployment", help="checkpoint, memory and time of the paper's models, in turns")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=PAPER_MODELS, help="neighbors are compared")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=shared.positive, default=5, help="steps of each model, after one to warm up")
    parser.add_argument("--folder", help="where to write the checkpoints for a while; default the system's")
    shared.add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    results = Results(args, "deployment", page, tables_are_dated=True)
    results.data = {"models": [], "turns": []} | results.data
    if not args.render:
        where = {"device": args.device, "machine": shared.place(args.device), "version": diffusers_terdit.__version__}
        pairs = [args.models[i : i + 2] for i in range(0, len(args.models), 2)]
        for dtype, names in itertools.product(args.dtypes, pairs):
            here = where | {"dtype": dtype}
            runs = [run for run in results.data["turns"] if run.items() >= here.items()]
            if args.fresh or not any(set(names) <= set(run["models"]) for run in runs):
                put(results.data, names, here, *measure_together(names, here, args))
                results.save()
    results.finish(plot)


def put(data: dict, names: list[str], here: dict, records: list[dict], new_runs: list[dict]) -> None:
    """Add records, and the times of models that ran in turns; they replace those of the same models."""
    same = {key: here[key] for key in ("dtype", "device")}.items()
    data["models"] = [old for old in data["models"] if old["model"] not in names or not old.items() >= same] + records
    replaced = {*names, *(name + BEST for name in names)}
    runs = [old for old in data["turns"] if not (old.items() >= here.items() and set(old["models"]) <= replaced)]
    data["turns"] = [*runs, *new_runs]


def measure_together(names: list[str], here: dict, args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Run each model in a separate process, one step at a time in turns: a record per model, and the runs' times."""
    common = {**here, **now(), "command": shared.command_line()}
    dtype = here["dtype"]
    records = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, contextlib.ExitStack() as stack:
        processes = {}
        for number, name in enumerate(names):
            print(f"{name}, {dtype}: saving and loading", file=sys.stderr, flush=True)
            model = on_meta(name)
            saved = Path(folder, str(number))
            files = shared.save_mapped(model, random_weights(model, getattr(torch, dtype)), saved)
            settings = json.dumps({"folder": str(saved), "dtype": dtype, "device": args.device})
            command = [sys.executable, __file__, settings]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes[name] = stack.enter_context(process)
            ask(name, process)
            sizes = counts(model) | {"files": files, "checkpoint_bytes": sum(files.values())}
            records.append({"model": name, **common, **sizes})
        steps = {name: partial(ask, name, process, "step") for name, process in processes.items()}
        times = by_clock(in_turns(steps, args.turns, clock=lambda step: step()))
        for record in records:
            record |= ask(record["model"], processes[record["model"]], "memory")
        runs = [{"models": names, **common, **times}]
        if len(names) == 2 and args.device == "cpu":
            ask(names[1], processes[names[1]], "best dense")
            best = [names[0], names[1] + BEST]
            steps = dict(zip(best, steps.values(), strict=True))
            runs.append({"models": best, **common, **by_clock(in_turns(steps, args.turns, clock=lambda step: step()))})
    return records, runs


def on_meta(name: str) -> torch.nn.Module:
    """Make a model without memory for its weights."""
    with torch.device("meta"):
        return MODELS[name]()


def counts(model: torch.nn.Module) -> dict[str, int]:
    """Count weights, not bytes: all, those in two bits, and those of the blocks' adaLN matrices."""
    sizes = {n: p.numel() * (4 if n.endswith("weight_packed") else 1) for n, p in model.named_parameters()}
    return {
        "parameters": sum(sizes.values()),
        "ternary_weights": sum(size for name, size in sizes.items() if name.endswith("weight_packed")),
        "adaln_weights": sum(size for name, size in sizes.items() if ADALN.fullmatch(name)),
    }


def random_weights(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and random values of every parameter of a meta model, one at a time."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            yield name, shared.random_codes(4 * parameter.shape[0], parameter.shape[1])
        elif kind == "weight_scale":
            scale = shared.power_of_two_scale(model.get_submodule(layer).in_features)
            yield name, torch.full(parameter.shape, scale)
        else:
            yield name, torch.empty(parameter.shape, dtype=dtype).normal_(std=0.02)


# The process of a model


@torch.inference_mode()
def denoising_steps(model: torch.nn.Module, device: str) -> Iterator[torch.Tensor]:
    """Run one guided DDPM step of one image at a time: two rows, latents and scheduler in float32."""
    channels, size = model.config.in_channels, model.config.sample_size
    null = getattr(model.config, "num_classes", None) or model.config.num_embeds_ada_norm
    variance = {"variance_type": "learned_range"} if model.out_channels == 2 * channels else {}
    scheduler = DDPMScheduler(beta_schedule="linear", clip_sample=False, **variance)
    scheduler.set_timesteps(STEPS, device=device)
    labels = torch.tensor([min(207, null - 1), null], device=device)
    latents = torch.randn(1, channels, size, size, device=device)
    for timestep in itertools.cycle(scheduler.timesteps):
        rows = latents.to(model.dtype).repeat(2, 1, 1, 1)
        output = model(rows, timestep=timestep.expand(2), class_labels=labels).sample.float()
        conditional, unconditional = output[:, :channels]
        guided = unconditional + 4.0 * (conditional - unconditional)
        prediction = torch.cat([guided, output[0, channels:]])[None]
        latents = scheduler.step(prediction, timestep, latents).prev_sample
        if device == "cuda":
            torch.cuda.synchronize()
        yield latents


def serve(folder: str, dtype: str, device: str) -> None:
    """Load a model, then do what each line of stdin says; answers are lines of JSON.

    "step", "memory", or "best dense": let the fastest functions compute the linear layers from now on.
    """
    torch.manual_seed(0)
    imported = round(shared.peak_memory() * 2**30)
    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    steps, latents = denoising_steps(model, device), []
    print(json.dumps({"loaded": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "step":
            reply = shared.both_clocks(lambda: latents.append(next(steps)))
            if not latents.pop().isfinite().all():
                raise RuntimeError(f"The step in {dtype} gave numbers that are not finite. Try --dtypes float32.")
        elif line.strip() == "best dense":
            reply = {"swapped": bool(peers.swap(model, peers.BestDense))}
        else:
            reply = {"imported_bytes": imported, "peak_bytes": round(shared.peak_memory() * 2**30)}
            if device == "cuda":
                reply |= {"device_peak_bytes": torch.cuda.max_memory_allocated()}
        print(json.dumps(reply), flush=True)


def ask(name: str, process: subprocess.Popen, command: str | None = None) -> dict:
    """Return the process's answer to a command; to none, its word that it has loaded."""
    with contextlib.suppress(BrokenPipeError):  # then there is no answer
        if command:
            process.stdin.write(f"{command}\n")
            process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        raise RuntimeError(f"The process of {name} ended with code {process.wait()}; its error is above.")
    return json.loads(line)


# Page


def page(data: dict) -> str:
    places, compared = [], []
    for device, records, runs in by_place(data):
        commands = list(dict.fromkeys(item["command"] for item in [*records, *runs]))
        measured = [row for record in records for row in measured_rows(record, runs)]
        latest = max(records, key=lambda record: record["date"])
        where = {"device": device, "machine": latest["machine"], "when": sentence(latest)}
        title = f"{shared.processor(latest['machine'])}, {', '.join(dict.fromkeys(item['dtype'] for item in records))}"
        places.append({**where, "title": title, "commands": commands, "measured": measured})
        compared += [compared_row(pair) for pair in comparisons(records, runs)]
    weights = []
    for record in {record["model"]: record for record in data["models"]}.values():
        sizes = [f"{record[key] / 1e6:,.1f}" for key in ("parameters", "ternary_weights", "adaln_weights")]
        weights.append([record["model"], *sizes, f"{100 * record['adaln_weights'] / record['parameters']:.1f} %"])
    return shared.render("deployment", places=places, compared=compared, weights=weights, steps=STEPS)


def by_place(data: dict) -> Iterator[tuple[str, list[dict], list[dict]]]:
    """Yield device, records and timed runs of every device of every machine, float32 first."""
    for device, machine in dict.fromkeys((record["device"], record["machine"]) for record in data["models"]):
        where = {"device": device, "machine": machine}.items()
        records, runs = ([item for item in data[key] if item.items() >= where] for key in ("models", "turns"))
        yield device, *(sorted(items, key=lambda item: item["dtype"] != "float32") for items in (records, runs))


def peak(record: dict) -> int:
    """Return the bytes at the peak: the GPU's where there is one, else the process's."""
    return record.get("device_peak_bytes", record["peak_bytes"])


def comparisons(records: list[dict], runs: list[dict]) -> list[dict]:
    """Return how neighbors that ran in turns compare: times smaller, and ratios of time of the pairs of steps."""
    found = {(record["model"], record["dtype"]): record for record in records}
    result = {}
    for run in runs:
        for names in zip(run["models"][::2], run["models"][1::2], strict=False):
            plain = [name.removesuffix(BEST) for name in names]
            if not all((name, run["dtype"]) in found for name in plain):
                continue  # measured again on another machine
            first, second = (found[name, run["dtype"]] for name in plain)
            times = {key: ratios(*(run[key][name] for name in names), digits=17) for key in ("seconds", "cpu_seconds")}
            smaller = {"checkpoint": second["checkpoint_bytes"] / first["checkpoint_bytes"]}
            smaller["peak"] = peak(second) / peak(first)
            where = {"names": names, "dtype": run["dtype"], "device": run["device"]}
            result[names, run["dtype"]] = where | smaller | times | {"pairs": len(run["seconds"][names[0]])}
    return list(result.values())


def compared_row(pair: dict) -> list[str]:
    smaller = [f"{pair[key]:.1f}" for key in ("checkpoint", "peak")]
    if pair["names"][1].endswith(BEST):
        smaller[1] = "-"  # which holds some weights twice
    times = [pair["seconds"], pair["cpu_seconds"] if pair["device"] == "cpu" else None]
    where = f"{NAMES[pair['device']]}, {pair['dtype']}"
    return [" over ".join(pair["names"]), where, *smaller, *map(shared.spread, times), str(pair["pairs"])]


def median_step(record: dict, runs: list[dict], suffix: str = "") -> dict[str, float] | None:
    """Return the median times of a step in the model's last run, by clock."""
    name = record["model"] + suffix
    for run in reversed(runs):
        if run["dtype"] == record["dtype"] and name in run["models"]:
            return {clock: statistics.median(run[clock][name]) for clock in ("seconds", "cpu_seconds")}
    return None


def measured_rows(record: dict, runs: list[dict]) -> Iterator[list[str]]:
    """Yield a row, and one of the step alone where the model was also timed on its best dense path."""
    sizes = [record["checkpoint_bytes"], peak(record), record["imported_bytes"]]
    cells = [record["model"], record["dtype"], *(f"{size / 1e6:,.0f}" for size in sizes)]
    times = median_step(record, runs)
    if times is None:
        yield [*cells, *["not timed"] * 3]
    elif record["device"] == "cuda":
        yield [*cells, f"{times['seconds']:,.2f}", "-", f"{STEPS * times['seconds']:,.0f}"]
    else:
        yield [*cells, *in_seconds(times)]
    best = median_step(record, runs, BEST)
    if best is not None:
        yield [record["model"] + BEST, record["dtype"], *["-"] * 3, *in_seconds(best)]


def in_seconds(times: dict[str, float]) -> list[str]:
    return [*(f"{time:,.2f}" for time in times.values()), f"{STEPS * min(times.values()):,.0f}"]


def plot(data: dict, path: Path) -> None:
    """Draw a bar per dtype of the largest models, on the first device: checkpoint and peak of memory."""
    panels: dict[str, list] = {"checkpoint, GB": [], "peak memory of a step, GB": []}
    records = [record for record in data["models"] if record["device"] == data["models"][0]["device"]]
    largest = max(record["parameters"] for record in records)
    for record in sorted(records, key=peak):
        if record["parameters"] < 0.9 * largest:
            continue
        kind = "ternary" if record["ternary_weights"] else "dense"
        for found, value in zip(panels.values(), (record["checkpoint_bytes"], peak(record)), strict=True):
            found.append((f"{kind} {record['model']}, {record['dtype']}", *[value / 1e9] * 2))
    shared.bars(path, panels)


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
