"""Measurements that the documentation quotes. Prints Markdown, with the machine and versions it ran on.

python examples/benchmark.py memory --preset terdit-4.2b-256
python examples/benchmark.py training --preset terdit-600m-256
python examples/benchmark.py linear --rows 512 8

`memory` saves a packed model of a preset's size with random codes, then, in a new process, loads it, runs one guided
forward pass (two rows), and prints that process's peak resident memory.

`training` times optimizer steps of a ternary model and of its full-precision twin in turns, at a preset's layer shapes
with fewer layers, and prints the ratio; each one's peak memory is measured in a process of its own.

`linear` times packed layers of the shapes of 600M and 4.2B in turns with dense layers that hold the same weights.
"""

import argparse
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler

from diffusers_terdit import TerDiTTransformer2DModel, TernaryLinear, losses, pack_ternary


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
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in flags]
    return (
        f"{found.get('model name', platform.processor() or platform.machine())} ({', '.join(sets) or 'no AVX2'}),"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {diffusers.__version__},"
        f" Python {platform.python_version()}"
    )


def random_packed(preset: str) -> TerDiTTransformer2DModel:
    """A packed model of a preset's size whose codes are random."""
    model = TerDiTTransformer2DModel.from_preset(preset, weight_format="packed")
    # every byte that four codes can make
    digits = torch.cartesian_prod(*[torch.arange(-1, 2)] * 4).T  # (4, 81)
    valid_bytes = pack_ternary(digits.contiguous()).flatten()
    for layer in model.ternary_layers().values():
        layer.weight_packed.copy_(valid_bytes[torch.randint(81, layer.weight_packed.shape)])
    return model


def peak_memory() -> float:
    """Peak resident memory of this process so far, GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would also count the parent, from before this program replaced it
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def measure_memory(folder: str, size: int) -> None:
    """Load, run one guided forward pass, print GiB: after imports, after loading, at the peak."""
    imported = peak_memory()
    model = TerDiTTransformer2DModel.from_pretrained(folder)
    loaded = peak_memory()
    start = time.perf_counter()
    with torch.inference_mode():
        sample = torch.randn(2, model.config.in_channels, size, size)
        output = model(sample, torch.tensor(500), torch.tensor([207, model.config.num_classes])).sample
    if not output.isfinite().all():
        raise RuntimeError("The forward pass gave numbers that are not finite.")
    print(f"{imported:.2f} {loaded:.2f} {peak_memory():.2f} {time.perf_counter() - start:.1f}")


def memory(preset: str, sizes: list[int], folder: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as saved:
        random_packed(preset).save_pretrained(saved)
        megabytes = sum(path.stat().st_size for path in Path(saved).iterdir()) / 1e6
        print(f"{preset}, packed, random codes: {megabytes:,.0f} MB on disk. {machine()}\n")
        print("| latents | imports, GiB | loaded, GiB | peak, GiB | forward, seconds |")
        print("| --- | --- | --- | --- | --- |")
        for size in sizes:
            command = [sys.executable, __file__, "memory", "--measure", saved, "--sizes", str(size)]
            result = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
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
    make = partial(training_step, args.preset, args.layers, args.batch_size, dtype, args.device)
    if args.measure:
        step = make(**arms[args.measure])
        for _ in range(2):
            step()
        print(torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else peak_memory())
        return
    print(f"{args.preset}, {args.layers} layers, {args.batch_size} images, {args.dtype}, {args.device}. {machine()}\n")
    steps = {name: make(**config) for name, config in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    print("| | step time, ratio of medians | lowest and highest pair | peak memory, GiB |\n| --- | --- | --- | --- |")
    base = times["full precision"][1:]
    for name in arms:
        own = times[name][1:]  # the first step warms up
        pairs = [a / b for a, b in zip(own, base, strict=True)]
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = statistics.median(own) / statistics.median(base)
        print(f"| {name} | {ratio:.2f} | {min(pairs):.2f} to {max(pairs):.2f} | {memory:.2f} |", flush=True)


SHAPES = [  # (outputs, inputs): attention, feed-forward in and out, adaLN, of 600M and of 4.2B
    *[(1536, 1536), (4096, 1536), (1536, 4096), (9216, 1024)],
    *[(3072, 3072), (8192, 3072), (3072, 8192), (18432, 1024)],
]


@torch.inference_mode()
def linear(args: argparse.Namespace) -> None:
    print(f"Time over dense, median of {args.repeats} pairs. {machine()}\n")
    print("| outputs x inputs | rows | float32 | bfloat16 |\n| --- | --- | --- | --- |")
    for out_features, in_features in SHAPES:
        ternary = torch.randint(-1, 2, (out_features, in_features)).float()
        layer = TernaryLinear(in_features, out_features, bias=False, weight_format="packed")
        layer.weight_packed.copy_(pack_ternary(ternary))
        layer.weight_scale.fill_(0.03)
        for rows in args.rows:
            cells = []
            for dtype in (torch.float32, torch.bfloat16):
                weight, x = layer.dequantize().to(dtype), torch.randn(rows, in_features).to(dtype)
                ratios = []
                for _ in range(args.repeats + 1):
                    start = time.perf_counter()
                    torch.nn.functional.linear(x, weight)
                    middle = time.perf_counter()
                    layer(x)
                    ratios.append((time.perf_counter() - middle) / (middle - start))
                cells.append(f"{statistics.median(ratios[1:]):.2f}")  # the first pair warms up
            print(f"| {out_features} x {in_features} | {rows} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("memory", help="peak resident memory of loading and one guided forward pass")
    sub.add_argument("--preset", default="terdit-4.2b-256")
    sub.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="sides of the latents")
    sub.add_argument("--folder", help="where to write the model for a while; default the system's")
    sub.add_argument("--measure", help=argparse.SUPPRESS)
    sub = commands.add_parser("training", help="cost of a training step beside the full-precision twin's")
    sub.add_argument("--preset", default="terdit-600m-256")
    sub.add_argument("--layers", type=int, default=2)
    sub.add_argument("--batch_size", type=int, default=8)
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    sub.add_argument("--repeats", type=int, default=7)
    sub.add_argument("--measure", help=argparse.SUPPRESS)
    sub = commands.add_parser("linear", help="packed layers beside dense ones")
    sub.add_argument("--rows", type=int, nargs="+", default=[512, 8])
    sub.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if args.command == "linear":
        linear(args)
    elif args.command == "training":
        training(args)
    elif args.measure:
        with torch.no_grad():
            measure_memory(args.measure, args.sizes[0])
    else:
        with torch.no_grad():
            memory(args.preset, args.sizes, args.folder)


if __name__ == "__main__":
    main()
