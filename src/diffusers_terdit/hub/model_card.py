"""The model card, README.md: metadata in YAML, then Markdown.

The generated part stands between two marks and is written anew by every push. Everything else in the card, metadata
too, belongs to its author and is kept.
"""

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import yaml_dump
from PIL import Image

from ..storage.weights import ORIGINAL, PACKED_SUFFIX, SCALE_SUFFIX


BEGIN = "<!-- diffusers-terdit: written anew by every push, up to the closing mark -->"
END = "<!-- /diffusers-terdit -->"
PICTURES = "card_images"  # folder of the repository
SMALLEST_SIDE = 128  # pixels of a picture in a card
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def human_bytes(size: float) -> str:
    """12345678 -> "12.3 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def model_card(
    model: Any,
    name: str,
    facts: Mapping[str, Any] | None = None,
    images: Mapping[str, str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    load_arguments: Mapping[str, Any] | None = None,
) -> str:
    """Text of a README.md.

    Args:
        model ([`TerDiTPipeline`], [`TerDiTTransformer2DModel`] or [`TernaryLinear`]): What the card is about.
        name (`str`): Repository or folder to load it from, also the title.
        facts (`dict`, *optional*): How it was trained, row by row.
        images (`dict[str, str]`, *optional*): Paths of pictures, relative to the card, by caption.
        license (`str`, *optional*): Identifier as on the Hub. Only the caller knows what data and origin allow.
        base_model (`str`, *optional*): Hub id of what it was made from; default the one it was converted or loaded
            from, where that is known.
        load_arguments (`dict`, *optional*): Arguments of `from_pretrained` besides the name: `revision`, `variant`.
    """
    transformer = getattr(model, "transformer", model)
    config = transformer.config
    is_layer = "in_features" in config
    ternary = is_layer or config["ternary"]
    tags = ["terdit", *(["ternary", "1.58-bit"] if ternary else []), *([] if is_layer else ["class-conditional"])]
    metadata = {
        "library_name": "diffusers",
        # The Hub has no task for images from labels; of its tasks this one asks for no text.
        "pipeline_tag": "unconditional-image-generation" if transformer is not model else None,
        "license": license,
        "base_model": base_model or _origin(model, name),
        "tags": [*tags, "diffusers"],
    }
    arguments = "".join(f", {key}={value!r}" for key, value in (load_arguments or {}).items() if value is not None)
    sections = [f"# {name}", _description(model, ternary)]
    if images:
        sections.append("\n".join(f"![{_one_line(caption)}]({path})" for caption, path in images.items()))
    sections += ["```python\n" + _snippet(model, f"{json.dumps(name)}{arguments}") + "\n```", _sizes(model)]
    if facts:
        rows = [f"| {_one_line(key)} | {_one_line(value)} |" for key, value in facts.items()]
        sections.append("\n".join(["## Training", "", "| | |", "| --- | --- |", *rows]))
    original = config.get(ORIGINAL)
    if original:
        repo_id = original["repo_id"]
        source = f" in [{repo_id}](https://huggingface.co/{repo_id})" if repo_id else ""
        rows = [f"| {file} | `{sha}` |" for file, sha in original["sha256"].items()]
        what = "The weights that training started from were" if facts else "The weights were"
        text = f"{what} converted from files of TerDiT's authors{source}:"
        sections.append("\n".join(["## Original", "", text, "", "| file | sha256 |", "| --- | --- |", *rows]))
    return _assemble(metadata, "\n\n".join([BEGIN, *sections, END]) + "\n")


def merge_cards(
    generated: str,
    existing: str | None,
    where: str = "README.md",
    overrides: Iterable[str] = (),
    append: bool = False,
) -> str:
    """An existing card with what it lacks: its author's text and metadata stay, the generated part is renewed.

    A text without the marks is its author's alone. Tags are united; any other metadata of the existing card is kept.

    Args:
        generated (`str`): What `model_card` gives.
        existing (`str`, *optional*): The card that is there.
        where (`str`): Name of the existing one, for errors.
        overrides (`Iterable[str]`): Metadata that the caller asked for: taken from the generated card.
        append (`bool`): Put the generated part behind a text without marks, instead of leaving it out.

    Raises:
        ValueError: The metadata of the existing card is not YAML.
    """
    if existing is None or not existing.strip():
        return generated
    new, new_text = _split(generated, "the generated card")
    old, old_text = _split(existing, where)
    merged = {**new, **old, **{key: new[key] for key in overrides if key in new}}
    old_tags = old.get("tags") or []
    old_tags = [old_tags] if isinstance(old_tags, str) else old_tags
    merged["tags"] = [*old_tags, *(tag for tag in new.get("tags", []) if tag not in old_tags)]
    begin, end = old_text.find(BEGIN), old_text.find(END)
    if 0 <= begin < end:
        text = old_text[:begin] + new_text.strip() + old_text[end + len(END) :]
    elif append and old_text.strip():
        text = f"{old_text.rstrip()}\n\n{new_text.strip()}\n"
    else:
        text = old_text if old_text.strip() else new_text
    if merged == old:  # its comments and order stay, too
        return existing[: len(existing) - len(old_text)] + text
    return _assemble(merged, text)


def own_text(card: str | None, where: str = "README.md") -> str:
    """What a card holds besides metadata and the generated part."""
    text = _split(card or "", where)[1]
    begin, end = text.find(BEGIN), text.find(END)
    return (text[:begin] + text[end + len(END) :] if 0 <= begin < end else text).strip()


def _split(card: str, where: str) -> tuple[dict[str, Any], str]:
    """Metadata and text."""
    found = _FRONT_MATTER.match(card)
    if not found:
        return {}, card
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata at the top of {where} is not YAML: {error}. Correct it first.") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"The metadata at the top of {where} must be `key: value` lines. Correct it first.")
    return metadata or {}, card[found.end() :]


def _assemble(metadata: Mapping[str, Any], text: str) -> str:
    kept = {key: value for key, value in metadata.items() if value is not None}
    gap = "" if text.startswith(("\n", "\r")) else "\n"
    return f"---\n{yaml_dump(kept, sort_keys=False).strip()}\n---\n{gap}{text}"


def _one_line(value: Any) -> str:
    """For a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _origin(model: Any, name: str) -> str | None:
    """Hub id of what a model was converted or loaded from, where that is sure."""
    original = getattr(model, "transformer", model).config.get(ORIGINAL)
    if original:
        return original["repo_id"]
    path = str(model.config.get("_name_or_path") or "")
    if path == name or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or Path(path).exists():
        return None
    # A folder that is gone looks like a repository; what is in the cache is one.
    files = ("model_index.json", "config.json", "transformer/config.json")
    return path if any(isinstance(try_to_load_from_cache(path, file), str) for file in files) else None


def _description(model: Any, ternary: bool) -> str:
    transformer = getattr(model, "transformer", model)
    config = transformer.config
    kind = "ternary" if ternary else "full-precision"
    if "in_features" in config:
        return f"A ternary linear layer, {config['in_features']:,} inputs to {config['out_features']:,} outputs."
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers = f"{config['num_layers']} layers of width {width:,}, {config['num_classes']:,} classes"
    method = " ([TerDiT](https://arxiv.org/abs/2405.14854): weights -1, 0 or +1, and a scale)" if ternary else ""
    if transformer is model:
        return f"A {kind} class-conditional diffusion transformer{method}: {layers}."
    factor = model.vae_scale_factor
    side = config["sample_size"] * factor
    pixels = {1: "grey pixels", 3: "RGB pixels"}.get(
        config["in_channels"], f"{config['in_channels']} channels, no VAE"
    )
    space = pixels if model.vae is None else "latents of a VAE"
    return (
        f"Images of {side} x {side} pixels from class labels, by a {kind} class-conditional diffusion"
        f" transformer{method}: {layers}, {space}. For diffusers, with the package diffusers-terdit."
    )


def _snippet(model: Any, arguments: str) -> str:
    """Python that loads and runs what is in the repository."""
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
        label = repr(labels[0]) if labels else "0"
        if model.vae is None and config["in_channels"] not in (1, 3):
            use = [f'latents = pipe([{label}], output_type="latent").images']
        else:
            use = [f"image = pipe([{label}]).images[0]", 'image.save("sample.png")']
        use += [f"# {len(labels):,} labels, by name or id: pipe.labels"] if labels else []
    torch_line = [] if variable == "pipe" else ["import torch"]
    return "\n".join([*torch_line, f"from diffusers_terdit import {name}", "", load, *use])


def _sizes(model: Any) -> str:
    """A table of what the weights take."""
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


def read_text(path: Path) -> str:
    """A card in a file.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # with the line ends of its author
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Correct it first.") from error


def encode_pictures(
    images: Mapping[str, Image.Image] | Sequence[Image.Image] | None,
) -> tuple[dict[str, str], dict[str, bytes]]:
    """PNG files for a card: paths by caption, and bytes by path. Small images are enlarged without smoothing.

    Raises:
        ValueError: Something else than an image.
    """
    images = {} if images is None else images
    by_caption = images if isinstance(images, Mapping) else {f"sample {i + 1}": im for i, im in enumerate(images)}
    paths: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for index, (caption, image) in enumerate(by_caption.items()):
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"`images` must hold PIL images, as a list or by caption, got {type(image).__name__} for {caption!r}."
            )
        factor = -(-SMALLEST_SIDE // min(image.size))
        if factor > 1:
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "png", optimize=True)
        paths[str(caption)] = f"{PICTURES}/{index:02d}.png"
        files[paths[str(caption)]] = buffer.getvalue()
    return paths, files
