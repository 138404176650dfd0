"""The one reader of a stranger's images: regular files of formats that start no program, read whole or refused."""

import io
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor


# Pillow goes by content, not by name, and for PostScript it would run Ghostscript.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that `read_image` reads, by Pillow's names, as far as this build of it has them."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def suffixes() -> set[str]:
    """Return the endings of the files that `read_image` reads, such as ".png"."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats()}


def read_image(source: Any, resolution: int, channels: int = 3, background: str = "white") -> Tensor:
    """Read the middle square of an image, scaled: (channels, resolution, resolution), float32 in [-1, 1].

    Args:
        source: A path, a `PIL.Image.Image`, an array (h, w) or (h, w, 1 | 3 | 4) of uint8, or a dict with `"bytes"` or
            `"path"`, as the undecoded images of `datasets` are.
        resolution (`int`): Pixels.
        channels (`int`): 1 or 3.
        background (`str`): Color behind transparent pixels, as Pillow names it: `"white"`, `"#808080"`.

    Raises:
        OSError: It is no regular file, of another format, damaged, or larger than Pillow takes for an attack.
        ValueError: Pillow knows no such color.
    """
    ImageColor.getrgb(background)  # here, so that no picture is blamed for it
    try:
        if isinstance(source, dict):
            source = io.BytesIO(source["bytes"]) if source.get("bytes") else source["path"]
        if isinstance(source, (str, os.PathLike)) and not stat.S_ISREG(Path(source).stat().st_mode):
            raise OSError("this is no regular file")
        if isinstance(source, np.ndarray):
            source = Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source)
        if isinstance(source, Image.Image):
            return prepare_image(source, resolution, channels, background)
        with Image.open(source, formats=formats()) as image:
            if (
                Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS
            ):  # where Pillow but warns
                raise OSError(f"it has {image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
            return prepare_image(image, resolution, channels, background)
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise anything at damaged bytes; Pillow's raise ten kinds of errors
        raise OSError(f"{type(error).__name__}: {error}") from error


def prepare_image(image: Image.Image, resolution: int, channels: int = 3, background: str = "white") -> Tensor:
    """Return the middle square of an image, scaled to (channels, resolution, resolution), float32 in [-1, 1].

    It is turned as its EXIF data say, and shown on a background where it is transparent: the colors that are stored
    under transparent pixels are anything. Large images are halved by boxes before one bicubic step, as in the training
    data of ADM and DiT. Source: https://github.com/openai/guided-diffusion (MIT).
    """
    image = ImageOps.exif_transpose(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = _eight_bits(image.crop((left, top, left + side, top + side)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("L" if channels == 1 else "RGB")
    while image.width >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32).reshape(resolution, resolution, channels)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 16-bit or float tones, which Pillow would clip, in 8 bits; others as they are."""
    if image.mode == "F":  # 0 to 1
        tones = np.asarray(image) * 255
    elif image.mode == "I" or image.mode.startswith("I;16"):
        tones = np.asarray(image) / 257
    else:
        return image
    return Image.fromarray(np.nan_to_num(tones).round().clip(0, 255).astype(np.uint8))
