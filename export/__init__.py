"""A GLiT model turned into something that runs without this repository: ONNX, quantised, served.

Imported as `glit_models.export`. It builds on the zoo, which never imports it; it never imports `glit_models.search`.
"""

from .metadata import ExportInfo
from .onnx import OnnxArtifact, export_onnx
from .pictures import Pictures
from .runtime import OnnxClassifier
from .timing import onnx_runner
from .verify import Agreement

__all__ = ["Agreement", "ExportInfo", "OnnxArtifact", "OnnxClassifier", "Pictures", "export_onnx", "onnx_runner"]
