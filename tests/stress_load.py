"""Leaks: `python tests/stress_load.py --cycles 1000 --images 10000`.

Each scenario runs in a process of its own and does one thing again and again: load, sample and delete a pipeline, draw
ten thousand images with one, leave a call by an error, and so on. At regular times, after a garbage collection and
with what malloc has free given back, it notes resident memory, tensors, objects, open files and threads. Over the last
half of the notes a line is fitted to each; a scenario passes when none rises by more than its bound per cycle.
The figures: docs/results/stress_load.md.
"""

import argparse
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import safetensors
import torch
from diffusers import AutoencoderKL, FirstBlockCacheConfig
from safetensors.torch import load_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.ops import has_integer_kernel
from diffusers_terdit.ops.cpu import choose
from diffusers_terdit.pipelines.schedulers import default_scheduler


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
NOTES = 40  # of a scenario
# What may be added per cycle at most, by the line through the last half of the notes. One thing that is kept in every
# cycle adds 1 to its number; what is smaller than 4 kB a cycle and no object of Python is not told from noise.
BOUNDS = {"bytes": 4096.0, "tensors": 0.1, "objects": 0.5, "files": 0.1, "threads": 0.1}


def memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


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


def watch(cycles: int, body: Callable[[int], None], every: int = 1) -> list[dict[str, int]]:
    """Notes from before the first cycle to after the last one, `every` so many cycles."""
    notes = [note(0)]
    for cycle in range(cycles):
        body(cycle)
        if (cycle + 1) % every == 0 or cycle + 1 == cycles:
            notes.append(note(cycle + 1))
    return notes


def growth(notes: list[dict[str, int]]) -> dict[str, float]:
    """Per cycle: the slope of the least-squares line through the last half of the notes."""
    last = notes[len(notes) // 2 :]
    cycles = np.array([item["cycle"] for item in last], dtype=float)
    return {key: float(np.polyfit(cycles, [float(item[key]) for item in last], 1)[0]) for key in BOUNDS}


def judge(notes: list[dict[str, int]], alone: list[dict[str, int]] | None = None) -> list[str]:
    """What leaks. Scenarios that load may add the bytes that safetensors adds `alone`, besides."""
    allowed = BOUNDS["bytes"] + (max(0.0, growth(alone)["bytes"]) if alone else 0.0)
    return [key for key, slope in growth(notes).items() if slope > (allowed if key == "bytes" else BOUNDS[key])]


# The scenarios: each makes a function of the cycle's number


def quiet(pipe: TerDiTPipeline) -> TerDiTPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digits(**kwargs) -> TerDiTPipeline:
    return quiet(TerDiTPipeline.from_pretrained(bundled("digits"), **kwargs))


def save_with_vae(folder: Path) -> None:
    """A small pipeline whose latents a VAE decodes."""
    torch.manual_seed(0)
    config = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "num_classes": 10}
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, sample_size=16,
    )  # fmt: skip
    transformer = TerDiTTransformer2DModel(**config, ffn_dim=64).pack()
    TerDiTPipeline(transformer, default_scheduler(), vae).save_pretrained(folder)


def sample(pipe: TerDiTPipeline, **kwargs) -> torch.Tensor:
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe([1, 2], **settings | kwargs).images


@contextmanager
def cycles(folder: Path) -> Iterator[Callable[[int], None]]:
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
        pipe = quiet(TerDiTPipeline.from_pretrained(source, dtype=getattr(torch, dtype)))
        pipe.transformer.set_activation_bits(activation_bits)
        assert torch.equal(sample(pipe), first.setdefault(mode, sample(pipe)))
        del pipe

    yield body


@contextmanager
def images(folder: Path) -> Iterator[Callable[[int], None]]:
    """Batches of 100 digits through one pipeline, as examples/evaluate.py samples them. The first hundred, drawn again
    at every tenth batch, keep their bits."""
    import evaluate

    args = evaluate.parse_args(["--batch_size", "100", "--num_inference_steps", "10"])
    pipe = evaluate.load_pipeline(args, torch.device("cpu"))
    first = evaluate.sample(pipe, args, range(100))

    def body(cycle: int) -> None:
        batch = evaluate.sample(pipe, args, range(100 * cycle, 100 * cycle + 100))
        assert len(batch) == 100
        assert cycle % 10 or np.array_equal(evaluate.sample(pipe, args, range(100)), first)

    yield body


@contextmanager
def callbacks(folder: Path) -> Iterator[Callable[[int], None]]:
    """A call with a callback that replaces the latents, and one that is stopped half-way."""
    pipe = digits()

    def replace(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"].clone()}

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    def body(cycle: int) -> None:
        sample(pipe, callback_on_step_end=replace)
        sample(pipe, callback_on_step_end=stop)

    yield body


@contextmanager
def safetensors_alone(folder: Path) -> Iterator[Callable[[int], None]]:
    """The weights that a cycle of "load, sample, delete" loads, by `safetensors.torch.load_file`, without diffusers
    and this package."""
    save_with_vae(folder)
    sources = [sorted(source.rglob("*.safetensors")) for source in (bundled("digits"), folder)]

    def body(cycle: int) -> None:
        for path in sources[cycle % 2]:
            load_file(path)

    yield body


class Stop(Exception):
    """Raised in a callback."""


@contextmanager
def errors(folder: Path) -> Iterator[Callable[[int], None]]:
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
            try:
                sample(pipe, **settings)
                raise AssertionError(f"no {kind.__name__}")
            except kind:
                pass
        weight = pipe.transformer.proj_in.bias.data
        kept, weight[0] = weight[0].clone(), float("nan")
        try:
            sample(pipe)
            raise AssertionError("NaN was not noticed")
        except ValueError:
            weight[0] = kept
        assert torch.equal(sample(pipe), expected)

    yield body


@contextmanager
def adapters(folder: Path) -> Iterator[Callable[[int], None]]:
    """`load_lora_adapter`, two images, `unload_lora`."""
    from peft import LoraConfig

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

    yield body


@contextmanager
def formats(folder: Path) -> Iterator[Callable[[int], None]]:
    """`unpack`, two images, `pack`, two images."""
    pipe = digits()
    expected = sample(pipe)

    def body(cycle: int) -> None:
        pipe.transformer.unpack()
        assert torch.equal(sample(pipe), expected)
        pipe.transformer.pack()
        assert torch.equal(sample(pipe), expected)

    yield body


@contextmanager
def files(folder: Path) -> Iterator[Callable[[int], None]]:
    """`save_pretrained` into one folder, and loads of damaged files, which are refused."""
    pipe = digits()
    weights = folder / "saved" / "transformer" / "diffusion_pytorch_model.safetensors"

    def body(cycle: int) -> None:
        pipe.save_pretrained(folder / "saved")
        data = bytearray(weights.read_bytes())
        for damaged in (data[:-100], data[:-1] + bytes([data[-1] ^ 1])):
            weights.write_bytes(damaged)
            try:
                TerDiTPipeline.from_pretrained(folder / "saved")
                raise AssertionError("a damaged file was loaded")
            except (OSError, ValueError):
                pass

    yield body


@contextmanager
def step_caches(folder: Path) -> Iterator[Callable[[int], None]]:
    """`enable_cache`, two images, `disable_cache`."""
    pipe = digits()
    expected = sample(pipe)

    def body(cycle: int) -> None:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        sample(pipe)
        pipe.transformer.disable_cache()
        assert torch.equal(sample(pipe), expected)

    yield body


@contextmanager
def threads(folder: Path) -> Iterator[Callable[[int], None]]:
    """Four new threads, each with a copy of the pipeline and its own scheduler, on the shared weights; then they end.
    All give the bits that one gives alone."""
    import copy

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

    yield body


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
    """What leaks, by scenario. That of safetensors alone is no leak of this package; the others are measured by it."""
    notes = {name: result["notes"] for name, result in report["scenarios"].items()}
    alone = notes["safetensors alone"]
    return {n: judge(notes[n], alone if n in LOADING else None) for n in notes if n != "safetensors alone"}


def measure(name: str, count: int) -> dict:
    """One scenario, in this process."""
    torch.set_num_threads(1)
    start = time.monotonic()
    # as many cycles between notes as the kinds of a cycle, or a multiple: the notes are then of like states
    period = 12 if SCENARIOS[name] in (cycles, safetensors_alone) else 1
    every = max(1, round(count / NOTES / period)) * period
    with tempfile.TemporaryDirectory() as folder, SCENARIOS[name](Path(folder)) as body:
        notes = watch(count, body, every)
    return {"cycles": count, "notes": notes, "peak": memory("VmHWM"), "seconds": time.monotonic() - start}


def run(counts: dict[str, int]) -> dict:
    """Scenarios by name, each `counts` cycles in a new process."""
    report: dict = {"scenarios": {}}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, count in counts.items():
        command = [sys.executable, __file__, "--scenario", name, "--cycles", str(count)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}:\n{done.stderr[-3000:]}")
        report["scenarios"][name] = json.loads(done.stdout.splitlines()[-1])
        print(name, growth(report["scenarios"][name]["notes"]), file=sys.stderr, flush=True)
    return report


def markdown(report: dict) -> str:
    """The page of a report."""
    scenarios = report["scenarios"]
    header = "| | cycles | MB at half | MB at the end | bytes | tensors | objects | files | threads |"
    lines = [header, f"| --- | {' | '.join(['---:'] * 8)} |"]
    for name, result in scenarios.items():
        notes, slopes = result["notes"], growth(result["notes"])
        half = notes[len(notes) // 2]
        cells = [f"{item['bytes'] / 1e6:.1f}" for item in (half, notes[-1])]
        cells += [f"{slopes['bytes']:+,.0f}", *(f"{round(slopes[key], 3) + 0.0:+.3f}" for key in list(BOUNDS)[1:])]
        lines.append(f"| {name} | {result['cycles']:,} | {' | '.join(cells)} |")
    bounds = [f"{BOUNDS['bytes']:,.0f}", *(f"{BOUNDS[key]:g}" for key in list(BOUNDS)[1:])]
    lines.append(f"| *at most* | | | | {' | '.join(bounds)} |")
    load, ends = scenarios["load, sample, delete"], scenarios["load, sample, delete"]["notes"][-1]
    return "\n".join(
        [
            "# Leaks: the figures",
            "",
            "What is added per cycle, when one thing is done again and again: the slope of the line through the last"
            f" half of about {NOTES} notes. Above a bound it counts as a leak.",
            "",
            "```bash",
            f"OMP_NUM_THREADS=1 python tests/stress_load.py --cycles {load['cycles']} --images"
            f" {100 * scenarios['images']['cycles']}",
            "```",
            "",
            f"Made on {report['machine']}, {report['versions']}, in"
            f" {sum(result['seconds'] for result in scenarios.values()) / 60:.0f} minutes.",
            "",
            *lines,
            "",
            "- *bytes*: resident memory, after a garbage collection and with what malloc has free given back. Between"
            f" two notes the first scenario took at most {load['peak'] / 1e6:.0f} MB: Python collects the cycles of"
            " references in a deleted pipeline when it likes.",
            "- *tensors*, *objects*: those that Python's garbage collector knows. *files*, *threads*: of the process."
            f" The first scenario ends with {ends['files']} files and {ends['threads']} threads.",
            f"- *safetensors alone* is a leak of safetensors {report['safetensors']}: integers that it makes for every"
            f" tensor. Scenarios that load ({'; '.join(LOADING)}) may add as much besides.",
            "- One tensor, object, file or thread that is kept in every cycle would add 1: `tests/test_stress_load.py`"
            " keeps some, and they are noticed. A leak outside Python below 4 kB per cycle is not told from noise.",
            "- Not among these: `torch.compile`, whose cache keeps every compiled shape on purpose, and a GPU.",
            "",
            "## Cycles",
            "",
            *(f"- **{name}**: {' '.join(SCENARIOS[name].__doc__.split())}" for name in scenarios),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=1000, help="of loading; a fifth of it for the rest")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/results"))
    parser.add_argument("--scenario", choices=SCENARIOS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scenario:
        print(json.dumps(measure(arguments.scenario, arguments.cycles)))
        return
    import diffusers

    counts = dict.fromkeys(SCENARIOS, arguments.cycles // 5)
    counts |= dict.fromkeys(("load, sample, delete", "safetensors alone"), arguments.cycles)
    report = run(counts | {"images": arguments.images // 100})
    isa = next(iter(choose.integer_kernels()), "without integer kernels")
    report["machine"] = f"{platform.machine()} CPU ({isa}), one thread"
    report["versions"] = (
        f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
    report["safetensors"] = safetensors.__version__
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "stress_load.json").write_text(json.dumps(report) + "\n")
    (arguments.output_dir / "stress_load.md").write_text(markdown(report))
    sys.exit(any(judge_all(report).values()))


if __name__ == "__main__":
    main()
