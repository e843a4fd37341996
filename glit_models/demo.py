"""`glit demo`: the shipped pictures, what GLiT-Tiny says of them, and a contact sheet of both."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .errors import DataError
from .inference import Classifier, Prediction, load_model, open_picture, pick_device

__all__ = ["MODEL", "run_demo"]

MODEL = "glit_tiny.fashion_mnist"
_PICTURES = Path(__file__).parent / "data" / "pictures"
_COLUMNS = 5
_CELL = (190, 222)  # width and height of a picture with its caption, in pixels
_SIDE = 168


def run_demo(out: Path) -> list[tuple[Prediction, str]]:
    """Classify the shipped pictures and draw the contact sheet.

    Args:
        out: PNG file to write.

    Returns:
        (prediction, true class name) for every picture.

    Raises:
        DataError: if `out` cannot be written.
    """
    labels: dict[str, str] = json.loads((_PICTURES / "labels.json").read_text())
    classifier = Classifier(load_model(MODEL), pick_device("cpu"))
    predictions = classifier.predict((_PICTURES / name for name in labels), top_k=3)
    results = [(prediction, labels[prediction.path.name]) for prediction in predictions]
    aside = out.with_name(f".{out.name}.tmp")
    try:
        _contact_sheet(results).save(aside, format="PNG")
        aside.replace(out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}") from None
    return results


def _contact_sheet(results: list[tuple[Prediction, str]]) -> Image.Image:
    """The pictures in rows, each over its label and the model's first choice: green where right, red where wrong."""
    rows = -(-len(results) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL[0], rows * _CELL[1]), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for index, (prediction, label) in enumerate(results):
        x, y = index % _COLUMNS * _CELL[0] + 11, index // _COLUMNS * _CELL[1] + 8
        sheet.paste(open_picture(prediction.path).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (x, y))
        name, probability = prediction.classes[0]
        draw.text((x, y + _SIDE + 3), f"label: {label}", "black", font)
        draw.text((x, y + _SIDE + 21), f"{name} {probability:.0%}", "#187a2f" if name == label else "#c01c28", font)
    return sheet
