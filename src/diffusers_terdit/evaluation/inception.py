"""The Inception network of FID: TensorFlow's classifier of 2015-12-05, in plain PyTorch.

It is not torchvision's Inception: average pools leave the padding out, the last block has a max pool, there are 1008
classes, and images are resized as TensorFlow 1 did. The weights are a file of yours,
`weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's release v0.2.0; nothing is downloaded.

Source: the graph `classify_image_graph_def.pb`, as torch-fidelity and pytorch-fid describe it.
"""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


SIZE = 299
KNOWN_SHA256 = "6726825d"  # of the published file, first digits
PUBLISHED = "FID's weights are `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's release v0.2.0."

Kernel = int | tuple[int, int]
Convolutions = tuple[str, int, Kernel] | tuple[str, int, Kernel, int]  # name, channels, kernel, stride
Step = Callable[[Tensor], Tensor] | Convolutions | list[Convolutions]  # a list: side by side, joined


class Convolution(nn.Module):
    """Convolution, batch normalization, ReLU."""

    def __init__(
        self, in_channels: int, channels: int, kernel: Kernel, stride: int = 1, *, padding: Kernel = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(hidden_states)))


class Mixed(nn.Module):
    """Branches of poolings and convolutions over one input, joined on the channels in their order.

    Convolutions of stride 1 keep the size, those of stride 2 have no padding.
    """

    def __init__(self, in_channels: int, *branches: list[Step]) -> None:
        super().__init__()
        self.branches: list[list[Callable | tuple[str, ...]]] = []
        for steps in branches:
            channels = in_channels
            names: list[Callable | tuple[str, ...]] = []
            for step in steps:
                if callable(step):
                    names.append(step)
                    continue
                parallel = step if isinstance(step, list) else [step]
                for name, width, kernel, *stride in parallel:
                    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
                    padding = (0, 0) if stride else (high // 2, wide // 2)
                    self.add_module(name, Convolution(channels, width, kernel, *stride, padding=padding))
                names.append(tuple(spec[0] for spec in parallel))
                channels = sum(spec[1] for spec in parallel)
            self.branches.append(names)

    def forward(self, hidden_states: Tensor) -> Tensor:
        joined = []
        for steps in self.branches:
            branch = hidden_states
            for step in steps:
                if callable(step):
                    branch = step(branch)
                else:
                    branch = torch.cat([self.get_submodule(name)(branch) for name in step], dim=1)
            joined.append(branch)
        return torch.cat(joined, dim=1)


def average_pool(hidden_states: Tensor) -> Tensor:
    """Mean over 3x3, at the border over what is inside."""
    return F.avg_pool2d(hidden_states, 3, 1, 1, count_include_pad=False)


def max_pool(hidden_states: Tensor) -> Tensor:
    """Maximum over 3x3."""
    return F.max_pool2d(hidden_states, 3, 1, 1)


def halve(hidden_states: Tensor) -> Tensor:
    """Maximum over 3x3, at every second position."""
    return F.max_pool2d(hidden_states, 3, 2)


def mixed_35(in_channels: int, pooled: int) -> Mixed:
    """A block on 35x35: 224 channels and `pooled` more."""
    return Mixed(
        in_channels,
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [average_pool, ("branch_pool", pooled, 1)],
    )


def mixed_35_to_17() -> Mixed:
    """288 channels on 35x35 -> 768 on 17x17."""
    return Mixed(
        288,
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        [halve],
    )


def mixed_17(inner: int) -> Mixed:
    """A block of 768 channels on 17x17; `inner` channels within."""
    return Mixed(
        768,
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [
            ("branch7x7dbl_1", inner, 1),
            ("branch7x7dbl_2", inner, (7, 1)),
            ("branch7x7dbl_3", inner, (1, 7)),
            ("branch7x7dbl_4", inner, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        [average_pool, ("branch_pool", 192, 1)],
    )


def mixed_17_to_8() -> Mixed:
    """768 channels on 17x17 -> 1280 on 8x8."""
    return Mixed(
        768,
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        [halve],
    )


def mixed_8(in_channels: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    """A block of 2048 channels on 8x8."""
    return Mixed(
        in_channels,
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
        ],
        [pool, ("branch_pool", 192, 1)],
    )


class InceptionV3(nn.Module):
    """FID's feature network, with the weights of a file.

    Its `name` is `inception-2015-12-05` if the file is the published one, by its sha256, else `unknown-inception-v3`:
    numbers made with other weights are no FID.

    Args:
        weights_path: A `.pth` of tensors named as in torch-fidelity's file; read without running its pickle.

    Raises: OSError if there is no such file or it cannot be read; ValueError naming tensors that are missing, extra or
    misshapen.
    """

    channels = 3

    def __init__(self, weights_path: str | Path) -> None:
        super().__init__()
        with torch.device("meta"):
            self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
            self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
            self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
            self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
            self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
            self.Mixed_5b = mixed_35(192, 32)
            self.Mixed_5c = mixed_35(256, 64)
            self.Mixed_5d = mixed_35(288, 64)
            self.Mixed_6a = mixed_35_to_17()
            self.Mixed_6b = mixed_17(128)
            self.Mixed_6c = mixed_17(160)
            self.Mixed_6d = mixed_17(160)
            self.Mixed_6e = mixed_17(192)
            self.Mixed_7a = mixed_17_to_8()
            self.Mixed_7b = mixed_8(1280, average_pool)
            self.Mixed_7c = mixed_8(2048, max_pool)
            self.fc = nn.Linear(2048, 1008)
        state, self.weights_sha256 = _read_weights(Path(weights_path), self.state_dict())
        self.load_state_dict(state, assign=True)
        self.requires_grad_(False)
        self.eval()
        known = self.weights_sha256.startswith(KNOWN_SHA256)
        self.name = "inception-2015-12-05" if known else "unknown-inception-v3"

    def train(self, mode: bool = True) -> "InceptionV3":
        """It stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images to what ADM measures.

        Args:
            images (`torch.Tensor`): (B, 3, H, W) in [0, 1], float32.

        Returns:
            `dict[str, torch.Tensor]`: `features` (B, 2048), the last pool; `spatial` (B, 2023), the first 7 channels
            of the 1x1 branch of `Mixed_6d` (TensorFlow's `mixed_6/conv`, after its ReLU) in the order (17, 17, 7);
            `logits` (B, 1008), without the bias, which ADM's Inception Score leaves out.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(f"Inception takes images (B, 3, H, W), got {tuple(images.shape)}.")
        hidden_states = (resize(images * 255, SIZE) - 128) / 128  # (B, 3, 299, 299)
        hidden_states = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(hidden_states)))
        hidden_states = halve(hidden_states)  # (B, 64, 73, 73)
        hidden_states = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden_states))
        hidden_states = halve(hidden_states)  # (B, 192, 35, 35)
        hidden_states = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden_states)))  # (B, 288, 35, 35)
        hidden_states = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(hidden_states)))  # (B, 768, 17, 17)
        hidden_states = self.Mixed_6d(hidden_states)
        spatial = hidden_states[:, :7].permute(0, 2, 3, 1).flatten(1)
        hidden_states = self.Mixed_7a(self.Mixed_6e(hidden_states))  # (B, 1280, 8, 8)
        hidden_states = self.Mixed_7c(self.Mixed_7b(hidden_states))  # (B, 2048, 8, 8)
        features = F.adaptive_avg_pool2d(hidden_states, 1).flatten(1)
        return {"features": features, "spatial": spatial, "logits": F.linear(features, self.fc.weight)}


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear resize to (B, C, size, size) as in TensorFlow 1: output pixel i is at input position i * in / out.

    PyTorch's own resize has pixel centers half a pixel further or corners aligned.
    """
    for axis in (3, 2):  # in TensorFlow's order
        length = images.shape[axis]
        position = torch.arange(size, device=images.device, dtype=torch.float32) * torch.tensor(length / size)
        low = position.long()
        share = (position - low).to(images.dtype).view(-1, *[1] * (3 - axis))
        below = images.index_select(axis, low)
        above = images.index_select(axis, (low + 1).clamp(max=length - 1))
        images = below + (above - below) * share
    return images


def _read_weights(path: Path, expected: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """State dict in float32, and the digest of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. {PUBLISHED}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # torch raises them all on files of something else
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(f"{path} is no readable file of tensors ({reason}). {PUBLISHED}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict, but a {type(state).__name__}. {PUBLISHED}")
    # Counters of training steps, which the published file does not have.
    counters = {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
    state = {name: value.float() for name, value in state.items() if name not in counters}
    wrong = [f"{name} is missing" for name in expected if name not in state and name not in counters]
    wrong += [f"{name} is not Inception's" for name in state if name not in expected]
    wrong += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not hold FID's Inception: {'; '.join(wrong[:5])}{more}. {PUBLISHED}")
    return state | counters, digest
