"""Tests of `OnnxClassifier` and `glit predict --onnx`: inputs, reported providers, and errors."""

from __future__ import annotations

import importlib.metadata
import json
import pickle
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import CLASSES, exported, small_glit
from glit_models.export import OnnxClassifier, onnx_runner, runtime, sessions
from glit_models.export.binding import Binding
from glit_models.export.images import generated_images
from PIL import Image

from glit_models import predict
from glit_models.cli import main
from glit_models.errors import DataError, ExportError
from glit_models.predict import Classifier

pytestmark = pytest.mark.usefixtures("cached_graphs")

ROOT = Path(__file__).parents[1]
IMAGES = Path(predict.__file__).parent / "data" / "images"


@pytest.fixture(scope="module")
def classifier() -> OnnxClassifier:
    return OnnxClassifier(exported().path, ["cpu"], threads=1)


def test_files_images_and_arrays_get_the_probabilities_of_pytorch(classifier: OnnxClassifier) -> None:
    paths = sorted(IMAGES.glob("*.png"))[:3]
    opened = [predict.open_image(path) for path in paths]
    arrays = [np.asarray(image) for image in opened]
    expected = Classifier(small_glit(), torch.device("cpu")).probabilities(opened).numpy()
    for images in (paths, [str(path) for path in paths], opened, arrays):
        np.testing.assert_allclose(classifier.probabilities(images), expected, atol=1e-5)


def test_classes_come_by_name_the_most_probable_first(classifier: OnnxClassifier) -> None:
    (first, *rest) = classifier.classify(generated_images(40, (30, 30)), top_k=3)
    assert len(rest) == 39
    names, values = zip(*first, strict=True)
    assert set(names) <= set(CLASSES)
    assert list(values) == sorted(values, reverse=True)


def test_one_image_is_one_image(classifier: OnnxClassifier) -> None:
    path = sorted(IMAGES.glob("*.png"))[0]
    image = predict.open_image(path)
    expected = classifier.classify([path])
    for one in (path, str(path), image, np.asarray(image)):
        assert classifier.classify(one) == classifier(one) == expected
    batch = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    assert classifier.classify(batch) == classifier.classify(list(batch))
    assert len(classifier.classify(np.zeros((28, 28, 3), np.uint8))) == 1
    for wrong in (np.zeros((4, 28, 28), np.uint8), np.zeros((2, 4, 28, 28), np.uint8)):
        with pytest.raises(DataError, match=r"an array is an image if it is uint8 \[h, w, 3\]"):
            classifier.classify(wrong)


def test_a_classifier_says_what_it_is_and_can_be_sent_to_another_process(classifier: OnnxClassifier) -> None:
    text = repr(classifier)
    assert str(classifier.path) in text
    assert "fp32, images of 32 x 32, 5 classes, CPUExecutionProvider" in text
    again = pickle.loads(pickle.dumps(classifier))
    images = list(generated_images(2, (30, 30)))
    np.testing.assert_array_equal(again.probabilities(images), classifier.probabilities(images))


def test_grey_arrays_are_images_too(classifier: OnnxClassifier) -> None:
    grey = np.full((20, 30), 99, np.uint8)
    rows = classifier.probabilities([grey, grey[..., None], np.stack([grey] * 3, axis=-1)])
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])


def test_a_file_of_one_channel_sees_grey_images() -> None:
    images = list(generated_images(2, (40, 40)))
    expected = Classifier(small_glit(in_chans=1, global_pool="avg"), torch.device("cpu")).probabilities(images).numpy()
    for options in ({}, {"preprocess": True}):
        found = OnnxClassifier(exported("one channel", **options).path).probabilities(images)
        np.testing.assert_allclose(found, expected, atol=2e-3 if options else 1e-5)


def test_nothing_in_is_nothing_out(classifier: OnnxClassifier) -> None:
    assert classifier.probabilities([]).shape == (0, 5)
    assert classifier.classify([]) == []
    assert classifier.logits(np.zeros((0, 3, 32, 32), np.float32)).shape == (0, 5)


def test_threads_may_share_a_classifier(classifier: OnnxClassifier) -> None:
    images = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)
    expected = classifier.logits(images)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda index: classifier.logits(images[index : index + 1]), list(range(16)) * 3))
    np.testing.assert_allclose(np.concatenate(results), np.concatenate([expected] * 3), atol=1e-5)


def test_half_precision_is_fed_and_read_without_thinking_of_it() -> None:
    images = list(generated_images(2, (40, 40)))
    half = OnnxClassifier(exported(precision="fp16").path)
    assert half.input_dtype == np.float16
    assert half.logits_of(images).dtype == np.float32
    plain = OnnxClassifier(exported().path)
    np.testing.assert_allclose(half.probabilities(images), plain.probabilities(images), atol=5e-3)


def test_bound_buffers_give_the_same_as_unbound_ones() -> None:
    fixed = OnnxClassifier(exported(batch=4).path, ["cpu"])
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    expected = fixed.logits(images)
    fixed._binding = Binding(fixed.session, images.shape, fixed.input_dtype, (4, 5), device="cpu")
    for scale in (1, 2, 1):
        found = fixed.logits(scale * images)
    np.testing.assert_array_equal(found, expected)


# ---- without torch ----

WITHOUT_TORCH = """
import json, pickle, sys, time
from pathlib import Path

ALLOWED = {"numpy", "PIL", "onnxruntime", "glit_runtime", *sys.stdlib_module_names}

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ALLOWED or any("onnxruntime" in str(folder) for folder in path or ()):
            return None
        raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refusal())
began = time.process_time()
import glit_runtime
took = time.process_time() - began
classifier = pickle.loads(pickle.dumps(glit_runtime.OnnxClassifier(sys.argv[1], ["cpu"], threads=1)))
rows = [classifier.probabilities(path)[0].tolist() for path in sys.argv[2:]]
errors = [found.error for found in classifier.predict([Path(sys.argv[2]), Path(sys.argv[1])])]
try:
    classifier.info.spec
except glit_runtime.ExportError as error:
    errors.append(str(error))
print(json.dumps({"took": took, "repr": repr(classifier), "rows": rows, "errors": errors}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel of `glit-runtime` holds."""
    project = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text())
    files = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    site = tmp_path_factory.mktemp("site")
    for source, target in files.items():
        (site / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "runtime" / source, site / target)
    return site


def test_a_file_is_classified_without_torch_as_with_it(installed: Path, classifier: OnnxClassifier) -> None:
    paths = sorted(IMAGES.glob("*.png"))[:3]
    program = f"import sys; sys.path.insert(0, {str(installed)!r})\n{WITHOUT_TORCH}"
    done = subprocess.run(
        [sys.executable, "-c", program, classifier.path, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    np.testing.assert_allclose(found["rows"], classifier.probabilities(paths), atol=1e-6)
    assert found["repr"] == repr(classifier)
    assert found["took"] < 1
    none, image, spec = found["errors"]
    assert none is None
    assert image.endswith("not an image of a known format")
    assert spec.startswith("glit_models cannot be imported")


@pytest.mark.parametrize("name", ["browser/index.html", "node/classify.mjs"])
def test_the_examples_use_names_that_an_exported_file_has(name: str) -> None:
    file = exported(preprocess=True).path
    report = json.loads(file.with_name(f"{file.name}.json").read_text())
    text = (ROOT / "examples" / name).read_text()
    assert "class_names: names" in text
    assert report["info"]["class_names"] == list(CLASSES)
    classifier = OnnxClassifier(file, ["cpu"])
    outputs = [output.name for output in classifier.session.get_outputs()]
    assert f"{{ {', '.join(outputs)} }} = await session.run({{ {classifier.input_name}: " in text


# ---- which provider ----


def test_the_provider_that_runs_it_is_said(classifier: OnnxClassifier) -> None:
    assert classifier.provider == "CPUExecutionProvider"
    assert classifier.provider in sessions.available_providers()


def test_a_provider_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ExportError, match="has no provider 'abacus', only .*CPUExecutionProvider"):
        OnnxClassifier(exported().path, ["abacus"])


def test_a_silent_fallback_is_seen_and_refused_if_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = ("CUDAExecutionProvider", "CPUExecutionProvider")
    if "CUDAExecutionProvider" in sessions.available_providers():
        pytest.skip("there is a GPU, so nothing falls back")
    monkeypatch.setattr(sessions, "available_providers", lambda: everything)
    # ONNX Runtime warns of a name that it does not know, and takes the CPU.
    with pytest.warns(UserWarning, match="not in available provider names"):
        assert OnnxClassifier(exported().path).provider == "CPUExecutionProvider"
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(
            ExportError, match="CUDAExecutionProvider cannot be used here, only CPUExecutionProvider; name no provider"
        ),
    ):
        OnnxClassifier(exported().path, ["cuda"], strict=True)


def test_two_builds_of_onnx_runtime_in_one_place_are_refused(
    classifier: OnnxClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert classifier.build == f"onnxruntime {onnxruntime.__version__}"
    real = importlib.metadata.distribution
    same = lambda name: real("onnxruntime" if name == "onnxruntime-gpu" else name)  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "distribution", same)
    with pytest.raises(ExportError, match="onnxruntime-gpu and onnxruntime are both installed and overwrite each"):
        OnnxClassifier(exported().path)


def test_engines_of_tensorrt_are_kept_for_each_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLIT_HOME", str(tmp_path))
    first, second = exported().path, exported(opset=18).path
    assert runtime._engine_cache(first, None) == {}  # it is not there
    monkeypatch.setattr(sessions, "available_providers", lambda: sessions.PROVIDERS)
    for others in (["cpu"], ["cuda"]):
        assert runtime._engine_cache(first, others) == {}
    assert list(tmp_path.iterdir()) == []
    caches = [runtime._engine_cache(first, None), runtime._engine_cache(second, ["trt"])]
    folders = [Path(cache["TensorrtExecutionProvider"]["trt_engine_cache_path"]) for cache in caches]
    assert {folder.parent for folder in folders} == {tmp_path / "tensorrt"}
    assert folders[0] != folders[1]
    assert all(folder.is_dir() for folder in folders)


def test_without_a_place_for_engines_tensorrt_works_uncached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported().path
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLIT_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(sessions, "available_providers", lambda: sessions.PROVIDERS)
    assert runtime._engine_cache(path, None) == {}
    assert "cannot be created (Not a directory), so TensorRT builds its engines" in capsys.readouterr().err


def test_a_cuda_graph_needs_a_fixed_batch_and_cuda() -> None:
    with pytest.raises(ExportError, match="needs a fixed batch and size; export it with batch=..."):
        OnnxClassifier(exported().path, ["cpu"], cuda_graph=True)
    with pytest.raises(ExportError, match="needs CUDAExecutionProvider, this runs on CPUExecutionProvider"):
        OnnxClassifier(exported(batch=4).path, ["cpu"], cuda_graph=True)


# ---- what it refuses ----


def test_files_that_are_none_of_ours_or_damaged_are_refused(tmp_path: Path) -> None:
    content = exported().path.read_bytes()
    whole = onnx.load_from_string(content)
    bare, lacking, damaged = (onnx.ModelProto() for _ in range(3))
    for model in (bare, lacking, damaged):
        model.CopyFrom(whole)
    del bare.metadata_props[:]
    for index, prop in enumerate(whole.metadata_props):
        if prop.key == "glit.input_size":
            del lacking.metadata_props[index]
            damaged.metadata_props[index].value = "[3, 32"
    files = {
        "cut.onnx": (content[: len(content) // 2], "not a whole ONNX file, probably cut short"),
        "empty.onnx": (b"", "not a whole ONNX file"),
        "text.onnx": (b"no model at all", "not a whole ONNX file"),
        "bare.onnx": (bare.SerializeToString(), "not exported by glit-models"),
        "lacking.onnx": (lacking.SerializeToString(), "its metadata lacks 'glit.input_size'"),
        "damaged.onnx": (damaged.SerializeToString(), "its metadata 'glit.input_size' is damaged"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ExportError, match=f"{name}: {message}"):
            OnnxClassifier(tmp_path / name)
    with pytest.raises(ExportError, match="nowhere.onnx: no such file"):
        OnnxClassifier(tmp_path / "nowhere.onnx")


def test_another_shape_or_type_is_named_with_the_right_one(classifier: OnnxClassifier) -> None:
    for images, message in (
        (np.zeros((1, 3, 64, 64), np.float32), r"float32 \[B, 3, 32, 32\], got float32 \[1, 3, 64, 64\]"),
        (np.zeros((1, 3, 32, 32)), r"float32 \[B, 3, 32, 32\], got float64 \[1, 3, 32, 32\]"),
        (np.zeros((3, 32, 32), np.float32), r"got float32 \[3, 32, 32\]"),
    ):
        with pytest.raises(DataError, match=message):
            classifier.logits(images)
    with pytest.raises(DataError, match=r"uint8 \[B, h, w, 3\], got uint8 \[1, 8, 8, 4\]"):
        OnnxClassifier(exported(preprocess=True).path).logits(np.zeros((1, 8, 8, 4), np.uint8))
    with pytest.raises(DataError, match="an array is an image if it is uint8"):
        classifier.probabilities([np.zeros((8, 8, 3), np.float32)])
    with pytest.raises(DataError, match="not an image"):
        classifier.probabilities([__file__])


# ---- the command ----


def test_predict_reads_an_exported_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(exported().path)
    Image.new("RGB", (30, 30), 99).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    assert main(["predict", str(tmp_path / "a.png"), "--onnx", path, "--topk", "2"]) == 0
    assert "on CPUExecutionProvider" in capsys.readouterr().out
    assert main(["predict", str(tmp_path), "--onnx", path, "--json", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    first, second = json.loads(out)
    assert {row["class"] for row in first["classes"]} == set(CLASSES)
    assert "b.png: not an image" in second["error"]
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onnx", "nowhere.onnx"], "nowhere.onnx: no such file"),
        (["--onnx", __file__], "not a whole ONNX file"),
        (["--onnx", "x.onnx", "--model", "glit_tiny"], "--model and --onnx exclude each other"),
        (["--onnx", "FILE", "--device", "abacus"], "no provider 'abacus'"),
    ],
)
def test_bad_files_end_predict_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(exported().path) if text == "FILE" else text for text in arguments]
    assert main(["predict", str(IMAGES), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_network_can_be_made_ready_to_be_timed() -> None:
    (logits,) = onnx_runner(small_glit(), batch_size=2)()
    assert logits.shape == (2, 5)
    with pytest.raises(ExportError, match=r"no provider 'abacus'"):
        onnx_runner(small_glit(), batch_size=2, device="abacus:0")
