"""What tests share besides fixtures."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file


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
