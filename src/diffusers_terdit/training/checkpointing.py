"""Checkpoints that are whole or absent, of one process or of many."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..storage.saving import new_file, new_folder, partial_path
from .sharding import full_tensor


CHECKPOINT_PREFIX = "checkpoint-"
STATE_NAME = "training_state.json"


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The whole `checkpoint-N` folders in `output_dir`, by N."""
    found = [path for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*") if (path / STATE_NAME).is_file()]
    return sorted((p for p in found if re.fullmatch(rf"{CHECKPOINT_PREFIX}\d+", p.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(CHECKPOINT_PREFIX))


def rotate_checkpoints(output_dir: str | os.PathLike, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; `None` keeps all."""
    for path in checkpoints(output_dir)[: -limit if limit else None] if limit else []:
        # Renamed first, so that a kill in the middle leaves no half checkpoint.
        with partial_path(path) as doomed:
            os.replace(path, doomed)


def cut_log(path: str | os.PathLike, step: int) -> None:
    """Keep the lines of a JSONL log up to a step: a resumed run writes the later ones again. The last may be torn."""
    path = Path(path)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            kept += [f"{line}\n"] if json.loads(line)["step"] <= step else []
    with new_file(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def save_checkpoint(
    folder: str | os.PathLike,
    model: ModelMixin,
    ema_model: ModelMixin,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    is_main_process: bool = True,
) -> None:
    """Write a resumable state: whole float tensors by name, whatever number of processes trained or sharded them.

    Files: `model.safetensors` (raw weights), `config.json`, `ema.safetensors`, `optimizer.safetensors` and
    `training_state.json`.
    Every process calls it, because gathering sharded tensors takes all of them; the main one writes, from CPU memory,
    one file after the other.

    Args:
        folder (`str` or `os.PathLike`): `checkpoint-N`; written beside it first, then renamed.
        model ([`~diffusers.ModelMixin`]): Not wrapped by DDP; its parameters may be sharded by `fully_shard`.
        ema_model ([`~diffusers.ModelMixin`]): Its average.
        optimizer (`torch.optim.Optimizer`): Over `model`'s parameters.
        state (`dict`): What else to keep, as JSON: the step, the batch size.
        is_main_process (`bool`): Whether this process writes.

    Raises:
        OSError: The disk is full or not writable; nothing is left behind.
    """
    parts = {
        "model": model.state_dict(),
        "ema": ema_model.state_dict(),
        "optimizer": _optimizer_tensors(model, optimizer),
    }
    with contextlib.ExitStack() as stack:
        partial = stack.enter_context(new_folder(folder)) if is_main_process else None
        for name, tensors in parts.items():
            gathered = {}
            for key, tensor in tensors.items():
                whole = full_tensor(tensor.detach())
                if partial is not None:
                    gathered[key] = whole.cpu().contiguous()
            if partial is not None:
                save_file(gathered, partial / f"{name}.safetensors")
        if partial is not None:
            model.save_config(partial)
            (partial / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(
    folder: str | os.PathLike, model: nn.Module, ema_model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore in place what `save_checkpoint` wrote, on any number of processes, and return its `state`.

    Sharded parameters take their part of each tensor from the file, one tensor at a time.

    Raises:
        OSError: The folder is no whole checkpoint.
        ValueError: The tensors are not those of this model and optimizer.
    """
    folder = Path(folder)
    if not (folder / STATE_NAME).is_file():
        raise OSError(f"{folder} is no checkpoint: it has no {STATE_NAME}. Pass a `checkpoint-N` folder.")
    for name, module in (("model", model), ("ema", ema_model)):
        restore_tensors(folder / f"{name}.safetensors", module.state_dict())
    names = _parameter_names(model, optimizer)
    parameters = dict(model.named_parameters())
    values: dict[int, dict[str, Tensor]] = {}
    with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
        indices = {name: index for index, name in enumerate(names)}
        for key in file.keys():  # noqa: SIM118
            name, _, kind = key.rpartition(".")
            if name not in indices:
                raise ValueError(
                    f"{folder}: `{name}` is no parameter of this optimizer. Resume with the options it was trained"
                    " with."
                )
            tensor = file.get_tensor(key)
            values.setdefault(indices[name], {})[kind] = _part(tensor, parameters[name]) if tensor.ndim else tensor
    # The hyperparameters are the running optimizer's.
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names in the order in which the optimizer's state dict counts parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}.{kind}": value
        for index, values in state.items()
        for kind, value in values.items()
        if isinstance(value, Tensor)
    }


def _part(tensor: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor, placed as `like`."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def restore_tensors(path: Path, targets: dict[str, Tensor]) -> None:
    """Copy the tensors of a file into `targets`, in place, one at a time; a sharded target takes its part."""
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(targets):
            odd = sorted(set(file.keys()) ^ set(targets))
            raise ValueError(
                f"{path} is not of this model: {len(odd)} tensors differ, such as `{odd[0]}`. Resume with the options"
                " it was trained with."
            )
        for name, target in targets.items():
            tensor = file.get_tensor(name)
            if tensor.shape != target.shape:
                raise ValueError(
                    f"{path}: `{name}` is {list(tensor.shape)}, the model's is {list(target.shape)}. Resume with the"
                    " options it was trained with."
                )
            target.copy_(_part(tensor, target))
