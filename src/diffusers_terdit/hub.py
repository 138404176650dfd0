"""What this package tells diffusers and the Hub about itself."""

from . import host
from .layers import TernaryLinear
from .models.transformer_terdit import TerDiTBlock, TerDiTTransformer2DModel
from .pipelines.pipeline_terdit import TerDiTPipeline


def register() -> None:
    """Let `DiffusionPipeline` and `AutoModel` find this package's classes, in folders and Hub repositories."""
    host.register(
        __package__, classes=(TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear), blocks=(TerDiTBlock,)
    )
