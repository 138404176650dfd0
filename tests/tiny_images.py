"""Images, features and networks for the tests of the evaluation, and its scores computed another way."""

import numpy as np
import pytest
import torch
from torch import nn


def random_features(rows, width, seed=0, dtype=torch.float32):
    """Correlated features, none with the mean or the spread of another."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scale = torch.linspace(0.1, 3, width, dtype=torch.float64)
    rows = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (rows * scale @ mixing + torch.rand(width, generator=generator, dtype=torch.float64)).to(dtype)


class Projection(nn.Module):
    """Random features of 8x8 images, seeded, and by default spatial features and logits, too."""

    name = "projection"

    def __init__(self, inputs=64, width=12, seed=0, extras=True):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(inputs, width, generator=generator) / inputs**0.5)
        self.head = nn.Parameter(torch.randn(width, 5, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.extras = extras

    def forward(self, images):
        features = self.dropout((images.flatten(1) @ self.weight).relu())
        if not self.extras:
            return features
        return {"features": features, "spatial": images.flatten(1)[:, :7], "logits": features @ self.head}


class Returning(nn.Module):
    """Gives what it was told to."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs(images)


def inception_score_by_numpy(probabilities, split_size):
    """Mean over splits of exp(E KL(p(y|x) || p(y))), as ADM writes it."""
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size].numpy()
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    return np.mean(scores)


def precision_and_recall_by_scikit_learn(samples, reference, neighbors=3):
    sklearn_neighbors = pytest.importorskip("sklearn.neighbors")

    def covered(points, centers):
        judge = sklearn_neighbors.NearestNeighbors(algorithm="brute").fit(centers)
        radii = judge.kneighbors(n_neighbors=neighbors)[0][:, -1]  # of other points
        distances = np.sqrt(((points[:, None] - centers[None]) ** 2).sum(-1))
        return (distances <= radii * (1 + 1e-9)).any(1).mean()

    samples, reference = samples.double().numpy(), reference.double().numpy()
    return covered(samples, reference), covered(reference, samples)
