"""Metrics: statistics, scores, files of samples, references and networks."""

import numpy as np
import torch
from message_table import Fixed, Row, edit
from safetensors.torch import save_file
from torch import nn

from diffusers_terdit import evaluation
from diffusers_terdit.evaluation import inception
from diffusers_terdit.evaluation.digits import digits_classifier


IMAGES = np.arange(6 * 2 * 2, dtype=np.uint8).reshape(6, 2, 2, 1)
PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"
AGAIN = "Write or download it again."
INF = torch.tensor([[1.0, 2.0], [float("inf"), 0.0], [3.0, 1.0]])
TWO = torch.tensor([[1.0, 2.0], [0.5, 0.0], [3.0, 1.0]])


class Net(nn.Module):
    """What `give` makes of the images."""

    def __init__(self, give=lambda images: images.flatten(1), channels=1):
        super().__init__()
        self.give, self.channels = give, channels

    def forward(self, images):
        return self.give(images)


def statistics(images=IMAGES, **options):
    return evaluation.image_statistics(images, options.pop("network", None) or Net(), **options)


def counted(*rows):
    found = evaluation.GaussianStatistics(2)
    for row in rows:
        found.update(row)
    return found


def moments(mean, covariance):
    return evaluation.GaussianStatistics.from_moments(mean, covariance, 9)


def saved(metadata=None, **changes):
    """Load statistics, after a change of their file."""

    def provoke(w):
        statistics().save(w.tmp / "x.safetensors")
        edit(w.tmp / "x.safetensors", metadata, **changes)
        evaluation.ImageStatistics.load(w.tmp / "x.safetensors")

    return provoke


def file_of(text, load):
    def provoke(w):
        (w.tmp / "x").write_bytes(text)
        load(w.tmp / "x")

    return provoke


def foreign(w):
    save_file({"a": torch.zeros(1)}, w.tmp / "x", {"format": "pt"})
    evaluation.ImageStatistics.load(w.tmp / "x")


def adm(**arrays):
    def provoke(w):
        np.savez(w.tmp / "x.npz", **arrays)
        evaluation.ImageStatistics.from_adm(w.tmp / "x.npz", Net())

    return provoke


def pickled(thing):
    def provoke(w):
        torch.save(thing, w.tmp / "x.pth")
        inception.InceptionV3(w.tmp / "x.pth")

    return provoke


def npz(damage, **arrays):
    def provoke(w):
        np.savez(w.tmp / "x.npz", **arrays)
        data = (w.tmp / "x.npz").read_bytes()
        (w.tmp / "x.npz").write_bytes(damage(data))
        evaluation.open_samples(w.tmp / "x.npz")

    return provoke


def npy(damage):
    def provoke(w):
        np.save(w.tmp / "x.npy", IMAGES)
        data = (w.tmp / "x.npy").read_bytes()
        (w.tmp / "x.npy").write_bytes(damage(data))
        evaluation.open_samples(w.tmp / "x.npy")

    return provoke


# fmt: off
ROWS = [
    # moments
    Row(lambda w: evaluation.GaussianStatistics(0), "got 0", "must be at least 1"),
    Row(lambda w: moments(torch.zeros(2), torch.eye(3)), "(2,) and (3, 3)", "are a mean (D,) and a covariance (D, D)"),
    Row(lambda w: moments(torch.tensor([0.0, float("nan")]), torch.eye(2)), Fixed("NaN or infinity"),
        "The mean or the covariance holds", "Compute them again from finite features."),
    Row(lambda w: moments(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "up to 0.5", "is not symmetric",
        "Compute it again from the features."),
    Row(lambda w: moments(torch.zeros(2), torch.eye(2)).update(TWO), "of 9 rows", "take no more rows",
        "Count all rows with new ones."),
    Row(lambda w: counted(TWO[:, :1]), "(3, 1)", "must be (N, 2)"),
    Row(lambda w: counted(INF), "rows 1,", "hold NaN or infinity", "Leave them out, or look at what made them."),
    Row(lambda w: counted().mean, Fixed("no features"), "There is no mean", "call `update` first"),
    Row(lambda w: counted(TWO[:1]).covariance, "got 1", "needs at least 2 rows"),
    Row(lambda w: evaluation.frechet_distance(TWO, TWO[:, :1]), "2 and 1", "takes features of one width"),
    Row(lambda w: evaluation.frechet_distance(TWO[0], TWO), "(2,)", "must be a tensor (N, D)"),
    Row(lambda w: evaluation.frechet_distance(TWO.numpy(), TWO), "ndarray", "must be a tensor (N, D)"),
    Row(lambda w: evaluation.frechet_distance(TWO, moments(torch.zeros(2), -torch.eye(2))), "variance of -1",
        "This is no covariance", "Compute it again from the features."),

    # scores
    Row(lambda w: evaluation.InceptionScore(0), "got 0", "must be at least 1"),
    Row(lambda w: evaluation.inception_score(torch.ones(5)), "(5,)", "must be (N, K)"),
    Row(lambda w: evaluation.inception_score(None), "NoneType", "must be (N, K)"),
    Row(lambda w: evaluation.inception_score(torch.full((2, 2), 0.9)), "it sums to 1.8", "is no set of probabilities",
        "Pass the softmax of logits."),
    Row(lambda w: evaluation.InceptionScore().value, Fixed("no images"), "There is no Inception Score",
        "call `update` first"),
    Row(lambda w: evaluation.precision_and_recall(TWO, TWO, neighbors=0), "0 and 2048", "must be at least 1"),
    Row(lambda w: evaluation.precision_and_recall(TWO, TWO[:, :1]), "(3, 2) and (3, 1)",
        "take features (N, D) and (M, D)"),
    Row(lambda w: evaluation.precision_and_recall(TWO, None), "(3, 2) and NoneType",
        "take features (N, D) and (M, D)"),
    Row(lambda w: evaluation.precision_and_recall(TWO, TWO), "got 3", "3 neighbors need at least 4 samples"),

    # images and networks
    Row(lambda w: digits_classifier()(torch.ones(2, 3, 8, 8)), "(2, 3, 8, 8)", "takes images (B, 1, 8, 8)"),
    Row(lambda w: statistics(None), "NoneType", "must hold uint8 images (N, H, W, C)"),
    Row(lambda w: statistics(IMAGES / 2), "float64 (6, 2, 2, 1)", "must hold uint8 images (N, H, W, C)"),
    Row(lambda w: statistics(IMAGES[:0]), "(0, 2, 2, 1)", "holds no images"),
    Row(lambda w: statistics(np.zeros((2, 3, 8, 8), np.uint8)), "(2, 3, 8, 8)",
        "must have 1 to 4 channels in its last dimension", "transpose it with (0, 2, 3, 1)"),
    Row(lambda w: evaluation.image_statistics(IMAGES, print), "builtin_function_or_method",
        "`network` must be a torch.nn.Module"),
    Row(lambda w: statistics(batch_size=0), "0 and 50000", "`batch_size` must be at least 1"),
    Row(lambda w: statistics(IMAGES[:1]), "got 1", "need at least 2 images"),
    Row(lambda w: statistics(network=Net(channels=2)), "takes 2 channels", "the images have 1", "Convert them."),
    Row(lambda w: statistics(batch_size=3, progress=lambda starts, total: starts[:1]), "3 of 6 images arrived",
        "must hand on all 2 batches"),
    Row(lambda w: evaluation.compare(statistics(name="a"), statistics(name="b")), "a (sha256",
        "were seen by two networks", "make one of them again"),
    Row(lambda w: evaluation.fingerprint(IMAGES, 0), "got 0", "must be at least 1"),
    Row(lambda w: statistics(network=Net(lambda images: {"logits": images})), "a dict of logits",
        "must give a tensor or a dict with `features`"),
    Row(lambda w: statistics(network=Net(lambda images: images)), "(6, 1, 2, 2)", "must be (6, D) for 6 images"),

    # files of statistics and references
    Row(lambda w: evaluation.ImageStatistics.load(w.tmp / "x"), "TMP/x", "There is no file",
        "`ImageStatistics.save` writes one", error=FileNotFoundError),
    Row(file_of(b"text", evaluation.ImageStatistics.load), "TMP/x", "is no readable safetensors file",
        "Remove it and make it again.", error=OSError),
    Row(foreign, "its format is 'pt'", "TMP/x holds no image statistics",
        "Pass a file that `ImageStatistics.save` wrote."),
    Row(saved({"version": "2"}), "version '2'", "this package reads '1'", "Make it again."),
    Row(saved(vectors=torch.zeros(6, 4)), "TMP/x.safetensors", "its digest differs", "Make it again."),
    Row(lambda w: evaluation.ImageStatistics.from_adm(w.tmp / "x", Net()), "TMP/x", "There is no file",
        "Download the reference file, or correct the path.", error=FileNotFoundError),
    Row(adm(mu=np.zeros(4)), "TMP/x.npz", "only one of `mu` and `sigma`"),
    Row(file_of(b"text", lambda path: evaluation.ImageStatistics.from_adm(path, Net())), "TMP/x",
        "is no whole .npz file", "Download it again.", error=OSError),
    Row(adm(x=np.zeros(4)), "TMP/x.npz", "neither `arr_0` nor `mu` and `sigma`"),
    Row(adm(arr_0=IMAGES, mu=np.zeros(9), sigma=np.eye(9)), "TMP/x.npz has 9 numbers", "gives 4",
        "Pass the network that made it."),
    Row(adm(arr_0=IMAGES, mu=np.full(4, 99.0), sigma=np.eye(4)), "TMP/x.npz", "was made by another network",
        "Pass the network that made it."),
    Row(lambda w: inception.InceptionV3(w.tmp / "x"), "TMP/x", "There is no file", PUBLISHED, error=FileNotFoundError),
    Row(file_of(b"text", inception.InceptionV3), "TMP/x", "is no readable file of tensors", PUBLISHED, error=OSError),
    Row(pickled([1]), "a list", "TMP/x.pth holds no state dict", PUBLISHED),
    Row(pickled({"a": torch.zeros(1)}), "TMP/x.pth", "does not hold FID's Inception", PUBLISHED),
    Row(lambda w: inception.InceptionV3.forward(None, torch.ones(1, 1, 8, 8)), "(1, 1, 8, 8)",
        "takes images (B, 3, H, W)"),

    # files of samples
    Row(lambda w: evaluation.open_samples(w.tmp / "x"), "TMP/x", "There is no file",
        "Write it with `numpy.save` or `numpy.savez`.", error=FileNotFoundError),
    Row(file_of(b"text", evaluation.open_samples), "b'text'", "is neither a .npz nor a .npy file",
        "Write it with `numpy.save` or `numpy.savez`."),
    Row(npz(lambda data: data[:2] + b"xx" + data[4:], arr_0=IMAGES), "TMP/x.npz", "no member at byte 0", AGAIN,
        error=OSError),
    Row(npz(lambda data: data, images=IMAGES), "only images.npy", "has no `arr_0`",
        "Write it with `numpy.savez(path, images)`."),
    Row(npy(lambda data: data[:-1]), "TMP/x.npy", "its images take 24 bytes, it holds 23", AGAIN, error=OSError),
    Row(npy(lambda data: data[:6] + b"\x09\x00" + data[8:]), "TMP/x.npy", "its array has no readable header", AGAIN,
        error=OSError),
]
