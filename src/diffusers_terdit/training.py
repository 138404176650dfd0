"""What trainers of ternary models share: random numbers, schedules, parameter groups, statistics, checkpoints, export.

A run is a function of its seed. Training consumes samples at positions 0, 1, 2, ...: step s with B samples per step
takes positions s*B to s*B + B - 1. Which sample stands at a position, its noise, timestep, label dropout and flip are
functions of (seed, position) alone, whatever the number of processes, loader workers or restarts.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils import logging
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from .layers import TernaryLinear
from .models.transformer_terdit import TerDiTTransformer2DModel
from .ops import pack_ternary, reference, unpack_ternary
from .pipelines.pipeline_terdit import TerDiTPipeline, default_scheduler


__all__ = [
    "PRESETS",
    "Digits",
    "Examples",
    "ImageSamples",
    "LatentCodec",
    "LatentSamples",
    "ShardedStream",
    "check_columns",
    "checkpoints",
    "clip_grad_norm",
    "cut_log",
    "ema_decay",
    "export_pipeline",
    "frechet_distance",
    "gate_sizes",
    "gradual_ternarization",
    "image_grid",
    "learning_rate_factor",
    "least_squares_scale",
    "load_checkpoint",
    "load_transformer",
    "microbatch_positions",
    "model_card",
    "new_folder",
    "normal",
    "open_dataset",
    "packed_codes",
    "packed_model",
    "parameter_groups",
    "prepare_image",
    "rotate_checkpoints",
    "run_positions",
    "sample_order",
    "save_checkpoint",
    "save_pipeline",
    "shard_model",
    "stream_samples",
    "ternary_statistics",
    "to_pipeline",
    "training_scheduler",
    "transfer_weights",
    "uniform",
    "update_ema",
    "whole_model",
]

logger = logging.get_logger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"
STATE_NAME = "training_state.json"
LATENTS_NAME = "latents.json"

_TERDIT_600M: dict[str, Any] = {
    "num_layers": 16,
    "num_attention_heads": 32,
    "attention_head_dim": 48,
    "learning_rate": 5e-4,
    "lr_scheduler": "piecewise_constant",
    "lr_step_rules": "1:1550000,0.2",
    "total_batch_size": 256,
    "max_train_steps": 1_750_000,
}
# Model and recipe by name, in the flags of examples/train_terdit.py: the paper's numbers, and the built-in demo.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "resolution": 8,
        "in_channels": 1,
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "ffn_dim": 192,
        "pos_embed_type": "rope+sincos2d",
        "train_batch_size": 64,
        "max_train_steps": 6000,
        "learning_rate": 4e-3,
        "lr_warmup_steps": 100,
        "lr_decay_steps": 1500,
        "ema_decay": 0.995,
        "checkpointing_steps": 1000,
        "validation_steps": 1000,
    },
    "terdit-600m": _TERDIT_600M,
    "terdit-4.2b": {
        **_TERDIT_600M,
        "num_layers": 32,
        "attention_head_dim": 96,
        "lr_step_rules": "1:550000,0.2",
        "total_batch_size": 512,
        "max_train_steps": 1_180_000,
    },
    # Figures 7 and 8: the authors' initialisation, one learning rate, a Frechet distance every 100,000 steps.
    "ablation": {
        **_TERDIT_600M,
        "initialization": "reference",
        "lr_scheduler": "constant",
        "max_train_steps": 400_000,
        "frechet_steps": 100_000,
        "checkpointing_steps": 100_000,
    },
}


@lru_cache
def _key(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")


def _philox(seed: int, stream: str, position: int) -> np.random.Philox:
    # Counter-based: the state is (seed, stream, position); word 0 counts within it.
    return np.random.Philox(key=[seed, _key(stream)], counter=[0, position, 0, 0])


def uniform(seed: int, stream: str, positions: Sequence[int]) -> Tensor:
    """One uniform number per position: a function of (seed, stream, position) and nothing else.

    Args:
        seed (`int`): 0 to 2**64 - 1.
        stream (`str`): What the number is for, such as `"timestep"`; other names give independent numbers.
        positions (`Sequence[int]`): B positions in the run.

    Returns:
        `torch.Tensor`: (B,), float64 in [0, 1), on the CPU.
    """
    values = [np.random.Generator(_philox(seed, stream, position)).random() for position in positions]
    return torch.tensor(values, dtype=torch.float64)


def normal(seed: int, stream: str, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise per position; see `uniform`.

    Returns:
        `torch.Tensor`: (B, *shape), float32, on the CPU.
    """
    noise = np.empty((len(positions), *shape), dtype=np.float32)
    for row, position in zip(noise, positions, strict=True):
        np.random.Generator(_philox(seed, stream, position)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the samples: position p of the run is sample `sample_order(n, seed, p // n)[p % n]`.

    Returns:
        `np.ndarray`: (num_samples,), int64.
    """
    return _philox(seed, "order", epoch).random_raw(num_samples).argsort(kind="stable")


def microbatch_positions(
    step: int, batch_size: int, accumulation_steps: int = 1, process_index: int = 0, num_processes: int = 1
) -> list[range]:
    """Positions that one process takes in one optimizer step, one range per accumulated micro-batch.

    Args:
        step (`int`): Optimizer step, from 0.
        batch_size (`int`): Samples per micro-batch and process.
        accumulation_steps (`int`): Micro-batches per optimizer step.
        process_index (`int`): 0 to `num_processes - 1`.
        num_processes (`int`): Processes in the run.
    """
    start = step * accumulation_steps * num_processes * batch_size
    starts = (start + (i * num_processes + process_index) * batch_size for i in range(accumulation_steps))
    return [range(first, first + batch_size) for first in starts]


def run_positions(
    first_step: int,
    max_steps: int,
    batch_size: int,
    accumulation_steps: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[range]:
    """`microbatch_positions` of one step after the other: what a loader's `batch_sampler` is, from any step on."""
    for step in range(first_step, max_steps):
        yield from microbatch_positions(step, batch_size, accumulation_steps, process_index, num_processes)


def prepare_image(image: Image.Image, resolution: int, channels: int = 3) -> Tensor:
    """Scale the shorter side to `resolution`, cut the middle: (channels, resolution, resolution), float32 in [-1, 1].

    Large images are halved by boxes before one bicubic step, as for ADM's and DiT's training data.
    Source: https://github.com/openai/guided-diffusion (MIT).
    """
    image = image.convert("L" if channels == 1 else "RGB")
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = resolution / min(image.size)
    size = [max(round(side * factor), resolution) for side in image.size]
    image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)), dtype=np.float32)
    return torch.from_numpy(pixels.reshape(resolution, resolution, channels) / 127.5 - 1).permute(2, 0, 1).contiguous()


class Digits(Dataset):
    """scikit-learn's 8x8 digits, (1, 8, 8) float32 in [-1, 1]: the last 300 of 1797 are held out from training."""

    flip = False

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits

        digits, part = load_digits(), slice(0, -300) if train else slice(-300, None)
        self.images = torch.from_numpy(digits.images[part]).float()[:, None] / 8 - 1  # (N, 1, 8, 8)
        self.labels = digits.target[part].tolist()
        names = "zero one two three four five six seven eight nine"
        self.id2label = dict(enumerate(names.split()))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class ImageSamples(Dataset):
    """Images that are read when asked for. One that cannot be read is logged and the next readable one taken instead.

    Args:
        sources (`Sequence`): One per image: a path, a `PIL.Image.Image`, or a dict with `"bytes"` or `"path"`, as the
            undecoded images of `datasets` are.
        labels (`Sequence[int]`): One class id per image.
        id2label (`dict[int, str]`): Label names.
        resolution (`int`): Pixels.
        channels (`int`): 1 or 3.
        flip (`bool`): Whether a trainer may mirror them.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        labels: Sequence[int],
        id2label: dict[int, str],
        resolution: int,
        channels: int = 3,
        flip: bool = False,
    ):
        self.sources, self.labels, self.id2label = sources, labels, id2label
        self.resolution, self.channels, self.flip = resolution, channels, flip

    @classmethod
    def from_dataset(
        cls, dataset: Any, image_column: str = "image", label_column: str = "label", **kwargs: Any
    ) -> "ImageSamples":
        """Images and labels of a loaded `datasets.Dataset`; images stay undecoded until they are asked for.

        Raises:
            ValueError: A column is not there.
        """
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        check_columns(dataset.column_names, image_column, label_column)
        feature = dataset.features[label_column]
        labels = list(dataset[label_column])
        if isinstance(feature, ClassLabel):
            names = feature.names
        else:
            values = sorted(set(labels))
            names, numbers = [str(value) for value in values], {value: i for i, value in enumerate(values)}
            labels = [numbers[label] for label in labels]
        if isinstance(dataset.features[image_column], ImageFeature):
            dataset = dataset.cast_column(image_column, ImageFeature(decode=False))
        return cls(dataset[image_column], labels, dict(enumerate(names)), **kwargs)

    @classmethod
    def from_folder(cls, root: str | os.PathLike, **kwargs: Any) -> "ImageSamples":
        """Images in `root/<label>/`, at any depth below the label; labels are numbered in the order of their names.

        Raises:
            ValueError: No class folders, or no images in them.
        """
        folders = sorted(path for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith("."))
        extensions = set(Image.registered_extensions())
        files = [[p for p in sorted(f.rglob("*")) if p.suffix.lower() in extensions] for f in folders]
        found = [(folder.name, paths) for folder, paths in zip(folders, files, strict=True) if paths]
        if not found:
            raise ValueError(
                f"{root} holds no images in folders named after their labels, such as {Path(root) / 'cat' / '1.png'}."
            )
        return cls(
            [path for _, paths in found for path in paths],
            [i for i, (_, paths) in enumerate(found) for _ in paths],
            {i: name for i, (name, _) in enumerate(found)},
            **kwargs,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """One image: (channels, resolution, resolution), float32 in [-1, 1].

        Raises:
            OSError: It cannot be read.
        """
        source = self.sources[index]
        if isinstance(source, dict):
            source = io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"]
        try:
            image = source if isinstance(source, Image.Image) else Image.open(source)
            return prepare_image(image, self.resolution, self.channels)
        except (OSError, ValueError, SyntaxError, TypeError) as error:  # Pillow raises all of these
            raise OSError(f"image {index} ({source}) cannot be read: {error}") from error

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for offset in range(100):
            other = (index + offset) % len(self)
            try:
                return self.read(other), self.labels[other]
            except OSError as error:
                logger.warning(f"Skipped: {error}")
        raise OSError(f"100 images in a row, from number {index}, cannot be read.")


class LatentSamples(Dataset):
    """Latents cached by `examples/cache_latents.py`: mean and deviation of the VAE's output, of images and mirrors.

    Args:
        folder (`str` or `os.PathLike`): Holds `latents.json` and safetensors shards, which are read row by row.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            self.info = json.loads((self.folder / LATENTS_NAME).read_text(encoding="utf-8"))
        except OSError as error:
            raise OSError(f"{folder} holds no whole latent cache: {error}. Run cache_latents.py (again).") from error
        self.id2label = {int(key): name for key, name in self.info["id2label"].items()}
        self.flip = self.info["flip"]
        self.ends = np.cumsum([shard["num_samples"] for shard in self.info["shards"]])
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a loader's worker opens its own

    def get(self, index: int, flipped: bool = False) -> tuple[Tensor, int]:
        """(2C, h, w) float32, the mean and the deviation of each latent; and the label."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        if shard not in self._open:
            path = self.folder / self.info["shards"][shard]["name"]
            self._open[shard] = safe_open(path, framework="pt").__enter__()
        file, row = self._open[shard], index - (int(self.ends[shard - 1]) if shard else 0)
        moments = file.get_slice("moments_flipped" if flipped else "moments")[row : row + 1][0]
        return moments.float(), int(file.get_slice("labels")[row : row + 1][0])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.get(index)


class Examples(Dataset):
    """What stands at a position of a run: a sample, its noise, time and label, all drawn from (seed, position).

    Args:
        samples: (tensor, label) by index, with `flip`: `ImageSamples`, `LatentSamples`, ...; or a `ShardedStream`.
        seed (`int`): Of the run.
        latent_shape (`tuple[int, ...]`): (C, h, w), the shape of the noise.
        num_classes (`int`): The null label's number.
        class_dropout_prob (`float`): How often the null label replaces the sample's.
        continuous_time (`bool`): `time` is a float32 in [0, 1), for flow matching, instead of an int in [0, 1000).
    """

    def __init__(
        self,
        samples: Any,
        seed: int,
        latent_shape: tuple[int, ...],
        num_classes: int,
        class_dropout_prob: float = 0.1,
        continuous_time: bool = False,
    ):
        self.samples, self.seed, self.latent_shape, self.num_classes = samples, seed, latent_shape, num_classes
        self.class_dropout_prob, self.continuous_time = class_dropout_prob, continuous_time
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, offset = divmod(position, len(self.samples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, sample_order(len(self.samples), self.seed, epoch)
        index = int(self._order[offset])
        if isinstance(self.samples, LatentSamples):
            return self.example(position, *self.samples.get(index, self._flips(position)))
        sample, label = self.samples[index]
        return self.example(position, sample.flip(-1) if self._flips(position) else sample, label)

    def stream(self, batches: Iterable[Sequence[int]]) -> Iterator[dict[str, Tensor]]:
        """Collated batches of a stream, whose samples come in the order of their positions."""
        batches, lookahead = itertools.tee(batches)
        samples = self.samples.samples(itertools.chain.from_iterable(lookahead))
        for positions in batches:
            batch = []
            for position, (sample, label) in zip(positions, itertools.islice(samples, len(positions)), strict=True):
                batch.append(self.example(position, sample.flip(-1) if self._flips(position) else sample, label))
            yield default_collate(batch)

    def example(self, position: int, sample: Tensor, label: int) -> dict[str, Any]:
        """A sample with what the position adds: `samples`, `class_labels`, `noise`, `time`.

        And `posterior_noise` where the sample is not yet the latent itself, but what it is to be drawn from.
        """
        time = self._draw("timestep", position)
        example = {
            "samples": sample,
            "class_labels": self.num_classes
            if self._draw("label_dropout", position) < self.class_dropout_prob
            else label,
            "noise": normal(self.seed, "noise", [position], self.latent_shape)[0],
            "time": np.float32(time) if self.continuous_time else int(time * 1000),
        }
        if tuple(sample.shape) != tuple(self.latent_shape):
            example["posterior_noise"] = normal(self.seed, "posterior", [position], self.latent_shape)[0]
        return example

    def _flips(self, position: int) -> bool:
        return self.samples.flip and self._draw("flip", position) < 0.5

    def _draw(self, stream: str, position: int) -> float:
        return uniform(self.seed, stream, [position]).item()


class LatentCodec:
    """What stands between training data and the latents that the model works on, if anything.

    Args:
        vae ([`~diffusers.AutoencoderKL`], *optional*): Encodes images, decodes samples.
        cache (`dict`, *optional*): `LatentSamples.info`, when the data are latents already.
    """

    def __init__(self, vae: AutoencoderKL | None = None, cache: dict[str, Any] | None = None):
        self.vae, self.cache = vae, cache
        self.scale = cache["scaling_factor"] if cache else vae.config["scaling_factor"] if vae is not None else 1.0

    @property
    def decodes(self) -> bool:
        """Whether samples can be shown: not cached latents without their VAE."""
        return self.vae is not None or self.cache is None

    def latent_shape(self, resolution: int, channels: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images of that size."""
        if self.cache:
            channels, height, width = self.cache["latent_shape"]
            return channels, height, width
        if self.vae is None:
            return channels, resolution, resolution
        size = resolution // 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        return self.vae.config["latent_channels"], size, size

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`samples` of a batch to float32 latents, drawn with its `posterior_noise` from the VAE's distribution."""
        batch = dict(batch)
        noise = batch.pop("posterior_noise", None)
        if noise is None:
            return batch
        samples = batch["samples"]
        if self.cache:
            mean, deviation = samples.chunk(2, dim=1)
        else:
            assert self.vae is not None
            distribution = self.vae.encode(samples.to(self.vae.dtype)).latent_dist
            mean, deviation = distribution.mean.float(), distribution.std.float()
        return {**batch, "samples": (mean + deviation * noise) * self.scale}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in [0, 1], (B, C, H, W) float32."""
        if self.vae is not None:
            latents = self.vae.decode((latents / self.scale).to(self.vae.dtype), return_dict=False)[0].float()
        return (latents / 2 + 0.5).clamp(0, 1)


def open_dataset(name: str, config_name: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """`datasets.load_dataset` for a name on the Hub, a folder, or one parquet file.

    Raises:
        ValueError: There is no such data set or split.
    """
    from datasets import load_dataset

    path, files = ("parquet", name) if name.endswith(".parquet") else (name, None)
    try:
        return load_dataset(path, config_name, data_files=files, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} (config {config_name}, split {split!r}) cannot be loaded: {error}") from error


def check_columns(columns: Sequence[str], *wanted: str) -> None:
    """Raise a `ValueError` that names the columns there are, unless all wanted ones are among them."""
    for column in wanted:
        if column not in columns:
            raise ValueError(f"The data set has no column {column!r}; its columns are {', '.join(columns)}.")


def stream_samples(
    num_shards: int,
    read_shard: Callable[[int], Any],
    positions: Iterable[int],
    seed: int,
    shard_sizes: dict[int, int],
) -> Iterator[Any]:
    """The rows at rising positions of an endless stream: shards in seeded order, rows in seeded order within each.

    Args:
        num_shards (`int`): Shards in an epoch.
        read_shard (`Callable`): All rows of a shard by its number, in a fixed order, with `len` and `[]`.
        positions (`Iterable[int]`): Rising positions in the run.
        seed (`int`): Of both orders.
        shard_sizes (`dict[int, int]`): Rows per shard as far as known; filled in while reading. A resumed run that is
            given the sizes skips to its place without reading.

    Raises:
        ValueError: Every shard is empty.
    """
    wanted = iter(positions)
    position, start = next(wanted, None), 0
    for epoch in itertools.count():
        epoch_start = start
        for shard in sample_order(num_shards, seed, epoch).tolist():
            if position is None:
                return
            rows = None
            if shard not in shard_sizes:
                rows = read_shard(shard)
                shard_sizes[shard] = len(rows)
            size = shard_sizes[shard]
            if position < start + size:
                rows = read_shard(shard) if rows is None else rows
                order = _philox(seed, f"order of shard {shard}", epoch).random_raw(size).argsort(kind="stable")
                while position is not None and position < start + size:
                    yield rows[int(order[position - start])]
                    position = next(wanted, None)
            start += size
        if start == epoch_start:
            raise ValueError("The stream holds no samples.")


class ShardedStream:
    """A streamed data set in an order that is a function of the seed: see `stream_samples`. Keeps one shard in memory.

    Args:
        dataset (`datasets.IterableDataset`): From `load_dataset(..., streaming=True)`.
        image_column (`str`): Images.
        label_column (`str`): A `ClassLabel`, so that the labels are known before the data is.
        seed (`int`): Of the order.
        kwargs: `resolution`, `channels` and `flip` of `ImageSamples`.

    Raises:
        ValueError: A column is not there, or the labels are no `ClassLabel`.
    """

    def __init__(self, dataset: Any, image_column: str, label_column: str, seed: int, **kwargs: Any):
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        if dataset.features is None:
            raise ValueError("This stream does not say its columns' types. Load it without --streaming.")
        check_columns(list(dataset.features), image_column, label_column)
        feature = dataset.features[label_column]
        if not isinstance(feature, ClassLabel):
            raise ValueError(f"Streaming needs labels of type ClassLabel, column {label_column!r} is {feature}.")
        self.dataset = dataset.cast_column(image_column, ImageFeature(decode=False))
        self.image_column, self.label_column, self.seed = image_column, label_column, seed
        self.id2label, self.flip, self.kwargs = dict(enumerate(feature.names)), kwargs["flip"], kwargs
        self.shard_sizes: dict[int, int] = {}  # what a resumed run needs to find its place without reading

    def read_shard(self, index: int) -> ImageSamples:
        """All samples of a shard, in the order of the file."""
        rows = list(self.dataset.shard(num_shards=self.dataset.num_shards, index=index))
        images, labels = [row[self.image_column] for row in rows], [row[self.label_column] for row in rows]
        return ImageSamples(images, labels, self.id2label, **self.kwargs)

    def samples(self, positions: Iterable[int]) -> Iterator[tuple[Tensor, int]]:
        """(image, label) at each of the rising positions."""
        return stream_samples(self.dataset.num_shards, self.read_shard, positions, self.seed, self.shard_sizes)


def learning_rate_factor(
    step: int,
    schedule: str,
    max_steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    step_rules: str | None = None,
) -> float:
    """What the learning rate is multiplied by at a step.

    Args:
        step (`int`): Optimizer step, from 0.
        schedule (`str`): `"constant"`; `"cosine"`: to 0 at `max_steps`; `"wsd"` (warm-up, stable, decay): constant,
            then linear to 0 over the last `decay_steps`; `"piecewise_constant"`: by `step_rules`.
        max_steps (`int`): Length of the run.
        warmup_steps (`int`): Linear from 0 at the start of any schedule.
        decay_steps (`int`): For `"wsd"`.
        step_rules (`str`, *optional*): diffusers' notation: `"1:1550000,0.2"` is 1 up to step 1,550,000, then 0.2.

    Raises:
        ValueError: Unknown schedule, or rules that do not parse.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1)
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "wsd":
        return min(max(max_steps - step, 0) / max(decay_steps, 1), 1.0)
    if schedule == "piecewise_constant":
        *rules, last = (step_rules or "").split(",")
        try:
            steps = [(float(value), int(until)) for value, until in (rule.split(":") for rule in rules)]
            return next((value for value, until in steps if step < until), float(last))
        except ValueError as error:
            raise ValueError(f'`step_rules` must look like "1:1550000,0.2", got {step_rules!r}.') from error
    raise ValueError(f'`schedule` must be "constant", "cosine", "wsd" or "piecewise_constant", got {schedule!r}.')


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, scale_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups: matrices; norms, biases and embeddings, without decay; ternary scales, on their own.

    Args:
        model (`torch.nn.Module`): Its parameters that take a gradient are grouped.
        weight_decay (`float`): Of the matrices; the other groups have 0.
        scale_lr_factor (`float`): The group of scales learns at this times the learning rate.

    Returns:
        `list[dict]`: Groups with `name`, `params`, `weight_decay` and `lr_factor`; the trainer sets each group's `lr`
        to the learning rate times `lr_factor`.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[str, list[Tensor]] = {"matrices": [], "vectors": [], "scales": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.split(".")[-1] == "weight_scale":
            groups["scales"].append(parameter)
        elif parameter.ndim < 2 or id(parameter) in embeddings:
            groups["vectors"].append(parameter)
        else:
            groups["matrices"].append(parameter)
    return [
        {
            "name": name,
            "params": params,
            "weight_decay": weight_decay if name == "matrices" else 0.0,
            "lr_factor": scale_lr_factor if name == "scales" else 1.0,
        }
        for name, params in groups.items()
        if params
    ]


def ema_decay(step: int, decay: float) -> float:
    """Decay after `step` updates, warmed up to forget the first weights: min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float) -> None:
    """`ema = decay * ema + (1 - decay) * model`, in place, over all parameters.

    The average is a model of its own in float32, so it can be sampled from, saved and packed while training goes on in
    the other one; nothing is swapped and restored.
    """
    averages = [_local(parameter) for parameter in ema_model.parameters()]
    torch._foreach_lerp_(averages, [_local(parameter) for parameter in model.parameters()], 1 - decay)


def load_transformer(path: str | os.PathLike) -> TerDiTTransformer2DModel:
    """The transformer of a pipeline (folder or Hub repository), a model folder, or a `checkpoint-N` (raw weights).

    Raises:
        OSError: There is none.
    """
    folder = Path(path)
    if (folder / STATE_NAME).is_file():
        model = TerDiTTransformer2DModel.from_config(TerDiTTransformer2DModel.load_config(folder))
        _restore(folder / "model.safetensors", model.state_dict())
        return model.eval()
    subfolder = None if (folder / "config.json").is_file() else "transformer"
    return TerDiTTransformer2DModel.from_pretrained(str(path), subfolder=subfolder)


@torch.no_grad()
def transfer_weights(source: TerDiTTransformer2DModel, target: TerDiTTransformer2DModel) -> list[str]:
    """Start a model from another of the same shape: ternary from full precision, the other way, or like from like.

    A ternary model takes the full-precision weights as its float weights, and the scale that brings `scale * T`
    nearest to them (least squares). A packed source gives its codes; a full-precision model takes dense `scale * T`.

    Args:
        source ([`TerDiTTransformer2DModel`]): Trained, in any format. May be changed.
        target ([`TerDiTTransformer2DModel`]): Float format; written in place. May have other classes.

    Returns:
        `list[str]`: Parameters of `target` that keep their fresh values: the label table, where the classes differ.

    Raises:
        ValueError: The shapes differ elsewhere.
    """
    if source.config.ternary and not target.config.ternary:
        source = source.dequantize()
    elif source.config.weight_format == "packed":
        source.unpack()
    weights = source.state_dict()
    if target.config.ternary and not source.config.ternary:
        for name, layer in target.ternary_layers().items():
            weights[f"{name}.weight_scale"] = least_squares_scale(weights[f"{name}.weight"], layer.scale_granularity)
    fresh = []
    for name, value in target.state_dict().items():
        if name not in weights or weights[name].shape != value.shape:
            if name != "class_embed.weight":
                found = list(weights[name].shape) if name in weights else "absent"
                raise ValueError(
                    f"`{name}` is {list(value.shape)} in the new model, {found} in the one to start from."
                )
            fresh.append(name)
        else:
            value.copy_(weights[name])
    return fresh


def least_squares_scale(weight: Tensor, scale_granularity: str | int = "tensor") -> Tensor:
    """The scale that brings `scale * ternarize(weight)` nearest to `weight`: (N, K) -> (1,), (N, 1) or (N, K/g)."""
    ternary = reference.ternarize(weight.float(), scale_granularity)
    shape = reference.scale_shape(weight.shape[0], weight.shape[1], scale_granularity)
    # The mean of |W| over the weights that are not rounded to zero.
    ones = ternary.abs().double()
    if scale_granularity == "tensor":
        total, count = (weight.double() * ternary).sum(), ones.sum()
    else:
        total = (weight.double() * ternary).unflatten(1, (shape[1], -1)).sum(2)
        count = ones.unflatten(1, (shape[1], -1)).sum(2)
    return (total / count.clamp(min=1)).float().reshape(shape)


def gradual_ternarization(model: TerDiTTransformer2DModel) -> Callable[[float], None]:
    """Blend full-precision and ternary weights while a model that starts from full precision gets used to the latter.

    Until it is called with 1, every ternary layer computes `(1 - strength) * W + strength * scale * T` instead of
    `scale * T`. Nothing of it is in the state dict: what is saved is an ordinary ternary model.

    Returns:
        `Callable[[float], None]`: Sets the strength, 0 to 1; at 1 the layers are themselves again.

    Source: https://huggingface.co/blog/1_58_llm_extreme_quantization, with a straight-through gradient to both parts.
    """
    strength = torch.zeros((), device=model.device)  # a tensor, so that compiled layers need not be compiled again

    def forward(layer: TernaryLinear, hidden_states: Tensor) -> Tensor:
        ternary = TernaryLinear.forward(layer, hidden_states)
        dense = nn.functional.linear(hidden_states, layer.weight, layer.bias)
        return torch.lerp(dense.to(ternary.dtype), ternary, strength.to(ternary.dtype))

    layers = model.ternary_layers().values()
    for layer in layers:
        layer.forward = partial(forward, layer)  # type: ignore[method-assign]

    def set_strength(value: float) -> None:
        strength.fill_(value)
        for layer in layers:
            if value >= 1:
                layer.__dict__.pop("forward", None)

    return set_strength


def frechet_distance(features: Tensor, other: Tensor) -> float:
    """Fréchet distance of two sets of features, as Gaussians: (N, D) and (M, D) float -> float, computed in float64.

    Source: https://arxiv.org/abs/1706.08500. With Inception's features it is the FID.
    Raises: ValueError if a set has fewer than two rows or the widths differ.
    """
    if min(len(features), len(other)) < 2 or features.shape[1:] != other.shape[1:]:
        got = f"{tuple(features.shape)} and {tuple(other.shape)}"
        raise ValueError(f"A Fréchet distance takes two sets of at least 2 features of one width, got {got}.")
    first, second = features.double().cpu(), other.double().cpu()
    covariances = [torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1]) for rows in (first, second)]
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), whose matrices are symmetric.
    eigenvalues, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return float(means + covariances[0].trace() + covariances[1].trace() - 2 * cross)


@torch.no_grad()
def packed_codes(model: TerDiTTransformer2DModel) -> dict[str, Tensor]:
    """The ternary weights now, two bits each: layer name -> (N/4, K) uint8, on the CPU."""
    return {name: pack_ternary(_ternary(layer)).cpu() for name, layer in model.ternary_layers().items()}


def _ternary(layer: TernaryLinear) -> Tensor:
    if layer.weight_format == "packed":
        return layer.ternary_weight(torch.int8)
    return reference.ternarize(_whole(layer.weight.detach()), layer.scale_granularity).to(torch.int8)


@torch.no_grad()
def ternary_statistics(
    model: TerDiTTransformer2DModel, previous_codes: dict[str, Tensor] | None = None
) -> dict[str, float | list[str]]:
    """How the ternary weights are doing.

    Args:
        model ([`TerDiTTransformer2DModel`]): Float or packed.
        previous_codes (`dict`, *optional*): An earlier `packed_codes(model)`, to count flips.

    Returns:
        `dict`: shares of all ternary weights: `zero_share`; in float format `near_threshold_share`, those within 5 %
        of the magnitude where rounding goes from 0 to 1; with `previous_codes`, `flip_share`, those whose code
        changed. Of the scales: `scale_min`, `scale_median`, `scale_max` (absolute) and `scale_negative_share`. And
        `dead_layers`, the names of layers whose codes are all 0. Empty for a model without ternary layers.
    """
    total = zeros = near = flips = 0
    scales, dead = [], []
    for name, layer in model.ternary_layers().items():
        codes = _ternary(layer)
        layer_zeros = int((codes == 0).sum())
        total += codes.numel()
        zeros += layer_zeros
        if layer.weight_format == "float":
            weight = _whole(layer.weight.detach())
            mean = reference.expand_scale(reference.absmean(weight, layer.scale_granularity), codes.shape[1])
            ratio = weight.float().abs() / (mean + reference.EPS)  # rounds to 0 below 0.5
            near += int(((ratio - 0.5).abs() <= 0.025).sum())
        if layer_zeros == codes.numel():
            dead.append(name)
        if previous_codes is not None:
            flips += int((codes.cpu() != unpack_ternary(previous_codes[name], torch.int8)).sum())
        scales.append(_whole(layer.weight_scale.detach()).flatten().cpu())
    if not total:
        return {}
    scale = torch.cat(scales)
    statistics: dict[str, float | list[str]] = {
        "zero_share": zeros / total,
        "scale_min": scale.abs().min().item(),
        "scale_median": scale.abs().median().item(),
        "scale_max": scale.abs().max().item(),
        "scale_negative_share": (scale < 0).float().mean().item(),
        "dead_layers": dead,
    }
    if model.config.weight_format == "float":
        statistics["near_threshold_share"] = near / total
    if previous_codes is not None:
        statistics["flip_share"] = flips / total
    return statistics


@torch.no_grad()
def gate_sizes(model: TerDiTTransformer2DModel, timestep: int = 500, max_labels: int = 16) -> dict[str, list[float]]:
    """Root mean square of each block's two gates, at one timestep, over the first labels: how much each block adds.

    Returns:
        `dict[str, list[float]]`: `gate_msa` and `gate_mlp`, one number per block.
    """
    labels = torch.arange(min(model.config.num_classes, max_labels), device=model.device)
    timesteps = torch.full_like(labels, timestep)
    timestep_proj = model.time_proj(timesteps).to(model.dtype)
    temb = _call_whole(model.time_embed, timestep_proj) + _call_whole(model.class_embed, labels)  # (B, E)
    gates: dict[str, list[float]] = {"gate_msa": [], "gate_mlp": []}
    for block in model.transformer_blocks:
        _, _, gate_msa, _, _, gate_mlp = _call_whole(block.get_submodule("adaln"), temb)
        gates["gate_msa"].append(gate_msa.float().square().mean().sqrt().item())
        gates["gate_mlp"].append(gate_mlp.float().square().mean().sqrt().item())
    return gates


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that appears whole or not at all: yields `<path>.partial`, and renames it to `path` at the end.

    A folder that was at `path` is replaced. On an error the partial folder is removed.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            _sync(file)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The whole `checkpoint-N` folders in `output_dir`, by N."""
    found = [path for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*") if (path / STATE_NAME).is_file()]
    return sorted((p for p in found if re.fullmatch(rf"{CHECKPOINT_PREFIX}\d+", p.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(CHECKPOINT_PREFIX))


def rotate_checkpoints(output_dir: str | os.PathLike, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; `None` keeps all."""
    for path in checkpoints(output_dir)[: -limit if limit else None] if limit else []:
        # Renamed first, so that a kill in the middle leaves no half checkpoint.
        doomed = path.with_name(path.name + ".partial")
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def cut_log(path: str | os.PathLike, step: int) -> None:
    """Keep the lines of a JSONL log up to a step: a resumed run writes the later ones again. The last may be torn."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            kept += [f"{line}\n"] if json.loads(line)["step"] <= step else []
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text("".join(kept), encoding="utf-8")
    os.replace(partial_path, path)


def save_checkpoint(
    folder: str | os.PathLike,
    model: TerDiTTransformer2DModel,
    ema_model: TerDiTTransformer2DModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    is_main_process: bool = True,
) -> None:
    """Write a resumable state: whole float tensors by name, whatever number of processes trained or sharded them.

    Files: `model.safetensors` (raw weights), `config.json`, `ema.safetensors`, `optimizer.safetensors` and
    `training_state.json`.
    Every process calls it, because gathering sharded tensors takes all of them; the main one writes, from CPU memory,
    one file after the other.

    Args:
        folder (`str` or `os.PathLike`): `checkpoint-N`; written beside it first, then renamed.
        model ([`TerDiTTransformer2DModel`]): Not wrapped by DDP; its parameters may be sharded by `fully_shard`.
        ema_model ([`TerDiTTransformer2DModel`]): Its average.
        optimizer (`torch.optim.Optimizer`): Over `model`'s parameters.
        state (`dict`): What else to keep, as JSON: the step, the batch size.
        is_main_process (`bool`): Whether this process writes.

    Raises:
        OSError: The disk is full or not writable; nothing is left behind.
    """
    parts = {
        "model": model.state_dict(),
        "ema": ema_model.state_dict(),
        "optimizer": _optimizer_tensors(model, optimizer),
    }
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(new_folder(folder)) if is_main_process else None
        for name, tensors in parts.items():
            gathered = {}
            for key, tensor in tensors.items():
                whole = _whole(tensor.detach())
                if partial is not None:
                    gathered[key] = whole.cpu().contiguous()
            if partial is not None:
                try:
                    save_file(gathered, partial / f"{name}.safetensors")
                except SafetensorError as error:
                    raise OSError(f"Could not write {partial / name}.safetensors: {error}") from error
        if partial is not None:
            model.save_config(partial)
            (partial / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(
    folder: str | os.PathLike, model: nn.Module, ema_model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore in place what `save_checkpoint` wrote, on any number of processes, and return its `state`.

    Sharded parameters take their part of each tensor from the file, one tensor at a time.

    Raises:
        OSError: The folder is no whole checkpoint.
        ValueError: The tensors are not those of this model and optimizer.
    """
    folder = Path(folder)
    if not (folder / STATE_NAME).is_file():
        raise OSError(f"{folder} is no checkpoint: it has no {STATE_NAME}.")
    for name, module in (("model", model), ("ema", ema_model)):
        _restore(folder / f"{name}.safetensors", module.state_dict())
    names = _parameter_names(model, optimizer)
    parameters = dict(model.named_parameters())
    values: dict[int, dict[str, Tensor]] = {}
    with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        indices = {name: index for index, name in enumerate(names)}
        for key in file.keys():  # noqa: SIM118
            name, _, kind = key.rpartition(".")
            if name not in indices:
                raise ValueError(f"{folder}: `{name}` is no parameter of this optimizer.")
            tensor = file.get_tensor(key)
            values.setdefault(indices[name], {})[kind] = _part(tensor, parameters[name]) if tensor.ndim else tensor
    # The hyperparameters are the running optimizer's.
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names in the order in which the optimizer's state dict counts parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}.{kind}": value
        for index, values in state.items()
        for kind, value in values.items()
        if isinstance(value, Tensor)
    }


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients, sharded or not, to a norm of at most `max_norm`, and return the norm before."""
    return float(_whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))


def shard_model(model: TerDiTTransformer2DModel, device_type: str) -> None:
    """Shard a model over all processes, in place, block by block (FSDP2): parameters, gradients, optimizer state.

    Everything stays float32, the gathered weights too: a weight gathered in bfloat16 would ternarize differently from
    the float32 one that is exported. The forward pass sees whole matrices, so their mean is the right one.

    Args:
        model ([`TerDiTTransformer2DModel`]): Before an optimizer holds its parameters; on its device.
        device_type (`str`): `"cuda"`, `"cpu"`, ...
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _whole(tensor: Any) -> Tensor:
    """The whole of a sharded tensor; takes every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _call_whole(module: nn.Module, *args: Tensor) -> Any:
    """Call a part of a model whose parameters may be sharded, outside the model's own forward."""
    parameters = {name: _whole(parameter.detach()) for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, parameters, args)


def _part(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, placed as `like`."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def _restore(path: Path, targets: dict[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(targets):
            odd = sorted(set(file.keys()) ^ set(targets))
            raise ValueError(f"{path} is not of this model: {len(odd)} tensors differ, such as `{odd[0]}`.")
        for name, target in targets.items():
            tensor = file.get_tensor(name)
            if tensor.shape != target.shape:
                raise ValueError(f"{path}: `{name}` is {list(tensor.shape)}, the model's is {list(target.shape)}.")
            target.copy_(_part(tensor, target))


def training_scheduler(
    learn_sigma: bool = True, flow_matching: bool = False
) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """What a model is trained on and sampled with: the 1000-step linear DDPM, or rectified flow.

    Args:
        learn_sigma (`bool`): Whether the model predicts the variance; without it DDPM uses its own small one.
        flow_matching (`bool`): Rectified flow instead of DDPM.
    """
    if flow_matching:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler = default_scheduler()
    return scheduler if learn_sigma else DDPMScheduler.from_config(scheduler.config, variance_type="fixed_small")


@torch.no_grad()
def packed_model(model: TerDiTTransformer2DModel) -> TerDiTTransformer2DModel:
    """A packed copy of a float-format model, on the CPU, made without a second float copy of the ternary weights."""
    if not model.config.ternary:
        raise ValueError("This model is full precision (ternary=False); it has no ternary weights to pack.")
    packed = TerDiTTransformer2DModel.from_config(model.config, weight_format="packed")
    codes = {f"{name}.weight_packed": tensor for name, tensor in packed_codes(model).items()}
    names = packed.state_dict().keys()
    floats = {name: _whole(tensor).cpu() for name, tensor in model.state_dict().items() if name in names}
    packed.load_state_dict({**floats, **codes})
    return packed.eval()


@torch.no_grad()
def whole_model(model: TerDiTTransformer2DModel) -> TerDiTTransformer2DModel:
    """A copy of a model, sharded or not, on the CPU."""
    copied = TerDiTTransformer2DModel.from_config(model.config)
    copied.load_state_dict({name: _whole(tensor).cpu() for name, tensor in model.state_dict().items()})
    return copied.eval()


def to_pipeline(
    transformer: TerDiTTransformer2DModel,
    scheduler: SchedulerMixin | None = None,
    vae: AutoencoderKL | None = None,
    id2label: dict[int, str] | None = None,
) -> TerDiTPipeline:
    """A pipeline of a trained model, on the CPU: ternarized and packed, or, in full precision, copied.

    Args:
        transformer ([`TerDiTTransformer2DModel`]): Float format, float32: the average of the weights. Left unchanged.
            When it is sharded, every process must call this, and each gets a pipeline.
        scheduler ([`~diffusers.SchedulerMixin`], *optional*): Default `training_scheduler`.
        vae ([`~diffusers.AutoencoderKL`], *optional*): Decoder.
        id2label (`dict[int, str]`, *optional*): Label names.
    """
    return TerDiTPipeline(
        transformer=packed_model(transformer) if transformer.config.ternary else whole_model(transformer),
        scheduler=scheduler or training_scheduler(transformer.config.learn_sigma),
        vae=vae,
        id2label={str(key): value for key, value in id2label.items()} if id2label else None,
    )


def save_pipeline(pipe: TerDiTPipeline, save_directory: str | os.PathLike) -> None:
    """Save a pipeline into a folder that may hold other things: its parts appear whole, `model_index.json` last."""
    save_directory = Path(save_directory)
    with new_folder(save_directory / ".export") as partial_folder:
        pipe.save_pretrained(partial_folder)
    # Without model_index.json the folder is no pipeline.
    parts = sorted((save_directory / ".export").iterdir(), key=lambda part: part.name == "model_index.json")
    for part in parts:
        target = save_directory / part.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(part, target)
    (save_directory / ".export").rmdir()


def export_pipeline(
    transformer: TerDiTTransformer2DModel,
    save_directory: str | os.PathLike,
    scheduler: SchedulerMixin | None = None,
    vae: AutoencoderKL | None = None,
    id2label: dict[int, str] | None = None,
    dtype: torch.dtype | None = None,
) -> TerDiTPipeline:
    """`to_pipeline`, then `save_pipeline`.

    Args:
        transformer ([`TerDiTTransformer2DModel`]): See `to_pipeline`, as for `scheduler`, `vae` and `id2label`.
        scheduler ([`~diffusers.SchedulerMixin`], *optional*): See there.
        vae ([`~diffusers.AutoencoderKL`], *optional*): See there.
        id2label (`dict[int, str]`, *optional*): See there.
        save_directory (`str` or `os.PathLike`): See `save_pipeline`.
        dtype (`torch.dtype`, *optional*): Of the tensors that are not ternary; scales stay float32. Default float32.
    """
    pipe = to_pipeline(transformer, scheduler, vae, id2label)
    if dtype is not None:
        pipe.transformer.to(dtype)
    save_pipeline(pipe, save_directory)
    return pipe


def model_card(
    pipe: TerDiTPipeline, name: str, facts: dict[str, Any], images: Sequence[str] = (), license: str | None = None
) -> str:
    """Text of a README.md for a trained model.

    Args:
        pipe ([`TerDiTPipeline`]): What was trained.
        name (`str`): Repository or folder to load it from, also the title.
        facts (`dict[str, Any]`): How it was trained, row by row: data, steps, images seen, learning rate, ...
        images (`Sequence[str]`): Paths of pictures, relative to the card.
        license (`str`, *optional*): Identifier as on the Hub. Only the caller knows what the data allows.
    """
    config = pipe.transformer.config
    kind = "ternary" if config.ternary else "full-precision"
    tags = ["terdit", *(["ternary", "1.58-bit"] if config.ternary else []), "class-conditional", "diffusers"]
    names = list(pipe.labels)
    example = repr(names[0]) if names else "0"
    statistics = {key: value for key, value in ternary_statistics(pipe.transformer).items() if key != "dead_layers"}
    rows = {
        "model": f"{config.num_layers} layers of width {config.num_attention_heads * config.attention_head_dim}",
        "classes": config.num_classes,
        **facts,
        **{key.replace("_", " "): f"{value:.4g}" for key, value in statistics.items()},
    }
    lines = ["---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation"]
    lines += [f"license: {license}"] if license else []
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", ""]
    lines += [f"# {name}", "", f"A {kind} class-conditional diffusion transformer, trained with diffusers-terdit.", ""]
    lines += [f"![samples]({image})" for image in images]
    lines += ["", "```python", "from diffusers_terdit import TerDiTPipeline", ""]
    lines += [f'pipe = TerDiTPipeline.from_pretrained("{name}")', f"image = pipe([{example}]).images[0]", "```", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines) + "\n"


def image_grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    min_side: int = 64,
    padding: int = 8,
) -> Image.Image:
    """Images in rows on white, with room between them; small ones are enlarged by a whole factor without smoothing.

    Args:
        images (`Sequence[PIL.Image.Image]`): Of one size, row by row.
        columns (`int`, *optional*): Images per row; default about as many as rows.
        labels (`Sequence[str]`, *optional*): Written above the images, cut to their width.
        min_side (`int`): Pixels; images with a shorter side are enlarged to at least this.
        padding (`int`): Pixels between cells.
    """
    if not images:
        raise ValueError("A grid needs at least one image.")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    factor = math.ceil(min_side / min(images[0].size)) if min(images[0].size) < min_side else 1
    width, height = images[0].width * factor, images[0].height * factor
    text_height = 14 if labels else 0
    cell_width, cell_height = width + padding, height + padding + text_height
    grid = Image.new("RGB", (columns * cell_width + padding, rows * cell_height + padding), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for i, image in enumerate(images):
        x, y = padding + i % columns * cell_width, padding + i // columns * cell_height
        if labels:
            text = str(labels[i])
            while text and draw.textlength(text, font=font) > width:
                text = text[:-1]
            draw.text((x, y), text, fill="black", font=font)
        enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        grid.paste(enlarged, (x, y + text_height))
    return grid
