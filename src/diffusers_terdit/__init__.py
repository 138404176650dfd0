"""Ternary diffusion transformers (TerDiT, https://arxiv.org/abs/2405.14854) for diffusers."""

# diffusers looks these base classes up by name in the package that a model_index.json names.
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from . import _diffusers, losses, training
from .conversion import convert_original_checkpoint
from .layers import TernaryLinear
from .models.transformer_terdit import TerDiTBlock, TerDiTTransformer2DModel
from .ops import pack_ternary, ternarize, unpack_ternary
from .pipelines.pipeline_terdit import TerDiTPipeline
from .quantization import TernaryConfig, TernaryMethod, TernaryQuantizer
from .remote_code import export_remote_code


__version__ = "0.2.0"
__all__ = [
    "DiffusionPipeline",
    "ModelMixin",
    "SchedulerMixin",
    "TerDiTPipeline",
    "TerDiTTransformer2DModel",
    "TernaryConfig",
    "TernaryLinear",
    "convert_original_checkpoint",
    "export_remote_code",
    "losses",
    "pack_ternary",
    "ternarize",
    "training",
    "unpack_ternary",
]

_diffusers.register(
    __name__,
    classes=(TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear),
    blocks=(TerDiTBlock,),
    quantizers={TernaryMethod.TERNARY: (TernaryConfig, TernaryQuantizer)},
)
