"""A tiny model to train, and its training."""

import torch

from diffusers_terdit import TerDiTTransformer2DModel, training


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


def optimizer_of(model, kind=torch.optim.AdamW):
    muon = kind is training.muon.Muon
    return kind(training.recipes.parameter_groups(model, muon=muon), lr=1e-2)


def take_steps(model, optimizer, steps, start=0):
    """Train on noise that is a function of the step."""
    for step in range(start, start + steps):
        samples = training.random.normal(0, "test", range(4 * step, 4 * step + 4), (1, 8, 8))
        output = model(samples, torch.arange(4), torch.arange(4), return_dict=False)[0]
        (output[:, :1] - samples).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
