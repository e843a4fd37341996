"""`OnnxClassifier`: classify images with an exported file, on a GPU or the CPU.

It needs only the file, whose metadata define the preprocessing and the class names. This module and those that it
imports are also packaged as `glit-runtime` (`runtime/pyproject.toml`), which works without torch. So their imports are
relative, and need nothing but numpy, Pillow and ONNX Runtime.

Axes: B images, C channels, H/W height and width of preprocessed images, h/w of original ones, K classes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.image_files import open_image, to_rgb
from ..errors import Argument, DataError, ExportError, first_line
from ..prediction import Prediction, predict_files
from ..preprocessing import prepare_image
from ..runs.console import say
from ..runs.files import home, sha256_of
from .binding import Binding
from .metadata import OUTPUT, ExportInfo
from .sessions import PROVIDERS, chosen_providers, open_session

__all__ = ["AnyImage", "OnnxClassifier", "as_array"]

AnyImage = str | os.PathLike[str] | Image.Image | np.ndarray
_BATCH = 32
_TENSORRT, _CUDA = PROVIDERS[:2]


class OnnxClassifier:
    """A classifier from a file written by `glit export`. Thread-safe.

    Calling it is the same as `classify`. A copy in another process (`pickle`) opens the file again.

    Args:
        path: path of the file.
        providers: in order of preference, 'cuda' or 'CUDAExecutionProvider'; None uses TensorRT, CUDA or the CPU, the
            first that works.
        strict: raise an error instead of falling back from the first provider.
        threads: threads of an operator on the CPU; None leaves the choice to ONNX Runtime.
        cuda_graph: record the work on the GPU once and replay it, for a file with fixed batch size: small batches then
            do not wait for kernel launches. Needs CUDA.

    Attributes:
        info: metadata of the file.
        provider: the provider in use, such as `CUDAExecutionProvider`.
        build: build of ONNX Runtime, such as 'onnxruntime-gpu 1.28.0'.
        input_name: name of the graph's input; `images` by default.
        input_dtype: numpy type of the input of `logits`.
        class_names: names of the outputs; numbers if the model has no names.
        is_multilabel: whether an image may have several classes, or none.

    Raises:
        ExportError: if the file is missing, truncated, not from this package, or cannot be run by the provider.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[str] | None = None,
        *,
        strict: bool = False,
        threads: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise ExportError(f"{path}: no such file")
        self._arguments = (path, providers, strict, threads, cuda_graph)
        options = _engine_cache(path, providers)
        if cuda_graph:
            options[_CUDA] = {"enable_cuda_graph": "1"}
        opened = open_session(path, providers, strict=strict, threads=threads, options=options)
        self.session, self.provider, self.build = opened.session, opened.provider, opened.build
        self.path = path
        self.info = ExportInfo.from_texts(self.session.get_modelmeta().custom_metadata_map, str(path))
        self.class_names, self.is_multilabel = self.info.labels, self.info.multilabel
        self.input_name, self.input_dtype = _input(self.session, path)
        self._binding = self._bind(cuda_graph)
        self._lock = threading.Lock()

    def _bind(self, cuda_graph: bool) -> Binding | None:
        """Buffers that stay on the GPU, if the shape of a batch is known in advance."""
        info = self.info
        fixed = info.batch is not None and not info.preprocess and not info.dynamic_size
        if cuda_graph and not fixed:
            raise ExportError(
                f"{self.path}: a CUDA graph needs a fixed batch and size; export it with ", Argument("batch", ...)
            )
        if cuda_graph and self.provider != _CUDA:
            raise ExportError(f"{self.path}: a CUDA graph needs {_CUDA}, this runs on {self.provider}")
        if not fixed or self.provider not in PROVIDERS[:2]:
            return None
        assert info.batch is not None
        return Binding(self.session, (info.batch, *info.input_size), self.input_dtype, (info.batch, info.num_classes))

    def __repr__(self) -> str:
        info = self.info
        size = "any size" if info.preprocess else " x ".join(map(str, info.input_size[1:]))
        return (
            f"OnnxClassifier({str(self.path)!r}: {info.source}, {info.precision}, images of {size}, "
            f"{info.num_classes} classes, {self.provider} of {self.build})"
        )

    def __reduce__(self) -> Any:
        return _open, self._arguments

    # ---- from images ----

    def probabilities(self, images: AnyImage | Iterable[AnyImage]) -> np.ndarray:
        """Probabilities [B, K] in float32. They add up to 1 unless `is_multilabel`.

        Args:
            images: file names, PIL images, or uint8 arrays [h, w, 3], [h, w, 1] or [h, w]; or a single one of them,
                which makes a batch of one. An array [B, h, w, 3] is B images.

        Raises:
            DataError: if a file cannot be read, or an array is not an image.
        """
        return self._probabilities_of(self.logits_of(images))

    def logits_of(self, images: AnyImage | Iterable[AnyImage]) -> np.ndarray:
        """Logits [B, K]; takes the same input as `probabilities`."""
        prepared = [self.prepare(image) for image in _as_several(images)]
        if self.info.preprocess:
            return self._logits_of_raw(prepared)
        return self.logits(np.stack(prepared)) if prepared else self._nothing()

    def prepare(self, image: AnyImage) -> np.ndarray:
        """Preprocess one image for `logits`: [C, H, W], or [h, w, C] for a file with preprocessing."""
        opened = _as_image(image)
        if self.info.preprocess:
            return as_array(opened, self.info.input_size[0])
        return prepare_image(opened, **self.info.data_config).astype(self.input_dtype)

    def classify(self, images: AnyImage | Iterable[AnyImage], top_k: int = 5) -> list[tuple[tuple[str, float], ...]]:
        """For each image, the `top_k` most probable (class name, probability) pairs, most probable first."""
        return self.best(self.logits_of(images), top_k)

    def best(self, logits: np.ndarray, top_k: int = 5) -> list[tuple[tuple[str, float], ...]]:
        """Compute the result of `classify` from logits [B, K]."""
        rows = self._probabilities_of(logits)
        order = np.argsort(-rows, axis=1, kind="stable")[:, :top_k]
        return [
            tuple((self.class_names[index], float(row[index])) for index in indices)
            for row, indices in zip(rows, order, strict=True)
        ]

    __call__ = classify

    def predict(self, paths: Iterable[Path], top_k: int | None = None) -> Iterator[Prediction]:
        """Yield one `Prediction` per file, in order; for a file that cannot be read, it holds the error.

        Args:
            top_k: number of classes; None for 5, or for all with a probability of at least one half if `is_multilabel`.
        """
        return predict_files(self.probabilities, self.class_names, paths, top_k, self.is_multilabel)

    def _probabilities_of(self, logits: np.ndarray) -> np.ndarray:
        if self.is_multilabel:
            return np.asarray(1 / (1 + np.exp(-np.clip(logits, -80, 80))), np.float32)
        return _softmax(logits) if len(logits) else logits

    def _logits_of_raw(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Logits of images [h, w, C]; those of one size share a batch."""
        rows = np.zeros((len(arrays), self.info.num_classes), np.float32)
        for shape in dict.fromkeys(array.shape for array in arrays):
            indices = [index for index, array in enumerate(arrays) if array.shape == shape]
            rows[indices] = self.logits(np.stack([arrays[index] for index in indices]))
        return rows

    # ---- from arrays ----

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] in float32.

        Args:
            images: preprocessed, [B, C, H, W] in the file's floating-point type; for a file with preprocessing, uint8
                images [B, h, w, C]. Any B: it is split into the file's batches, and the last one is padded.

        Raises:
            DataError: on another shape or type; names both.
            ExportError: if ONNX Runtime fails.
        """
        self.check(images)
        size = self.info.batch or _BATCH
        parts = [self.run_batch(images[start : start + size]) for start in range(0, len(images), size)]
        return np.concatenate(parts) if parts else self._nothing()

    def _nothing(self) -> np.ndarray:
        return np.zeros((0, self.info.num_classes), np.float32)

    def run_batch(self, images: np.ndarray) -> np.ndarray:
        """`logits` of one batch, without checks and splitting."""
        count = len(images)
        if self.info.batch is not None and count < self.info.batch:
            images = np.concatenate([images, np.repeat(images[-1:], self.info.batch - count, axis=0)])
        images = np.ascontiguousarray(images)
        try:
            if self._binding is not None:
                with self._lock:  # the buffers are shared
                    logits = self._binding.run(images)
            else:
                (logits,) = self.session.run([OUTPUT], {self.input_name: images})
        except Exception as error:  # its exceptions have no other common base class
            raise ExportError(f"{self.path}: {self.provider} failed: {first_line(error)}") from None
        return np.asarray(logits[:count], np.float32)

    def check(self, images: np.ndarray, name: str | None = None) -> None:
        """Raise DataError if `logits` does not accept the array; `name` is the name of the file in the message."""
        name = name or str(self.path)
        channels, height, width = self.info.input_size
        if self.info.preprocess:
            expected: tuple[Any, ...] = ("B", "h", "w", channels)
        else:
            expected = ("B", channels, "H", "W") if self.info.dynamic_size else ("B", channels, height, width)
        fits = images.ndim == len(expected) and all(
            wanted == found if isinstance(wanted, int) else found > 0 or wanted == "B"
            for wanted, found in zip(expected, images.shape, strict=True)
        )
        shape = f"[{', '.join(map(str, expected))}]"
        if not fits or images.dtype != self.input_dtype:
            got = f"{images.dtype} [{', '.join(map(str, images.shape))}]"
            raise DataError(f"{name} takes {self.input_dtype} {shape}, got {got}")
        patch = self.info.patch_size
        if self.info.dynamic_size and (images.shape[2] % patch or images.shape[3] % patch):
            raise DataError(f"{name} takes images of sides that {patch} divides, got {images.shape[2:]}")


def _engine_cache(path: Path, providers: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Cache the TensorRT engines of this file, because building one takes minutes. Each file has a separate cache."""
    if _TENSORRT not in chosen_providers(providers):
        return {}
    folder = home() / "tensorrt" / sha256_of(path)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)  # ONNX Runtime creates only the last folder of a path
    except OSError as error:
        say(f"glit: {folder} cannot be created ({error.strerror}), so TensorRT builds its engines at every start")
        return {}
    return {_TENSORRT: {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}}


def _open(path: Path, providers: Any, strict: bool, threads: int | None, cuda_graph: bool) -> OnnxClassifier:
    """Open the same classifier again, in another process."""
    return OnnxClassifier(path, providers, strict=strict, threads=threads, cuda_graph=cuda_graph)


def _input(session: Any, path: Path) -> tuple[str, np.dtype]:
    """The name and type of the input."""
    names = [(value.name, value.type) for value in session.get_inputs()]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    if len(names) != 1 or OUTPUT not in [value.name for value in session.get_outputs()]:
        raise ExportError(f"{path}: not exported by glit-models; `glit export` makes such files")
    if names[0][1] not in types:
        raise ExportError(f"{path}: takes {names[0][1]}, which numpy has no type for; export it again")
    return names[0][0], np.dtype(types[names[0][1]])


def _as_several(images: AnyImage | Iterable[AnyImage]) -> Iterable[AnyImage]:
    """One image as a list of one."""
    if isinstance(images, np.ndarray):
        return [images] if images.ndim in (2, 3) else images
    return [images] if isinstance(images, (str, os.PathLike, Image.Image)) else images


def _as_image(image: AnyImage) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, np.ndarray):
        return open_image(Path(image))
    array = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if array.dtype != np.uint8 or array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise DataError(
            f"an array is an image if it is uint8 [h, w, 3], [h, w, 1] or [h, w], got {image.dtype} "
            f"{list(image.shape)}; prepared images go to logits()"
        )
    return Image.fromarray(array).convert("RGB")


def as_array(image: Image.Image, channels: int) -> np.ndarray:
    """Convert an image to [h, w, channels] in uint8."""
    return np.asarray(image) if channels == 3 else np.asarray(image.convert("L"))[..., None]


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True), np.float32)
