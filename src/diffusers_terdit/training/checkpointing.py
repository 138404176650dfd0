"""Resumable checkpoints: whole or absent, and the same files whatever number of processes trains or shards a model."""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..storage.saving import new_file, new_folder, partial_path
from ..storage.weights import (
    WeightsFile,
    canonical_json,
    check_tensors_of,
    differing_keys,
    read_json,
    state_dict_digest,
)
from . import log
from .sharding import local_tensor, shard_like


CHECKPOINT_PREFIX = "checkpoint-"
STATE_NAME = "training_state.json"


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Return whether a folder is a whole checkpoint of a trainer."""
    return (Path(folder) / STATE_NAME).is_file()


def find(output_dir: str | os.PathLike) -> list[Path]:
    """Return the whole `checkpoint-N` folders in `output_dir`, sorted by N."""
    found = [path for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*") if is_checkpoint(path)]
    return sorted((p for p in found if re.fullmatch(rf"{CHECKPOINT_PREFIX}\d+", p.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(CHECKPOINT_PREFIX))


def rotate(output_dir: str | os.PathLike, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; `None` and -1 keep all.

    Raises:
        ValueError: Another limit below 1.
    """
    if limit is None or limit == -1:
        return
    if limit < 1:
        raise ValueError(f"`limit` must be at least 1, or -1 to keep all checkpoints, got {limit}.")
    for path in find(output_dir)[:-limit]:
        # Renamed first, so that a kill in the middle leaves no half checkpoint.
        with partial_path(path) as doomed:
            os.replace(path, doomed)


def cut_log(path: str | os.PathLike, step: int) -> None:
    """Keep the lines of a JSONL log up to a step, because a resumed run writes the later ones again.

    A killed run may have torn the last line; it is dropped, as is any other that is no record of a step.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [f"{json.dumps(record)}\n" for record in log.read(path) if record["step"] <= step]
    with new_file(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def snapshot(
    model: ModelMixin,
    ema_model: ModelMixin | None,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    is_main_process: bool = True,
    copy: bool = True,
) -> Callable[[str | os.PathLike], None]:
    """Take a resumable state, and return what writes it into a folder.

    Every process must call this, because gathering sharded tensors takes all of them; in those other than the main one
    the function that is returned does nothing.

    Args:
        model ([`~diffusers.ModelMixin`]): Not wrapped by DDP; its parameters may be sharded by `fully_shard`.
        ema_model ([`~diffusers.ModelMixin`], *optional*): Its average. `None` where an adapter is trained: then
            `model.safetensors` holds what takes gradients alone, and there is no `ema.safetensors`.
        optimizer (`torch.optim.Optimizer`): Over `model`'s parameters.
        state (`dict`): What else to keep, as JSON: the step, the batch size.
        is_main_process (`bool`): Whether this process, of rank 0, writes.
        copy (`bool`): Whether it is a copy in CPU memory, which a thread may write while training goes on. Otherwise
            it must be written before the next step.

    Returns:
        `Callable`: Takes the folder `checkpoint-N`, written under another name, then renamed. Files: whole float
            tensors by name in `model.safetensors` (raw weights), `ema.safetensors` and `optimizer.safetensors`;
            `config.json` and `training_state.json`. Raises an `OSError` where the disk is full or not writable;
            nothing is left behind.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    written = json.dumps(state, indent=2)
    # In each file: files of several checkpoints do not mix, and an edited state is found.
    marks = {"format": "pt", "terdit.state": canonical_json(json.loads(written))}
    # Rank 0 gets everything, the others nothing.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
    parts: dict[str, dict[str, Any]] = {}
    if ema_model is None:
        parts["model"] = _trained(model)
    else:
        parts["model"] = get_model_state_dict(model, options=options)
        parts["ema"] = get_model_state_dict(ema_model, options=options)
    # torch would have an optimizer without state take a step.
    parts["optimizer"] = _optimizer_state(model, optimizer, options) if optimizer.state else {}
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model, ema_model, optimizer)} if copy else set()
    for tensors in parts.values() if is_main_process else ():
        for name, tensor in tensors.items():
            shared = tensor.untyped_storage().data_ptr() in own
            tensors[name] = tensor.detach().contiguous().clone() if shared else tensor.contiguous()
    config = model.to_json_string()

    def write(folder: str | os.PathLike) -> None:
        if not is_main_process:
            return
        with new_folder(folder) as partial:
            for name, tensors in parts.items():
                digest = {"terdit.sha256": state_dict_digest(tensors)}
                save_file(tensors, partial / f"{name}.safetensors", {**marks, **digest})
            (partial / model.config_name).write_text(config, encoding="utf-8")
            (partial / STATE_NAME).write_text(written + "\n", encoding="utf-8")

    return write


def _tensors(model: nn.Module, ema_model: nn.Module | None, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield what the next step changes in place, of sharded tensors this process' part."""
    for module in (model, ema_model):
        if module is not None:
            yield from map(local_tensor, itertools.chain(module.parameters(), module.buffers()))
    for state in optimizer.state.values():
        yield from (local_tensor(value) for value in state.values() if isinstance(value, Tensor))


class Writer:
    """Writes checkpoints on a separate thread, one after the other, while training goes on."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Call a function on the thread, once the one before it has ended; raise what that one raised."""
        self.wait()

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=run)
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was started has ended, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error


def save(
    folder: str | os.PathLike,
    model: ModelMixin,
    ema_model: ModelMixin | None,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    is_main_process: bool = True,
) -> None:
    """Write a resumable state now: `snapshot`, and what it returns. Every process must call this.

    Raises:
        OSError: The disk is full or not writable; nothing is left behind.
    """
    snapshot(model, ema_model, optimizer, state, is_main_process, copy=False)(folder)


def load(
    folder: str | os.PathLike, model: ModelMixin, ema_model: ModelMixin | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore in place what `save` wrote, on any number of processes, and return its `state`.

    The optimizer keeps its hyperparameters; only its tensors are restored.

    Raises:
        OSError: The folder is not a complete checkpoint.
        ValueError: The config or the tensors are not those of this model and optimizer, or the files are damaged or
            not of one checkpoint.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    folder = Path(folder)
    state = read_state(folder, ("model", "optimizer") if ema_model is None else ("model", "ema", "optimizer"))
    _check_config(folder, model)
    restore_tensors(folder / "model.safetensors", _trained(model) if ema_model is None else model.state_dict())
    if ema_model is not None:
        restore_tensors(folder / "ema.safetensors", ema_model.state_dict())
    # The optimizer's own tensors, which a step without gradients makes where there are none. They are overwritten in
    # place: `set_optimizer_state_dict` would hold a second set of them.
    tensors = _optimizer_state(model, optimizer, StateDictOptions(flatten_optimizer_state_dict=True))
    for tensor in tensors.values():
        tensor.zero_()  # the file has no state of a parameter that had no gradient yet
    restore_tensors(folder / "optimizer.safetensors", tensors, partial=True)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                optimizer.state[parameter][key] = tensors[f"{name}.{key}"].item()
    return state


def read_state(folder: str | os.PathLike, names: Sequence[str] = ("model", "ema", "optimizer")) -> dict[str, Any]:
    """Return the `state` that a checkpoint was saved with, after a check that these files of it belong together.

    Raises:
        OSError: The folder is not a complete checkpoint.
        ValueError: The files are damaged or not of one checkpoint.
    """
    folder = Path(folder)
    if not is_checkpoint(folder):
        raise OSError(f"{folder} is no checkpoint: it has no {STATE_NAME}. Pass a `checkpoint-N` folder.")
    state = read_json(folder / STATE_NAME)
    for name in names:
        if WeightsFile(path := folder / f"{name}.safetensors").metadata.get("terdit.state") != canonical_json(state):
            raise ValueError(
                f"{path} was not saved with this {STATE_NAME}: one of them is damaged, was changed, or is of another"
                " checkpoint. Take another one."
            )
    return state


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_config(folder: Path, model: ModelMixin) -> None:
    """Raise a `ValueError` that names what differs between the config of a checkpoint and that of a model."""
    saved, asked = read_json(folder / "config.json"), json.loads(model.to_json_string())
    if keys := differing_keys(saved, asked):
        shown = ", ".join(f"{key}={saved[key]!r:.80}, not {asked.get(key)!r:.80}" for key in keys[:5])
        raise ValueError(f"{folder} was trained with {shown}. Resume with the options it was trained with.")


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, options: Any) -> dict[str, Any]:
    """Return what an optimizer remembers as tensors by name, such as `proj_in.weight.exp_avg`; numbers are copies."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = get_optimizer_state_dict(model, optimizer, options=options)
    # bitsandbytes nests what is quantized in a dict; its tables `qmap1`, `qmap2` are constants that all weights share.
    names = {key: key.removeprefix("state.").replace(".__bnb_optimizer_quant_state__", "") for key in state}
    kept = {names[key]: value for key, value in state.items() if key.startswith("state.")}
    return {name: torch.as_tensor(value) for name, value in kept.items() if not name.endswith((".qmap1", ".qmap2"))}


@torch.no_grad()
def restore_tensors(path: Path, targets: dict[str, Tensor], partial: bool = False) -> None:
    """Copy the tensors of a safetensors file into `targets`, in place, one at a time; a sharded one takes its part.

    Args:
        path (`Path`): The file; every process reads it.
        targets (`dict[str, torch.Tensor]`): By the names in the file.
        partial (`bool`): Whether the file may lack some of them.

    Raises:
        ValueError: The names, dtypes or shapes in the file are not those of `targets`, or it is damaged.
        OSError: The file cannot be read.
    """
    expected = {name: (target.dtype, tuple(target.shape)) for name, target in targets.items()}
    check_tensors_of(
        path, expected, "Resume with the options it was trained with, or from another checkpoint.", partial
    )
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            targets[name].copy_(shard_like(file.get_tensor(name), targets[name]))
