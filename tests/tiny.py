"""What tests share besides fixtures."""

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from diffusers_terdit import TernaryLinear
from diffusers_terdit.ops import dequantize, reference


def randomize(module, seed=0, std=0.1):
    """Add seeded noise to every floating-point weight; a fresh model's last layer and parts of adaLN are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return module


def read_weights(path):
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict


def rewrite_weights(path, edit, keep_metadata=False):
    """Change the tensors of a weights file; without its metadata nothing but the tensors themselves can tell."""
    tensors, metadata = read_weights(path)
    edit(tensors)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata if keep_metadata else {"format": "pt"})


def tiny_vae():
    """An autoencoder of four latent channels that halves the sides."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def make_ternary(model, granularity=16, dtype=torch.float16, include="blocks"):
    """Dense weights that are `scale * {-1, 0, +1}`, scales as `dtype` holds them."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and include in name:
                ternary = reference.round_to_ternary(module.weight, granularity)
                scale = reference.least_squares_scale(module.weight, ternary, granularity).to(dtype).float()
                module.weight.copy_(dequantize(ternary, scale))
    return model


def ternary_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
