"""Tests of rankings: measures compared with training, the noise of training, and the surrogate."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from glit_models.search import Ranking, glit
from glit_models.search.evidence.ranking import Ranked, compare, noise_ceiling
from glit_models.search.methods.surrogate import Surrogate

from glit_models import count_macs
from glit_models.errors import SearchError

SPACE = glit(48, 3, 4, 4)


def _networks(count: int, noise: float, between: float = 1.0) -> list[Ranked]:
    rng = random.Random(0)
    networks = []
    for place in range(count):
        spec, truth = SPACE.sample(rng), rng.gauss(0, between)
        trained, again = ({name: truth + rng.gauss(0, noise) for name in ("loss", "top-1")} for _ in range(2))
        predictions = {"perfect": truth, "chance": rng.random(), "constant": 1.0, "opposite": -truth}
        networks.append(Ranked(spec, {"macs": count_macs(spec)}, predictions, trained, None if place % 3 else again))
    return networks


def test_a_measure_without_error_reaches_the_ceiling_that_the_noise_of_training_leaves() -> None:
    for noise in (0.2, 1.0):
        ranking = compare("joint", _networks(300, noise))
        expected = 2 / math.pi * math.asin(math.sqrt(1 / (1 + noise**2)))
        for truth in ("loss", "top-1"):
            taus, ceiling = ranking.taus[truth], ranking.ceilings[truth]
            assert ceiling.value == pytest.approx(expected, abs=0.1)
            assert ceiling.low <= taus["perfect"].value <= ceiling.high
            assert abs(taus["chance"].value) < 0.12
            assert taus["opposite"].value == pytest.approx(-taus["perfect"].value)
            assert "constant" not in taus
        assert ranking.noise("loss") == pytest.approx(noise, rel=0.2)


def test_where_networks_do_not_differ_beyond_the_noise_no_measure_can_order_them() -> None:
    ranking = compare("joint", _networks(60, noise=1.0, between=1e-3))
    assert ranking.ceilings["loss"].low == 0
    assert ranking.ceilings["loss"].value < 0.5


def test_the_regret_is_how_far_the_best_of_the_first_five_is_behind_the_best() -> None:
    networks = _networks(40, noise=0.0)
    ranking = compare("joint", networks)
    trained = sorted((network.trained["loss"] for network in networks), reverse=True)
    assert ranking.regrets["loss"]["perfect"] == 0
    assert ranking.regrets["loss"]["opposite"] == pytest.approx(trained[0] - trained[-5])


def test_a_ranking_survives_its_file_and_shows_every_measure() -> None:
    ranking = compare("joint", _networks(12, 0.5))
    again = Ranking.from_dict(json.loads(json.dumps(ranking.to_dict())))
    assert again == ranking
    text = str(again)
    assert "12 stand-alone networks of joint, 4 of them trained twice." in text
    for name in ("perfect", "chance", "opposite", "without error"):
        assert text.count(f"    {name}") == 2


def test_equal_accuracies_leave_the_ranking_by_loss() -> None:
    networks = [replace(n, trained={**n.trained, "top-1": 50.0}) for n in _networks(12, 0.5)]
    ranking = compare("joint", networks)
    assert list(ranking.taus) == list(ranking.regrets) == ["loss"]
    assert Ranking.from_dict(json.loads(json.dumps(ranking.to_dict()))) == ranking


def test_too_few_networks_trained_twice_give_no_noise() -> None:
    assert compare("joint", _networks(6, 0.5)).ceilings == {}
    with pytest.raises(SearchError, match="the noise needs at least 3 networks that were trained twice, got 2"):
        noise_ceiling([1, 2, 3, 4], [1, 2, None, None])


# ---- the surrogate ----


def _scored(count: int, noise: float = 0.0) -> tuple[list, list[float], list[float]]:
    """Networks, how good they are (a sum over genes), and that with noise."""
    rng = random.Random(1)
    worth: dict[object, float] = {}
    specs = list(dict.fromkeys(SPACE.sample(rng) for _ in range(count)))
    truth = []
    for spec in specs:
        genes = [(i, *item) for i, block in enumerate(spec.blocks) for item in SPACE.spec_class.genes_of(block).items()]
        truth.append(sum(worth.setdefault(gene, rng.gauss(0, 1)) for gene in genes if gene[2] is not None))
    return specs, truth, [value + rng.gauss(0, noise) for value in truth]


def test_the_surrogate_learns_what_each_choice_is_worth_and_predicts_networks_it_has_not_seen() -> None:
    specs, truth, _ = _scored(400)
    surrogate = Surrogate(SPACE, specs[:300], truth[:300])
    predicted = surrogate.predict(specs[300:])
    assert np.corrcoef(predicted, truth[300:])[0, 1] > 0.99
    assert {feature[1] for feature in surrogate.effects()} >= {"num_global_heads", "kernel_size", "mlp_ratio"}


def test_the_surrogate_shrinks_where_scores_are_noisy() -> None:
    specs, truth, noisy = _scored(150, noise=5.0)
    surrogate = Surrogate(SPACE, specs[:100], noisy[:100])
    assert surrogate.penalty > Surrogate(SPACE, specs[:100], truth[:100]).penalty
    assert np.corrcoef(surrogate.predict(specs[100:]), truth[100:])[0, 1] > 0.2


def test_its_leave_one_out_error_is_that_of_leaving_each_one_out() -> None:
    specs, _, noisy = _scored(30, noise=1.0)
    best = Surrogate(SPACE, specs, noisy).penalty
    errors = {}
    for penalty in (0.01, best):
        left_out = []
        for place in range(len(specs)):
            rest = [i for i in range(len(specs)) if i != place]
            one = Surrogate(SPACE, [specs[i] for i in rest], [noisy[i] for i in rest], penalties=(penalty,))
            left_out.append((one.predict([specs[place]])[0] - noisy[place]) ** 2)
        errors[penalty] = sum(left_out)
    assert errors[best] <= errors[0.01]


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan, 2.0], [1.0, 2.0]])
def test_a_surrogate_of_too_little_is_refused(values: list[float]) -> None:
    specs = [SPACE.sample(random.Random(seed)) for seed in range(3 if len(values) > 1 else 1)]
    with pytest.raises(SearchError, match="a surrogate needs two networks or more, and a finite number for each"):
        Surrogate(SPACE, specs, values)
