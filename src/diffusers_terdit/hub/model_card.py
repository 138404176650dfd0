"""The model card, README.md: metadata in YAML, then Markdown.

Every push renews the part between two marks. Everything else in the card, metadata too, stays as its author wrote it.
"""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, RepoCard, try_to_load_from_cache
from PIL import Image

from ..storage.configs import ORIGINAL
from ..storage.weights import PACKED_SUFFIX, SCALE_SUFFIX
from .known_files import PICTURES, open_inside


BEGIN = "<!-- diffusers-terdit: written anew by every push, up to the closing mark -->"
END = "<!-- /diffusers-terdit -->"
SMALLEST_SIDE = 128  # pixels of a picture in a card


@dataclass(frozen=True)
class CardOptions:
    """What a model card says beyond what the model itself tells.

    Args:
        license (`str`, *optional*): Identifier as on the Hub. Only the caller knows what data and origin allow.
        base_model (`str`, *optional*): Hub id of what the model was made from; by default the repository that it was
            converted or loaded from, where that is known.
        images (`list` or `dict` of `PIL.Image.Image`, *optional*): Pictures to upload; the keys are captions.
        files (`dict[str, str]`, *optional*): Paths, relative to the card, of pictures that are there, by caption.
        facts (`dict`, *optional*): How the model was trained, row by row.

    Raises:
        ValueError: `images` holds something else.
    """

    license: str | None = None
    base_model: str | None = None
    images: Mapping[str, Image.Image] | Sequence[Image.Image] | None = None
    files: Mapping[str, str] | None = None
    facts: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for caption, image in self._by_caption().items():
            if not isinstance(image, Image.Image):
                raise ValueError(
                    f"`images` must hold PIL images, as a list or by caption, got {type(image).__name__} for"
                    f" {caption!r}."
                )

    def _by_caption(self) -> Mapping[str, Image.Image]:
        images = self.images or {}
        return images if isinstance(images, Mapping) else {f"sample {i + 1}": im for i, im in enumerate(images)}

    def paths(self) -> dict[str, str]:
        """Return the paths of all pictures in the repository, by caption."""
        made = {str(caption): f"{PICTURES}/{i:02d}.png" for i, caption in enumerate(self._by_caption())}
        return {**(self.files or {}), **made}

    def encoded(self) -> dict[str, bytes]:
        """Return the `images` as PNG files, by path; small ones are enlarged without smoothing."""
        encoded = {}
        for caption, image in self._by_caption().items():
            factor = -(-SMALLEST_SIDE // min(image.size))
            if factor > 1:
                image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "png", optimize=True)
            encoded[self.paths()[str(caption)]] = buffer.getvalue()
        return encoded


def human_bytes(size: float) -> str:
    """Return a number of bytes in words: 12345678 -> "12.3 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def printable(text: str) -> str:
    """Return text, such as a name in a file, with what a terminal would obey or not show written as Python does."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def model_card(model: Any, name: str, options: CardOptions, **load_arguments: Any) -> str:
    """Return the text of a README.md.

    Args:
        model ([`TerDiTPipeline`], [`TerDiTTransformer2DModel`] or [`TernaryLinear`]): What the card is about.
        name (`str`): Repository or folder to load it from, also the title.
        options ([`CardOptions`]): What the model does not tell.
        load_arguments: Arguments of `from_pretrained` besides the name, such as `revision`; `None` is left out.
    """
    transformer = getattr(model, "transformer", model)
    config = transformer.config
    is_layer = "in_features" in config
    ternary = is_layer or config["ternary"]
    tags = [
        "terdit",
        *(["ternary", "1.58-bit"] if ternary else []),
        *([] if is_layer or _is_unconditional(config) else ["class-conditional"]),
    ]
    metadata: dict[str, Any] = {
        "library_name": "diffusers",
        # The Hub has no task for images from labels; of its tasks this one asks for no text.
        "pipeline_tag": "unconditional-image-generation" if transformer is not model else None,
        "license": options.license,
        "base_model": options.base_model or _origin(model, name),
        "tags": [*tags, "diffusers"],
    }
    arguments = "".join(f", {key}={value!r}" for key, value in load_arguments.items() if value is not None)
    sections = [f"# {printable(name)}", _description(model, ternary)]
    if pictures := options.paths():
        sections.append("\n".join(f"![{_one_line(caption)}]({path})" for caption, path in pictures.items()))
    sections += ["```python\n" + _snippet(model, f"{json.dumps(name)}{arguments}") + "\n```", _sizes(model)]
    if options.facts:
        rows = [f"| {_one_line(key)} | {_one_line(value)} |" for key, value in options.facts.items()]
        sections.append("\n".join(["## Training", "", "| setting | value |", "| --- | --- |", *rows]))
    original = config.get(ORIGINAL)
    if original:
        repo_id = original["repo_id"]
        source = f" in [{repo_id}](https://huggingface.co/{repo_id})" if repo_id else ""
        rows = [f"| {file} | `{sha}` |" for file, sha in original["sha256"].items()]
        what = "The weights that training started from were" if options.facts else "The weights were"
        text = f"{what} converted from files of TerDiT's authors{source}:"
        sections.append("\n".join(["## Original", "", text, "", "| file | sha256 |", "| --- | --- |", *rows]))
    return f"---\n{CardData(**metadata).to_yaml()}\n---\n\n" + "\n\n".join([BEGIN, *sections, END]) + "\n"


def read_card(path: Path) -> RepoCard:
    """Return the card in a file.

    Raises:
        OSError: It cannot be read, or only through a link.
        ValueError: It is no card, see `parse_card`.
    """
    with open_inside(path.parent, path.name) as file:
        return parse_card(file.read(), path)


def parse_card(content: bytes, where: str | os.PathLike) -> RepoCard:
    """Return the card that a file holds.

    Args:
        content (`bytes`): The file.
        where (`str` or `os.PathLike`): What the message calls it.

    Raises:
        ValueError: It is not UTF-8, or its metadata is not YAML of `key: value` lines.
    """
    try:
        return RepoCard(content.decode())
    except Exception as error:  # of YAML, whose package only huggingface_hub imports; or a key that is no string
        raise ValueError(f"{where} cannot be read as a model card: {error}. Correct it first.") from error


def merge_cards(generated: str, existing: RepoCard | None, options: CardOptions, append: bool = False) -> str:
    """Return an existing card with its generated part renewed, and with the metadata that it lacks.

    Its author's text and metadata stay; only a license and a base model in `options` replace theirs. Tags are united.
    A text without the marks is its author's alone.

    Args:
        generated (`str`): What `model_card` returns.
        existing ([`~huggingface_hub.RepoCard`], *optional*): The card that is there.
        options ([`CardOptions`]): Those of the generated card.
        append (`bool`): Put the generated part behind a text without marks, instead of leaving it out.
    """
    if existing is None:
        return generated
    new, merged = RepoCard(generated), copy(existing)
    given = {key: value for key in ("license", "base_model") if (value := getattr(options, key))}
    tags = existing.data.get("tags", [])
    tags = tags if isinstance(tags, list) else [tags]
    tags = [*tags, *(tag for tag in new.data["tags"] if tag not in tags)]
    merged.data = CardData(**{**new.data.to_dict(), **existing.data.to_dict(), **given, "tags": tags})
    around = _around(existing.text)
    if around:
        merged.text = new.text.strip().join(around)
    elif not existing.text.strip():
        merged.text = new.text
    elif append:
        merged.text = f"{existing.text.rstrip()}\n\n{new.text.strip()}\n"
    return str(merged)


def own_text(card: RepoCard | None) -> str:
    """Return what a card holds besides metadata and the generated part."""
    text = "" if card is None else card.text
    return "".join(_around(text) or text).strip()


def _around(text: str) -> tuple[str, str] | None:
    """Return the text before and after the generated part, or `None` where there is no such part."""
    begin, end = text.find(BEGIN), text.find(END)
    return (text[:begin], text[end + len(END) :]) if 0 <= begin < end else None


def _one_line(value: Any) -> str:
    """Return the text of a table's cell."""
    return printable(" ".join(str(value).split())).replace("|", "\\|")


def _origin(model: Any, name: str) -> str | None:
    """Return the Hub id of what a model was converted or loaded from, where that is sure."""
    original = getattr(model, "transformer", model).config.get(ORIGINAL)
    if original:
        return original["repo_id"]
    path = str(model.config.get("_name_or_path") or "")
    if path == name or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or Path(path).exists():
        return None
    # A folder that is gone looks like a repository; what is in the cache is one.
    files = ("model_index.json", "config.json", "transformer/config.json")
    return path if any(isinstance(try_to_load_from_cache(path, file), str) for file in files) else None


def _is_unconditional(config: Mapping[str, Any]) -> bool:
    """Whether a network knows neither classes nor a null label."""
    return config["num_classes"] == 1 and not config["class_dropout_prob"]


def _description(model: Any, ternary: bool) -> str:
    transformer = getattr(model, "transformer", model)
    config = transformer.config
    kind = "ternary" if ternary else "full-precision"
    if "in_features" in config:
        return f"A ternary linear layer, {config['in_features']:,} inputs to {config['out_features']:,} outputs."
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers = f"{config['num_layers']} layers of width {width:,}"
    conditioning, labels = "unconditional", ""
    if not _is_unconditional(config):
        layers += f", {config['num_classes']:,} classes"
        conditioning, labels = "class-conditional", " from class labels"
    method = " ([TerDiT](https://arxiv.org/abs/2405.14854): weights -1, 0 or +1, and a scale)" if ternary else ""
    if transformer is model:
        return f"A {kind} {conditioning} diffusion transformer{method}: {layers}."
    factor = model.vae_scale_factor
    side = config["sample_size"] * factor
    pixels = {1: "grey pixels", 3: "RGB pixels"}.get(
        config["in_channels"], f"{config['in_channels']} channels, no VAE"
    )
    space = pixels if model.vae is None else "latents of a VAE"
    return (
        f"Images of {side} x {side} pixels{labels}, by a {kind} {conditioning} diffusion"
        f" transformer{method}: {layers}, {space}. For diffusers, with the package diffusers-terdit."
    )


def _snippet(model: Any, arguments: str) -> str:
    """Return Python that loads and runs what is in the repository."""
    name, config = type(model).__name__, getattr(model, "transformer", model).config
    variable = "pipe" if hasattr(model, "transformer") else "layer" if "in_features" in config else "transformer"
    load = f"{variable} = {name}.from_pretrained({arguments})"
    if variable == "layer":
        use = [f"output = layer(torch.randn(1, {config['in_features']}))  # (1, {config['out_features']})"]
    elif variable == "transformer":
        shape = f"1, {config['in_channels']}, {config['sample_size']}, {config['sample_size']}"
        use = [f"noise = transformer(torch.randn({shape}), torch.tensor([999]), torch.tensor([0])).sample"]
    else:
        labels = list(model.labels)
        label = "" if _is_unconditional(config) else f"[{labels[0]!r}]" if labels else "[0]"
        if model.vae is None and config["in_channels"] not in (1, 3):
            use = [f'latents = pipe({label}{", " if label else ""}output_type="latent").images']
        else:
            use = [f"image = pipe({label}).images[0]", 'image.save("sample.png")']
        defaults = model.sampling_defaults
        use += [f"# by default {defaults['num_inference_steps']} steps, guidance {defaults['guidance_scale']:g}"]
        use += [f"# {len(labels):,} labels, by name or id: pipe.labels"] if labels else []
    torch_line = [] if variable == "pipe" else ["import torch"]
    return "\n".join([*torch_line, f"from diffusers_terdit import {name}", "", load, *use])


def _sizes(model: Any) -> str:
    """Return a table of the bytes that the weights take."""
    transformer = getattr(model, "transformer", model)
    here: dict[str, list[int]] = {"ternary weights": [0, 0], "their scales": [0, 0], "other weights": [0, 0]}
    packed = 0
    for module in transformer.modules():
        ternary = SCALE_SUFFIX in module._parameters
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            kind = "other weights"
            if ternary and name in ("weight", PACKED_SUFFIX):
                kind = "ternary weights"
            elif name == SCALE_SUFFIX:
                kind = "their scales"
            count = parameter.numel() * (4 if name == PACKED_SUFFIX else 1)
            here[kind][0] += count
            here[kind][1] += parameter.numel() * parameter.element_size()
            packed += count // 4 if kind == "ternary weights" else 0
    vae = getattr(model, "vae", None)
    if vae is not None:
        parameters = list(vae.parameters())
        here["VAE"] = [sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)]
    here = {kind: row for kind, row in here.items() if row[0]}
    here["together"] = [sum(row[i] for row in here.values()) for i in range(2)]
    lines = ["## Size", "", "| | number | here | as float16 |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {kind} | {count:,} | {human_bytes(size)} | {human_bytes(2 * count)} |"
        for kind, (count, size) in here.items()
    ]
    if packed and transformer.config["weight_format"] == "float":
        lines += ["", f"The ternary weights are float here, to train on; packed, they take {human_bytes(packed)}."]
    return "\n".join(lines)
