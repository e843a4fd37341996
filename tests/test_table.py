"""Tests of the table of trained networks: its content, lookup by spec, and judging measures."""

import json
import re
from pathlib import Path

import pytest
from glit_models.search.evidence.table import NetworkTable

from benchmarks.ranked.__main__ import TABLE, load_spaces
from glit_models import BlockSpec, GLiTSpec, count_macs, count_params
from glit_models.errors import SearchError


@pytest.fixture(scope="module")
def table() -> NetworkTable:
    return NetworkTable.read(TABLE)


def test_the_frozen_table_holds_members_of_its_spaces_with_their_costs_and_scores(table: NetworkTable) -> None:
    for name, space in load_spaces().items():
        for network in table.of(name, space):
            assert network.costs == {
                "macs": count_macs(network.spec, 28, 10),
                "params": count_params(network.spec, 10, 28),
            }
            assert 0 in network.trainings
            for scores in network.trainings.values():
                assert 80 < scores["test_top1"] <= scores["search_top1"] + 3 < 98
                assert 0.2 < scores["test_loss"] < 0.6
    assert len({network.spec for network in table.networks}) == len(table.networks)


def test_a_measure_that_knows_the_truth_has_a_tau_of_one_and_its_opposite_minus_one(table: NetworkTable) -> None:
    losses = {network.spec: network.trainings[0]["test_loss"] for network in table.networks}
    ranking = table.judge("all", {spec: {"right": -loss, "wrong": loss} for spec, loss in losses.items()})
    assert ranking.taus["loss"]["right"].value == pytest.approx(1)
    assert ranking.taus["loss"]["wrong"].value == pytest.approx(-1)
    assert ranking.regrets["loss"]["right"] == 0


def test_a_second_training_gives_the_noise(tmp_path: Path) -> None:
    rows = json.loads(TABLE.read_text())
    again = [{**row, "seed": 1, "test_loss": row["test_loss"] + 0.001} for row in rows if row["seed"] == 0]
    (tmp_path / "table.json").write_text(json.dumps(again + [row for row in rows if row["seed"] == 0]))
    table = NetworkTable.read(tmp_path / "table.json")
    ranking = table.judge("all", {network.spec: {"MACs": network.costs["macs"]} for network in table.networks})
    assert ranking.noise("loss") == pytest.approx(0.001 / 2**0.5)
    assert 0.9 < ranking.ceilings["loss"].value < 1


def test_a_network_that_the_table_does_not_have_is_named(table: NetworkTable) -> None:
    other = GLiTSpec((BlockSpec(1, 2, 1, 0.5, 3, 1),), 24, 3, 8)
    with pytest.raises(SearchError, match=r"the table has \d+ networks, but not {\"embed_dim\": 24"):
        table[other]


def test_networks_of_another_space_are_refused(table: NetworkTable) -> None:
    with pytest.raises(SearchError, match="joint-00 of the table is not a member of the given space"):
        table.of("joint", load_spaces()["stage2"])
    with pytest.raises(SearchError, match="no networks of space 'stage3'"):
        table.of("stage3", load_spaces()["joint"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "no table of trained networks"),
        ('{"a": 1}', "no table of trained networks"),
        ('[{"name": "a"}]', "a row lacks 'seed'"),
        ('[{"name": "a", "seed": 0, "search_top1": "x"}]', "no table of trained networks"),
    ],
)
def test_a_file_that_is_no_table_is_named(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(SearchError, match=re.escape(str(path))) as error:
        NetworkTable.read(path)
    assert reason in str(error.value)
    with pytest.raises(SearchError, match="cannot be read"):
        NetworkTable.read(tmp_path / "none.json")
