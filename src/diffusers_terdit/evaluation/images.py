"""What a set of images is to a network, kept in one file, and the comparison of two sets."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..storage.saving import new_file
from .gaussian import GaussianStatistics, frechet_distance
from .samples import check_images, open_samples
from .scores import InceptionScore, precision_and_recall


FORMAT = "terdit-image-statistics"


@dataclass(eq=False)
class ImageStatistics:
    """What one set of images is to one network.

    Attributes:
        count: Number of images; 0 for the moments of an ADM reference file, which does not say.
        features: Mean and covariance of the features.
        spatial: Mean and covariance of the spatial features, where the network has them.
        inception_score: Where the network has logits.
        vectors: (M, D) float32, features of the first M images, for precision and recall.
        network: Name of the network and digest of its weights.
        fingerprint: Digest of the images.
    """

    count: int
    features: GaussianStatistics
    spatial: GaussianStatistics | None
    inception_score: float | None
    vectors: Tensor
    network: str
    fingerprint: str

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a digest of itself; a file of that name is replaced when all is written."""
        path = Path(path)
        tensors = {"vectors": self.vectors.detach().to("cpu", torch.float32).contiguous()}
        counts = {}
        for name, gaussian in (("features", self.features), ("spatial", self.spatial)):
            if gaussian is not None:
                tensors[f"{name}.mean"] = gaussian.mean
                tensors[f"{name}.covariance"] = gaussian.covariance
                counts[name] = gaussian.count
        fields = {
            "count": self.count,
            "counts": counts,
            "inception_score": self.inception_score,
            "network": self.network,
            "fingerprint": self.fingerprint,
        }
        metadata = {"format": FORMAT, "version": "1", "fields": json.dumps(fields)}
        metadata["sha256"] = _file_digest(tensors, metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: str | Path) -> ImageStatistics:
        """Read what `save` wrote.

        Raises: OSError if the file does not exist or is no safetensors file; ValueError if it holds something else or
        was changed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}. `ImageStatistics.save` writes one.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise OSError(f"{path} is no readable safetensors file ({error}). Remove it and make it again.") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no image statistics: its format is {metadata.get('format')!r}. Pass a file that"
                " `ImageStatistics.save` wrote."
            )
        if metadata.get("version") != "1":
            raise ValueError(
                f"{path} is in version {metadata.get('version')!r} of its format, this package reads '1'. Make it"
                " again."
            )
        if metadata.pop("sha256", None) != _file_digest(tensors, metadata):
            raise ValueError(f"{path} was changed after it was written: its digest differs. Make it again.")
        fields = json.loads(metadata["fields"])
        gaussians = {
            name: GaussianStatistics.from_moments(tensors[f"{name}.mean"], tensors[f"{name}.covariance"], count)
            for name, count in fields.pop("counts").items()
        }
        return cls(
            features=gaussians["features"], spatial=gaussians.get("spatial"), vectors=tensors["vectors"], **fields
        )

    @classmethod
    def from_adm(
        cls,
        path: str | Path,
        network: nn.Module,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        progress: Callable[..., Iterable[int]] | None = None,
    ) -> ImageStatistics:
        """Statistics of an ADM reference file, such as `VIRTUAL_imagenet256_labeled.npz`.

        Its `mu`, `sigma`, `mu_s` and `sigma_s` are the moments; its images in `arr_0`, a part of those behind the
        moments, go through `network` for precision and recall. A file without moments is read as images, as ADM does.

        Args:
            path: The `.npz`.
            network (`torch.nn.Module`): As for `image_statistics`: the one that the moments were made with.
            batch_size (`int`, defaults to 64): Images at a time.
            device (*optional*): Where the network shall run; where it is.
            progress (*optional*): As for `image_statistics`.

        Raises: ValueError if the file holds neither, the moments do not fit together, or they lie so far from the
        features of the file's own images that another network must have made them; OSError if it cannot be read.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}. Download the reference file, or correct the path.")
        if device is None:
            device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
        features, spatial, has_images = _adm_moments(path)
        found = None
        if has_images:
            found = image_statistics(open_samples(path), network, batch_size, device, progress=progress)
        if features is None:
            if found is None:
                raise ValueError(f"{path} is no ADM reference file: it has neither `arr_0` nor `mu` and `sigma`.")
            return found
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if found is None:
            return cls(0, features, spatial, None, torch.empty(0, features.width), network_name(network), digest)
        for name, gaussian, own in (("mu", features, found.features), ("mu_s", spatial, found.spatial)):
            if gaussian is None or own is None:
                continue
            if gaussian.width != own.width:
                raise ValueError(
                    f"`{name}` of {path} has {gaussian.width} numbers, {found.network} gives {own.width}. Pass the"
                    " network that made it."
                )
            # The mean of n images strays from the mean of all by trace / n on average.
            distance, spread = float((gaussian.mean - own.mean).square().sum()), float(gaussian.covariance.trace())
            if distance > (0.05 + 10 / own.count) * spread:
                raise ValueError(
                    f"`{name}` of {path} was made by another network than {found.network}: the {own.count} images in "
                    f"the file have a mean at a squared distance of {distance:.3g}, where all vary by {spread:.3g}. "
                    "Pass the network that made it."
                )
        return replace(found, count=0, features=features, spatial=spatial, fingerprint=digest)


def image_statistics(
    images: np.ndarray,
    network: nn.Module,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    max_vectors: int = 50_000,
    name: str = "",
    progress: Callable[..., Iterable[int]] | None = None,
) -> ImageStatistics:
    """Send images through a network, in evaluation mode, and keep what `compare` needs.

    Args:
        images: uint8 (N, H, W, C): an array, a memory map (`open_samples`), or anything that has `shape` and `dtype`
            and gives an array for a slice. Each slice is read once.
        network (`torch.nn.Module`): Takes (B, C, H, W) float32 in [0, 1]; gives features (B, D), or a dict of
            `features` and, if it has them, `spatial` (B, S) and `logits` (B, K). One-channel images are repeated to
            three for a network whose `channels` is 3. It is moved to `device`.
        batch_size (`int`, defaults to 64): Images at a time.
        device: Where the network runs; the sums are on the CPU.
        max_vectors (`int`, defaults to 50,000): Features kept for precision and recall, 4 D bytes each.
        name (`str`, *optional*): What to call the network, instead of its own `name` or class.
        progress (*optional*): Wraps the batches as `tqdm` does: `progress(batches, total=...)`.

    Raises: ValueError for other arrays, fewer than 2 images, a network that gives something else, or features that
    are not finite, naming the images.
    """
    check_images(images)
    if not isinstance(network, nn.Module):
        raise ValueError(f"`network` must be a torch.nn.Module, got {type(network).__name__}.")
    if batch_size < 1 or max_vectors < 0:
        raise ValueError(f"`batch_size` must be at least 1, `max_vectors` 0, got {batch_size} and {max_vectors}.")
    count, channels = images.shape[0], images.shape[3]
    if count < 2:
        raise ValueError(f"Statistics need at least 2 images, got {count}.")
    wanted: Any = getattr(network, "channels", channels)
    if channels != wanted and (channels, wanted) != (1, 3):
        raise ValueError(f"The network takes {wanted} channels, the images have {channels}. Convert them.")

    sha = _image_hash(images)
    features = spatial = score = None
    vectors = torch.empty(0, 0)
    starts = range(0, count, batch_size)
    modes = [(module, module.training) for module in network.modules()]
    network.eval().to(device)
    try:
        for start in starts if progress is None else progress(starts, total=len(starts)):
            batch = np.array(images[start : start + batch_size], order="C")  # a copy: a memory map is read-only
            sha.update(batch.data)
            pixels = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float().div(255)  # (B, C, H, W)
            with torch.no_grad():
                outputs = _outputs(network(pixels.expand(-1, wanted, -1, -1).contiguous()), len(batch))
            if features is None:
                width = outputs["features"].shape[1]
                features = GaussianStatistics(width)
                spatial = GaussianStatistics(outputs["spatial"].shape[1]) if "spatial" in outputs else None
                score = InceptionScore() if "logits" in outputs else None
                vectors = torch.empty(min(count, max_vectors), width)
            features.update(outputs["features"])
            if spatial is not None:
                spatial.update(outputs["spatial"])
            if score is not None:
                score.update(outputs["logits"].cpu().double().softmax(1))
            kept = vectors[start : start + len(batch)]
            kept.copy_(outputs["features"][: len(kept)])
    finally:
        for module, mode in modes:
            module.training = mode
    if features is None or features.count != count:
        seen = 0 if features is None else features.count
        raise ValueError(f"`progress` must hand on all {len(starts)} batches; {seen} of {count} images arrived.")
    return ImageStatistics(
        count=count,
        features=features,
        spatial=spatial,
        inception_score=None if score is None else score.value,
        vectors=vectors,
        network=network_name(network, name),
        fingerprint=sha.hexdigest(),
    )


def compare(
    samples: ImageStatistics, reference: ImageStatistics, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """The measures of a set of samples.

    Returns:
        `dict[str, float]`: `fid` and `sfid`, Fréchet distances of features and spatial features, `inception_score`,
        `precision` and `recall`, as far as both sets have what they take. They are called FID and sFID only where
        `samples.network` is the original Inception. `device` is for precision and recall, quadratic in the images.

    Raises: ValueError for statistics of two networks, or too few images.
    """
    if samples.network != reference.network:
        raise ValueError(
            f"Samples and reference were seen by two networks, {samples.network} and {reference.network}: "
            "make one of them again."
        )
    found = {"fid": frechet_distance(samples.features, reference.features)}
    if samples.spatial is not None and reference.spatial is not None:
        found["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    if samples.inception_score is not None:
        found["inception_score"] = samples.inception_score
    if len(samples.vectors) and len(reference.vectors):
        found["precision"], found["recall"] = precision_and_recall(samples.vectors.to(device), reference.vectors)
    return found


def fingerprint(images: np.ndarray, chunk: int = 256) -> str:
    """sha256 over shape and bytes of uint8 images (N, H, W, C), read `chunk` images at a time."""
    check_images(images)
    if chunk < 1:
        raise ValueError(f"`chunk` must be at least 1, got {chunk}.")
    sha = _image_hash(images)
    for start in range(0, images.shape[0], chunk):
        sha.update(np.ascontiguousarray(images[start : start + chunk]).data)
    return sha.hexdigest()


def network_name(network: nn.Module, name: str = "") -> str:
    """`name`, or the network's own `name` or class, and a digest of its weights, whatever their device.

    A network that knows the digest of its file has it as `weights_sha256`.
    """
    digest = getattr(network, "weights_sha256", None)
    if digest is None:
        state = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
        digest = _file_digest(state, {})
    return f"{name or getattr(network, 'name', type(network).__name__)} (sha256 {digest[:12]}...)"


def _image_hash(images: np.ndarray):
    return hashlib.sha256(f"uint8 {[int(side) for side in images.shape]}".encode())


def _file_digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _outputs(outputs: Tensor | Mapping[str, Tensor], batch: int) -> Mapping[str, Tensor]:
    found = {"features": outputs} if isinstance(outputs, Tensor) else outputs
    if not isinstance(found, Mapping) or "features" not in found:
        got = f"a dict of {', '.join(map(str, found))}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"The network must give a tensor or a dict with `features`, got {got}.")
    for name in ("features", "spatial", "logits"):
        shape = tuple(found[name].shape) if name in found else (batch, 1)
        if len(shape) != 2 or shape[0] != batch or not shape[1]:
            raise ValueError(f"The network's `{name}` must be ({batch}, D) for {batch} images, got {shape}.")
    return found


def _adm_moments(path: Path) -> tuple[GaussianStatistics | None, GaussianStatistics | None, bool]:
    """Moments of features and of spatial features, where the file has them, and whether it has images."""
    moments: list[GaussianStatistics | None] = []
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
                if (mean in file.files) != (covariance in file.files):
                    raise ValueError(f"it has only one of `{mean}` and `{covariance}`")
                if mean in file.files:
                    mu, sigma = (torch.from_numpy(file[name].astype(np.float64)) for name in (mean, covariance))
                    moments.append(GaussianStatistics.from_moments(mu, sigma))
                else:
                    moments.append(None)
            return moments[0], moments[1], "arr_0" in file.files
    except ValueError as error:
        raise ValueError(f"{path} is no ADM reference file: {error}") from error
    except (EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:  # memory for what a header names
        raise OSError(f"{path} is no whole .npz file ({error}). Download it again.") from error
