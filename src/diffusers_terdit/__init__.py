"""Ternary diffusion transformers (TerDiT, https://arxiv.org/abs/2405.14854) for diffusers."""

# diffusers looks these base classes up by name in the package that a model_index.json names.
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from . import hub, losses, training
from .conversion import convert_original_checkpoint
from .layers import TernaryLinear
from .models.transformer_terdit import TerDiTTransformer2DModel
from .ops import pack_ternary, ternarize, unpack_ternary
from .pipelines.pipeline_terdit import TerDiTPipeline


__version__ = "0.1.0"
__all__ = [
    "DiffusionPipeline",
    "ModelMixin",
    "SchedulerMixin",
    "TerDiTPipeline",
    "TerDiTTransformer2DModel",
    "TernaryLinear",
    "convert_original_checkpoint",
    "losses",
    "pack_ternary",
    "ternarize",
    "training",
    "unpack_ternary",
]

hub.register()
