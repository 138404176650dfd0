"""Averages of pixels: features of any images without a trained network, for a first number offline."""

from torch import Tensor, nn


class PixelAverages(nn.Module):
    """The colors of an image in 8 x 8 areas.

    Their Fréchet distance sees colors and layout, not what is shown: it compares runs on the same data, and is no FID.
    """

    name = "pixel averages"

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> features (B, 64 C)."""
        return nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)
