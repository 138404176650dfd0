"""Export trained weights: a packed pipeline folder, its card and its pictures."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from PIL import Image, ImageDraw, ImageFont

from ..hub.errors import hub_errors
from ..hub.model_card import CardOptions, merge_cards, model_card, read_card
from ..models.transformer_terdit import TerDiTTransformer2DModel
from ..pipelines.pipeline_terdit import TerDiTPipeline
from ..storage.saving import new_file, replacing
from .checkpointing import read_state
from .initialize import empty_transformer, load_transformer
from .sharding import full_tensor
from .statistics import packed_codes, ternary_statistics


@torch.no_grad()
def packed_model(model: TerDiTTransformer2DModel) -> TerDiTTransformer2DModel:
    """Return a packed copy of a float-format model, on the CPU, without a second float copy of the ternary weights."""
    if not model.config.ternary:
        raise ValueError(
            "This model is full precision (ternary=False); it has no ternary weights to pack. Save it as it is."
        )
    packed = empty_transformer(model.config, weight_format="packed")
    codes = {f"{name}.weight_packed": tensor for name, tensor in packed_codes(model).items()}
    names = packed.state_dict().keys()
    floats = {name: full_tensor(tensor).cpu() for name, tensor in model.state_dict().items() if name in names}
    packed.load_state_dict({**floats, **codes})
    return packed.eval()


@torch.no_grad()
def _copy(model: TerDiTTransformer2DModel) -> TerDiTTransformer2DModel:
    copied = empty_transformer(model.config)
    copied.load_state_dict({name: full_tensor(tensor).cpu() for name, tensor in model.state_dict().items()})
    return copied.eval()


def to_pipeline(
    transformer: TerDiTTransformer2DModel,
    scheduler: SchedulerMixin | None = None,
    vae: AutoencoderKL | None = None,
    id2label: dict[int, str] | None = None,
    sampling_defaults: dict[str, float] | None = None,
) -> TerDiTPipeline:
    """Return a pipeline of a trained model, on the CPU: ternarized and packed, or, in full precision, copied.

    Args:
        transformer ([`TerDiTTransformer2DModel`]): Float format, float32: the average of the weights. Left unchanged.
            When it is sharded, every process must call this, and each gets a pipeline.
        scheduler ([`~diffusers.SchedulerMixin`], *optional*): By default, that of what the model says it predicts.
        vae ([`~diffusers.AutoencoderKL`], *optional*): Decoder.
        id2label (`dict[int, str]`, *optional*): Label names.
        sampling_defaults (`dict`, *optional*): Steps and guidance that suit it, see [`TerDiTPipeline`].

    Raises:
        ValueError: There is no scheduler, and the model does not say what it predicts.
    """
    return TerDiTPipeline(
        transformer=packed_model(transformer) if transformer.config.ternary else _copy(transformer),
        scheduler=scheduler,
        vae=vae,
        id2label={str(key): value for key, value in id2label.items()} if id2label else None,
        sampling_defaults=sampling_defaults,
    )


def checkpoint_pipeline(folder: str | os.PathLike) -> TerDiTPipeline:
    """Return a pipeline of the averaged weights in a `checkpoint-N` folder of `examples/train_terdit.py`, on the CPU.

    Raises:
        OSError: The folder is not a complete checkpoint, or the VAE that it was trained with cannot be loaded.
        ValueError: The files are damaged, not of one checkpoint, or do not say what the model predicts.
    """
    state, model = read_state(folder), load_transformer(folder, average=True)
    if not (model.config.prediction_type or model.config.learn_sigma):
        raise ValueError(
            f"{folder} was saved by a release that did not record what the model predicts. Resume it with the newest"
            " train_terdit.py, whose checkpoints do."
        )
    vae = None
    if name := state.get("vae"):
        with hub_errors(name):
            vae = AutoencoderKL.from_pretrained(name)
    return to_pipeline(model, None, vae, state.get("id2label"), state.get("sampling_defaults"))


def save_pipeline(pipe: TerDiTPipeline, save_directory: str | os.PathLike) -> None:
    """Save a pipeline of any class into a folder that may hold other things, which stay.

    Raises:
        OSError: The disk is full or not writable; what was there before is still there.
    """
    save_directory = Path(save_directory)
    with replacing(save_directory, save_directory / "transformer" / "pipeline.saving") as partial:
        pipe.save_pretrained(partial)


def card_options(
    pipe: TerDiTPipeline, facts: Mapping[str, Any], images: Sequence[str] = (), license: str | None = None
) -> CardOptions:
    """Return what the card of a trained model says: how it was trained, and statistics of its ternary weights.

    Args:
        pipe ([`TerDiTPipeline`]): What was trained.
        facts (`dict[str, Any]`): How, row by row: data, steps, images seen, learning rate, ...
        images (`Sequence[str]`): Paths of pictures, relative to the card.
        license (`str`, *optional*): Identifier as on the Hub. Only the caller knows what the data allows.
    """
    statistics = {key: value for key, value in ternary_statistics(pipe.transformer).items() if key != "dead_layers"}
    rows = {**facts, **{key.replace("_", " "): f"{value:.4g}" for key, value in statistics.items()}}
    files = {f"samples {i + 1}" if i else "samples": path for i, path in enumerate(images)}
    return CardOptions(license, files=files, facts=rows)


def save_card(pipe: TerDiTPipeline, save_directory: str | os.PathLike, name: str, options: CardOptions) -> None:
    """Write a model card into a folder; a README.md that is there keeps its author's text and metadata.

    Args:
        pipe ([`TerDiTPipeline`]): What the card is about.
        save_directory (`str` or `os.PathLike`): See `save_pipeline`.
        name (`str`): Repository or folder to load it from, also the title.
        options ([`CardOptions`]): See `card_options`.

    Raises:
        ValueError: The README.md that is there cannot be read.
    """
    path = Path(save_directory) / "README.md"
    existing = read_card(path) if path.exists() else None
    with new_file(path) as partial:
        partial.write_bytes(merge_cards(model_card(pipe, name, options), existing, options).encode())


def image_grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    min_side: int = 64,
    padding: int = 8,
    scale: int | None = None,
    per_label: int = 1,
) -> Image.Image:
    """Lay out images in rows on white; small ones are enlarged by a whole factor without smoothing.

    Args:
        images (`Sequence[PIL.Image.Image]`): Of one size, row by row.
        columns (`int`, *optional*): Images per row, or blocks of a label's images; default about as many as rows.
        labels (`Sequence[str]`, *optional*): Written above the images, or blocks, in as many lines as they need.
        min_side (`int`): Pixels; images with a shorter side are enlarged to at least this.
        padding (`int`): Pixels between cells.
        scale (`int`, *optional*): Factor to enlarge by, whatever their size.
        per_label (`int`): How many successive images are of one label; they are a block of the grid.
    """
    if not images:
        raise ValueError(f"A grid needs at least one image, got {images!r}.")
    blocks = math.ceil(len(images) / per_label)
    across = per_label if per_label <= 8 else math.ceil(math.sqrt(per_label))  # images in a row of a block
    down = math.ceil(per_label / across)
    shape = math.sqrt(blocks * down / across)
    columns = columns or max(1, math.ceil(shape) if per_label == 1 else round(shape))
    rows = math.ceil(blocks / columns)
    factor = scale or max(1, math.ceil(min_side / min(images[0].size)))
    width, height = images[0].width * factor, images[0].height * factor

    font, line_height = ImageFont.load_default(size=11), 14
    block_width = across * (width + padding) - padding
    most = max(block_width, 160)  # a longer word is broken
    lines = [_wrap(str(label), font, block_width, most) for label in labels or [""] * blocks]
    block_width = max([block_width, *(math.ceil(font.getlength(line)) for texts in lines for line in texts)])
    titles = [max(map(len, lines[i : i + columns])) * line_height for i in range(0, blocks, columns)]
    block_height = down * (height + padding)
    size = (columns * (block_width + padding) + padding, rows * block_height + sum(titles) + padding)
    grid = Image.new("RGB", size, "white")
    draw, y = ImageDraw.Draw(grid), padding
    for row in range(rows):
        for column in range(min(columns, blocks - row * columns)):
            block, x = row * columns + column, padding + column * (block_width + padding)
            draw.multiline_text((x, y), "\n".join(lines[block]), fill="black", font=font, spacing=3)
            for i, image in enumerate(images[block * per_label : (block + 1) * per_label]):
                enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                at = x + i % across * (width + padding), y + titles[row] + i // across * (height + padding)
                grid.paste(enlarged, at)
        y += titles[row] + block_height
    return grid


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, most: float) -> list[str]:
    """Break a text at spaces into lines of a width, and words that are wider than `most` anywhere."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if font.getlength(lines[-1] + character) > most:
                lines.append("")
            lines[-1] += character
    return lines
