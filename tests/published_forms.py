"""Writes models as MLX and gemlite publish them; `tests/data/forms/` holds layers that these libraries wrote."""

import json

import numpy as np
import torch
from safetensors.torch import save_file


FILE = "diffusion_pytorch_model.safetensors"
GROUP = 32
# As in the published config.json.
EXTRA = {"enable_time_sign_embed": False, "musubi_block_swap_device": "cpu", "musubi_blocks_to_swap": 0}
QUANTIZATION = {
    "bits": 2,
    "group_size": GROUP,
    "solver": "ternary",
    "skip_patterns": ["proj_out"],
    "pack_seconds": 1.5,
}


def words(codes, bits=32):
    """(N, K) codes of 0 to 3 -> (N, K/c) integers of so many bits, the first code in the lowest two bits."""
    each = codes.numpy().astype(np.uint64).reshape(len(codes), -1, bits // 2)
    return (each << np.arange(0, bits, 2, dtype=np.uint64)).sum(-1).astype(f"u{bits // 8}")


def in_mlx(codes, scale):
    scale = scale.to(torch.bfloat16)
    return {"weight": torch.from_numpy(words(codes)), "scales": scale, "biases": -scale}


def in_gemlite(codes, scale, bits=8, zeros="one"):
    packed = torch.from_numpy(words(codes, bits).astype({8: "u1", 32: "i4"}[bits])).t().contiguous()
    zero = {"one": torch.tensor(1), "each": torch.ones_like(scale.t()), "added": -scale.t().contiguous()}[zeros]
    metadata = torch.tensor([0, 2, GROUP, 3, bits // 2, 1, 1, 0, 1, 0, 4 if zeros == "added" else 3, 1])
    shape = torch.tensor(codes.shape, dtype=torch.int32)
    parts = {"W_q": packed, "scales": scale.t().contiguous(), "zeros": zero, "meta_scale": torch.tensor(0.0)}
    return parts | {"metadata": metadata.int(), "orig_shape": shape}


def write(folder, model, pack, dtype, file=FILE):
    """A model's folder as published: the layers of its blocks packed, the rest in `dtype`."""
    folder.mkdir(parents=True)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in linears and "blocks" in name:
            groups = tensor.float().unflatten(1, (-1, GROUP))
            codes = (groups.sign().flatten(1) + 1).byte()
            tensors |= {f"{layer}.{key}": value for key, value in pack(codes, groups.abs().amax(2)).items()}
        else:
            tensors[name] = tensor.to(dtype)
    if file == FILE:
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    (folder / "config.json").write_text(
        json.dumps({**dict(model.config), "_class_name": type(model).__name__, **EXTRA})
    )
    (folder / "quantization_config.json").write_text(json.dumps(QUANTIZATION))
    return folder
