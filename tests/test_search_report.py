"""Tests of a search's report: a stand-alone, deterministic page at any time, and errors."""

import base64
import builtins
import html.parser
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import search_folders
import yaml
from glit_models.search import write_report
from glit_models.search.evidence.control import Control
from glit_models.search.methods.candidates import pareto_front
from glit_models.search.report import figures, findings
from glit_models.search.report.findings import Network
from glit_models.search.report.panels import show_count
from PIL import Image
from search_folders import write_search

from glit_models import GLIT_TINY
from glit_models.errors import GlitError, SearchError, WriteError
from glit_models.evaluate import accuracy_interval
from glit_models.runs.console import show_seconds

STAGE_FILES = findings._STAGE_FILES


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that is over, with its report."""
    folder = write_search(tmp_path_factory.mktemp("search") / "search")
    write_report(folder)
    return folder


@pytest.fixture
def search(finished: Path, tmp_path: Path) -> Path:
    """A copy without the report, to change."""
    return shutil.copytree(finished, tmp_path / "search", ignore=shutil.ignore_patterns("report"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images take a second each; some promises are about the rest."""
    drawn = io.BytesIO()
    Image.new("RGB", (1, 1)).save(drawn, format="png")
    monkeypatch.setattr(figures, "_drawn", lambda fill, size: drawn.getvalue())


class Page(html.parser.HTMLParser):
    """A page's text, tags, and the sources of its figures; unbalanced tags fail."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def edit(path: Path, change: Callable[[object], object]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_the_page_stands_alone_and_its_figures_lie_beside_it(finished: Path) -> None:
    page = Page(finished / "report" / "index.html")
    files = {path.name: path.read_bytes() for path in (finished / "report").glob("*.png")}
    assert set(files) == {
        f"{n}.png" for n in ("network", "generations", "accuracy-macs", "effects", "ranking", "supernet", "times")
    }
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources]
    assert sorted(embedded) == sorted(files.values())
    assert not {"script", "link"} & set(page.tags)
    assert "url(" not in (finished / "report" / "index.html").read_text()


def test_the_page_says_the_result_in_numbers(finished: Path) -> None:
    text = Page(finished / "report" / "index.html").text
    result = json.loads((finished / "result.json").read_text())
    low, high = accuracy_interval(result["test_accuracy"], 5_000)
    assert f"on the test set {result['test_accuracy']:.2f} % ({low:.1f} to {high:.1f})" in text
    assert f"winner's MACs {show_count(result['macs'])}" in text
    assert "time 5 h 18 min" in text
    assert "seed 3" in text
    assert "entangled" in text
    rank = json.loads((finished / "stage2" / "rank.json").read_text())
    assert f"about {50 + 50 * rank['taus']['loss']['inherited loss']['value']:.0f} of 100 cases" in text
    assert f"a tau of about {rank['ceilings']['loss']['value']:.2f}" in text
    assert "a measure without error" in text
    for stage in ("stage1", "stage2"):
        for network in json.loads((finished / stage / "retrained.json").read_text()):
            low, high = accuracy_interval(network["accuracy"], 10_000)
            assert f"{network['fitness']:.2f} % {network['accuracy']:.2f} % ({low:.1f} to {high:.1f})" in text
    assert "Not there yet" not in text


def test_the_winner_is_shown_beside_random_networks(search: Path, finished: Path) -> None:
    control = Control.from_dict(json.loads((finished / "control.json").read_text()))
    text = Page(finished / "report" / "index.html").text
    assert f"On the test set the winner is better than {control.num_beaten} of 3;" in text
    edit(search / "control.json", lambda data: {**data, "networks": [{**n, "accuracy": 100} for n in data["networks"]]})
    text = Page(write_report(search)).text
    assert "better than 0 of 3;" in text
    assert "By chance alone the winner would beat all of 3 in one of 4 searches" in text
    edit(search / "control.json", lambda data: {**data, "split": "search"})
    text = Page(write_report(search)).text
    assert "By chance alone" not in text
    assert "The winner was chosen from several retrained networks on these same images" in text


def test_the_winner_is_shown_beside_what_it_started_from(search: Path) -> None:
    def add(data: dict[str, Any]) -> dict[str, Any]:
        spec = data["networks"][0]["spec"]
        accuracies = {"<b>": data["winner"] - 5, "from random weights": data["winner"] + 0.1}
        starts = [{"name": name, "spec": spec, "accuracy": accuracy} for name, accuracy in accuracies.items()]
        return {**data, "starts": starts}

    assert "What was the start worth?" not in Page(write_report(search)).text
    edit(search / "control.json", add)
    text = Page(write_report(search)).text
    assert "What was the start worth?" in text
    assert re.search(r"<b> .* better \(\+5\.00 points\) from random weights .* a tie \(-0\.10 points\)", text)


def test_retrained_networks_that_the_images_cannot_tell_apart_are_ties(search: Path) -> None:
    edit(search / "stage2" / "retrained.json", lambda networks: [
        {**network, "accuracy": accuracy} for network, accuracy in zip(networks, (88.0, 87.8, 80.0), strict=False)
    ])  # fmt: skip
    text = Page(write_report(search)).text
    assert re.search(r"87\.80 % \(87\.1 to 88\.4\) a tie", text)
    assert re.search(r"80\.00 % \(79\.2 to 80\.8\) worse", text)


def test_every_image_has_its_explanation(finished: Path) -> None:
    page = (finished / "report" / "index.html").read_text()
    captions = re.findall(r"<figure><img [^>]*><figcaption>(.*?)</figcaption></figure>", page)
    assert len(captions) == page.count("<img ")
    assert min(map(len, captions)) > 80


def test_the_same_folder_gives_the_same_bytes_whatever_the_user_s_style(search: Path, finished: Path) -> None:
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 30}):
        write_report(search)
    for path in (finished / "report").iterdir():
        assert (search / "report" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_thousand_candidates_a_stage_stay_a_small_page(search: Path) -> None:
    rng = random.Random(0)
    for stage in ("stage1", "stage2"):
        path = search / stage / "candidates.jsonl"
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        many = [rng.choice(entries) for _ in range(1000)]
        scattered = [
            {**c, "fitness": rng.gauss(60, 5), "macs": rng.uniform(25e6, 40e6), "generation": i // 50}
            for i, c in enumerate(many)
        ]
        path.write_text(search_folders.lines(scattered))
    assert write_report(search).stat().st_size < 600_000
    for path in (search / "report").glob("*.png"):
        with Image.open(path) as image:
            assert 500 < image.width < 1500, path.name


@pytest.mark.parametrize("method", ["spos", "random"])
def test_searches_of_one_stage_have_a_report_too(method: str, tmp_path: Path) -> None:
    page = Page(write_report(write_search(tmp_path, method)))
    assert "One stage" in page.text
    assert ("drawn at random, so" in page.text) == (method == "random")
    assert len(page.sources) == 7


def test_at_each_moment_of_a_search_there_is_a_report_of_what_there_is(search: Path, tmp_path: Path) -> None:
    """The files arrive one by one, as the pipeline writes them."""
    under_way = tmp_path / "under way"
    arriving = [f"{stage}/{file}" for stage in ("stage1", "stage2") for file in STAGE_FILES]
    pictured, drawn_at = 0, {1, 2, 3, 5, 9}  # drawn where an image is new; each moment would take a minute
    for number, file in enumerate(
        ["recipe.yaml", *arriving, "stage2/rank.json", "winner.json", "control.json", "times.json", "result.json"]
    ):
        (under_way / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(search / file, under_way / file)
        if number in drawn_at or number == 0:
            page = Page(write_report(under_way))
            assert "Not there yet" in page.text
            assert len(page.sources) >= pictured
            pictured = len(page.sources)
    assert "Not there yet" not in Page(write_report(under_way)).text


@pytest.mark.parametrize(
    "file",
    [
        "winner.json",
        "result.json",
        "times.json",
        "control.json",
        "stage2/rank.json",
        *(f"stage1/{file}" for file in STAGE_FILES),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_part_that_is_not_there_is_named_and_left_out(search: Path, file: str) -> None:
    (search / file).unlink()
    text = Page(write_report(search)).text
    assert re.search(rf"Not there yet: [^.]*{re.escape(file.rpartition('/')[2])}", text)


def test_the_first_candidates_of_a_search_are_drawn(search: Path) -> None:
    shutil.rmtree(search / "stage2")
    for name in ("winner.json", "stage1/winner.json", "stage1/retrained.json", "stage1/references.json"):
        (search / name).unlink()
    path = search / "stage1" / "candidates.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:40])  # the second is being written
    page = Page(write_report(search))
    assert "Drawn is the best candidate of stage1 so far" in page.text
    assert "1 random" in page.text


def test_folders_of_0_1_read_the_same(search: Path) -> None:
    read = findings.read_findings(search)
    named = {"candidates.jsonl": "accuracy", "references.json": "accuracy", "retrained.json": "inherited"}
    for path in [search / stage / file for stage in ("stage1", "stage2") for file in named]:
        path.write_text(path.read_text().replace('"fitness"', f'"{named[path.name]}"'))
    assert findings.read_findings(search) == read


def test_those_that_were_stopped_early_are_never_the_best(search: Path) -> None:
    path = search / "stage2" / "candidates.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entries[3] |= {"fitness": 99.5, "images": 100}
    path.write_text(search_folders.lines(entries))
    assert "99.5" not in Page(write_report(search)).text


def test_the_front_is_made_of_those_that_none_beats() -> None:
    rng = random.Random(0)
    networks = [
        Network(GLIT_TINY, {"macs": rng.randint(0, 30), "params": 1}, fitness=rng.randint(0, 30)) for _ in range(60)
    ]
    front = pareto_front(networks, lambda network: network.fitness, lambda network: network.costs["macs"])
    places = [(network.costs["macs"], network.fitness) for network in front]
    assert places == sorted(set(places))
    for network in networks:
        place = (network.costs["macs"], network.fitness)
        beaten = any(x <= place[0] and y >= place[1] and (x, y) != place for x, y in places)
        assert beaten or place in places


def test_a_search_within_milliseconds_shows_them(search: Path) -> None:
    recipe = (search / "recipe.yaml").read_text()
    (search / "recipe.yaml").write_text(
        re.sub(r"params: \{.*?\}|params:\n.*\n.*", "latency_ms: {low: null, high: 7}", recipe)
    )
    path = search / "stage2" / "candidates.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(search_folders.lines([{**entry, "latency_ms": entry["macs"] / 5e6} for entry in entries]))
    page = Page(write_report(search))
    assert (search / "report" / "accuracy-latency_ms.png").is_file()
    assert "latency in ms at most 7" in page.text


def test_a_ranking_in_which_no_measure_tells_networks_apart_says_so(search: Path) -> None:
    nothing = {"loss": {}, "top-1": {}}
    edit(search / "stage2" / "rank.json", lambda rank: {**rank, "taus": nothing, "regrets": nothing})
    assert "No measure tells the networks of stage2 apart." in Page(write_report(search)).text


def test_a_ranking_that_0_1_wrote_is_shown(search: Path) -> None:
    (search / "stage2" / "rank.json").unlink()
    candidates = [json.loads(line) for line in (search / "stage2" / "candidates.jsonl").read_text().splitlines()]
    networks = [{**c, "inherited": c["fitness"], "standalone": c["fitness"] + i} for i, c in enumerate(candidates[:5])]
    tau = {"value": 0.42, "low": -0.23, "high": 0.87, "samples": 5}
    old = {"stage": "stage2", "networks": networks, "kendall": tau, "spearman": tau, "kendall_macs": tau}
    (search / "rank.json").write_text(json.dumps(old))
    text = Page(write_report(search)).text
    assert "stage2's inherited top-1 names the better one in about 71 of 100 cases" in text
    assert "0.42 (\N{MINUS SIGN}0.23 to 0.87)" in text


@pytest.mark.usefixtures("undrawn")
def test_candidates_are_shown_by_the_measure_they_were_compared_by(search: Path) -> None:
    (search / "recipe.yaml").write_text((search / "recipe.yaml").read_text() + "fitness: inherited_loss\n")
    best = max(
        json.loads(line)["fitness"] for line in (search / "stage1" / "candidates.jsonl").read_text().splitlines()
    )
    text = Page(write_report(search)).text
    assert "best negative inherited loss" in text
    assert f" {best:.4g} " in text
    assert f"{best:.2f} %" not in text


@pytest.mark.usefixtures("undrawn")
def test_whatever_the_files_hold_is_text_in_the_page(search: Path) -> None:
    evil = "<script>alert('x')</script>&amp;\"'"
    edit(search / "stage1" / "references.json", lambda networks: [{**networks[0], "name": evil}])
    edit(search / "stage2" / "rank.json", lambda rank: {**rank, "stage": evil})
    (search / "recipe.yaml").write_text((search / "recipe.yaml").read_text().replace("entangled", "<img src=x>"))
    page = Page(write_report(search))
    assert "script" not in page.tags
    assert "x" not in page.sources
    assert page.text.count("<script>alert('x')</script>&amp;\"'") == 2


def test_names_that_look_like_formulas_or_have_no_letters_in_the_font_are_drawn(search: Path) -> None:
    odd = ["$\\frac{1$", "網絡", "_hidden", "x" * 300, "7", ""]
    for stage in ("stage1", "stage2"):
        edit(
            search / stage / "references.json",
            lambda networks: [{**networks[i % 2], "name": name} for i, name in enumerate(odd)],
        )
    assert "網絡" in Page(write_report(search)).text


def test_a_folder_that_is_no_search_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SearchError, match=r"is no search: it has no recipe.yaml$"):
            write_report(folder)
        assert not (folder / "report").exists()


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("recipe.yaml", b"{", "not valid YAML"),
        ("recipe.yaml", b"- 3", "a mapping is missing where list stands"),
        ("recipe.yaml", b"seed: 3", "it lacks 'method'"),
        (
            "recipe.yaml",
            b"{method: magic}",
            "unknown search method 'magic'; known: autoformer, evolution, hierarchical, nsga2",
        ),
        (
            "recipe.yaml",
            b"{method: spos, seed: 1, supernet: {sharing: a}, budget: {macs: 3}}",
            "'int' object is not subscriptable",
        ),
        ("stage1/space.yaml", b"embed_dim: 3", ""),
        ("stage1/supernet/metrics.jsonl", b'{"step": 1, "loss": null}\n', ""),
        ("stage1/candidates.jsonl", b"[]\n", "line 1: a mapping is missing where list stands"),
        ("stage1/candidates.jsonl", b"{}\n", "it lacks 'spec'"),
        ("stage1/candidates.jsonl", b'{"spec"\n{}\n', "line 1: "),
        ("stage1/references.json", b"{}", "it must hold a list, not dict"),
        ("stage1/retrained.json", b"[3]", "a mapping is missing where int stands"),
        ("stage1/retrained.json", b'[{"spec": {}}]', "spec lacks the field 'blocks'"),
        ("stage1/winner.json", b"\xff\xfe", ""),
        ("stage2/winner.json", b"", "not valid JSON"),
        ("winner.json", b"{}", "spec lacks the field 'blocks'"),
        ("result.json", b'{"macs": "many"}', "macs must be a finite number, got 'many'"),
        ("result.json", b'{"test_accuracy": 101}', "an accuracy must be from 0 to 100, got 101"),
        ("times.json", b'{"test": NaN}', "seconds must be a finite number, got nan"),
        ("stage2/rank.json", b'{"networks": []}', "it lacks 'taus'"),
        (
            "stage2/rank.json",
            b'{"stage": "a", "networks": [], "taus": {"loss": {"b": {"value": NaN}}}}',
            "value must be",
        ),
        ("stage2/rank.json", b'{"stage": "a", "networks": [], "taus": {}}', "it lacks 'ceilings'"),
        ("control.json", b'{"split": "train", "images": 5, "winner": 3.0, "networks": []}', "it must name a split"),
        ("rank.json", b'{"kendall": {}, "networks": [{"spec": {}}]}', "it lacks 'inherited'"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(search: Path, file: str, content: bytes, reason: str) -> None:
    (search / file).write_bytes(content)
    with pytest.raises(SearchError) as error:
        write_report(search)
    assert str(error.value).startswith(f"{search / file} is damaged: {reason}")
    assert "\n" not in str(error.value)
    assert not (search / "report").exists()


def test_a_file_that_cannot_be_read_is_named(search: Path) -> None:
    (search / "result.json").unlink()
    (search / "result.json").mkdir()
    with pytest.raises(SearchError, match=r"result.json cannot be read: Is a directory$"):
        write_report(search)


@pytest.mark.usefixtures("undrawn")
def test_a_report_that_cannot_be_written_says_so(search: Path) -> None:
    (search / "report").touch()
    with pytest.raises(WriteError, match=rf"^{re.escape(os.fspath(search))}/report cannot be written: "):
        write_report(search)


def test_without_matplotlib_the_message_says_what_to_install(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_matplotlib(name: str, *args: object, **keywords: object) -> object:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return imported(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(GlitError, match=r'is missing: pip install "\.\[search\]" in the checkout$'):
        write_report(search)


@pytest.mark.parametrize(
    ("value", "text"), [(1_472_873_280, "1.473 G"), (38_241_000, "38.24 M"), (950_000, "950 k"), (12, "12")]
)
def test_counts_have_the_digits_that_matter(value: float, text: str) -> None:
    assert show_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.7, "1 min 0 s"), (250, "4 min 10 s"), (7499, "2 h 5 min"), (3599.9, "1 h 0 min")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


def test_a_front_and_a_start_from_weights_are_told(tmp_path: Path) -> None:
    search = write_search(tmp_path / "search", method="spos")
    recipe = yaml.safe_load((search / "recipe.yaml").read_text())
    recipe |= {"method": "nsga2", "retrain": {"start": "inherited"}}
    recipe["supernet"]["from"] = "glit_tiny.fractal1k<script>"
    (search / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = write_report(search).read_text()
    assert "supernet started from" in page
    assert "glit_tiny.fractal1k&lt;script&gt;" in page
    assert "the supernet&#x27;s weights, the control&#x27;s too" in page
    assert "along the front of all candidates" in page
