"""Shared by the reliability programs: tiny models, safetensors files read and written without the library, reports."""

import argparse
import json
import os
import platform
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import nn

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryConfig, TernaryLinear
from diffusers_terdit.conversion.terdit import ARGS_NAME, WEIGHTS_NAMES, convert_name
from diffusers_terdit.evaluation.measured import stamp
from diffusers_terdit.pipelines.schedulers import default_scheduler


PTH = WEIGHTS_NAMES[0]
SECONDS = 20  # of wall clock for one case, on a machine that does other work
# Modules of the authors' files, of a model of one block
ORIGINAL_MODULES = [
    "x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table", "final_layer.linear",
    "final_layer.adaLN_modulation.1", *(f"layers.0.{name}" for name in (
        "attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention.q_norm", "attention.k_norm",
        "attention_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "ffn_norm", "adaLN_modulation.1",
        "adaLN_modulation.2")),
]  # fmt: skip


def parse(data: bytes) -> tuple[dict, bytes]:
    """Split a safetensors file into header and bytes of the tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Add seeded noise to every floating-point weight; some weights of a fresh model are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return module


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    sizes = {"block_out_channels": (8, 8), "down_block_types": down, "up_block_types": up, "layers_per_block": 1}
    return AutoencoderKL(**sizes, latent_channels=4, norm_num_groups=4, sample_size=16).eval()


def make_bases(folder: Path) -> None:
    """Write one healthy folder of every kind that is loaded."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4}

    def ternary(**config) -> TerDiTTransformer2DModel:
        return randomize(TerDiTTransformer2DModel(**sizes, num_classes=4, ffn_dim=16, **config))

    def other() -> nn.Module:
        model = DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, patch_size=2, num_embeds_ada_norm=4)
        return TernaryConfig(scale_granularity="row").quantize(randomize(model))

    torch.manual_seed(0)
    randomize(TernaryLinear(16, 8, scale_granularity=4)).pack().save_pretrained(folder / "layer")
    model = ternary().pack()
    model.save_pretrained(folder / "model")
    ternary(scale_granularity="row").save_pretrained(folder / "sharded", max_shard_size="4KB")
    labels = {str(i): name for i, name in enumerate(["zero", "one", "two", "three"])}
    pipe = TerDiTPipeline(ternary(in_channels=3).pack(), default_scheduler(), id2label=labels)
    pipe.save_pretrained(folder / "pipeline")
    other().save_pretrained(folder / "quantized")
    other().dequantize().save_pretrained(folder / "dense")

    names = {convert_name(f"{module}.weight").removesuffix(".weight"): module for module in ORIGINAL_MODULES}
    state_dict = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        leaf = {"weight_scale": "alphas", "weight_packed": "weight"}.get(leaf, leaf)
        state_dict[f"{names[module]}.{leaf}"] = tensor.detach().clone()
    (folder / "original").mkdir()
    torch.save(state_dict, folder / "original" / PTH)
    arguments = argparse.Namespace(image_size=32, model="DiT_Llama_tiny_patch2", vae="ema")
    torch.save(arguments, folder / "original" / ARGS_NAME)


def memory(key: str) -> int:
    """Bytes that Linux counts for this process, such as `"VmRSS"`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Worker:
    """A process that reads numbers of cases and writes a line with the result of each; and its pipes."""

    def __init__(self, program: str, options: list[str], folder: Path):
        command = [sys.executable, program, "--worker", str(folder), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(folder / "worker.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )
        if self.read(600) != b"ready\n":
            raise RuntimeError(f"The worker did not start:\n{(folder / 'worker.log').read_text()[-3000:]}")

    def read(self, seconds: float) -> bytes | None:
        """Read a line: b"" when the process has died, None when it takes too long."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    def run(self, number: int) -> bytes | None:
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()
        return self.read(SECONDS)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def supervise(
    program: str,
    options: list[str],
    inputs: int,
    seed: int,
    prepare: Callable[[Path], object],
    fault_of: Callable[[int], str],
    bad: tuple[str, ...],
    progress: Path | None = None,
) -> dict:
    """Have a worker of `program` try cases 0 to `inputs`, and count their outcomes.

    A worker that dies or takes too long is started again. With `progress` the counts are written every 1,000 cases,
    and a later call resumes there. `prepare` fills the worker's folder.
    """
    report: dict = {"seed": seed, "next": 0, "faults": {}, "kinds": {}, "failures": [], "restarts": 0}
    report |= {"bytes": 0, "seconds": 0.0, "elapsed": 0.0}
    if progress is not None and progress.exists():
        saved = json.loads(progress.read_text())
        report |= saved if saved["seed"] == seed else {}
    options = [*options, "--seed", str(seed)]
    with tempfile.TemporaryDirectory(prefix="files-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        prepare(folder)
        process = Worker(program, options, folder)
        begin, before = time.monotonic(), report["elapsed"]
        try:
            for number in range(report["next"], inputs):
                line = process.run(number)
                if line:
                    result = json.loads(line)
                else:
                    result = {"number": number, "fault": fault_of(number), "kind": "?", "detail": "", "seconds": 0}
                    result |= {"outcome": "hung" if line is None else "crashed", "bytes": 0}
                    process.stop()
                    report["restarts"] += 1
                    process = Worker(program, options, folder)
                for table, key in (("faults", result["fault"]), ("kinds", result["kind"])):
                    counts = report[table].setdefault(key, {})
                    counts[result["outcome"]] = counts.get(result["outcome"], 0) + 1
                report["bytes"] = max(report["bytes"], result["bytes"])
                report["seconds"] = max(report["seconds"], result["seconds"])
                report["next"] = number + 1
                if result["outcome"] in bad:
                    report["failures"].append(result)
                if progress is not None and (number + 1) % 1000 == 0:
                    report["elapsed"] = before + time.monotonic() - begin
                    progress.write_text(json.dumps(report))
                    print(number + 1, dict(Counter(r["outcome"] for r in report["failures"])), flush=True)
        finally:
            process.stop()
            report["elapsed"] = before + time.monotonic() - begin
            if progress is not None:
                progress.write_text(json.dumps(report))
    return report


def processor() -> str:
    """Name the processor, as Linux says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, one core"


def versions(*modules: ModuleType) -> str:
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{module.__name__} {module.__version__}" for module in modules)]
    )


def write_report(path: Path, report: dict) -> None:
    path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    stamp(path)


def features() -> nn.Module:
    """Make a network of few features for `examples/evaluate.py`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).requires_grad_(False)
