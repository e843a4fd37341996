"""Tests of evaluation with shared work: the scores equal those of each network evaluated separately."""

import random

import pytest
import torch
import torch.nn.functional as F
from glit_models.search import SearchSpace, Supernet, glit
from glit_models.search.supernets.scoring import Evaluator, Images, Score, prefixes_of
from glit_models.search.supernets.supernet import Sharing
from torch import nn
from torch.optim.swa_utils import update_bn

from glit_models import Spec
from glit_models.errors import SearchError
from tests.spaces import AUTOFORMER, LOCAL

SPACE = glit(24, 3, 4, patch_size=8, kernel_sizes=(3, 5), expand_ratios=(1, 2), qkv_ratios=(0.5, 1), mlp_ratios=(1, 2))
CLASSES, BATCH, BATCHES = 4, 24, 4


def _images(seed: int, count: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(BATCH, 3, 32, 32, generator=generator), torch.randint(0, CLASSES, (BATCH,), generator=generator))
        for _ in range(count)
    ]
    return Images(lambda wanted: batches[wanted.start : wanted.stop], count)


CALIBRATION, SEARCH_SET = _images(0, 3), _images(1, BATCHES)


def _evaluator(sharing: Sharing = "entangled", space: SearchSpace = SPACE, **settings: float) -> Evaluator:
    torch.manual_seed(0)
    supernet = Supernet(space, sharing, img_size=32, num_classes=CLASSES)
    for parameter in supernet.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return Evaluator(supernet, CALIBRATION, SEARCH_SET, **settings)  # type: ignore[arg-type]


def _population(seed: int = 0, space: SearchSpace = SPACE) -> list[Spec]:
    rng = random.Random(seed)
    parents = [space.sample(rng) for _ in range(4)]
    children = [space.mutate(parents[rng.randrange(4)], 0.1, rng) for _ in range(8)]
    return list(dict.fromkeys([*parents, *children]))


def _score_alone(model: nn.Module) -> Score:
    """A network's score by itself, its statistics recomputed by torch."""
    update_bn([images for images, _ in CALIBRATION.batches(CALIBRATION.all)], model)
    model.eval()
    right, loss = 0, 0.0
    with torch.inference_mode():
        for images, labels in SEARCH_SET.batches(SEARCH_SET.all):
            logits = model(images)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum").double())
    return Score(100 * right / (BATCH * BATCHES), loss / (BATCH * BATCHES))


@pytest.mark.parametrize("sharing", ["independent", "entangled"])
def test_a_population_scores_bit_for_bit_as_its_networks_do_one_by_one(sharing: Sharing):
    shared, alone = _evaluator(sharing), _evaluator(sharing, share=False)
    population = _population()
    scores = shared.evaluate(population)
    assert scores == alone.evaluate(population)
    assert shared.block_images < 0.8 * alone.block_images
    assert len({score.accuracy for score in scores.values()}) > 2  # there is something to tell apart


@pytest.mark.parametrize("space", [AUTOFORMER, LOCAL], ids=["several widths and depths", "three local parts"])
def test_networks_of_all_kinds_score_as_they_do_one_by_one(space: SearchSpace):
    shared, alone = _evaluator(space=space), _evaluator(space=space, share=False)
    population = _population(space=space)
    scores = shared.evaluate(population)
    assert scores == alone.evaluate(population)
    assert shared.block_images < 0.9 * alone.block_images
    for spec in population[:4]:
        assert _score_alone(shared.supernet.extract(spec)) == scores[spec]


def test_the_statistics_and_the_score_are_those_of_torchs_own_recomputation():
    evaluator = _evaluator()
    scores = evaluator.evaluate(_population())
    for spec in _population()[:4]:
        model = evaluator.supernet.extract(spec)
        assert _score_alone(model) == scores[spec]
        for name, tensor in model.named_buffers():
            _, block, rest = name.split(".", 2)
            assert torch.equal(tensor, evaluator._statistics[prefixes_of(spec)[int(block)]][rest])


def test_what_is_kept_from_one_generation_to_the_next_changes_no_score():
    kept = _evaluator()
    first, second = _population(0), _population(1)
    rng = random.Random(2)
    second += [SPACE.mutate(first[index], 0.1, rng) for index in range(8)]
    second = [spec for spec in dict.fromkeys(second) if spec not in first]
    kept.evaluate(first)
    before = kept.block_images
    kept.retain(first[:3])
    scores = kept.evaluate(second)
    fresh = _evaluator()
    assert scores == fresh.evaluate(second)
    assert kept.block_images - before < fresh.block_images


@pytest.mark.parametrize("memory_mb", [0.3, 1])
def test_little_memory_changes_time_alone(memory_mb: float):
    scarce, plenty = _evaluator(memory_mb=memory_mb), _evaluator()
    assert scarce.evaluate(_population()) == plenty.evaluate(_population())
    assert scarce._cache.bytes <= scarce._cache.max_bytes <= memory_mb * 1e6
    second = [spec for spec in _population(1) if spec not in _population()]
    scarce.retain(_population()[:2])
    assert scarce.evaluate(second) == plenty.evaluate(second)


def test_memory_for_less_than_one_batch_is_refused():
    with pytest.raises(SearchError, match=r"evaluation.memory_mb must be at least 1 for batches of 24 images, got 0.1"):
        _evaluator(memory_mb=0.1).evaluate(_population())


def test_progress_is_told_within_an_evaluation():
    told: list[tuple[int, int]] = []
    evaluator = _evaluator()
    evaluator._on_batch = lambda done, total: told.append((done, total))
    evaluator.evaluate(_population())
    assert told == [(done, 7) for done in range(1, 8)]


@pytest.mark.parametrize("share", [True, False])
def test_losses_are_those_of_single_images_on_the_first_batches(share: bool):
    evaluator, fresh = _evaluator(share=share), _evaluator()
    population = _population()
    few, all_images = evaluator.losses(population, 2), evaluator.losses(population, BATCHES)
    assert few.shape == (len(population), 2 * BATCH)
    assert torch.equal(few, all_images[:, : 2 * BATCH])
    scores = fresh.evaluate(population)
    torch.testing.assert_close(all_images.mean(1).tolist(), [scores[spec].loss for spec in population])
    assert evaluator.evaluate(population) == scores  # also after a part was embedded and kept
