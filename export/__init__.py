"""Export models to formats that run without this repository: ONNX, quantised graphs, servers.

Imported as `glit_models.export`. It builds on `glit_models`, which never imports it, and not on `glit_models.search`.
"""

from .coreml import CoreMlModel, CoreMlTarget
from .executorch import ExecutorchModel, ExecutorchTarget
from .form import ExportForm
from .huggingface import HuggingFaceTarget
from .images import ImageSource
from .kserve import KServeTarget
from .litert import LiteRtModel, LiteRtTarget
from .metadata import ExportInfo
from .onnx import OnnxArtifact, export_onnx
from .openvino import OpenVinoModel, OpenVinoTarget
from .program import export_torch
from .runtime import OnnxClassifier
from .serving import export_triton
from .source import ModelSource
from .targets import TARGETS, Artifact, Target, TargetOptions, export_model, register_target, write_verified
from .timing import onnx_runner
from .verify import Agreement

__all__ = [
    "TARGETS",
    "Agreement",
    "Artifact",
    "CoreMlModel",
    "CoreMlTarget",
    "ExecutorchModel",
    "ExecutorchTarget",
    "ExportForm",
    "ExportInfo",
    "HuggingFaceTarget",
    "ImageSource",
    "KServeTarget",
    "LiteRtModel",
    "LiteRtTarget",
    "ModelSource",
    "OnnxArtifact",
    "OnnxClassifier",
    "OpenVinoModel",
    "OpenVinoTarget",
    "Target",
    "TargetOptions",
    "export_model",
    "export_onnx",
    "export_torch",
    "export_triton",
    "onnx_runner",
    "register_target",
    "write_verified",
]
