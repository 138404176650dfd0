"""How good images are, next to reference images: the five measures of the ADM evaluation, on any feature network.

`image_statistics` sends images through a network once, in slices, and keeps what the measures need; `compare` gives
Fréchet distances, Inception Score, precision and recall of two such statistics. With `inception.InceptionV3` these are
FID, sFID and the rest as papers print them; with another network they compare models with each other, not with papers.

Source: https://github.com/openai/guided-diffusion, evaluations/evaluator.py. Two differences: precision and recall use
float64 distances where ADM uses float16 ones, and a probability of 0 adds 0 to the Inception Score where ADM's gives
NaN.
"""

from .gaussian import GaussianStatistics, frechet_distance
from .images import ImageStatistics, compare, fingerprint, image_statistics, network_name
from .samples import open_samples
from .scores import InceptionScore, inception_score, precision_and_recall


__all__ = [
    "GaussianStatistics",
    "ImageStatistics",
    "InceptionScore",
    "compare",
    "fingerprint",
    "frechet_distance",
    "image_statistics",
    "inception_score",
    "network_name",
    "open_samples",
    "precision_and_recall",
]
