"""Classify images with ONNX files of glit-models; `OnnxClassifier("model.onnx")("photo.jpg")`. See README.md."""

from .errors import DataError, ExportError, GlitError
from .export.metadata import ExportInfo
from .export.runtime import OnnxClassifier
from .prediction import Prediction

__all__ = ["DataError", "ExportError", "ExportInfo", "GlitError", "OnnxClassifier", "Prediction"]
