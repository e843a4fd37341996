"""Tests of a published folder in transformers, after `import glit_models`, run by `make transformers-test`."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from weight_folders import CLASSES, FACTS, small_model

from glit_models import AutoFormerBlock, AutoFormerSpec
from glit_models.weights.folder import save_folder
from glit_models.weights.publish import publish

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["glit_tiny", "autoformer_tiny"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published")
    if request.param == "glit_tiny":
        model = small_model()
    else:
        spec = AutoFormerSpec((AutoFormerBlock(2, 2.0), AutoFormerBlock(3, 4.0)), 48, head_dim=16)
        torch.manual_seed(0)
        model = timm.create_model(request.param, spec=spec, img_size=64, num_classes=len(CLASSES)).eval()
    save_folder(model, path / "saved", class_names=CLASSES, name=f"{request.param}.small", facts=FACTS)
    publish(str(path / "saved"), folder=path / "folder")
    return path / "folder"


def test_the_timm_wrapper_loads_a_published_folder_and_gives_its_golden_logits(published: Path) -> None:
    model = transformers.TimmWrapperForImageClassification.from_pretrained(published, dtype=torch.float32).eval()
    golden = load_file(published / "golden.safetensors")
    with torch.inference_mode():
        logits = model(pixel_values=golden["input"].float()).logits
    torch.testing.assert_close(logits, golden["logits"], atol=1e-4, rtol=0)
    assert tuple(model.config.id2label.values()) == CLASSES


def test_the_image_classification_pipeline_names_the_classes(published: Path) -> None:
    classify = transformers.pipeline("image-classification", model=str(published), device="cpu")
    answers = classify(Image.new("RGB", (80, 70), (100, 20, 30)), top_k=3)
    assert len(answers) == 3
    assert {answer["label"] for answer in answers} <= set(CLASSES)
