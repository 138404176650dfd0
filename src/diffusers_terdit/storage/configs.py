"""Typed JSON: what a config that was read from a file may hold, before anything is built from it."""

import inspect
import math
import os
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch


ORIGINAL = "_converted_from"  # in a config: the files a model was converted from; the host passes `_...` along
MAX_BLOCKS = 1000  # of a config: each takes a millisecond to build, before the weights are read
_MAX_TIMESTEPS = 10**6  # a scheduler allocates several numbers for each
_MAX_INT = 2**31 - 1
_MAX_FLOAT = torch.finfo(torch.float32).max


def check_config(where: str | os.PathLike, config: Any, cls: type | None = None) -> None:
    """Raise a `ValueError` where a config asks for the impossible, before anything is built from it.

    Args:
        where (`str` or `os.PathLike`): File or class, for the message.
        config: What the JSON file holds.
        cls (`type`, *optional*): Class to build: the annotations of its `__init__` say what the config must hold. An
            integer is a size, 1 or more, unless the default is less.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where}: the config is {type(config).__name__}, expected an object.")
    for key, value in config.items():
        if isinstance(value, float) and _MAX_FLOAT < abs(value) < math.inf:
            raise ValueError(f"{where}: the config has {key}={value}, more than a float32 holds.")
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        limit = MAX_BLOCKS if re.search(r"layers|blocks|depth", key) else _MAX_INT
        limit = _MAX_TIMESTEPS if key == "num_train_timesteps" else limit
        if abs(value) > limit:
            shown = value if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"
            raise ValueError(f"{where}: the config asks for {key}={shown}, more than {limit}; nothing was allocated.")
    quantization = config.get("quantization_config")
    if quantization is not None and not (isinstance(quantization, dict) and "quant_method" in quantization):
        raise ValueError(
            f"{where}: the config has quantization_config={quantization!r:.80}, expected one with a `quant_method`."
        )
    if not _is_original(original := config.get(ORIGINAL)):
        raise ValueError(
            f"{where}: the config has {ORIGINAL}={original!r:.80}, expected a Hub id, and sha256 by file."
        )
    if cls is None:
        return
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    for key, parameter in inspect.signature(cls).parameters.items():
        hint, default = hints.get(key, Any), parameter.default
        value = config.get(key, default)
        if value is parameter.empty and hint is not Any:
            raise ValueError(
                f"{where}: the config has no {key}, which a {cls.__name__} needs. Download or save it again, or load"
                f" it as what it says it is: {config.get('_class_name')!r:.80}."
            )
        least = min(default, 1) if isinstance(default, int) else 1
        is_default = type(value) is type(default) and (value == default or isinstance(value, bool))
        if not is_default and not fits(value, hint, least):
            positive = int in (hint, *get_args(hint)) and least == 1
            expected = "a positive int" if positive else inspect.formatannotation(hint)
            raise ValueError(f"{where}: the config has {key}={value!r:.80}, expected {expected}.")


def _is_original(value: Any) -> bool:
    """Return whether a config says what a model was converted from as conversion does; cards repeat it."""
    if value is None:
        return True
    digests = value.get("sha256") if isinstance(value, dict) else None
    if not isinstance(digests, dict) or not fits(digests, dict[str, str], 1):
        return False
    lines = [f"{file}:{digest}" for file, digest in digests.items()]
    repo_id = value.get("repo_id")
    named = repo_id is None or (isinstance(repo_id, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id))
    return bool(named) and all(re.fullmatch(r"[\w .+-]+:[0-9a-f]{64}", line) for line in lines)


def fits(value: Any, hint: Any, least: float) -> bool:
    """Return whether a value read from JSON fits an annotation; an int must be `least` or more."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, argument, least) for argument in arguments)
    if kind is Literal:  # the type alone: diffusers' classes take choices that their annotations leave out
        return type(value) in map(type, arguments)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is dict:
        kinds = arguments or (Any, Any)
        return isinstance(value, dict) and all(
            fits(part, kind, -math.inf) for pair in value.items() for part, kind in zip(pair, kinds, strict=True)
        )
    if kind in (list, tuple, np.ndarray):  # all of them a list in JSON
        kinds = (float,) if kind is np.ndarray else tuple(a for a in arguments if a is not Ellipsis) or (Any,)
        return isinstance(value, (list, tuple)) and all(
            any(fits(item, kind, -math.inf) for kind in kinds) for item in value
        )
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)
