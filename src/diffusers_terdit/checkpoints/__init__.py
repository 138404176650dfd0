"""The checkpoints that come with this package."""

from pathlib import Path


def bundled(name: str = "digits") -> Path:
    """Folder of a bundled checkpoint, for [`TerDiTPipeline.from_pretrained`].

    Args:
        name (`str`): `"digits"`: 8x8 handwritten digits; `"emoji"`: 32x32 faces by name. See their READMEs.

    Raises:
        ValueError: No such checkpoint.
    """
    root = Path(__file__).parent
    names = sorted(path.parent.name for path in root.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"No bundled checkpoint {name!r}; there are {', '.join(map(repr, names))}.")
    return root / name
