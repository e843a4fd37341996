"""Write a Triton repository with a manifest for KServe: an `InferenceService` that serves it on Kubernetes.

https://kserve.github.io/website
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from glit_models.errors import Argument, ExportError
from glit_models.runs.files import write_text

from .onnx import OnnxArtifact
from .serving import TritonOptions, TritonTarget
from .source import ModelSource
from .targets import register_target

__all__ = ["KServeOptions", "KServeTarget", "kserve_manifest"]


@dataclass(frozen=True)
class KServeOptions(TritonOptions):
    """Options of the repository, see `TritonOptions`; `storage_uri` is where the cluster reads it."""

    storage_uri: str = ""
    engine_cache: str = "/tmp"  # exists and is writable in every container; ONNX Runtime creates only NAME in it

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/]\S*", self.storage_uri):
            raise ExportError(
                Argument("storage_uri"),
                f" must say where the cluster reads the repository, such as s3://BUCKET/repository, got "
                f"{self.storage_uri!r}",
            )


@register_target
class KServeTarget(TritonTarget):
    """A Triton repository with an `InferenceService` of KServe.

    `path` is the repository.
    """

    name = "kserve"
    options = KServeOptions

    def export(self, source: ModelSource, path: Path, options: KServeOptions) -> OnnxArtifact:  # type: ignore[override]
        """Write the repository, and `NAME.kserve.yaml` in it if the model agrees with PyTorch."""
        artifact = super().export(source, path, options)
        if artifact.agreement is None or not artifact.agreement.holds:
            return artifact
        name = artifact.path.parents[1].name
        manifest = path / f"{name}.kserve.yaml"
        write_text(manifest, yaml.safe_dump(kserve_manifest(name, options), sort_keys=False))
        return dataclasses.replace(artifact, notes=(*artifact.notes, f"manifest {manifest.name}"))


def kserve_manifest(name: str, options: KServeOptions) -> dict[str, Any]:
    """The `InferenceService` that serves a repository by the open inference protocol; `name` is that of its model."""
    model: dict[str, Any] = {
        "modelFormat": {"name": "triton"},
        "runtime": "kserve-tritonserver",
        "protocolVersion": "v2",
        "storageUri": options.storage_uri,
    }
    if options.gpu:
        model["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": _resource_name(name)},
        "spec": {"predictor": {"model": model}},
    }


def _resource_name(name: str) -> str:
    """A name that Kubernetes accepts: lower-case letters, digits and '-', from a letter on."""
    plain = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"model-{plain}")[:40].rstrip("-")
