"""Measurements that the documentation quotes. Prints Markdown, with the machine and versions it ran on.

python examples/benchmark.py memory --preset terdit-4.2b-256
python examples/benchmark.py training --preset terdit-600m-256
python examples/benchmark.py deployment
python examples/benchmark.py kernels
python examples/benchmark.py step
python examples/benchmark.py gpu
python examples/benchmark.py flux2
python examples/benchmark.py numerics

`memory` saves a packed model of a preset's size with random codes, then, in a new process, loads it, runs one guided
forward pass (two rows), and prints that process's peak resident memory.

`training` times optimizer steps of a ternary model and of its full-precision twin in turns, at a preset's layer shapes
with fewer layers, and prints the ratio; each one's peak memory is measured in a process of its own.

`deployment` measures the models of the paper's deployment table with random weights: bytes of a checkpoint, peak
memory and time of a guided denoising step. It writes deployment.json and, rendered from that, deployment.md and .png.

`kernels` times packed layers of the shapes of 600M and 4.2B, in every mode, in turns with dense layers that hold the
same weights, and measures their errors. `--kernel module:function` checks and times anyone's kernel beside them.
`step` does the same with whole blocks of both models. They write kernels.json and step.json, with a page and a plot.

`gpu` does it on a CUDA device: layers and whole steps beside dense ones and other libraries that are installed, and
what fits on cards of 2, 4 and 8 GB. It writes gpu.json and gpu.md.

`flux2` imports a model of FLUX.2-klein's shape with random ternary weights and measures folder, memory and time beside
the dense one. It writes flux2.json and flux2.md.

`numerics` measures the error of every dtype and arithmetic against float64, of a layer, a forward pass and a picture.
It writes numerics.json and numerics.md.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import AutoModel, DDPMScheduler, DiTTransformer2DModel

import deployment_page
import diffusers_terdit
import flux2_page
import gpu_benchmark
import kernel_benchmark
import kernel_page
import numerics_page
from diffusers_terdit import TerDiTTransformer2DModel, losses, pack_ternary


ACTIVATION_BITS: dict[str, int | str | None] = {"none": None, "16": 16, "8": 8, "auto": "auto"}


def machine() -> str:
    """One line: processor, its instruction sets that matter here, threads, versions."""
    found = {}
    if Path("/proc/cpuinfo").exists():
        found = dict(
            (part.strip() for part in line.split(":", 1))
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
    flags = set(found.get("flags", "").split())
    sets = [
        name for name in ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in flags
    ]
    return (
        f"{found.get('model name', platform.processor() or platform.machine())} ({', '.join(sets) or 'no AVX2'}),"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {diffusers.__version__},"
        f" Python {platform.python_version()}"
    )


def command_line() -> str:
    """How this program was called, with the settings that change what is measured."""
    names = ("OMP_NUM_THREADS", *kernel_page.LIMITS)
    settings = "".join(f"{name}={os.environ[name]} " for name in names if name in os.environ)
    return f"{settings}python examples/benchmark.py {' '.join(sys.argv[1:])}"


def random_codes(shape: torch.Size) -> torch.Tensor:
    """Random bytes of a packed weight, uint8: each of the 81 that four codes can make."""
    digits = torch.cartesian_prod(*[torch.arange(-1, 2)] * 4).T  # (4, 81)
    return pack_ternary(digits.contiguous()).flatten()[torch.randint(81, shape)]


def random_packed(preset: str) -> TerDiTTransformer2DModel:
    """A packed model of a preset's size whose codes are random."""
    model = TerDiTTransformer2DModel.from_preset(preset, weight_format="packed")
    for layer in model.ternary_layers().values():
        layer.weight_packed.copy_(random_codes(layer.weight_packed.shape))
    return model


def peak_memory() -> float:
    """Peak resident memory of this process so far, GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the parent, from before this program replaced it
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def measure_memory(folder: str, size: int, dtype: torch.dtype, bits: int | str | None) -> None:
    """Load, run one guided forward pass, print GiB: after imports, after loading, at the peak."""
    imported = peak_memory()
    model = TerDiTTransformer2DModel.from_pretrained(folder, dtype=dtype)
    model.set_activation_bits(bits)
    loaded = peak_memory()
    start = time.perf_counter()
    with torch.inference_mode():
        sample = torch.randn(2, model.config.in_channels, size, size, dtype=dtype)
        null = model.config.num_classes
        labels = torch.tensor([min(207, null - 1), null])
        output = model(sample, torch.tensor(500), labels).sample
    if not output.isfinite().all():
        raise RuntimeError(f"The forward pass in {dtype} gave numbers that are not finite. Try --dtype float32.")
    print(f"{imported:.2f} {loaded:.2f} {peak_memory():.2f} {time.perf_counter() - start:.1f}")


def memory(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as saved:
        random_packed(args.preset).save_pretrained(saved)
        megabytes = sum(path.stat().st_size for path in Path(saved).iterdir()) / 1e6
        mode = f"{args.dtype}, activation bits: {args.activation_bits}"
        print(f"{args.preset}, packed, random codes, {mode}: {megabytes:,.0f} MB on disk. {machine()}\n")
        print("| latents | imports, GiB | loaded, GiB | peak, GiB | forward, seconds |")
        print("| --- | --- | --- | --- | --- |")
        for size in args.sizes:
            command = [sys.executable, __file__, "memory", "--measure", saved, "--sizes", str(size)]
            command += ["--dtype", args.dtype, "--activation_bits", args.activation_bits]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            print(f"| {size} x {size} | {' | '.join(result)} |", flush=True)


def training_step(preset: str, layers: int, batch: int, dtype: torch.dtype, device: str, **config):
    """A function that runs one optimizer step of a fresh model."""
    torch.manual_seed(0)
    model = TerDiTTransformer2DModel.from_preset(preset, num_layers=layers, **config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    alphas = DDPMScheduler(beta_schedule="linear").alphas_cumprod.to(device)
    clean = torch.randn(batch, 4, model.config.sample_size, model.config.sample_size, device=device)
    noise, labels = torch.randn_like(clean), torch.randint(1000, (batch,), device=device)
    timesteps = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            output = model(clean, timesteps, labels).sample.float()
        losses.diffusion_loss(output, clean, noise, timesteps, alphas).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def training(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype)
    arms = {"full precision": {"ternary": False}, "ternary": {}, "ternary, 8-bit activations": {"activation_bits": 8}}
    settings = {key: getattr(args, key) for key in ("preset", "layers", "batch_size", "dtype", "device", "repeats")}
    make = partial(training_step, args.preset, args.layers, args.batch_size, dtype, args.device)
    if args.measure:
        step = make(**arms[args.measure])
        for _ in range(2):
            step()
        print(torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else peak_memory())
        return
    path = args.output_dir / "training.json" if args.output_dir else None
    data = json.loads(path.read_text()) if path and path.exists() else {}
    same = (data.get("place"), data.get("settings")) == (place(args.device), settings)
    if same and len(data["records"]) == len(arms):
        print(f"{path} holds this already; delete it to measure again.")
        return
    data = gpu_benchmark.resumed({}, place(args.device), command_line()) | {"settings": settings}
    steps = {name: make(**config) for name, config in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    del steps, step
    base = times["full precision"][1:]
    for name in arms:
        own = times[name][1:]  # the first step warms up
        pairs = [a / b for a, b in zip(own, base, strict=True)]
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratios = {"ratio": statistics.median(own) / statistics.median(base), "pairs": [min(pairs), max(pairs)]}
        record = {"model": name, "milliseconds": 1e3 * statistics.median(own), **ratios, "memory_gib": memory}
        data["records"].append(record)
        if path:
            gpu_benchmark.save(path, data, training_page(data))
    print(training_page(data))


def training_page(data: dict) -> str:
    settings = data["settings"]
    lines = [
        [
            record["model"],
            f"{record['milliseconds']:.4g}",
            f"{record['ratio']:.2f} ({record['pairs'][0]:.2f} to {record['pairs'][1]:.2f})",
            f"{record['memory_gib']:.2f}",
        ]
        for record in data["records"]
    ]
    header = ["model", "step, ms", "time over full precision (lowest to highest pair)", "peak memory, GiB"]
    return (
        f"# A training step\n\n{settings['preset']} with {settings['layers']} layers, {settings['batch_size']} images,"
        f" autocast {settings['dtype']}; lower is better.\n\n{data['place']}\n\n```bash\n{data['command']}\n```\n\n"
        + kernel_page.table(header, lines)
    )


MODELS: dict[str, Callable[[], torch.nn.Module]] = {  # the paper's deployment table; neighbours are compared
    "TerDiT-600M": partial(TerDiTTransformer2DModel.from_preset, "terdit-600m-256", weight_format="packed"),
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
    "TerDiT-4.2B": partial(TerDiTTransformer2DModel.from_preset, "terdit-4.2b-256", weight_format="packed"),
    "Large-DiT-4.2B": partial(TerDiTTransformer2DModel.from_preset, "terdit-4.2b-256", ternary=False),
}
ADALN = re.compile(r"transformer_blocks\.\d+\.(adaln|norm1)\.linear\.weight(_packed)?")


def model_source(text: str) -> tuple[str, Callable[[], torch.nn.Module]]:
    """A name of `MODELS`, or `name=folder` with the config of another model: (name, what makes the model)."""
    name, _, folder = text.partition("=")
    if not folder:
        if name not in MODELS:
            raise argparse.ArgumentTypeError(f"no model {text!r}; there are {', '.join(MODELS)}, or name=folder")
        return name, MODELS[name]
    if not (Path(folder) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"no config.json in the folder of {text!r}; pass name=folder")
    kind = json.loads((Path(folder) / "config.json").read_text()).get("_class_name")
    classes = {model.__name__: model for model in (TerDiTTransformer2DModel, DiTTransformer2DModel)}
    if kind not in classes:
        raise argparse.ArgumentTypeError(f"{text!r} is the config of a {kind}; it must be one of {', '.join(classes)}")
    config = classes[kind].load_config(folder)
    ternary = classes[kind] is TerDiTTransformer2DModel and config.get("ternary", True)
    return name, partial(classes[kind].from_config, config, **{"weight_format": "packed"} if ternary else {})


def on_meta(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return make()


def config_of(model: torch.nn.Module) -> dict:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def counts(model: torch.nn.Module) -> dict[str, int]:
    """Weights, not bytes: all, those in two bits, and those of the blocks' adaLN matrices."""
    sizes = {n: p.numel() * (4 if n.endswith("weight_packed") else 1) for n, p in model.named_parameters()}
    return {
        "parameters": sum(sizes.values()),
        "ternary_weights": sum(size for name, size in sizes.items() if name.endswith("weight_packed")),
        "adaln_weights": sum(size for name, size in sizes.items() if ADALN.fullmatch(name)),
    }


def save_random(make: Callable[[], torch.nn.Module], dtype: torch.dtype, folder: Path) -> dict[str, int]:
    """Save a model with random weights in a new folder; bytes by file.

    The weights lie in mapped files, so that 17 GB of them need no such memory.
    """
    torch.manual_seed(0)
    model = on_meta(make)
    state = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for number, (name, parameter) in enumerate(model.named_parameters()):
            shape, kind = parameter.shape, name.rpartition(".")[2]
            if kind == "weight_scale":
                fan_in = model.get_submodule(name.removesuffix(f".{kind}")).in_features
                state[name] = torch.full(shape, 1 / math.sqrt(0.75 * fan_in))
                continue
            # a file for each: tensors that share one would be saved as one shard, whatever its size
            stored = torch.uint8 if kind == "weight_packed" else dtype
            values = torch.from_file(f"{scratch}/{number}", shared=True, size=parameter.numel(), dtype=stored)
            values = values.view(shape)
            state[name] = values.copy_(random_codes(shape)) if kind == "weight_packed" else values.normal_(std=0.02)
        model.load_state_dict(state, assign=True)
        model.save_pretrained(folder)
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


@torch.inference_mode()
def denoising_steps(model: torch.nn.Module, device: str):
    """Generator that runs one guided DDPM step of one image at a time: two rows, latents and scheduler in float32."""
    channels, size = model.config.in_channels, model.config.sample_size
    null = getattr(model.config, "num_classes", None) or model.config.num_embeds_ada_norm
    variance = {"variance_type": "learned_range"} if model.out_channels == 2 * channels else {}
    scheduler = DDPMScheduler(beta_schedule="linear", clip_sample=False, **variance)
    scheduler.set_timesteps(deployment_page.STEPS, device=device)
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


def serve_steps(folder: str, dtype: torch.dtype, device: str) -> None:
    """Load a model, then do what each line of stdin says, "step" or "memory"; answers are lines of JSON."""
    torch.manual_seed(0)
    report = {"imported_bytes": round(peak_memory() * 2**30)}
    model = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    steps = denoising_steps(model, device)
    print(json.dumps({"loaded": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "step":
            start, busy = time.perf_counter(), time.process_time()
            latents = next(steps)
            answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
            if not latents.isfinite().all():
                raise RuntimeError(f"The step in {dtype} gave numbers that are not finite. Try --dtypes float32.")
        else:
            answer = report | {"peak_bytes": round(peak_memory() * 2**30)}
            if device == "cuda":
                answer |= {"device_peak_bytes": torch.cuda.max_memory_allocated()}
        print(json.dumps(answer), flush=True)


def ask(name: str, process: subprocess.Popen, command: str | None = None) -> dict:
    """The process's answer to a command; to none, its word that it has loaded."""
    with contextlib.suppress(BrokenPipeError):  # then there is no answer
        if command:
            process.stdin.write(f"{command}\n")
            process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        raise RuntimeError(f"The process of {name} ended with code {process.wait()}; its error stands above.")
    return json.loads(line)


def place(device: str) -> str:
    return f"{torch.cuda.get_device_name()}; {machine()}" if device == "cuda" else machine()


def is_free(needed: float, device: str) -> bool:
    """Whether so many bytes are free; True where the system does not say."""
    if device == "cuda":
        return needed < torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    return not info.exists() or needed < int(re.search(r"MemAvailable:\s+(\d+) kB", info.read_text())[1]) * 1024


def groups_that_fit(models: list, dtype: torch.dtype, device: str) -> list[list]:
    """All models in one group if they fit in memory together, else two neighbours at a time."""

    def needed(group: list) -> float:  # 0.8 GB: a process's imports, activations and decoded weights
        total = 0.0
        for _, make in group:
            parameters = on_meta(make).parameters()
            total += 0.8e9 + sum(p.numel() * (dtype.itemsize if p.is_floating_point() else 1) for p in parameters)
        return total

    if is_free(needed(models), device):
        return [models]
    pairs = [models[i : i + 2] for i in range(0, len(models), 2)]
    for pair in pairs:
        if not is_free(needed(pair), device):
            raise SystemExit(
                f"{' and '.join(name for name, _ in pair)} in {str(dtype).removeprefix('torch.')} need about"
                f" {needed(pair) / 1e9:.0f} GB of memory together, which is not free. Leave some out with --models,"
                " or pass --dtypes bfloat16."
            )
    return pairs


def measure_together(group: list, dtype: str, args: argparse.Namespace, common: dict) -> tuple[list[dict], dict]:
    """Each model in a process of its own, one step at a time in turns: a record per model, and the times."""
    records, times = [], {key: {name: [] for name, _ in group} for key in ("seconds", "cpu_seconds")}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, contextlib.ExitStack() as stack:
        processes = {}
        for number, (name, make) in enumerate(group):
            print(f"{name}, {dtype}: saving and loading", file=sys.stderr, flush=True)
            model = on_meta(make)
            saved = Path(folder, str(number))
            files = save_random(make, getattr(torch, dtype), saved)
            command = [sys.executable, __file__, "deployment", "--measure", saved]
            command += ["--dtypes", dtype, "--device", args.device]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes[name] = stack.enter_context(process)
            ask(name, process)
            records.append(
                {"model": name, "dtype": dtype}
                | common
                | {
                    "class": type(model).__name__,
                    "config": config_of(model),
                    "latents": [2, model.config.in_channels, *[model.config.sample_size] * 2],
                    **counts(model),
                    "files": files,
                    "checkpoint_bytes": sum(files.values()),
                }
            )
        for turn in range(args.turns + 1):
            # there and back, so that a drift of the machine's speed falls on each side of a pair
            for name in list(processes)[:: 1 if turn % 2 else -1]:
                step = ask(name, processes[name], "step")
                if turn:  # the first step warms up
                    times["seconds"][name].append(step["seconds"])
                    times["cpu_seconds"][name].append(step["cpu_seconds"])
                print(f"{name}, {dtype}: step {turn}, {step['seconds']:.2f} s", file=sys.stderr, flush=True)
        for record in records:
            record |= ask(record["model"], processes[record["model"]], "memory")
    return records, {"models": list(processes), "dtype": dtype} | common | times


def deployment(args: argparse.Namespace) -> None:
    path = args.output_dir / "deployment.json"
    if args.render and not path.exists():
        raise SystemExit(f"{path} does not exist; measure first, without --render.")
    if args.turns < 1:
        raise SystemExit(f"--turns must be 1 or more, got {args.turns}.")
    if args.device == "cuda" and not args.render and not torch.cuda.is_available():
        raise SystemExit(f"This torch sees no GPU; leave out --device {args.device}.")
    names = [name for name, _ in args.models]
    if len(set(names)) < len(names):
        raise SystemExit(
            f"--models has a name twice: {', '.join(names)}. Leave one out, or rename it with name=folder."
        )
    data = json.loads(path.read_text()) if path.exists() else {"models": [], "turns": []}
    if not args.render:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for dtype in args.dtypes:
            measure_missing(data, path, dtype, args)
    (args.output_dir / "deployment.md").write_text(deployment_page.page(data), "utf-8")
    deployment_page.plot(data, args.output_dir / "deployment.png")


def measure_missing(data: dict, path: Path, dtype: str, args: argparse.Namespace) -> None:
    """Add what is not there yet for this machine and these versions; the JSON is written after each group."""
    common = {
        "device": args.device,
        "machine": place(args.device),
        "version": diffusers_terdit.__version__,
        "command": command_line(),
    }
    here = {key: common[key] for key in ("device", "machine", "version")} | {"dtype": dtype}

    def kept(name: str, make: Callable[[], torch.nn.Module]) -> bool:
        wanted = here | {"model": name, "config": json.loads(json.dumps(config_of(on_meta(make))))}
        return any(record.items() >= wanted.items() for record in data["models"])

    def timed(names: set[str]) -> bool:
        return any(run.items() >= here.items() and names <= set(run["models"]) for run in data["turns"])

    models = args.models
    pairs = [{name for name, _ in models[i : i + 2]} for i in range(0, len(models), 2)]
    if not args.fresh and all(kept(*model) for model in models) and all(timed(pair) for pair in pairs):
        return
    for group in groups_that_fit(models, getattr(torch, dtype), args.device):
        names = {name for name, _ in group}
        if not args.fresh and all(kept(*model) for model in group) and timed(names):
            continue
        stay = set() if args.fresh else {name for name, make in group if kept(name, make)}
        records, run = measure_together(group, dtype, args, common)
        new = [record for record in records if record["model"] not in stay]
        table = {tuple(record[key] for key in ("model", "dtype", "device")): record for record in data["models"] + new}
        data["models"] = list(table.values())
        stale = [old for old in data["turns"] if old.items() >= here.items() and (names - stay) & set(old["models"])]
        data["turns"] = [old for old in data["turns"] if old not in stale] + [run]
        partial_file = path.with_suffix(".partial")
        partial_file.write_text(json.dumps(data, indent=1) + "\n")
        partial_file.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("memory", help="peak resident memory of loading and one guided forward pass")
    sub.add_argument("--preset", default="terdit-4.2b-256")
    sub.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="sides of the latents")
    sub.add_argument("--folder", help="where to write the model for a while; default the system's")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    sub.add_argument("--activation_bits", choices=list(ACTIVATION_BITS), default="auto")
    sub.add_argument("--measure", help=argparse.SUPPRESS)
    sub = commands.add_parser("training", help="cost of a training step beside the full-precision twin's")
    sub.add_argument("--preset", default="terdit-600m-256")
    sub.add_argument("--layers", type=int, default=2)
    sub.add_argument("--batch_size", type=int, default=8)
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sub.add_argument("--repeats", type=int, default=7)
    sub.add_argument("--output_dir", type=Path, help="for training.json and training.md; default: only print")
    sub.add_argument("--measure", help=argparse.SUPPRESS)
    sub = commands.add_parser("deployment", help="checkpoint, memory and time of the paper's models, side by side")
    sub.add_argument(
        "--models",
        type=model_source,
        nargs="+",
        default=[model_source(name) for name in MODELS],
        metavar="NAME[=FOLDER]",
        help=f"of {', '.join(MODELS)} (default: all), or any name with the folder of a config.json",
    )
    sub.add_argument("--dtypes", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sub.add_argument("--turns", type=int, default=5, help="steps of each model, after one that warms up")
    sub.add_argument("--folder", help="where to write the checkpoints for a while; default the system's")
    sub.add_argument("--output_dir", type=Path, default=Path("docs", "results"))
    sub.add_argument("--fresh", action="store_true", help="measure again what the JSON already holds")
    sub.add_argument("--render", action="store_true", help="measure nothing, write page and plot from the JSON")
    sub.add_argument("--measure", help=argparse.SUPPRESS)
    kernel_benchmark.add_arguments(commands)
    gpu_benchmark.add_arguments(commands)
    flux2_page.add_arguments(commands)
    numerics_page.add_arguments(commands)
    args = parser.parse_args()
    if args.command == "deployment" and args.measure:
        serve_steps(args.measure, getattr(torch, args.dtypes[0]), args.device)
    elif args.command == "deployment":
        deployment(args)
    elif args.command in ("kernels", "step"):
        kernel_benchmark.run(args, machine(), command_line())
    elif args.command == "gpu":
        gpu_benchmark.run(args, machine(), command_line())
    elif args.command == "flux2":
        flux2_page.run(args, machine(), command_line(), peak_memory)
    elif args.command == "numerics":
        numerics_page.run(args, machine(), command_line())
    elif args.command == "training":
        training(args)
    elif args.measure:
        with torch.no_grad():
            bits = ACTIVATION_BITS[args.activation_bits]
            measure_memory(args.measure, args.sizes[0], getattr(torch, args.dtype), bits)
    else:
        with torch.no_grad():
            memory(args)


if __name__ == "__main__":
    main()
