"""The checkpoints that come with this package."""

from pathlib import Path

from diffusers.utils import logging


logger = logging.get_logger(__name__)

_ROOT = Path(__file__).parent
BUNDLED = tuple(sorted(path.parent.name for path in _ROOT.glob("*/model_index.json")))


def bundled(name: str = "digits") -> Path:
    """Folder of a bundled checkpoint, for [`TerDiTPipeline.from_pretrained`].

    Args:
        name (`str`): `"digits"`: 8x8 handwritten digits; `"emoji"`: 32x32 faces by name; `"fashion"`: 28x28 pieces of
            clothing by name. See their READMEs.

    Raises:
        ValueError: No such checkpoint.
    """
    if name not in BUNDLED:
        raise ValueError(f"No bundled checkpoint {name!r}; there are {', '.join(map(repr, BUNDLED))}.")
    return _ROOT / name


def resolve_model(model: str) -> str:
    """Return what `from_pretrained` takes: a folder or Hub id as it is, a bundled checkpoint's folder for its name.

    Args:
        model (`str`): As a user gives it on a command line.

    Raises:
        OSError: A path of a file, or of a folder that does not exist.
        ValueError: Neither a path nor a Hub id, and no bundled checkpoint's name.
    """
    path = Path(model)
    if model and path.is_dir():
        if model in BUNDLED:
            logger.warning(f"The folder {model} here is used, not the bundled checkpoint of that name.")
        return model
    if path.is_file():
        raise NotADirectoryError(f"{model} is a file. Pass the folder of a saved pipeline.")
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
        raise FileNotFoundError(f"No file {model} is here. Check its path; a model is a folder or a Hub id.")
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"{model} is not a folder. Pass that of a saved pipeline, or a Hub id.")
    if "/" not in model and model not in BUNDLED:
        known = ", ".join(BUNDLED)
        raise ValueError(f"{model!r} is no folder here, no Hub id (owner/name), and no bundled checkpoint ({known}).")
    return model if "/" in model else str(bundled(model))
