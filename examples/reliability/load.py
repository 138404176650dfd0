"""Find leaks: `python examples/reliability/load.py --cycles 1000 --images 10000`.

Each scenario runs in a new process and repeats one operation: load, sample and delete a pipeline, draw ten thousand
images with one, leave a call by an error, and so on. At regular times, after a garbage collection and after malloc has
returned its free memory, it notes resident memory, tensors, objects, open files and threads. A line is fitted to the
last half of the notes of each; a scenario passes when none rises by more than its bound per cycle.
`page.py` writes the figures: docs/results/reliability.md.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import diffusers
import numpy as np
import safetensors
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from safetensors.torch import load_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.ops import has_integer_kernel
from diffusers_terdit.ops.cpu import choose
from diffusers_terdit.pipelines.schedulers import default_scheduler
from harness import memory, tiny_vae, versions, write_report


sys.path.append(str(Path(__file__).parents[1]))
import evaluate


Body = Callable[[int], None]  # one cycle, by its number
NOTES = 40  # per scenario
# Largest growth per cycle, by the line through the last half of the notes. A thing that is kept in every cycle adds 1
# to its number; a leak below 4 kB a cycle that is no object of Python cannot be told from noise.
BOUNDS = {"bytes": 4096.0, "tensors": 0.1, "objects": 0.5, "files": 0.1, "threads": 0.1}


def note(cycle: int) -> dict[str, int]:
    gc.collect()
    with suppress(AttributeError):  # of glibc
        ctypes.CDLL(None).malloc_trim(0)
    objects = gc.get_objects()
    return {
        "cycle": cycle,
        "bytes": memory("VmRSS"),
        "tensors": sum(issubclass(type(item), torch.Tensor) for item in objects),
        "objects": len(objects),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def watch(cycles: int, body: Body, every: int = 1) -> list[dict[str, int]]:
    """Take notes from before the first cycle to after the last one, `every` so many cycles."""
    notes = [note(0)]
    for cycle in range(cycles):
        body(cycle)
        if (cycle + 1) % every == 0 or cycle + 1 == cycles:
            notes.append(note(cycle + 1))
    return notes


def growth(notes: list[dict[str, int]]) -> dict[str, float]:
    """Slopes per cycle of the least-squares lines through the last half of the notes."""
    last = notes[len(notes) // 2 :]
    cycles = np.array([item["cycle"] for item in last], dtype=float)
    return {key: float(np.polyfit(cycles, [float(item[key]) for item in last], 1)[0]) for key in BOUNDS}


def judge(notes: list[dict[str, int]], alone: list[dict[str, int]] | None = None) -> list[str]:
    """Name what leaks. Scenarios that load may also add the bytes that safetensors adds `alone`."""
    allowed = BOUNDS["bytes"] + (max(0.0, growth(alone)["bytes"]) if alone else 0.0)
    return [key for key, slope in growth(notes).items() if slope > (allowed if key == "bytes" else BOUNDS[key])]


# The scenarios: each makes a function of the cycle's number. The page shows their docstrings.


def open_pipeline(source: Path, **kwargs) -> TerDiTPipeline:
    pipe = TerDiTPipeline.from_pretrained(source, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digits() -> TerDiTPipeline:
    return open_pipeline(bundled("digits"))


def save_with_vae(folder: Path) -> None:
    """A small pipeline whose latents a VAE decodes."""
    config = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "num_classes": 10}
    transformer = TerDiTTransformer2DModel(**config, ffn_dim=64).pack()
    TerDiTPipeline(transformer, default_scheduler(), tiny_vae()).save_pretrained(folder)


def sample(pipe: TerDiTPipeline, **kwargs) -> torch.Tensor:
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe([1, 2], **settings | kwargs).images


def cycles(folder: Path) -> Body:
    """`from_pretrained`, two images, delete; two pipelines in six dtypes and modes. Each mode always gives the same
    bits."""
    save_with_vae(folder / "vae")
    bits = [None, "auto", None, 8, 16, None] if has_integer_kernel("cpu") else [None] * 6
    modes = list(zip(["float32", "bfloat16", "float16", "float32", "float32", "bfloat16"], bits, strict=True))
    first: dict[int, torch.Tensor] = {}

    def body(cycle: int) -> None:
        mode = cycle % 12
        dtype, activation_bits = modes[mode // 2]
        source = folder / "vae" if mode % 2 else bundled("digits")
        pipe = open_pipeline(source, dtype=getattr(torch, dtype))
        pipe.transformer.set_activation_bits(activation_bits)
        assert torch.equal(sample(pipe), first.setdefault(mode, sample(pipe)))
        del pipe

    return body


def images(folder: Path) -> Body:
    """Batches of 100 digits through one pipeline, as examples/evaluate.py samples them. The first hundred, drawn again
    at every tenth batch, keep their bits."""
    args = evaluate.parse_args(["--batch_size", "100", "--num_inference_steps", "10"])
    pipe = evaluate.load_pipeline(args, torch.device("cpu"))
    first = evaluate.sample(pipe, args, range(100))

    def body(cycle: int) -> None:
        batch = evaluate.sample(pipe, args, range(100 * cycle, 100 * cycle + 100))
        assert len(batch) == 100
        assert cycle % 10 or np.array_equal(evaluate.sample(pipe, args, range(100)), first)

    return body


def callbacks(folder: Path) -> Body:
    """A call with a callback that replaces the latents, and one that is stopped halfway."""
    pipe = digits()

    def replace(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"].clone()}

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    def body(cycle: int) -> None:
        sample(pipe, callback_on_step_end=replace)
        sample(pipe, callback_on_step_end=stop)

    return body


def safetensors_alone(folder: Path) -> Body:
    """The weights that a cycle of "load, sample, delete" loads, by `safetensors.torch.load_file`, without diffusers
    and this package."""
    save_with_vae(folder)
    sources = [sorted(source.rglob("*.safetensors")) for source in (bundled("digits"), folder)]

    def body(cycle: int) -> None:
        for path in sources[cycle % 2]:
            load_file(path)

    return body


class Stop(Exception):
    """Raised in a callback."""


def must_fail(kinds: type[BaseException] | tuple[type[BaseException], ...], work: Callable[[], object]) -> None:
    try:
        work()
    except kinds:
        return
    raise AssertionError(f"there was no {kinds}")


def errors(folder: Path) -> Body:
    """Calls that end in an exception, a KeyboardInterrupt, a refused input, a call from their own callback, NaN in the
    latents, and NaN in the model; then one that works."""
    pipe = digits()
    expected = sample(pipe)

    def failing(error):
        def callback(*args):
            raise error

        return callback

    def again(pipe, step, timestep, tensors):
        return sample(pipe)

    def nan(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * float("nan")}

    def body(cycle: int) -> None:
        for kind, settings in (
            (Stop, {"callback_on_step_end": failing(Stop())}),
            (KeyboardInterrupt, {"callback_on_step_end": failing(KeyboardInterrupt())}),
            (ValueError, {"num_inference_steps": 0}),
            (RuntimeError, {"callback_on_step_end": again}),
            (ValueError, {"callback_on_step_end": nan}),
        ):
            must_fail(kind, lambda settings=settings: sample(pipe, **settings))
        weight = pipe.transformer.proj_in.bias.data
        kept, weight[0] = weight[0].clone(), float("nan")
        must_fail(ValueError, lambda: sample(pipe))
        weight[0] = kept
        assert torch.equal(sample(pipe), expected)

    return body


def adapters(folder: Path) -> Body:
    """`load_lora_adapter`, two images, `unload_lora`."""
    pipe = digits()
    expected = sample(pipe)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "down_proj"], init_lora_weights=False))
    pipe.transformer.save_lora_adapter(folder)
    pipe.transformer.unload_lora()

    def body(cycle: int) -> None:
        pipe.transformer.load_lora_adapter(folder)
        assert not torch.equal(sample(pipe), expected)
        pipe.transformer.unload_lora()
        assert torch.equal(sample(pipe), expected)

    return body


def formats(folder: Path) -> Body:
    """`unpack`, two images, `pack`, two images."""
    pipe = digits()
    expected = sample(pipe)

    def body(cycle: int) -> None:
        pipe.transformer.unpack()
        assert torch.equal(sample(pipe), expected)
        pipe.transformer.pack()
        assert torch.equal(sample(pipe), expected)

    return body


def files(folder: Path) -> Body:
    """`save_pretrained` into one folder, and loads of damaged files, which are refused."""
    pipe = digits()
    weights = folder / "saved" / "transformer" / "diffusion_pytorch_model.safetensors"

    def body(cycle: int) -> None:
        pipe.save_pretrained(folder / "saved")
        data = bytearray(weights.read_bytes())
        for damaged in (data[:-100], data[:-1] + bytes([data[-1] ^ 1])):
            weights.write_bytes(damaged)
            must_fail((OSError, ValueError), lambda: TerDiTPipeline.from_pretrained(folder / "saved"))

    return body


def step_caches(folder: Path) -> Body:
    """`enable_cache`, two images, `disable_cache`."""
    pipe = digits()
    expected = sample(pipe)

    def body(cycle: int) -> None:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        sample(pipe)
        pipe.transformer.disable_cache()
        assert torch.equal(sample(pipe), expected)

    return body


def threads(folder: Path) -> Body:
    """Four new threads, each with a copy of the pipeline and its own scheduler, on the shared weights; then they end.
    All give the bits that one alone gives."""
    pipe = digits()
    pipe.transformer.set_activation_bits(16 if has_integer_kernel("cpu") else None)
    expected = sample(pipe)

    def body(cycle: int) -> None:
        results: list[torch.Tensor] = []

        def work() -> None:
            own = copy.copy(pipe)
            own.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            results.append(sample(own))

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 4
        assert all(torch.equal(result, expected) for result in results)

    return body


SCENARIOS = {
    "load, sample, delete": cycles,
    "safetensors alone": safetensors_alone,
    "images": images,
    "callbacks": callbacks,
    "errors": errors,
    "LoRA": adapters,
    "pack and unpack": formats,
    "save, and load damaged files": files,
    "step caches": step_caches,
    "threads": threads,
}
LOADING = ("load, sample, delete", "save, and load damaged files", "LoRA")


def judge_all(report: dict) -> dict[str, list[str]]:
    """Name what leaks, by scenario. The leak of safetensors alone is not this package's; others are measured by it."""
    notes = {name: result["notes"] for name, result in report["scenarios"].items()}
    alone = notes.pop("safetensors alone")
    return {name: judge(of, alone if name in LOADING else None) for name, of in notes.items()}


def measure(name: str, count: int) -> dict:
    """Run one scenario in this process."""
    torch.set_num_threads(1)
    start = time.monotonic()
    # as many cycles between notes as the kinds of a cycle, or a multiple: the notes are then of like states
    period = 12 if SCENARIOS[name] in (cycles, safetensors_alone) else 1
    every = max(1, round(count / NOTES / period)) * period
    with tempfile.TemporaryDirectory() as folder:
        notes = watch(count, SCENARIOS[name](Path(folder)), every)
    return {"cycles": count, "notes": notes, "peak": memory("VmHWM"), "seconds": time.monotonic() - start}


def run(counts: dict[str, int], progress: Path) -> dict:
    """Run scenarios by name, each `counts` cycles in a new process; a later call keeps those that are done."""
    report: dict = json.loads(progress.read_text()) if progress.exists() else {"scenarios": {}}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, count in counts.items():
        if report["scenarios"].get(name, {}).get("cycles") == count:
            continue
        command = [sys.executable, __file__, "--scenario", name, "--cycles", str(count)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}:\n{done.stderr[-3000:]}")
        report["scenarios"][name] = json.loads(done.stdout.splitlines()[-1])
        print(name, growth(report["scenarios"][name]["notes"]), flush=True)
        progress.write_text(json.dumps(report))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000, help="of loading; a fifth of it for the rest")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/results"))
    parser.add_argument("--scenario", choices=SCENARIOS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scenario:
        print(json.dumps(measure(args.scenario, args.cycles)))
        return
    counts = dict.fromkeys(SCENARIOS, args.cycles // 5)
    counts |= dict.fromkeys(("load, sample, delete", "safetensors alone"), args.cycles)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    progress = args.output_dir / "reliability_load.progress.json"
    report = run(counts | {"images": args.images // 100}, progress)
    isa = next(iter(choose.integer_kernels()), "without integer kernels")
    report["machine"] = f"{platform.machine()} CPU ({isa}), one thread"
    report["versions"] = versions(torch, diffusers)
    report["safetensors"] = safetensors.__version__
    write_report(args.output_dir / "reliability_load.json", report)
    progress.unlink()
    if leaks := {name: leaking for name, leaking in judge_all(report).items() if leaking}:
        sys.exit(f"These grow: {leaks}")


if __name__ == "__main__":
    main()
