"""A gradio page for a model: drop an image to see its classes, an attention map and the network's blocks.

`glit demo --serve` serves it, and a Space of the Hub runs it. Images are opened by the package's own reader. Nothing
that a visitor sends is executed, and it is stored only in gradio's folder for temporary files.
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .data.image_files import open_image
from .errors import Argument, GlitError, first_line, pip_install, printable
from .explain import gradcam
from .explanation_sheet import check_method, explain_image
from .figure import network_image
from .model import SpecTransformer
from .predict import Classifier, load_model, pick_device
from .runs.console import say
from .runs.signals import StopRequest

__all__ = ["LIMITS", "import_gradio", "make_demo", "serve_demo"]

LIMITS = {"max_file_size": "20mb", "ssr_mode": False, "quiet": True}  # for gradio's `launch`
_MOST_PIXELS = 50_000_000
_SHOWN = 5


def import_gradio() -> Any:
    """Import gradio with its analytics off. Raises GlitError if it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise GlitError(f"the page needs gradio: {pip_install('demo')}") from None
    return gradio


def make_demo(name: str, device: str | torch.device | None = None) -> Any:
    """Create the page of a model as gradio's `Blocks`; its method `launch` serves it.

    Args:
        name: name of the model, as for `predict.load_model`.
        device: device for inference; None uses the GPU if there is one.

    Raises:
        GlitError: if gradio is missing. WeightsError: if there is no such model.
    """
    gradio = import_gradio()
    classifier = Classifier(load_model(name), pick_device(None if device is None else str(device)))
    method = _explained_by(classifier)

    def answer(path: str | None) -> tuple[dict[str, float] | None, Image.Image | None]:
        if path is None:  # the image was removed
            return None, None
        try:
            image = open_image(Path(path), "the image", _MOST_PIXELS)
            probabilities = classifier.probabilities([image])[0].tolist()
            sheet = explain_image(classifier, image, method) if method else None
        except GlitError as error:
            raise gradio.Error(printable(str(error)), print_exception=False) from None
        shown = None if sheet is None else Image.open(io.BytesIO(sheet))
        return dict(zip(map(printable, classifier.class_names), probabilities, strict=True)), shown

    title = printable(Path(name).resolve().name if Path(name).is_dir() else name)
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Textbox(title, label="Model", interactive=False)
        with gradio.Row():
            image = gradio.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="Drop an image here",
                height=320,
            )  # no image_mode: the file as it is, which is read as by `glit predict`
            several = "of any number of classes" if classifier.is_multilabel else "of one class"
            classes = gradio.Label(num_top_classes=_SHOWN, label=f"Probabilities, {several}")
        plain = {"show_label": False, "interactive": False}  # a label would cover part of the image
        gradio.Markdown(f"### What the model looks at: {method}", visible=method is not None)
        sheet = gradio.Image(visible=method is not None, **plain)
        if isinstance(classifier.model, SpecTransformer):
            gradio.Markdown("### The network's blocks: what mixes tokens above, the feed-forward network below")
            gradio.Image(network_image(classifier.model.spec), **plain)
        image.change(answer, image, [classes, sheet], api_name="classify")
    return page


def _explained_by(classifier: Classifier) -> str | None:
    """The method that explains the model, if one is available."""
    for method in ("attention", "gradcam"):
        try:
            check_method(classifier.model, method)
            if method == "gradcam":  # works for many models, and only a try shows for which
                gradcam(classifier.model, torch.zeros(1, *classifier.input_size, device=classifier.device))
        except GlitError:
            continue
        return method
    return None


def serve_demo(name: str, host: str = "127.0.0.1", port: int | None = None, device: str | None = None) -> int:
    """Serve the page of a model until SIGTERM or SIGINT.

    Args:
        name, device: see `make_demo`.
        host: address to listen on. port: None uses the first free one from 7860.

    Returns:
        The exit status of the signal, 143 or 130.

    Raises:
        GlitError: if the address is in use or unknown, and as `make_demo` does.
    """
    page = make_demo(name, device)
    with StopRequest() as stop:
        try:
            _, url, _ = page.launch(server_name=host, server_port=port, share=False, prevent_thread_lock=True, **LIMITS)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise GlitError(f"cannot listen on {host}: {reason}; ", Argument("port", ...), " takes another") from None
        say(f"the page is at {url.rstrip('/')}; Ctrl-C ends it")
        while stop.signal is None:
            time.sleep(0.2)
        page.close(verbose=False)
    return stop.exit_status
