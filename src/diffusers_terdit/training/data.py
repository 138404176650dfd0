"""Training data: images, data sets, streams and cached latents, and the examples that a run draws from them."""

import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..storage.configs import fits
from ..storage.weights import WeightsFile, canonical_json, check_tensors_of, is_plain_name, read_json
from . import idx
from .images import read_image, suffixes
from .random import draw, normal, permutation, sample_order


logger = logging.get_logger(__name__)


LATENTS_NAME = "latents.json"
KEPT_BYTES = 10**9  # of memory for images that were read: 81,000 of 32 pixels, 1,200 of 256


@contextmanager
def _train_extra() -> Iterator[None]:
    """Name the extra to install where an optional dependency is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0].replace("sklearn", "scikit-learn")
        raise ImportError(f"This needs {package}: pip install {package}") from error


class Digits(Dataset):
    """The 8x8 digits of scikit-learn, (1, 8, 8) float32 in [-1, 1]; training leaves out the last 300 of 1797."""

    flip = False

    def __init__(self, train: bool):
        with _train_extra():
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
    """Images that are read on access; one that cannot be read is logged and the next readable one taken instead.

    Where all of them fit `KEPT_BYTES`, each is read once: decoding a photo takes longer than training on it.

    Args:
        sources (`Sequence`): One per image, as `read_image` takes them.
        labels (`Sequence[int]`): One class id per image.
        id2label (`dict[int, str]`): Label names; empty where all images are of one class without a name.
        resolution (`int`): Pixels.
        channels (`int`): 1 or 3.
        flip (`bool`): Whether a trainer may mirror them.
        folders (`Sequence[str]`): Where a file may be that a dict names, because a data set of a stranger names any.
        background (`str`): Color behind transparent pixels, see `read_image`.
        keep (`bool`): Whether images are read once where all of them fit `KEPT_BYTES`.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        labels: Sequence[int],
        id2label: dict[int, str],
        resolution: int,
        channels: int = 3,
        flip: bool = False,
        folders: Sequence[str] = (),
        background: str = "white",
        keep: bool = True,
    ):
        self.sources, self.labels, self.id2label = sources, labels, id2label
        # All images, and which of them were read. One tensor, because thousands of small ones would scatter the heap.
        self._kept: tuple[Tensor, Tensor] | None = None
        self._keeps = keep
        self._skipped: set[int] = set()  # and logged
        self.resolution, self.channels, self.flip, self.folders = resolution, channels, flip, folders
        self.background = background

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        image_column: str = "image",
        label_column: str | None = "label",
        name: str | os.PathLike | None = None,
        label_order: str = "value",
        **kwargs: Any,
    ) -> "ImageSamples":
        """Take images and labels from a loaded `datasets.Dataset`; images are decoded on access.

        Args:
            dataset (`datasets.Dataset`): Its rows hold the images, or name files in the folder it was loaded from.
            image_column (`str`): Images.
            label_column (`str` or `None`): A `ClassLabel`, or numbers or texts; `None` for images without classes.
            name (`str` or `os.PathLike`, *optional*): What `open_dataset` was given.
            label_order (`str`): Of labels that are no `ClassLabel`, see `ordered_labels`.
            kwargs: `resolution`, `channels`, `flip` and `background`.

        Raises:
            ValueError: A column is missing or of another type, there are no rows, or a row has no label.
        """
        from datasets import ClassLabel

        if not len(dataset):
            raise ValueError(
                f"The data set has the columns {', '.join(dataset.column_names)}, but no rows. Take another split."
            )
        dataset = _with_images(dataset, image_column, label_column)
        feature = dataset.features.get(label_column)
        labels = list(dataset[label_column]) if label_column is not None else [0] * len(dataset)
        names: Sequence[str] = ()
        if isinstance(feature, ClassLabel):
            names = feature.names
            _check_labels(labels, names)
        elif label_column is not None:
            _check_labels(labels)
            values = ordered_labels(labels, label_order)
            names, numbers = [str(value) for value in values], {value: i for i, value in enumerate(values)}
            labels = [numbers[label] for label in labels]
        return cls(dataset[image_column], labels, dict(enumerate(names)), **kwargs, folders=_folders_of(name))

    @classmethod
    def from_folder(cls, root: str | os.PathLike, label_order: str = "value", **kwargs: Any) -> "ImageSamples":
        """Take the images in `root/<label>/`, at any depth below, or images without classes in `root` itself.

        Hidden files and folders, `__MACOSX` and files of other formats are left out.

        Args:
            root (`str` or `os.PathLike`): Holds class folders, or images.
            label_order (`str`): How the labels are numbered, see `ordered_labels`.
            kwargs: `resolution`, `channels`, `flip` and `background`.

        Raises:
            ValueError: There are no images, or images both in class folders and in `root` itself.
            OSError: `root` is no folder.
        """
        root, endings = Path(root), suffixes()
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is no folder. Pass one that holds images, or a folder of each class.")

        def images(found: Iterable[Path], folder: Path) -> list[Path]:
            pictures = (path for path in found if path.suffix.lower() in endings)
            return sorted(p for p in pictures if not any(map(_is_hidden, p.relative_to(folder).parts)))

        entries = [path for path in root.iterdir() if not _is_hidden(path.name)]
        folders = {path.name: path for path in entries if path.is_dir()}
        direct = images((path for path in entries if path.name not in folders), root)
        files = {name: images(folder.rglob("*"), folder) for name, folder in sorted(folders.items())}
        names = ordered_labels((name for name, paths in files.items() if paths), label_order)
        if direct and names:
            raise ValueError(
                f"{root} holds images in itself, such as {direct[0].name}, and in folders, such as {names[0]}. Move"
                " all of them into a folder of each class; or, to have no classes, into one folder."
            )
        if not (direct or names):
            raise ValueError(
                f"{root} holds no images, neither in folders named after their labels, such as"
                f" {root / 'cat' / '1.png'}, nor in itself."
            )
        if names and (empty := [name for name, paths in files.items() if not paths]):
            logger.warning(f"{root}: no class is made of folders without images: {', '.join(empty):.200}.")
        if direct:
            return cls(direct, [0] * len(direct), {}, **kwargs)
        return cls(
            [path for name in names for path in files[name]],
            [i for i, name in enumerate(names) for _ in files[name]],
            dict(enumerate(names)),
            **kwargs,
        )

    @classmethod
    def from_pairs(
        cls,
        pairs: Any,
        id2label: dict[int, str] | None = None,
        resolution: int | None = None,
        channels: int | None = None,
        **kwargs: Any,
    ) -> "ImageSamples":
        """Take images and labels from a data set in memory: any object with `len` and `[]`, such as a list.

        Each pair is read once here. Images are those of PIL, arrays (h, w) or (h, w, 1 | 3 | 4) of uint8, or
        tensors (c, h, w) of uint8.

        Args:
            pairs: (image, label) by index, the labels ints from 0.
            id2label (`dict[int, str]`, *optional*): Label names; by default the labels as numbers.
            resolution (`int`, *optional*): Pixels; by default those of the first image, which is then a square.
            channels (`int`, *optional*): 1 or 3; by default 1 where the first image is gray.
            kwargs: `flip` and `background`.

        Raises:
            ValueError: There are no pairs, or one is none of these.
        """
        images, labels = [], []
        for index in range(len(pairs)):
            image, label = pairs[index]
            if isinstance(image, Tensor) and image.dim() == 3:
                image = image.permute(1, 2, 0).cpu().numpy()
            if isinstance(image, np.ndarray) and not (
                image.dtype == np.uint8 and image.size and (image.ndim == 2 or image.shape[2:] in ((1,), (3,), (4,)))
            ):
                raise ValueError(
                    f"Image {index} is {image.dtype} of shape {image.shape}, expected uint8, (h, w) or (h, w, 1 | 3 |"
                    " 4), or a tensor (1 | 3 | 4, h, w). Scale floats to 0 to 255 and round them."
                )
            if not isinstance(image, (np.ndarray, Image.Image)):
                raise ValueError(
                    f"Image {index} is {type(image).__name__}, expected a PIL image, an array or a tensor (c, h, w)."
                )
            value = getattr(label, "item", lambda label=label: label)()
            if not isinstance(value, int) or value < 0 or (id2label is not None and value not in id2label):
                known = "0 or more" if id2label is None else f"one of {sorted(id2label)}"
                raise ValueError(f"Label {index} is {label!r:.80}, expected an int, {known:.200}.")
            images.append(image)
            labels.append(value)
        if not images:
            raise ValueError(f"`pairs` holds none, got {pairs!r:.80}. Pass at least one (image, label).")
        first = images[0]
        width, height = first.size if isinstance(first, Image.Image) else first.shape[1::-1]
        gray = first.mode in ("1", "L") if isinstance(first, Image.Image) else first.ndim == 2 or first.shape[2] == 1
        if resolution is None and width != height:
            raise ValueError(
                f"The first image has {width} x {height} pixels, which is no square. Pass a `resolution`: the middle"
                " square of each image is scaled to it."
            )
        if id2label is None:
            id2label = {label: str(label) for label in range(max(labels) + 1)}
        return cls(images, labels, id2label, resolution or width, channels or (1 if gray else 3), **kwargs)

    @classmethod
    def from_idx(cls, folder: str | os.PathLike, part: str = "train", **kwargs: Any) -> "ImageSamples":
        """Take the images of IDX files in a folder, such as MNIST's or Fashion-MNIST's, see `idx.read_pairs`.

        Args:
            folder (`str` or `os.PathLike`): Holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, or .gz.
            part (`str`): "train", or "t10k" for the test images.
            kwargs: `resolution`, `channels`, `flip` and `background`; by default those of the files.
        """
        images, labels, id2label = idx.read_pairs(folder, part)
        options = {"resolution": images.shape[1], "channels": 1, **kwargs}
        return cls(list(images), labels, id2label, **options)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kept_bytes(self) -> int:
        """Memory of all images, if they are kept once they were read; else 0."""
        size = len(self) * self.channels * self.resolution**2 * 4
        return size if self._keeps and size <= KEPT_BYTES else 0

    def read(self, index: int) -> Tensor:
        """Read one image: (channels, resolution, resolution), float32 in [-1, 1].

        Raises:
            OSError: The image cannot be read.
        """
        source = self.sources[index]
        where = source.get("path") if isinstance(source, dict) else source
        where = where if isinstance(where, (str, os.PathLike)) else "of the data set"
        try:
            if isinstance(source, dict) and source.get("path") and not source.get("bytes"):
                path = os.path.abspath(source["path"])
                if not any(Path(path).is_relative_to(folder) for folder in self.folders):
                    raise OSError("the data set holds its name alone, and it is not in the data set's folder")
            return read_image(source, self.resolution, self.channels, self.background)
        except OSError as error:
            raise OSError(f"image {index} ({where}) cannot be read: {error}. Repair or remove it.") from error

    def _pixels(self, index: int) -> Tensor:
        """Return an image, read once if they are kept."""
        if not self.kept_bytes:
            return self.read(index)
        kept = self._kept  # threads that meet here may each make one; the last stays
        if kept is None:
            images = torch.empty(len(self), self.channels, self.resolution, self.resolution)
            kept = self._kept = images, torch.zeros(len(self), dtype=torch.bool)
        images, is_read = kept
        if not is_read[index]:
            images[index] = self.read(index)
            is_read[index] = True
        return images[index].clone()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):  # what ends a `for` over the samples
            raise IndexError(f"There are {len(self)} images, numbered from 0, no number {index}.")
        for offset in range(min(100, len(self))):
            other = (index + offset) % len(self)
            try:
                return self._pixels(other), self.labels[other]
            except OSError as error:
                if other not in self._skipped:
                    logger.warning(f"Skipped: {error}")
                self._skipped.add(other)
        raise OSError(
            f"{offset + 1} images in a row, from number {index}, cannot be read. The log names each of them."
        )


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: hidden, or made by macOS when it packs an archive."""
    return name.startswith(".") or name == "__MACOSX"


def ordered_labels(labels: Iterable[Any], order: str = "value") -> list[Any]:
    """Return the distinct labels in the order of their ids.

    Args:
        labels: Names of folders, or what a column holds; all of one type.
        order (`str`): `"value"` sorts texts by value where all of them are decimal numbers; `"text"` sorts texts as
            text, "10" before "2".

    Raises:
        ValueError: `order` is another word.
    """
    if order not in ("value", "text"):
        raise ValueError(f'`order` must be "value" or "text", got {order!r:.80}.')
    distinct = set(labels)
    if order == "value" and all(isinstance(label, str) and label.isdecimal() for label in distinct):
        return sorted(distinct, key=lambda label: (int(label), label))
    return sorted(distinct)


def numbering_note(id2label: dict[int, str]) -> str:
    """Return a sentence that says which id is which where that could be mistaken, else an empty text.

    Names that are numbers are, unless each is its own id.
    """
    numbers = [name.isdecimal() for name in id2label.values()]
    if not any(numbers) or (all(numbers) and all(int(name) == i for i, name in id2label.items())):
        return ""
    why = "Class ids count from 0 and differ from the names of the classes"
    if not all(numbers):
        why = "Some class names are numbers and some are not, so all are sorted as text"
    ids = [f"id {i} is {name!r:.40}" for i, name in id2label.items()]
    return f"{why}: {', '.join(ids if len(ids) <= 12 else [*ids[:10], '...', ids[-1]])}."


_INDEX = {"id2label": dict[str, str], "latent_shape": list[int], "scaling_factor": float, "flip": bool}
_INDEX |= {"shards": list[dict[str, object]]}
_CACHE_AGAIN = "Run cache_latents.py again, into another folder."


class LatentSamples(Dataset):
    """Latents cached by `examples/cache_latents.py`: mean and deviation of the VAE's output, also of mirrored images.

    All of them are read once at opening, to find damage before a run starts: up to 4 s per GB and core.

    Args:
        folder (`str` or `os.PathLike`): Holds `latents.json` and safetensors shards, which are read row by row.

    Raises:
        ValueError: The files do not belong together, or one is damaged.
        OSError: One is missing or cannot be read.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / LATENTS_NAME
        if not path.is_file():
            raise OSError(f"{folder} holds no whole latent cache, no {LATENTS_NAME}. Run cache_latents.py (again).")
        self.info = read_json(path)
        _check_types(path, self.info, _INDEX)
        shards = self.info["shards"]
        for shard in shards:
            _check_types(path, shard, {"name": str, "num_samples": int})
        names = [shard["name"] for shard in shards]
        if not names or names != sorted(set(names)) or not all(map(is_plain_name, names)):
            raise ValueError(
                f"{path} has the shards {names!r:.80}, expected plain names of files in its folder, in their order."
                f" {_CACHE_AGAIN}"
            )
        if set(self.info["id2label"]) != {str(i) for i in range(len(self.info["id2label"]))}:
            raise ValueError(
                f"{path} names the classes {', '.join(self.info['id2label'])!r:.80}, expected 0 to the last one."
                f" {_CACHE_AGAIN}"
            )
        self.id2label = {int(key): name for key, name in self.info["id2label"].items()}
        self.flip = self.info["flip"]
        self.ends = np.cumsum([shard["num_samples"] for shard in shards])
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._check_shard, shards))
        self._open: dict[int, Any] = {}

    def _check_shard(self, shard: dict[str, Any]) -> None:
        """Raise unless a shard is what the index says, and its numbers are moments and labels."""
        path, count = self.folder / shard["name"], shard["num_samples"]
        channels, *sides = self.info["latent_shape"]
        header = WeightsFile(path)
        dtype = torch.float32 if header.tensors.get("moments", ("", ()))[0] == "F32" else torch.float16
        moments = ["moments", "moments_flipped"] if self.flip else ["moments"]
        expected = dict.fromkeys(moments, (dtype, (count, 2 * channels, *sides)))
        check_tensors_of(path, {**expected, "labels": (torch.int64, (count,))}, _CACHE_AGAIN)
        config = canonical_json({key: value for key, value in self.info.items() if key != "shards"})
        if header.metadata.get("terdit.config", config) != config or shard.get("sha256") not in (
            None,
            header.metadata.get("terdit.sha256"),
        ):
            raise ValueError(f"{path} was not written with its {LATENTS_NAME}. {_CACHE_AGAIN}")
        with safe_open(path, framework="pt") as file:
            labels = file.get_tensor("labels")
            if labels.min() < 0 or labels.max() >= max(1, len(self.id2label)):
                raise ValueError(
                    f"{path}: `labels` has {int(labels.min())} to {int(labels.max())}, where {LATENTS_NAME} names"
                    f" {len(self.id2label)} classes. {_CACHE_AGAIN}"
                )
            for name in moments:
                rows = file.get_slice(name)
                if any((rows[start : start + 1024, channels:] < 0).any() for start in range(0, count, 1024)):
                    raise ValueError(f"{path}: `{name}` has a negative deviation. {_CACHE_AGAIN}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a loader's worker opens its own

    def get(self, index: int, flipped: bool = False) -> tuple[Tensor, int]:
        """Return mean and deviation of the latents, (2C, h, w) float32, and the label."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        if shard not in self._open:
            path = self.folder / self.info["shards"][shard]["name"]
            self._open[shard] = safe_open(path, framework="pt").__enter__()
        file, row = self._open[shard], index - (int(self.ends[shard - 1]) if shard else 0)
        moments = file.get_slice("moments_flipped" if flipped else "moments")[row : row + 1][0]
        return moments.float(), int(file.get_slice("labels")[row : row + 1][0])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.get(index)


class TrainingExamples(Dataset):
    """The training example at each position of a run: a sample, noise, time and label, drawn from (seed, position).

    Args:
        samples: (tensor, label) by index, with `flip`: `ImageSamples`, `LatentSamples`, ...; or a `ShardedStream`.
        seed (`int`): Of the run.
        latent_shape (`tuple[int, ...]`): (C, h, w), the shape of the noise.
        num_classes (`int`): The null label's number.
        class_dropout_prob (`float`): How often the null label replaces the sample's.
        continuous_time (`bool`): `time` is a float32 in [0, 1), for flow matching, instead of an int in [0, 1000).
        logit_normal (`tuple[float, float]`, *optional*): Mean and standard deviation of the logit of `time`, whose
            distribution is uniform without it (https://arxiv.org/abs/2403.03206, section 3.1).

    Raises:
        ValueError: There are no samples, `class_dropout_prob` is not in [0, 1], or the deviation is not positive.
    """

    def __init__(
        self,
        samples: Any,
        seed: int,
        latent_shape: tuple[int, ...],
        num_classes: int,
        class_dropout_prob: float = 0.1,
        continuous_time: bool = False,
        logit_normal: tuple[float, float] | None = None,
    ):
        if hasattr(samples, "__len__") and not len(samples):
            raise ValueError(f"`samples` holds none, got {samples!r:.80}. Pass at least one.")
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` must be a probability, 0 to 1, got {class_dropout_prob}.")
        if logit_normal is not None and not logit_normal[1] > 0:
            raise ValueError(f"`logit_normal` must be a mean and a positive deviation, got {logit_normal}.")
        self.samples, self.seed, self.latent_shape, self.num_classes = samples, seed, latent_shape, num_classes
        self.class_dropout_prob, self.continuous_time = class_dropout_prob, continuous_time
        self.logit = NormalDist(*logit_normal) if logit_normal else None
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.example(position, *self._sample(position))

    def _sample(self, position: int) -> tuple[Tensor, int]:
        epoch, offset = divmod(position, len(self.samples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, sample_order(len(self.samples), self.seed, epoch)
        index = int(self._order[offset])
        if isinstance(self.samples, LatentSamples):
            return self.samples.get(index, self._flips(position))
        sample, label = self.samples[index]
        return sample.flip(-1) if self._flips(position) else sample, label

    def stream(self, batches: Iterable[Sequence[int]]) -> Iterator[dict[str, Tensor]]:
        """Yield collated batches of a stream, whose samples come in the order of their positions."""
        batches, lookahead = itertools.tee(batches)
        samples = self.samples.samples(itertools.chain.from_iterable(lookahead))
        for positions in batches:
            batch = []
            for position, (sample, label) in zip(positions, itertools.islice(samples, len(positions)), strict=True):
                batch.append(self.example(position, sample.flip(-1) if self._flips(position) else sample, label))
            yield default_collate(batch)

    def example(self, position: int, sample: Tensor, label: int) -> dict[str, Any]:
        """Return a sample with what the position adds: `samples`, `class_labels`, `noise`, `time`.

        `posterior_noise` is added where the latent is yet to be drawn from the sample.
        """
        time = self._draw("timestep", position)
        if self.logit is not None:
            time = (1 + math.tanh(self.logit.inv_cdf(max(time, 2**-54)) / 2)) / 2  # the sigmoid
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
        return draw(self.seed, stream, position)


def _check_types(path: Path, found: dict[str, Any], hints: dict[str, Any]) -> None:
    """Raise a `ValueError` unless an object of a JSON file has these keys, with values of these types."""
    for key, hint in hints.items():
        if not fits(found.get(key), hint, 1) or (key == "latent_shape" and len(found[key]) != 3):
            kind = inspect.formatannotation(hint)
            raise ValueError(f"{path} has {key}={found.get(key)!r:.80}, expected {kind}. {_CACHE_AGAIN}")


class LatentCodec:
    """Encodes training data to the latents that the model works on, and decodes samples; pixels pass unchanged.

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
        """Return (C, h, w), the shape of the latents of images of that size."""
        if self.cache:
            channels, height, width = self.cache["latent_shape"]
            return channels, height, width
        if self.vae is None:
            return channels, resolution, resolution
        size = resolution // 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        return self.vae.config["latent_channels"], size, size

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn `samples` of a batch to float32 latents; its `posterior_noise` draws them from what the VAE says."""
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
        """Turn latents to images in [0, 1], (B, C, H, W) float32."""
        if self.vae is not None:
            latents = self.vae.decode((latents / self.scale).to(self.vae.dtype), return_dict=False)[0].float()
        return (latents / 2 + 0.5).clamp(0, 1)


def open_dataset(name: str, config_name: str | None = None, split: str = "train", streaming: bool = False) -> Any:
    """Load a data set with `datasets`: a name on the Hub, a folder, also one of `save_to_disk`, or one parquet file.

    Raises:
        ValueError: There is no such data set or split, or its files are damaged.
    """
    with _train_extra():
        from datasets import load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError

    path, files = ("parquet", name) if name.endswith(".parquet") else (name, None)
    has_splits = Path(name, "dataset_dict.json").is_file()
    try:
        if has_splits or Path(name, "state.json").is_file():
            dataset = load_from_disk(os.path.join(name, split) if has_splits else name)
            return dataset.to_iterable_dataset(max(1, len(dataset.cache_files))) if streaming else dataset
        return load_dataset(path, config_name, data_files=files, split=split, streaming=streaming)
    except (OSError, ValueError, DatasetsError, RuntimeError) as error:  # the last at a data set that brings a script
        raise ValueError(
            f"{name!r} (config {config_name}, split {split!r}) cannot be loaded: {str(error).rstrip('.')}. Check"
            " name, config and split."
        ) from error


def _with_images(dataset: Any, image_column: str, label_column: str | None) -> Any:
    """Return a data set, streamed or not, with undecoded images; raise a `ValueError` unless it has the columns."""
    from datasets import Image

    columns = list(dataset.features)
    asked = {"image_column": (image_column, ""), "label_column": (label_column, ", or none to train without classes")}
    for name, (column, advice) in asked.items():
        if column is not None and column not in columns:
            raise ValueError(
                f"The data set has no column {column!r}; its columns are {', '.join(columns)}. Pass one of these as"
                f" {name}{advice}."
            )
    feature = dataset.features[image_column]
    if isinstance(feature, dict):  # bytes and path of each image, as files hold them
        return dataset
    if not isinstance(feature, Image) and feature.dtype not in ("string", "binary"):
        raise ValueError(
            f"Column {image_column!r} of the data set holds {feature.dtype}, not images; its columns are"
            f" {', '.join(columns)}. Pass the one of the images as image_column."
        )
    return dataset.cast_column(image_column, Image(decode=False))


def _check_labels(labels: Sequence[Any], names: Sequence[str] | None = None) -> None:
    """Raise a `ValueError` at the first row of a data set without a label, or with one that is no class."""
    for row, label in enumerate(labels):
        if names is None:
            right = isinstance(label, (int, float, str)) and type(label) is type(labels[0]) and label == label  # NaN
        else:
            right = isinstance(label, int) and 0 <= label < len(names)
        if not right:
            expected = f"0 to {len(names) - 1}" if names else f"one like that of row 0, {labels[0]!r:.80}"
            raise ValueError(
                f"Row {row} of the data set has the label {label!r:.80}, expected {expected}. Take a split with"
                " labels, or leave such rows out."
            )


def _folders_of(name: str | os.PathLike | None) -> list[str]:
    """Return where the rows of a data set may name files: where it was loaded from, and where `datasets` unpacks."""
    from datasets import config

    folders = [HF_HUB_CACHE, str(config.HF_DATASETS_CACHE), str(config.DOWNLOADED_DATASETS_PATH)]
    own = [] if name is None else [os.path.dirname(name) if os.path.isfile(name) else os.fspath(name)]
    return [os.path.abspath(folder) for folder in folders + own]


def stream_samples(
    num_shards: int,
    read_shard: Callable[[int], Any],
    positions: Iterable[int],
    seed: int,
    shard_sizes: dict[int, int],
) -> Iterator[Any]:
    """Yield the rows at rising positions of an endless stream: shards, and rows within each, in seeded order.

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
                order = permutation(size, seed, f"order of shard {shard}", epoch)
                while position is not None and position < start + size:
                    yield rows[int(order[position - start])]
                    position = next(wanted, None)
            start += size
        if start == epoch_start:
            raise ValueError(
                f"The stream holds no samples in its {num_shards} shards. Take another data set or split."
            )


class ShardedStream:
    """A streamed data set in an order that is a function of the seed (`stream_samples`), one shard in memory.

    Args:
        dataset (`datasets.IterableDataset`): From `load_dataset(..., streaming=True)`.
        image_column (`str`): Images.
        label_column (`str` or `None`): A `ClassLabel`, so that the labels are known before the data is; `None` for
            images without classes.
        seed (`int`): Of the order.
        name (`str` or `os.PathLike`, *optional*): What `open_dataset` was given.
        kwargs: `resolution`, `channels`, `flip` and `background` of `ImageSamples`.

    Raises:
        ValueError: A column is missing, the labels are not a `ClassLabel`, or, on access, a row has none.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        label_column: str | None,
        seed: int,
        name: str | os.PathLike | None = None,
        **kwargs: Any,
    ):
        from datasets import ClassLabel

        if dataset.features is None:
            raise ValueError("This stream does not say its columns' types. Load it without --streaming.")
        self.dataset = _with_images(dataset, image_column, label_column)
        feature = dataset.features.get(label_column)
        if label_column is not None and not isinstance(feature, ClassLabel):
            raise ValueError(
                f"Streaming needs labels of type ClassLabel, column {label_column!r} is {feature}. Load it without"
                " --streaming."
            )
        self.image_column, self.label_column, self.seed = image_column, label_column, seed
        self.id2label = dict(enumerate(feature.names)) if feature is not None else {}
        self.flip = kwargs["flip"]
        self.kwargs = {**kwargs, "folders": _folders_of(name)}
        self.shard_sizes: dict[int, int] = {}  # what a resumed run needs to find its place without reading

    def read_shard(self, index: int) -> ImageSamples:
        """Return all samples of a shard, in the order of the file."""
        rows = list(self.dataset.shard(num_shards=self.dataset.num_shards, index=index))
        images = [row[self.image_column] for row in rows]
        if self.label_column is None:
            return ImageSamples(images, [0] * len(rows), {}, **self.kwargs, keep=False)
        labels = [row[self.label_column] for row in rows]
        _check_labels(labels, list(self.id2label.values()))
        return ImageSamples(images, labels, self.id2label, **self.kwargs, keep=False)

    def samples(self, positions: Iterable[int]) -> Iterator[tuple[Tensor, int]]:
        """Yield (image, label) at each of the rising positions."""
        return stream_samples(self.dataset.num_shards, self.read_shard, positions, self.seed, self.shard_sizes)
