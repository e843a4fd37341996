"""Tests of supernet training: the networks and images of a step, and resuming from any moment."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from glit_models.search import SearchSpace, Supernet, extremes, load_search_recipe
from glit_models.search.recipe import SearchRecipe
from glit_models.search.run.context import Interrupted, RunContext
from glit_models.search.run.stage import Stage
from glit_models.search.spaces.budget_sampler import BudgetSampler
from glit_models.search.supernets.path_sampling import BalancedSampler, path_sampling
from glit_models.search.supernets.training import SupernetTrainee
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from glit_models import Spec, count_macs
from glit_models.errors import RecipeError
from glit_models.training import Objective, Trainer
from tests.spaces import AUTOFORMER, SCATTERED, TIED

FIXTURES = Path(__file__).parent / "fixtures"
DATA = (f"train.data.root={FIXTURES / 'fashion-mnist'}", "train.data.limit=90", "supernet.train.optim.epochs=1")


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than these trainings."""
    monkeypatch.setattr(Trainer, "_draw", lambda self, is_wanted: None)


def _recipe(*overrides: str) -> SearchRecipe:
    return load_search_recipe(str(FIXTURES / "search.yaml"), [*DATA, *overrides])


def _trainee(recipe: SearchRecipe, stop_before: int | None = None) -> SupernetTrainee:
    supernet, training = recipe.supernet, recipe.supernet_recipe()
    draw = path_sampling(BudgetSampler(recipe.load_space()), supernet.sampling, supernet.paths, training.seed)

    def draw_until(step: int) -> Sequence[Spec]:
        if step == stop_before:
            raise KeyboardInterrupt
        return draw(step)

    return SupernetTrainee(recipe.load_space(), supernet.sharing, training, draw_until)


def _train(recipe: SearchRecipe, out: Path, stop_before: int | None = None) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    trainee = _trainee(recipe, stop_before)
    assert Trainer(trainee.recipe, out, device="cpu", trainee=trainee).run() is not None
    return load_file(out / "model.safetensors")


def test_each_part_of_a_step_goes_through_its_own_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    recipe = _recipe("supernet.paths=3", "supernet.train.optim.grad_accumulation=2", "supernet.sampling=balanced")
    sizes, seen = [], []
    forward = Supernet.forward

    def note(self: Supernet, x: Tensor) -> Tensor:
        sizes.append(len(x))
        seen.append((self.active, self.paths))
        return forward(self, x)

    monkeypatch.setattr(Supernet, "forward", note)
    _train(recipe, tmp_path)
    assert sizes == [5] * 18  # three steps of 30 images in six parts
    for step in range(3):
        paths = tuple(_trainee(recipe).draw_paths(step))
        assert len(paths) == 3
        assert seen[6 * step : 6 * step + 6] == [(path, paths) for path in paths * 2]


def test_the_gradients_of_a_step_are_the_mean_over_its_paths():
    recipe = _recipe("supernet.paths=2")
    trainee = _trainee(recipe)
    torch.manual_seed(0)
    supernet = trainee.create_model(5).train()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5

    def grads(*halves: int) -> list[Tensor]:
        supernet.zero_grad()
        for half in halves:
            trainee.begin_part(supernet, 0, half)
            cross_entropy(supernet(images[half::2]), labels[half::2]).div(2).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in supernet.parameters()]

    for first, second, both in zip(grads(0), grads(1), grads(0, 1), strict=True):
        torch.testing.assert_close(first + second, both)


def test_a_training_of_several_paths_that_dies_goes_on_to_the_same_weights(tmp_path: Path):
    recipe = _recipe("supernet.paths=2", "supernet.sampling=balanced")
    whole = _train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(recipe, tmp_path / "killed", stop_before=2)
    resumed = _train(recipe, tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_paths_that_do_not_fit_a_batch_and_unknown_samplings_are_refused():
    with pytest.raises(RecipeError, match=r"^supernet.paths must be at least 1, got 0$"):
        _recipe("supernet.paths=0")
    for paths in (4, 31):
        message = rf"^supernet.paths={paths} cuts each batch into parts: optim.batch_size must be a multiple of {paths}"
        with pytest.raises(RecipeError, match=message):
            _recipe(f"supernet.paths={paths}")
    with pytest.raises(RecipeError, match=r"supernet.sampling must be .*balanced.*, got 'fair'"):
        _recipe("supernet.sampling=fair")


@pytest.mark.parametrize(("space", "turn"), [(AUTOFORMER, 4), (TIED, 18), (SCATTERED, 12)])
def test_balanced_draws_take_each_value_of_each_gene_equally_often(space: SearchSpace, turn: int):
    draws = [BalancedSampler(space, 0).draw(number) for number in range(4 * turn)]
    assert all(spec in space for spec in draws)
    assert len({BalancedSampler(space, seed).draw(0) for seed in range(20)}) > 1
    for part in (draws[:turn], draws[turn : 2 * turn], draws):  # of every turn, not only in the mean
        for values in ([spec.depth for spec in part], [spec.embed_dim for spec in part]):
            assert len(set(Counter(values).values())) == 1
        for index in range(max(space.depths)):
            blocks = [spec.blocks[index] for spec in part if spec.depth > index]
            leading = [space.spec_class.genes_of(block)[space.spec_class.leading_genes[0]] for block in blocks]
            drawn, expected = Counter(leading), Counter()
            for block, count in zip(space.block_options[index].blocks, space.block_options[index].counts, strict=True):
                expected[space.spec_class.genes_of(block)[space.spec_class.leading_genes[0]]] += count
            assert {value: drawn[value] * sum(expected.values()) for value in expected} == {
                value: count * len(blocks) for value, count in expected.items()
            }


@pytest.mark.parametrize("space", [AUTOFORMER, TIED, SCATTERED])
def test_a_widening_space_begins_with_the_largest_sizes_and_ends_with_all(space: SearchSpace):
    sizes = [space.largest(share).size for share in (0.0, 0.5, 0.99, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < space.size
    assert space.largest(1.0) == space
    assert all(spec in space for spec in space.largest(0.0))
    largest = extremes(space, count_macs)[1]
    assert largest in space.largest(0.0)
    leading = [name for name in space.spec_class.leading_genes if name == "num_global_heads"]
    for name in leading:  # of which none is larger than another
        for whole, narrow in zip(space.block_options, space.largest(0.0).block_options, strict=True):
            values = [{getattr(block, name) for block in options.blocks} for options in (whole, narrow)]
            assert values[0] == values[1]


def test_a_sandwich_has_the_largest_and_the_smallest_network_in_every_step():
    ends = extremes(TIED, count_macs)[::-1]
    draw = path_sampling(BudgetSampler(TIED), "sandwich", 4, 0, ends, widen_steps=10)
    steps = [draw(step) for step in range(20)]
    assert all(tuple(paths[:2]) == ends and len(paths) == 4 for paths in steps)
    assert all(spec in TIED.largest(0.0) for spec in steps[0][2:])
    assert any(spec not in TIED.largest(0.0) for paths in steps[10:] for spec in paths[2:])
    assert [draw(step) for step in range(20)] == steps


def test_in_place_distillation_teaches_all_but_the_largest_network(tmp_path: Path):
    recipe = _recipe()
    space = recipe.load_space()
    largest = extremes(space, count_macs)[1]
    supernet = Supernet(space, img_size=32, num_classes=5).train()
    objective = Objective(recipe.supernet_recipe().augment, recipe.supernet_recipe().distill, 5, {}, lambda name: None)
    draw = path_sampling(BudgetSampler(space), "uniform", 1, 0)
    trainee = SupernetTrainee(space, "entangled", recipe.supernet_recipe(), draw, None, largest, 0.75)
    optimizer = torch.optim.AdamW(supernet.parameters())
    trainee.begin(supernet, optimizer, objective, lambda module: None)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    supernet.activate(largest)
    taught = supernet(images).detach()
    plain = cross_entropy(taught, labels, label_smoothing=objective.smoothing)
    torch.testing.assert_close(objective.loss(taught, images, labels), plain)
    spec = next(spec for spec in space if spec != largest)
    supernet.activate(spec, (spec, largest))
    logits = supernet(images)
    learned = kl_div(logits.log_softmax(1), taught.log_softmax(1), log_target=True, reduction="batchmean")
    expected = 0.25 * cross_entropy(logits, labels, label_smoothing=objective.smoothing) + 0.75 * learned
    torch.testing.assert_close(objective.loss(logits, images, labels), expected)
    assert (supernet.active, supernet.paths) == (spec, (spec, largest))


def test_a_sandwich_with_distillation_that_dies_goes_on_to_the_same_weights(tmp_path: Path):
    keys = ("supernet.paths=3", "supernet.sampling=sandwich", "supernet.distill=1", "supernet.widen=0.5")
    recipe = _recipe(*keys)

    def train(name: str, minutes: float | None = None) -> dict[str, Tensor] | None:
        context = RunContext(recipe, tmp_path / name, "cpu", minutes)
        Stage("joint", recipe.load_space(), context).train_supernet()
        return load_file(tmp_path / name / "joint/supernet/model.safetensors")

    torch.set_num_threads(1)
    whole = train("whole")
    with pytest.raises(Interrupted):
        train("stopped", minutes=1e-9)
    resumed = train("stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_keys_of_a_supernets_training_that_do_not_go_together_are_refused():
    for keys, message in (
        (["supernet.sampling=sandwich", "supernet.paths=2"], "supernet.paths must be at least 3 for"),
        (["supernet.sampling=balanced", "supernet.widen=0.5"], "supernet.widen needs supernet.sampling=uniform or"),
        (["supernet.distill=0.5"], "supernet.distill needs supernet.sampling=sandwich"),
        (
            [
                "supernet.sampling=sandwich",
                "supernet.paths=3",
                "supernet.distill=0.5",
                "train.distill.teacher=glit_tiny",
            ],
            "supernet.distill cannot be set beside",
        ),
        (["supernet.sampling=budget", "budget.latency_ms.high=9"], "supernet.sampling=budget cannot be used with"),
        (["supernet.train.model.img_size=16"], "model.img_size must be the same in supernet.train and retrain.train"),
        (["supernet.distill=2"], "supernet.distill must be from 0 to 1, got 2"),
        (["supernet.widen=-1"], "supernet.widen must be from 0 to 1, got -1"),
    ):
        with pytest.raises(RecipeError, match=message):
            _recipe(*keys)
