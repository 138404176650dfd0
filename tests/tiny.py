"""What tests share besides fixtures."""

import torch


def randomize(module, seed=0, std=0.1):
    """Add seeded noise to every floating-point weight; a fresh model's last layer and parts of adaLN are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return module
