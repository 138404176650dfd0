"""The 4.2-billion-parameter model on a small machine. Most take minutes and gigabytes: `make slow`."""

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_terdit import TerDiTTransformer2DModel
from diffusers_terdit.ops import torch_ops


ROOT = Path(__file__).parent.parent
FLOAT_NAME = "consolidated_ema.00-of-01.pth"


@pytest.mark.slow
def test_packed_4_2b_loads_and_runs_in_less_than_2_gib(tmp_path):
    command = [
        sys.executable,
        ROOT / "examples" / "benchmarks" / "run.py",
        "memory",
        "--folder",
        tmp_path,
        "--output_dir",
        tmp_path,
        "--presets",
        "terdit-4.2b-256",
    ]
    subprocess.run(command, check=True)
    peaks = {
        record["size"]: record["peak_gib"] for record in json.loads((tmp_path / "memory.json").read_text())["records"]
    }
    assert peaks.keys() == {32, 64}
    assert max(peaks.values()) < 2.0, peaks


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
@pytest.mark.parametrize("weight_format", ["float", "packed"])
def test_a_large_float_checkpoint_converts_in_a_fraction_of_its_size(tmp_path, weight_format):
    """2.8 GB of float weights, read and written by `terdit convert`; pages of the mapped file do not count."""
    source = Path(__file__).parent / "data" / "reference" / "tiny-qknorm-float"
    folder = tmp_path / "original"
    folder.mkdir()
    shutil.copy(source / "model_args.pth", folder)
    torch.save(widened(torch.load(source / FLOAT_NAME, weights_only=True), 2048, num_layers=12), folder / FLOAT_NAME)
    assert (folder / FLOAT_NAME).stat().st_size > 2.5e9
    code = f"""
import re, threading, time
from diffusers_terdit.cli import main

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
assert main(["convert", {str(folder)!r}, {str(tmp_path / "out")!r}, "--weight_format", {weight_format!r}]) == 0
print(peak)
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(printed.split()[-1]) < 1.6e9
    transformer = TerDiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert transformer.config.weight_format == weight_format
    assert transformer.config.num_layers == 12


def widened(state_dict, dim, num_layers):
    """A checkpoint of another width and depth with the names and dtypes of `state_dict`."""
    cond, ffn = min(dim, 1024), -(-8 * dim // 3 // 256) * 256
    sizes = {
        "x_embedder.weight": (dim, 16),
        "x_embedder.bias": (dim,),
        "t_embedder.mlp.0.weight": (cond, 256),
        "t_embedder.mlp.0.bias": (cond,),
        "t_embedder.mlp.2.weight": (cond, cond),
        "t_embedder.mlp.2.bias": (cond,),
        "y_embedder.embedding_table.weight": (1001, cond),
        "final_layer.linear.weight": (32, dim),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2 * dim, cond),
        "final_layer.adaLN_modulation.1.bias": (2 * dim,),
    }
    block = {
        "attention.wq.weight": (dim, dim),
        "attention.wk.weight": (dim, dim),
        "attention.wv.weight": (dim, dim),
        "attention.wo.weight": (dim, dim),
        "feed_forward.w1.weight": (ffn, dim),
        "feed_forward.w2.weight": (dim, ffn),
        "feed_forward.w3.weight": (ffn, dim),
        "adaLN_modulation.1.weight": (6 * dim, cond),
        "adaLN_modulation.1.bias": (6 * dim,),
        "adaLN_modulation.2.weight": (6 * dim,),
    }
    for layer in range(num_layers):
        for name in [name.removeprefix("layers.0.") for name in state_dict if name.startswith("layers.0.")]:
            shape = block.get(name, (1,) if name.endswith("alphas") else (dim,))
            sizes[f"layers.{layer}.{name}"] = shape
    return {name: torch.randn(shape) for name, shape in sizes.items()}


class _Storages(TorchDispatchMode):
    """Counts the bytes of all tensors on the meta device that are alive, and what a ternary layer decodes."""

    def __init__(self, *modules):
        super().__init__()
        self.alive, self.peak = {}, 0
        for module in modules:
            for parameter in module.parameters():
                self.add(parameter)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage._cdata, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        codes = torch.utils._pytree.tree_leaves(args[1]) if func.namespace == "diffusers_terdit" else []
        decoded = sum(4 * 2 * code.numel() for code in codes)  # (N/4, K) to 16 bits
        self.peak = max(self.peak, sum(self.alive.values()) + decoded)
        return output

    def take_peak(self):
        peak, self.peak = self.peak, 0
        return peak / 1e6


@torch.no_grad()
def test_tensors_of_4_2b_and_its_vae_take_less_than_1_3_gb_on_a_gpu(monkeypatch):
    """Batch 1 with guidance in bfloat16, as docs/gpu.md says for small cards; counted without data, in MB."""
    monkeypatch.setattr(torch_ops, "_has_products", lambda device_type: True)  # as on a GPU
    with torch.device("meta"):
        model = TerDiTTransformer2DModel.from_preset("terdit-4.2b-256", weight_format="packed").to(torch.bfloat16)
        vae = AutoencoderKL(  # of Stable Diffusion
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=256,
        )
        torch.nn.Module.to(vae, torch.bfloat16)
        vae.encoder = None
        latents, labels = torch.empty(2, 4, 32, 32, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int64)
        with _Storages(model, vae) as storages:
            ahead = model.adaln_ahead(torch.empty(250), [207, 1000])
            rows = torch.empty(ahead.steps_at_once * 2)
            vectors = model.modulations(rows, rows.long())
            assert 30 < vectors.nbytes / 1e6 < 34
            assert 1200 < storages.take_peak() < 1260
            model(latents, torch.empty(2), labels, modulation=vectors[:, :2])
            assert 1250 < storages.take_peak() < 1300
            del vectors
            vae.decode(latents[:1])
            assert 1240 < storages.take_peak() < 1300
