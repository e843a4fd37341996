"""Find and open the models of `glit serve`, and run them in batches.

A model's file is read once; later changes to the file have no effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np

from glit_models.errors import Argument, DataError, ExportError, printable
from glit_models.runs.files import temporary_folder

from .batching import Batcher
from .metadata import OUTPUT
from .metrics import Metrics
from .onnx import export_onnx
from .protocol import DATATYPES
from .runtime import OnnxClassifier
from .serving import MODEL, VERSION, served_name

__all__ = ["MOST_PIXELS", "ServedModel", "open_models"]

MOST_PIXELS = 40_000_000  # limit of an image that the graph resizes
_MOST_STRETCHED = 20  # longer over shorter side; the shorter one is scaled to the model's size
_MOST_ENLARGED = 16  # pixels of an image over those of the model's size, if any size is accepted
_RUN_BYTES = 1 << 25  # of images per run: large images gain nothing from batching
_WARM_SIDE = 256


@final
class ServedModel:
    """A classifier that serves several callers with shared batches.

    Args:
        name: name of the model in requests.
        classifier: the classifier.
        max_batch: maximum number of images per run and per request.
        max_delay: seconds that a request waits for others.
        version: version of the model, a number as text.

    Raises:
        ExportError: if the classifier cannot be run.
    """

    def __init__(
        self, name: str, classifier: OnnxClassifier, max_batch: int, max_delay: float, version: str = VERSION
    ) -> None:
        self.name, self.version, self.classifier = name, version, classifier
        self.labels = tuple(map(printable, classifier.info.labels))
        self.max_batch = max_batch
        self.metrics = Metrics()
        shape = [_WARM_SIDE if side < 0 else side for side in self.input_shape[1:]]
        classifier.logits(np.zeros((1, *shape), classifier.input_dtype))  # fail here rather than on the first request
        self.batcher = Batcher(self._run, max_batch, max_delay)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input; -1 for any size."""
        info = self.classifier.info
        if info.preprocess:
            return (-1, -1, -1, info.input_size[0])
        return (-1, info.input_size[0], -1, -1) if info.dynamic_size else (-1, *info.input_size)

    def metadata(self) -> dict[str, Any]:
        """The protocol's metadata of the model."""
        classifier = self.classifier
        datatype = DATATYPES[classifier.input_dtype]
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": classifier.input_name, "datatype": datatype, "shape": list(self.input_shape)}],
            "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, classifier.info.num_classes]}],
        }

    def check(self, images: np.ndarray) -> None:
        """Raise DataError, with the bound, if the model does not accept these images."""
        self.classifier.check(images, self.name)
        if not 1 <= len(images) <= self.max_batch:
            raise DataError(f"{self.name} takes from 1 to {self.max_batch} images a request, got {len(images)}")
        info = self.classifier.info
        height, width = images.shape[1:3] if info.preprocess else images.shape[2:4]
        most = MOST_PIXELS if info.preprocess else _MOST_ENLARGED * info.input_size[1] * info.input_size[2]
        if height * width > most:
            raise DataError(f"{self.name} takes images of at most {most:,} pixels, got {width} x {height}")
        if max(height, width) > _MOST_STRETCHED * min(height, width):
            raise DataError(
                f"one side is at most {_MOST_STRETCHED} times the other, got images of {width} x {height} pixels"
            )

    def _run(self, images: np.ndarray) -> np.ndarray:
        run = self.classifier.run_batch if self.classifier.info.batch is None else self.classifier.logits
        step = max(_RUN_BYTES // images[0].nbytes, 1)
        return np.concatenate([run(images[start : start + step]) for start in range(0, len(images), step)])


@contextmanager
def open_models(
    what: str,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    max_batch: int = 16,
    max_delay: float = 0.002,
    name: str | None = None,
) -> Iterator[dict[str, ServedModel]]:
    """Open the models to serve, by name; at the end of the block, waiting requests are completed.

    Args:
        what: an exported file; a Triton repository, whose models are served in their latest versions; or 'model.tag', a
            weight folder or a Hub repository, which is exported with its preprocessing and compared with PyTorch.
        providers: as for `OnnxClassifier`; if given, only the first is used.
        threads: threads of an operator on the CPU.
        max_batch, max_delay: see `ServedModel`.
        name: name of a single model; default: that of its weights.

    Raises:
        ExportError: if a model cannot be exported, opened or run, or its name is not allowed. WeightsError: if there is
            no such model.
    """
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise ExportError(f"{name!r} is not a name for a model; take letters, digits and '_'")
    if threads is not None and threads < 1:
        raise ExportError(Argument("threads"), f" must be at least 1, got {threads}")

    def opened(path: Path) -> OnnxClassifier:
        return OnnxClassifier(path, providers, strict=providers is not None, threads=threads)

    models: dict[str, ServedModel] = {}
    try:
        for found, version, classifier in _find(what, name, opened):
            models[found] = ServedModel(found, classifier, max_batch, max_delay, version)
        yield models
    finally:
        for model in models.values():
            model.batcher.close()


def _find(what: str, name: str | None, opened: Any) -> Iterator[tuple[str, str, OnnxClassifier]]:
    """Names, versions and classifiers."""
    path = Path(what)
    if path.is_file() or path.suffix == ".onnx":
        classifier = opened(path)
        yield name or served_name(classifier.info.source), VERSION, classifier
    elif files := _repository(path):
        if name is not None:
            raise ExportError(Argument("name"), f" is for a single model, and {path} is a repository")
        for file in files:
            yield file.parents[1].name, file.parent.name, opened(file)
    else:
        source = str(path.resolve()) if path.exists() else what
        yield name or served_name(source), VERSION, _export(what, opened)


def _repository(folder: Path) -> list[Path]:
    """The files of a Triton repository: the latest version of each model, without unverified models."""
    latest: dict[Path, Path] = {}
    for file in folder.glob(f"*/*/{MODEL}"):
        version, model = file.parent, file.parents[1]
        if not version.name.isdecimal() or not re.fullmatch(r"\w[\w.-]*", model.name) or model.suffix == ".unverified":
            continue
        if model not in latest or int(latest[model].parent.name) < int(version.name):
            latest[model] = file
    return [latest[model] for model in sorted(latest)]


def _export(what: str, opened: Any) -> OnnxClassifier:
    """Export a model to a temporary file, and return its classifier."""
    with temporary_folder() as folder:
        artifact = export_onnx(what, folder / MODEL, preprocess=True)
        agreement = artifact.agreement
        if agreement is None or not agreement.holds:
            problems = agreement.problems if agreement else ("not compared",)
            raise ExportError(f"{what}: its export is not what PyTorch computes: {problems[0]}")
        return opened(artifact.path)
