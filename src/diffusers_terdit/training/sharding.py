"""Models sharded over processes with FSDP2, and how to read their tensors."""

from typing import Any

import torch
from torch import Tensor, nn

from ..models.transformer_terdit import TerDiTTransformer2DModel


def shard_model(model: TerDiTTransformer2DModel, device_type: str) -> None:
    """Shard a model over all processes, in place, block by block (FSDP2): parameters, gradients, optimizer state.

    Everything stays float32, the gathered weights too: a weight gathered in bfloat16 would ternarize differently from
    the float32 one that is exported. The forward pass sees whole matrices, so their mean is the right one.

    Args:
        model ([`TerDiTTransformer2DModel`]): Before an optimizer holds its parameters; on its device.
        device_type (`str`): `"cuda"`, `"cpu"`, ...
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def full_tensor(tensor: Any) -> Tensor:
    """Return the whole of a tensor that may be sharded; if it is, every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_tensor(tensor: Any) -> Tensor:
    """Return this process's part of a tensor that may be sharded, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard_like(tensor: Tensor, target: Any) -> Tensor:
    """Return a whole tensor as `target` is: this process's part of it, where that is sharded."""
    if not hasattr(target, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)


def call_full(module: nn.Module, *args: Tensor) -> Any:
    """Call a part of a model with whole parameters, outside the forward pass of the model, where they are sharded."""
    parameters = {name: full_tensor(parameter.detach()) for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, parameters, args)
