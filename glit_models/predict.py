"""Load a model by name or folder and classify image files with it.

Works with any timm model; the command line prints the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import create_transform, resolve_input_data_config
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale

from .activations import check_memory
from .data.image_files import open_image
from .errors import Argument, GlitError, first_line
from .prediction import BATCH, THRESHOLD, Prediction, predict_files
from .runs.files import whole_file
from .weights import loading
from .weights.files import MULTILABEL

__all__ = ["THRESHOLD", "Classifier", "Prediction", "load_model", "pick_device", "predict_files"]

DEMO_MODEL = "glit_tiny.fashion_mnist"

_IMAGES = Path(__file__).parent / "data" / "images"
_COLUMNS = 5  # of a contact sheet
_CELL = (190, 222)  # width and height of an image with its caption, in pixels
_SIDE = 168


def pick_device(name: str | None = None) -> torch.device:
    """The named device; by default a GPU if there is one, else the CPU. Raises GlitError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GlitError(f"device {name!r} cannot be used here ({first_line(error)}); try 'cpu'") from None
    return device


def load_model(name: str) -> Any:
    """Load a pretrained model in evaluation mode.

    Args:
        name: timm's 'model.tag' or 'model', a folder with `config.json` and `model.safetensors`, or a Hub
            repository 'namespace/name'.

    Raises:
        WeightsError: if there is no such model, or its weights are missing or damaged.
    """
    return loading.load_model(name, any_timm=True).model


class Classifier:
    """A model, its preprocessing and its class names.

    Args:
        model: any timm classifier with a `pretrained_cfg`; classes without names are numbered.
        device: device for inference.

    The preprocessing is timm's for evaluation, which may use a larger size than training; a model with one input
    channel gets grey images. `has_names` is whether `class_names` are more than numbers, and `is_multilabel` whether an
    image may have several classes, or none.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        config = resolve_input_data_config(model, use_test_size=True)
        self.input_size: tuple[int, int, int] = config["input_size"]
        self.model = reparameterize_model(model).eval().to(device)
        self.device = device
        transform = create_transform(**config)
        self.transform = transform if config["input_size"][0] == 3 else Compose([Grayscale(), transform])
        names = model.pretrained_cfg.get("label_names") or ()
        self.is_multilabel = getattr(model, "problem_type", None) == MULTILABEL
        self.has_names = 0 < len(names) == model.num_classes
        self.class_names = tuple(names) if self.has_names else tuple(map(str, range(model.num_classes)))

    def check_memory(self, num_images: int, *way_out: str | Argument) -> None:
        """Raises GlitError, which ends in `way_out`, if so many images at a time do not fit into memory."""
        check_memory(self.model, (num_images, *self.input_size), self.device, *way_out)

    @torch.inference_mode()
    def probabilities(self, images: Iterable[Image.Image]) -> Tensor:
        """Class probabilities [B, num_classes] of RGB images, on the CPU. They add up to 1 unless `is_multilabel`."""
        batch = torch.stack([self.transform(image) for image in images])
        logits = self.model(batch.to(self.device))
        return (logits.sigmoid() if self.is_multilabel else logits.softmax(-1)).cpu()

    def predict(self, paths: Iterable[Path], top_k: int | None = None) -> Iterator[Prediction]:
        """Yield one `Prediction` per file, in order; for a file that cannot be read, it holds the error.

        Args:
            top_k: number of classes; None for 5, or for all with a probability of at least one half if `is_multilabel`.
        """
        paths = list(paths)
        self.check_memory(min(len(paths), BATCH), "give fewer images, or take a smaller network")
        return predict_files(self.probabilities, self.class_names, paths, top_k, self.is_multilabel)


@torch.inference_mode()
def count_correct(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> int:
    """Count the preprocessed images [B, C, H, W] whose most probable class is their label [B]."""
    return sum(int((model(images.to(device)).argmax(1) == labels.to(device)).sum()) for images, labels in batches)


# ---- example images ----


def run_demo(out: Path) -> list[tuple[Prediction, str]]:
    """Classify the example images of the package and draw the contact sheet.

    Args:
        out: PNG file to write.

    Returns:
        (prediction, true class name) for every image.

    Raises:
        WriteError: if `out` cannot be written.
    """
    labels: dict[str, str] = json.loads((_IMAGES / "labels.json").read_text())
    classifier = Classifier(load_model(DEMO_MODEL), pick_device("cpu"))
    predictions = classifier.predict((_IMAGES / name for name in labels), top_k=3)
    results = [(prediction, labels[prediction.path.name]) for prediction in predictions]
    with whole_file(out) as path:
        _contact_sheet(results).save(path, format="PNG")
    return results


def _contact_sheet(results: list[tuple[Prediction, str]]) -> Image.Image:
    """Draw the images in rows, each with its label and the predicted class: green if correct, red if wrong."""
    rows = -(-len(results) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL[0], rows * _CELL[1]), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for index, (prediction, label) in enumerate(results):
        x, y = index % _COLUMNS * _CELL[0] + 11, index // _COLUMNS * _CELL[1] + 8
        sheet.paste(open_image(prediction.path).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (x, y))
        name, probability = prediction.classes[0]
        draw.text((x, y + _SIDE + 3), f"label: {label}", "black", font)
        draw.text((x, y + _SIDE + 21), f"{name} {probability:.0%}", "#187a2f" if name == label else "#c01c28", font)
    return sheet
