"""The folder that is exported: the transformer's graph, and the configs that a sampler needs."""

import os
from pathlib import Path

from ..pipelines.pipeline_terdit import TerDiTPipeline
from ..storage.saving import replacing, scrub_paths
from .graph import trace
from .to_onnx import write_onnx
from .to_openvino import write_openvino


# Writer and file of each format, named as Optimum names them.
FORMATS = {"onnx": (write_onnx, "model.onnx"), "openvino": (write_openvino, "openvino_model.xml")}


def export_pipeline(pipe: TerDiTPipeline, folder: str | os.PathLike, format: str) -> Path:
    """Write a pipeline's transformer for other software, with the configs of the pipeline and its components.

    The VAE's weights are not written: decode latents with diffusers.

    Args:
        pipe ([`TerDiTPipeline`]): Packed, float32, on the CPU. It stays as it is.
        folder (`str` or `os.PathLike`): Made if it does not exist. It holds `transformer/model.onnx`, or
            `transformer/openvino_model.xml` with its `.bin`; and `model_index.json` with the names of the labels,
            `scheduler/scheduler_config.json`, `transformer/config.json`.
        format (`str`): "onnx" or "openvino".

    Returns:
        `pathlib.Path`: The file of the transformer.

    Raises:
        ValueError: Another format, or a model that cannot be written in it, see [`trace`] and [`write_onnx`].
        ImportError: A package of the extra `export` is missing.
        OSError: The folder cannot be written; what was there before is still there.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be {' or '.join(map(repr, FORMATS))}, got {format!r}.")
    write, name = FORMATS[format]
    folder = Path(folder)
    with replacing(folder, folder / "transformer" / "pipeline.saving") as partial:
        pipe.save_config(partial)
        for component in ("transformer", "scheduler", "vae"):
            if getattr(pipe, component) is not None:
                getattr(pipe, component).save_config(partial / component)
        scrub_paths(partial)
        write(trace(pipe.transformer), partial / "transformer" / name)
    return folder / "transformer" / name
