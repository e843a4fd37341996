"""Tests of networks extracted from a supernet: their outputs, records, and errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from glit_models.search import SearchSpace, Supernet, extract_networks, glit, load_space
from glit_models.search.run.context import RunContext
from glit_models.search.supernets.scoring import Evaluator, Images

from glit_models import GLiTSpec, cli
from glit_models.errors import SearchError, SpecError
from glit_models.families import named_specs
from glit_models.runs.files import write_json
from glit_models.weights.loading import load_model
from tests.search_folders import begin_search, short_recipe
from tests.spaces import AUTOFORMER, LOCAL


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin_search(tmp_path_factory.mktemp("search") / "short")


def _candidates(search: Path) -> list[dict[str, Any]]:
    """Those of the first stage, the best first."""
    lines = (search / "stage1" / "candidates.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda candidate: -candidate["fitness"])


@pytest.mark.parametrize("space", [AUTOFORMER, LOCAL, glit(24, 3, 2, 8, kernel_sizes=(3, 5), mlp_ratios=(1, 2))])
def test_an_extracted_network_computes_what_its_path_is_scored_with(space: SearchSpace) -> None:
    torch.manual_seed(0)
    supernet = Supernet(space, img_size=32, num_classes=4)
    batches = [(torch.randn(6, 3, 32, 32), torch.randint(4, (6,))) for _ in range(3)]
    images = Images(lambda wanted: batches[wanted.start : wanted.stop], 3)
    logits: list[torch.Tensor] = []
    evaluator = Evaluator(supernet, images, images)
    classify = evaluator._classify
    evaluator._classify = lambda *args: logits.append(classify(*args)) or logits[-1]  # type: ignore[method-assign, func-returns-value]
    for spec in list(space)[::11][:4]:
        logits.clear()
        evaluator.evaluate([spec])
        model = evaluator.extract(spec)
        with torch.inference_mode():
            for path, (batch, _) in zip(logits, batches, strict=True):
                torch.testing.assert_close(model(batch), path, rtol=0, atol=1e-6)


def test_the_model_of_a_place_has_the_fitness_of_the_search_and_says_what_it_is(
    search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert cli.main(["search", "extract", str(search), "--place", "2", "--out", str(out), "--device", "cpu"]) == 0
    best = _candidates(search)[1]
    assert f"{best['fitness']:.2f}" in capsys.readouterr().out
    model = load_model(str(out)).model
    assert model.spec == GLiTSpec.from_dict(best["spec"])
    context = RunContext(short_recipe(), search, "cpu", None)
    batches, count = context.feed().scoring(context.splits.validation)
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    assert 100 * right / count == pytest.approx(best["fitness"])
    entry = json.loads((out / "entry.json").read_text())
    assert entry["metrics"][0]["value"] == round(best["fitness"], 2)
    assert entry["metrics"][0]["source"] == f"glit search extract {search} --place 2"
    names = ["--license", "apache-2.0", "--name", "glit_tiny.look"]
    assert cli.main(["publish", str(out), "--to-folder", str(tmp_path / "published"), *names]) == 0
    card = (tmp_path / "published" / "README.md").read_text()
    for text in ("inherited from a supernet, with no stand-alone training", "the search short", "fashion-mnist",
                 "with inherited weights, %", "BatchNorm statistics were recomputed"):  # fmt: skip
        assert text in card
    assert cli.main(["verify", str(out)]) == 0
    image = str(Path(__file__).parents[1] / "glit_models" / "data" / "images")
    assert cli.main(["predict", image, "--model", str(out), "--device", "cpu"]) == 0


def test_a_front_is_a_folder_for_each_of_its_networks_cheapest_first(search: Path, tmp_path: Path) -> None:
    extracted = extract_networks(search, tmp_path / "front", front="macs", device="cpu")
    front = json.loads((search / "stage1" / "front.json").read_text())["macs"]
    assert [network.spec.to_dict() for network in extracted] == [entry["spec"] for entry in front]
    assert [network.accuracy for network in extracted] == [pytest.approx(entry["fitness"]) for entry in front]
    assert [network.folder for network in extracted] == [tmp_path / "front" / f"{i + 1}" for i in range(len(front))]
    for network in extracted:
        assert load_model(str(network.folder)).model.spec == network.spec


def test_any_network_of_the_space_can_be_taken(search: Path, tmp_path: Path) -> None:
    spec = next(iter(load_space(search / "stage1" / "space.yaml")))
    write_json(tmp_path / "spec.json", spec.to_dict())
    (extracted,) = extract_networks(search, tmp_path / "model", spec=tmp_path / "spec.json", device="cpu")
    assert extracted.spec == spec == load_model(str(tmp_path / "model")).model.spec


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--place", "99"], "--place must be from 1 to 12, the networks that stage1 evaluated, got 99"),
        (["--place", "0"], "--place must be from 1 to 12"),
        (["--front", "flops"], "--front must be macs or params, got 'flops'"),
        (["--spec", "other.json"], "depth must be the space's 2, got 12"),
        (["--spec", "missing.json"], "missing.json"),
        (["--place", "1", "--stage", "stage2"], "--stage must have a trained supernet, as stage1 has; got 'stage2'"),
        (["--place", "1", "--front", "macs"], "give one of --place N, --front COST and --spec FILE"),
        ([], "give one of --place N, --front COST and --spec FILE"),
        (["--place", "1", "--set", "seed=1"], "glit search extract takes no --set; it is for `glit search`"),
    ],
)
def test_what_cannot_be_taken_is_one_line_with_status_2(
    arguments: list[str], message: str, search: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "other.json", named_specs()["glit_tiny"].to_dict())
    assert cli.main(["search", "extract", str(search), "--out", "model", *arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_folder_that_is_taken_or_holds_no_supernet_is_refused(search: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(SearchError, match=r"taken is there already; choose another out"):
        extract_networks(search, tmp_path / "taken", place=1, device="cpu")
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    with pytest.raises(SearchError, match=r"holds no search: there is no recipe.yaml"):
        extract_networks(tmp_path, tmp_path / "model", place=1)
    shutil.copytree(search, tmp_path / "run", ignore=shutil.ignore_patterns("supernet"))
    with pytest.raises(SearchError, match=r"run has no trained supernet to take networks from"):
        extract_networks(tmp_path / "run", tmp_path / "model", place=1)
    with pytest.raises(SpecError, match="spec must be an object"):
        extract_networks(search, tmp_path / "model", spec=3)
