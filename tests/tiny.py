"""What tests share besides fixtures."""

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_terdit import TerDiTTransformer2DModel, training


def randomize(module, seed=0, std=0.1):
    """Add seeded noise to every floating-point weight; a fresh model's last layer and parts of adaLN are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return module


def fresh_model(seed=0, **overrides):
    """A model as it starts to train: 8x8 pixels of one channel, ten classes, its last layer zero."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "ffn_dim": 32,
        "num_classes": 10,
    }
    return TerDiTTransformer2DModel(**{**config, **overrides})


def optimizer_of(model, **kwargs):
    return torch.optim.AdamW(training.recipes.parameter_groups(model, **kwargs), lr=1e-2)


def take_steps(model, optimizer, steps, start=0):
    """Train on noise that is a function of the step."""
    for step in range(start, start + steps):
        samples = training.random.normal(0, "test", range(4 * step, 4 * step + 4), (1, 8, 8))
        output = model(samples, torch.arange(4), torch.arange(4), return_dict=False)[0]
        (output[:, :1] - samples).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


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
