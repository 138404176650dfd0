"""The programs behind `terdit train`, `train-lora`, `cache-latents`, `evaluate` and `app`: the files of `examples/`.

A wheel carries them in this folder. In a checkout they are found where they are.
"""

from pathlib import Path


_EXAMPLES = Path(__file__).parents[3] / "examples"
if not Path(__file__).with_name("train_terdit.py").exists() and _EXAMPLES.is_dir():
    __path__.append(str(_EXAMPLES))
