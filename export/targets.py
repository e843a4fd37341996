"""Export targets: their base class, the table of targets, and `export_model`.

To add a custom target, subclass `Target` with a dataclass of its options. Register it with `register_target`, or name
it as `module:Name`: `glit export MODEL --format my_target:MyTarget --out FILE`. See docs/extending.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from glit_models.activations import check_memory
from glit_models.errors import Argument, ExportError
from glit_models.extensions import Table

from .extras import require
from .images import ImageSource
from .metadata import SMALLER_BATCH, ExportInfo, check_batch
from .source import ModelSource, open_source
from .verify import Agreement, Runner, compare
from .writing import check_writable, files_of, write_and_judge

__all__ = [
    "TARGETS",
    "Artifact",
    "FixedOptions",
    "Target",
    "TargetOptions",
    "export_model",
    "register_target",
    "write_verified",
]


@dataclass(frozen=True)
class Artifact:
    """An exported file or folder.

    Attributes:
        path: path of the file or folder, with the suffix `.unverified` if it does not agree with PyTorch.
        info: its metadata.
        num_bytes: its size.
        agreement: agreement with PyTorch; None if it was not compared.
        notes: description of what was chosen.
    """

    path: Path
    info: ExportInfo
    num_bytes: int
    agreement: Agreement | None
    notes: tuple[str, ...] = ()

    @property
    def facts(self) -> tuple[str, ...]:
        """The facts to print next to the path."""
        return (f"{self.num_bytes / 1e6:.1f} MB", self.info.precision, *self.notes)


@dataclass(frozen=True)
class TargetOptions:
    """The options that every target takes. A target's options are a frozen dataclass that extends this one.

    Attributes:
        verify: number of images to compare with PyTorch on; 0 for none, which marks the result as `.unverified`.
        images: images to compare on; default: generated ones.
        force: replace an existing file or folder.

    Raises:
        ExportError: on an option out of bounds, or on options that exclude each other.
    """

    verify: int = 64
    images: ImageSource | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.verify < 0:
            raise ExportError(Argument("verify"), f" must be 0 or more images, got {self.verify}")


@dataclass(frozen=True)
class FixedOptions(TargetOptions):
    """Options of a program for devices: the batch size, which is fixed, and the size of images; None is the model's."""

    batch: int = 1
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch is None:
            raise ExportError(Argument("batch"), " must be a number of images in this format")
        check_batch(self.batch)
        if self.image_size is not None and not isinstance(self.image_size, tuple):
            raise ExportError(Argument("image_size"), f" must be a height and width, got {self.image_size!r}")

    def images_for(self, form: torch.nn.Module, info: ExportInfo) -> torch.Tensor:
        """Example images [B, C, H, W] of the fixed shape. Raises GlitError if memory is short."""
        shape = (self.batch, *info.input_size)
        check_memory(form, shape, torch.device("cpu"), *SMALLER_BATCH)
        return torch.zeros(shape)


class Target(ABC):
    """A kind of file or folder that a model can be exported to. Abstract.

    Attributes:
        name: name in the table, and on the command line (class attribute).
        suffix: suffix of the file or folder, with its dot; '' for none (class attribute).
        is_folder: whether a folder is written (class attribute).
        options: dataclass of its options (class attribute).
        packages: modules that must be importable (class attribute).
        extra: extra of this package that installs them (class attribute).
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    is_folder: ClassVar[bool] = False
    options: ClassVar[type[TargetOptions]] = TargetOptions
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "export"

    @classmethod
    def missing_packages(cls) -> tuple[str, ...]:
        """The modules in `packages` that are not installed."""
        return tuple(name for name in cls.packages if importlib.util.find_spec(name) is None)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(field.name for field in dataclasses.fields(cls.options))

    def check_path(self, path: Path, options: Any) -> None:
        """Raise ExportError if nothing can be written to `path`; called before any work is done."""
        check_writable(path, options.force, self.is_folder)

    @abstractmethod
    def export(self, source: ModelSource, path: Path, options: Any) -> Artifact:
        """Write the model to `path` and compare it with PyTorch; `write_verified` does both.

        Args:
            source: the model, in float32 on the CPU and in evaluation mode.
            path: has passed `check_path`.
            options: an instance of the target's `options`.

        Raises:
            ExportError: if the model cannot be exported to this target.
        """


TARGETS: Table[type[Target]] = Table("export target", Target, ExportError)
"""The formats that `export_model` writes, by name."""
register_target = TARGETS.register_class("name")
"""Class decorator that registers a `Target` under its `name`."""


def export_model(
    model: nn.Module | ModelSource | str | Path,
    path: str | os.PathLike[str],
    target: str = "onnx",
    **options: Any,
) -> Artifact:
    """Export a model, and compare its outputs with PyTorch's.

    Args:
        model: any timm classifier, which is not changed; 'model.tag', a weight folder, or a Hub repository.
        path: file or folder to write.
        target: a name in `TARGETS`, or `module:Name` for a custom `Target`.
        options: options of the target; see its `options`.

    Raises:
        ExportError: on an unknown target, an unknown option, incompatible options, a path that exists or cannot be
            written, or a missing package. WeightsError, SpecError, DataError: on an invalid model, size or image.
    """
    path, chosen = Path(path), TARGETS.find(target)
    given = make_options(chosen, options)
    maker = chosen()
    maker.check_path(path, given)
    for package in chosen.packages:
        require(package, chosen.extra)
    if given.images is not None:
        next(iter(given.images.pick(1)))  # reject an unsuitable folder before the work
    return maker.export(open_source(model), path, given)


def make_options(target: type[Target], options: Mapping[str, Any]) -> TargetOptions:
    """Create a target's options by name. Raises ExportError on an unknown option; also raises as the options do."""
    known = target.option_names()
    for name in options:
        if name not in known:
            raise ExportError(
                f"{name} is not an option of the export target {target.name}; it takes {', '.join(known)}"
            )
    return target.options(**options)


def write_verified(
    path: Path,
    write: Callable[[Path], object],
    load: Callable[[Path], Runner],
    source: ModelSource,
    info: ExportInfo,
    options: TargetOptions,
    **about: Any,
) -> Artifact:
    """Write a file or folder, compare it with PyTorch, and move it to `path`, or to `PATH.unverified`.

    Args:
        path: final path.
        write: writes the file to a given path.
        load: opens the file for running.
        source: the exported model.
        info: metadata of the file.
        options: options of the comparison.
        about: further content of the report next to the file.

    Raises:
        ExportError: if it cannot be written or run. Nothing is then left.
    """

    def judge(temporary: Path) -> Agreement | None:
        return compare(load(temporary), source, options.verify, options.images) if options.verify else None

    final, agreement = write_and_judge(path, write, judge, {**about, "info": dataclasses.asdict(info)})
    return Artifact(final, info, sum(file.stat().st_size for file in files_of(final)), agreement)
