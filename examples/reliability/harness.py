"""Shared by the reliability programs: tiny models, safetensors files read and written without the library, reports."""

import argparse
import json
import platform
import struct
from pathlib import Path
from types import ModuleType

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import nn

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryConfig, TernaryLinear
from diffusers_terdit.conversion.terdit import ARGS_NAME, WEIGHTS_NAMES, convert_name
from diffusers_terdit.pipelines.schedulers import default_scheduler


PTH = WEIGHTS_NAMES[0]
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


def versions(*modules: ModuleType) -> str:
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{module.__name__} {module.__version__}" for module in modules)]
    )


def write_report(path: Path, report: dict) -> None:
    path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def features() -> nn.Module:
    """Make a network of few features for `examples/evaluate.py`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).requires_grad_(False)
