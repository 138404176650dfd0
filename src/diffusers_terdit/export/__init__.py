"""Write models for other software: the transformer as a graph whose ternary layers keep two bits per weight."""

from .graph import trace
from .pipeline import FORMATS, export_pipeline
from .to_onnx import write_onnx
from .to_openvino import write_openvino


__all__ = ["FORMATS", "export_pipeline", "trace", "write_onnx", "write_openvino"]
