"""A small classifier of 8x8 digits: the feature network of the demo data, where Inception would see nothing."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


WEIGHTS = Path(__file__).with_name("digits_classifier.safetensors")


class DigitsClassifier(nn.Module):
    """Three convolutions and two linear layers, 23 thousand weights; 98.3 % right on the 300 held-out digits.

    Its numbers compare models of the digits with each other; they are no FID.
    """

    name = "digits classifier"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 1, 8, 8) in [0, 1] -> `features` (B, 64), `logits` (B, 10)."""
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(f"The digits classifier takes images (B, 1, 8, 8), got {tuple(images.shape)}.")
        features = self.trunk(images * 2 - 1)
        return {"features": features, "logits": self.head(features)}


def digits_classifier() -> DigitsClassifier:
    """The classifier that comes with the package, in evaluation mode."""
    with torch.device("meta"):  # draws no random numbers
        network = DigitsClassifier()
    network.load_state_dict(load_file(WEIGHTS), assign=True)
    return network.eval().requires_grad_(False)


def train_digits_classifier(images: Tensor, labels: Tensor, epochs: int = 60, seed: int = 0) -> DigitsClassifier:
    """How the weights were made: images (N, 1, 8, 8) in [0, 1], shifted by up to a pixel, with noise.

    `training.data.Digits(train=True)` holds them, in [-1, 1]. Seconds on one core.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # initial weights and dropout
        network = DigitsClassifier()
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        batches = len(images) // 64
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, epochs * batches)
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator)[: batches * 64].chunk(batches):
                down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
                padded = nn.functional.pad(images[rows], (1, 1, 1, 1))
                shifted = padded[:, :, 1 + down : 9 + down, 1 + right : 9 + right]
                noise = 0.05 * torch.randn(shifted.shape, generator=generator)
                logits = network(shifted + noise)["logits"]
                nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.05).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return network.eval().requires_grad_(False)
