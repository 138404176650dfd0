"""Measurements that the documentation quotes. Prints Markdown, with the machine and versions it ran on.

python examples/benchmark.py memory --preset terdit-4.2b-256

`memory` saves a packed model of a preset's size with random codes, then, in a new process, loads it, runs one guided
forward pass (two rows), and prints that process's peak resident memory.
"""

import argparse
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch

from diffusers_terdit import TerDiTTransformer2DModel, pack_ternary


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("memory", help="peak resident memory of loading and one guided forward pass")
    sub.add_argument("--preset", default="terdit-4.2b-256")
    sub.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="sides of the latents")
    sub.add_argument("--folder", help="where to write the model for a while; default the system's")
    sub.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure_memory(args.measure, args.sizes[0])
    else:
        memory(args.preset, args.sizes, args.folder)


if __name__ == "__main__":
    with torch.no_grad():
        main()
