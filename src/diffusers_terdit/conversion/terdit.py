"""Convert checkpoints of TerDiT's authors to pipelines of this package.

A published folder holds `consolidated[_ema][_ternary].00-of-01.pth` (a state dict) and `model_args.pth` (a pickled
`argparse.Namespace`). Both are read with torch's `weights_only` unpickler, which runs no code; the namespace class is
the only one it may build.
"""

import argparse
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from huggingface_hub import HfApi, RepoFile, hf_hub_download, try_to_load_from_cache
from torch import Tensor

from ..hub.errors import hub_errors
from ..hub.model_card import human_bytes
from ..models.transformer_terdit import TerDiTTransformer2DModel
from ..ops import pack_ternary, reference, ternarize
from ..pipelines.pipeline_terdit import TerDiTPipeline
from ..pipelines.schedulers import default_scheduler
from ..storage.configs import MAX_BLOCKS, ORIGINAL
from ..storage.weights import check_tensors, is_finite, load_pickle


# In the order of preference: what the authors recommend is smallest and first.
WEIGHTS_NAMES = tuple(f"consolidated{kind}.00-of-01.pth" for kind in ("_ema_ternary", "_ternary", "_ema", ""))
ARGS_NAME = "model_args.pth"
VAE_FACTOR = 8  # pixels per latent of the Stable Diffusion VAE that the authors use
GUIDANCE_CHANNELS = 3  # of 4, as the authors sample
_SIZES = {"3b": "4.2b"}  # what the arguments call the model of 4.2 billion parameters

_TOP = {
    "x_embedder": "proj_in",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "class_embed",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_BLOCK = {
    "attention.wq": "attn.to_q",
    "attention.wk": "attn.to_k",
    "attention.wv": "attn.to_v",
    "attention.wo": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "attention_norm": "norm1",
    "feed_forward.w1": "ff.gate_proj",
    "feed_forward.w2": "ff.down_proj",
    "feed_forward.w3": "ff.up_proj",
    "ffn_norm": "norm2",
    "adaLN_modulation.1": "adaln.linear",
    "adaLN_modulation.2": "adaln.norm",
}


def imagenet_labels() -> dict[str, str]:
    """The 1,000 names of ImageNet-1k by standard class id, "0" to "999"; several names of a class separated by commas.

    The file says its source and license: `imagenet1k_labels.json`.
    """
    return json.loads((files(__package__) / "imagenet1k_labels.json").read_text(encoding="utf-8"))["labels"]


def label_rows(num_classes: int) -> list[int]:
    """Class id of each row of the authors' label table.

    They trained on folders named "0" to "999" in the order of strings, so row 2 is class 10, and class 2 is row 112.
    """
    return sorted(range(num_classes), key=str)


def convert_name(name: str) -> str:
    """Name of an original module or tensor in this package: "layers.3.attention.wq.weight" and so on.

    Raises:
        ValueError: The name does not belong to a TerDiT.
    """
    module, _, leaf = name.rpartition(".")
    leaf = {"alphas": "weight_scale"}.get(leaf, leaf)
    block = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if block and block[2] in _BLOCK:
        return f"transformer_blocks.{block[1]}.{_BLOCK[block[2]]}.{leaf}"
    if module in _TOP:
        return f"{_TOP[module]}.{leaf}"
    raise ValueError(f"tensor `{name}` does not belong to a TerDiT; only files of its authors are converted")


def infer_config(state_dict: dict[str, Tensor], args: dict[str, Any], num_attention_heads: int = 32) -> dict[str, Any]:
    """Init arguments of the [`TerDiTTransformer2DModel`] that a state dict was saved from; sizes come from the
    tensors.

    Args:
        state_dict (`dict`): The original tensors; only shapes and dtypes are read.
        args (`dict`): The contents of `model_args.pth`.
        num_attention_heads (`int`): Tensors cannot tell; every published size has 32.

    Raises:
        ValueError: The tensors are not those of a TerDiT, or an option is set that this package does not have.
    """
    for option in ("rope_scaling_factor", "ntk_factor"):
        factor = args.get(option)
        if factor is not None and not (isinstance(factor, (int, float)) and factor == 1):
            raise ValueError(
                f"it was trained with {option}={reprlib.repr(factor)}, which this package does not implement; take"
                " another file"
            )

    def rows(name: str) -> int:
        if name not in state_dict:
            raise ValueError(f"tensor `{name}` is missing, so this is not a TerDiT; download the file again")
        weight = state_dict[name]
        if weight.dim() != 2 or weight.numel() == 0:
            raise ValueError(
                f"tensor `{name}` has shape {list(weight.shape)}, expected a matrix; download the file again"
            )
        return weight.shape[0] * (reference.CODES_PER_BYTE if weight.dtype == torch.uint8 else 1)

    dim = rows("x_embedder.weight")
    if isinstance(num_attention_heads, bool) or not isinstance(num_attention_heads, int) or num_attention_heads < 1:
        raise ValueError(f"`num_attention_heads` must be a positive int, got {num_attention_heads!r}")
    if dim % num_attention_heads:
        raise ValueError(f"width {dim} does not divide into {num_attention_heads} heads; pass `num_attention_heads`")
    name = args.get("model", "")
    if not isinstance(name, str):
        raise ValueError(
            f"its arguments say model={reprlib.repr(name)}, expected a name; take the {ARGS_NAME} that belongs to it"
        )
    found = re.search(r"patch(\d+)", name)
    patch_size = int(found[1][:4]) if found else 2
    in_channels = state_dict["x_embedder.weight"].shape[1] // max(patch_size, 1) ** 2
    if patch_size < 1 or in_channels < 1:
        raise ValueError(
            f"its arguments say patches of {patch_size}, which do not fit `x_embedder.weight`; take the {ARGS_NAME}"
            " that belongs to it"
        )
    image_size = args.get("image_size", 256)
    if isinstance(image_size, bool) or not isinstance(image_size, int) or not VAE_FACTOR <= image_size <= 2**20:
        raise ValueError(
            f"its arguments say image_size={reprlib.repr(image_size)}, expected pixels; take the {ARGS_NAME} that"
            " belongs to it"
        )
    blocks = {found[1] for found in (re.match(r"layers\.(\d+)\.", name) for name in state_dict) if found}
    num_layers = len(blocks)  # a gap in the numbers shows as tensors that do not fit
    if num_layers > MAX_BLOCKS:
        raise ValueError(f"it has {num_layers} layers, more than {MAX_BLOCKS}; download the file again")
    head_dim = dim // num_attention_heads
    ffn_dim = rows("layers.0.feed_forward.w1.weight")
    kv_heads = rows("layers.0.attention.wk.weight") // head_dim
    rows("layers.0.attention.wq.weight")
    if kv_heads < 1 or num_attention_heads % kv_heads:
        raise ValueError(
            f"{num_attention_heads} heads do not divide into {kv_heads} of keys; pass `num_attention_heads`"
        )
    return {
        "sample_size": -(-image_size // VAE_FACTOR // patch_size) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": head_dim,
        "num_classes": rows("y_embedder.embedding_table.weight") - 1,
        "learn_sigma": rows("final_layer.linear.weight") == 2 * in_channels * patch_size**2,
        "qk_norm": "layers.0.attention.q_norm.weight" in state_dict,
        "num_key_value_heads": None if kv_heads == num_attention_heads else kv_heads,
        "ffn_dim": ffn_dim,
        "adaln_norm": "layers.0.adaLN_modulation.2.weight" in state_dict,
        "weight_format": "packed" if state_dict["layers.0.attention.wq.weight"].dtype == torch.uint8 else "float",
    }


def _refuse_views(state_dict: dict[str, Tensor]) -> None:
    """Raise a `ValueError` unless each tensor is one block of numbers that is its own."""
    memory: dict[int, str] = {}
    for name, tensor in state_dict.items():
        if tensor.is_nested or tensor.is_neg():
            raise ValueError(f"tensor `{name}` is nested, or a view with the signs changed; download the file again")
        if tensor.numel() and (other := memory.setdefault(tensor.untyped_storage().data_ptr(), name)) != name:
            raise ValueError(f"tensor `{name}` shares its memory with `{other}`; download the file again")


def convert_state_dict(state_dict: dict[str, Tensor], pack: bool = False) -> dict[str, Tensor]:
    """Original tensors to this package's names and label order, one at a time.

    Args:
        state_dict (`dict`): The original tensors, possibly memory-mapped; not changed.
        pack (`bool`): Ternarize and pack float weights on the way, so that they are never all in memory.

    Returns:
        `dict`: Packed weights uint8, everything else float32. A float32 tensor is the original's own memory, so that a
            memory-mapped file of 17 GB is not read into memory.

    Raises:
        ValueError: An unknown tensor, a second one of one name, one of another dtype, a packed one with a code that is
            not ternary, or NaN or infinity.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        new_name = convert_name(name)
        if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
            raise ValueError(
                f"tensor `{name}` is {tensor.dtype}, expected floats or packed codes; download the file again"
            )
        if not is_finite(tensor):
            raise ValueError(f"tensor `{name}` holds NaN or infinity; download the file again")
        is_ternary = f"{name.rpartition('.')[0]}.alphas" in state_dict and name.endswith(".weight")
        if tensor.dtype == torch.uint8:
            if not is_ternary or reference.has_invalid_code(tensor):
                raise ValueError(
                    f"tensor `{name}` is uint8 but does not hold packed ternary codes; download the file again"
                )
            new_name, new = f"{new_name}_packed", tensor.clone()
        elif is_ternary and pack:
            new_name, new = f"{new_name}_packed", pack_ternary(ternarize(tensor.float()))
        elif name == "y_embedder.embedding_table.weight" and len(tensor) == 1001:
            new = torch.empty_like(tensor, dtype=torch.float32)
            new[[*label_rows(1000), 1000]] = tensor.float()
        else:
            new = tensor.float()
        if new_name in converted:
            raise ValueError(f"tensor `{name}` is a second `{new_name}` of this package; download the file again")
        converted[new_name] = new
    return converted


class Published(NamedTuple):
    """A checkpoint in a folder or repository.

    Attributes:
        folder (`str`): Its folder there, "" for the top.
        weights_name (`str`): The file that is read of it.
        size (`str`): "600m", "4.2b", or what its arguments call it; "" if they do not say.
        resolution (`int`): Pixels of a side.
        bytes (`int`): Of the weights.
    """

    folder: str
    weights_name: str
    size: str
    resolution: int
    bytes: int


def list_checkpoints(
    path: str | os.PathLike,
    weights_name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> list[Published]:
    """List the checkpoints of TerDiT's authors in a folder or repository, of which the arguments are downloaded.

    Args:
        path (`str` or `os.PathLike`): Folder, which is searched one folder down, or Hub id.
        weights_name (`str`, *optional*): Only those with this file; default the packed EMA one where there is one.
        revision (`str`, *optional*): Of the Hub repository.
        token (`str`, *optional*): For a private one.

    Raises:
        OSError: There is none, or the folder or repository cannot be read.
        ValueError: A file of arguments holds something else.
    """
    if Path(path).is_dir():
        files = [*Path(path).glob("*.pth"), *Path(path).glob("*/*.pth")]
        sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    else:
        with hub_errors(path, revision):
            tree = HfApi().list_repo_tree(str(path), recursive=True, revision=revision, token=token)
            sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    wanted = [weights_name] if weights_name else [*WEIGHTS_NAMES]
    found = []
    for home in sorted(name.removesuffix(ARGS_NAME) for name in sizes if PurePosixPath(name).name == ARGS_NAME):
        if names := [name for name in wanted if home + name in sizes]:
            with hub_errors(path, revision):
                args = _arguments(_file(path, home + ARGS_NAME, revision=revision, token=token))
            model, side = args.get("model"), args.get("image_size")
            named = re.search(r"_(\d+[MB])_", model) if isinstance(model, str) else None
            size = named[1].lower() if named else "unknown size"
            pixels = side if isinstance(side, int) else 0
            found.append(Published(home.rstrip("/"), names[0], _SIZES.get(size, size), pixels, sizes[home + names[0]]))
    if not found:
        raise FileNotFoundError(_why_none(path, sizes, wanted))
    return found


def _why_none(path: str | os.PathLike, names: Iterable[str], wanted: list[str]) -> str:
    if alone := sorted(name for name in names if PurePosixPath(name).name in wanted):
        return f"{path} holds {alone[0]} but no {ARGS_NAME}; both are needed."
    parts = sorted(name for name in names if re.fullmatch(r"consolidated.*-of-.*\.pth", PurePosixPath(name).name))
    split = (
        f" It holds {', '.join(parts)}; model-parallel checkpoints of several parts cannot be read." if parts else ""
    )
    return (
        f"{path} holds none of {', '.join(wanted)}.{split} Pass the folder or repository that holds one, or its"
        " `weights_name`."
    )


def _choose(found: list[Published], path: str | os.PathLike, **asked: Any) -> Published:
    """Return the one checkpoint that is asked for by folder, size or resolution, or the one at the top."""
    asked = {name: value for name, value in asked.items() if value is not None}
    chosen = [one for one in found if all(getattr(one, name) == value for name, value in asked.items())]
    if len(chosen) > 1 and not asked:
        chosen = [one for one in chosen if not one.folder] or chosen
    if len(chosen) == 1:
        return chosen[0]
    listed = "; ".join(
        f"{one.folder or 'at the top'} ({one.size}, {one.resolution} px, {human_bytes(one.bytes)})" for one in found
    )
    of = f" of {', '.join(f'{name} {value}' for name, value in asked.items())}" if asked else ""
    raise FileNotFoundError(
        f"{path} holds {'several checkpoints' if chosen else 'no checkpoint'}{of}. There are: {listed}. Pass `size`"
        " and `resolution`, or the `subfolder`, of one."
    )


def _file(path: str | os.PathLike, name: str, **hub: Any) -> Path:
    """Return a file of a folder, or download it."""
    return Path(path) / name if Path(path).is_dir() else Path(hf_hub_download(str(path), name, **hub))


def _arguments(path: Path) -> dict[str, Any]:
    namespace = load_pickle(path, argparse.Namespace)
    args = vars(namespace) if isinstance(namespace, argparse.Namespace) else namespace
    if not isinstance(args, dict):
        raise ValueError(
            f"{path} holds {type(args).__name__}, expected the arguments of a training run. Download it again."
        )
    return args


def convert_original_checkpoint(
    path: str | os.PathLike,
    vae: AutoencoderKL | str | os.PathLike | None = None,
    subfolder: str | None = None,
    weights_name: str | None = None,
    weight_format: str | None = None,
    num_attention_heads: int = 32,
    revision: str | None = None,
    token: str | None = None,
    size: str | None = None,
    resolution: int | None = None,
) -> TerDiTPipeline:
    """Read a checkpoint as TerDiT's authors publish it, exactly.

    Labels become standard ImageNet ids (the authors' rows are in string order), with their names. Guidance acts on the
    first 3 channels, as the authors sample. The transformer's config records names and sha256 of the files, and the
    repository, for the card of a later `push_to_hub`.

    Args:
        path (`str` or `os.PathLike`): Folder with `consolidated[_ema][_ternary].00-of-01.pth` and `model_args.pth`, or
            the id of a Hub repository, of which the weights file and the arguments are downloaded.
        vae ([`~diffusers.AutoencoderKL`] or `str`, *optional*): The VAE, its folder or Hub id, or `"auto"` for the one
            named in `model_args.pth` (downloaded). Without it nothing else is downloaded and the pipeline gives
            latents.
        subfolder (`str`, *optional*): Folder inside `path`.
        weights_name (`str`, *optional*): File to read; default the packed EMA one where there is one.
        weight_format (`str`, *optional*): `"float"` or `"packed"`; default as in the file. Packing a float file goes
            tensor by tensor.
        num_attention_heads (`int`, defaults to 32): As in every published size; the tensors cannot tell.
        revision (`str`, *optional*): Of the Hub repository.
        token (`str`, *optional*): For a private one.
        size (`str`, *optional*): Of several checkpoints in `path` the one of this size: "600m" or "4.2b".
        resolution (`int`, *optional*): And of this one, 256 or 512 pixels.

    Returns:
        [`TerDiTPipeline`]: In float32 (or packed), on the CPU.

    Raises:
        FileNotFoundError: The folder or a file in it does not exist.
        OSError: A file cannot be read, or the repository cannot be reached.
        ValueError: The file is not a TerDiT checkpoint, or wants to run code.
    """
    if weight_format not in (None, "float", "packed"):
        raise ValueError(f'`weight_format` must be "float", "packed" or None, got {weight_format!r}.')
    place: Path | str
    if Path(path, subfolder or "").is_dir():
        place, subfolder = Path(path, subfolder or ""), None
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not Path(path).exists():
        place = str(path)
    else:
        raise FileNotFoundError(
            f"{Path(path, subfolder or '')} is not a folder. Pass that of a checkpoint, or a Hub id."
        )
    found = list_checkpoints(place, weights_name, revision, token)
    asked = {"folder": subfolder and subfolder.strip("/"), "size": size and size.lower(), "resolution": resolution}
    chosen = _choose(found, place, **asked)
    home = f"{chosen.folder}/" if chosen.folder else ""
    with hub_errors(place, revision):
        weights, arguments = (
            _file(place, home + name, revision=revision, token=token) for name in (chosen.weights_name, ARGS_NAME)
        )
    args, state_dict = _arguments(arguments), load_pickle(weights)
    if vae == "auto":
        kind = args.get("vae", "ema")
        if kind not in ("ema", "mse"):
            raise ValueError(
                f'{arguments} says vae={reprlib.repr(kind)}, expected "ema" or "mse". Pass a VAE, or its Hub id.'
            )
        vae = f"stabilityai/sd-vae-ft-{kind}"
    check_tensors(weights, state_dict)
    transformer = _with_file_name(
        weights, lambda: _convert_transformer(state_dict, args, weight_format, num_attention_heads)
    )
    original = {
        "repo_id": None if isinstance(place, Path) else place,
        "sha256": {file.name: _sha256(file) for file in (weights, arguments)},
    }
    transformer.register_to_config(**{ORIGINAL: original})
    if isinstance(vae, (str, os.PathLike)):
        with hub_errors(vae):
            if not os.path.isdir(vae) and not isinstance(try_to_load_from_cache(str(vae), "config.json"), str):
                HfApi().model_info(str(vae))  # fails at once without a network; loading would try for half a minute
            vae = AutoencoderKL.from_pretrained(vae)
    id2label = imagenet_labels() if transformer.config.num_classes == 1000 else None
    return TerDiTPipeline(transformer, default_scheduler(), vae, id2label, guidance_channels=GUIDANCE_CHANNELS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_file_name(path: Path, convert: Callable[[], Any]) -> Any:
    try:
        return convert()
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error


def _convert_transformer(
    state_dict: dict[str, Tensor], args: dict[str, Any], weight_format: str | None, num_attention_heads: int
) -> TerDiTTransformer2DModel:
    _refuse_views(state_dict)
    config = infer_config(state_dict, args, num_attention_heads)
    pack = weight_format == "packed" and config["weight_format"] == "float"
    with init_empty_weights():
        model = TerDiTTransformer2DModel(**{**config, "weight_format": "packed" if pack else config["weight_format"]})
    converted = convert_state_dict(state_dict, pack)
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in converted.items()}
    if shapes != expected:
        wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} tensors do not fit a TerDiT of these sizes, first `{name}`: found"
            f" {shapes.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}; download the file again, or"
            " pass `num_attention_heads`"
        )
    model.load_state_dict(converted, assign=True)
    if weight_format == "float":
        model.unpack()
    return model.eval()
