"""Tests of what ViTAS adds to a supernet: identity blocks by a solved probability, private q and k, and both sides."""

import random
from collections import Counter
from math import prod
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from glit_models.search import (
    BudgetSampler,
    SearchRun,
    SearchSpace,
    Supernet,
    extract_networks,
    load_search_recipe,
    macs_budget,
    params_budget,
    plan_search,
    search_again,
    vitas,
)
from glit_models.search.recipe import SearchRecipe
from glit_models.search.run.context import RunContext
from glit_models.search.run.plan import _rarest_value
from glit_models.search.supernets.block import Sharing, Side
from glit_models.search.supernets.path_sampling import IdentitySampler, path_sampling, solve_identity_prob
from glit_models.search.supernets.scoring import Evaluator, Images, Score
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from glit_models import Spec, count_macs
from glit_models.autoformer import VITAS_B, VITAS_E
from glit_models.autoformer.spec import AutoFormerBlock
from glit_models.errors import RecipeError, SearchError
from glit_models.weights.folder import save_folder
from glit_models.weights.loading import load_model
from tests.spaces import AUTOFORMER, LOCAL, VITAS, chi_square, choices

FIXTURES = Path(__file__).parent / "fixtures"
# Blocks of local or of global heads only, so that no block has two mixers, but some have BatchNorm.
UNMIXED = SearchSpace(
    [(choices((0,), (1, 2), (), (3, 5), (1, 2)), choices((3,), (1, 2), (0.5, 1)))] * 3, 24, num_heads=3, patch_size=8
)
SIDED = {"autoformer": (AUTOFORMER, False), "vitas": (VITAS, False), "private": (VITAS, True), "glit": (UNMIXED, False)}
sided = pytest.mark.parametrize(("space", "private_qk"), SIDED.values(), ids=SIDED)


def _supernet(space: SearchSpace = VITAS, sharing: Sharing = "both_sides", private_qk: bool = True) -> Supernet:
    """With weights that differ everywhere."""
    torch.manual_seed(0)
    size = 4 * space.patch_size
    supernet = Supernet(space, sharing, img_size=size, num_classes=5, global_pool="token", private_qk=private_qk)
    for parameter in supernet.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return supernet


def _images(space: SearchSpace, count: int = 4, seed: int = 1) -> Tensor:
    size = 4 * space.patch_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _network(supernet: Supernet, spec: Spec, side: Side) -> nn.Module:
    """A stand-alone network with the weights of one side."""
    name = {"glit": "glit_tiny", "autoformer": "vitas_a"}[spec.family]
    size = 4 * spec.patch_size
    model = timm.create_model(name, spec=spec, img_size=size, num_classes=5, global_pool="token", fc_norm=False)
    model.load_state_dict(supernet.state_of(spec, side))
    return model.eval()


# ---- both sides ----


@sided
@torch.no_grad()
def test_the_logits_are_the_mean_of_two_networks_and_the_first_is_extracted(space: SearchSpace, private_qk: bool):
    supernet, rng = _supernet(space, private_qk=private_qk).eval(), random.Random(0)
    differ = 0
    for _ in range(6):
        spec = space.sample(rng)
        supernet.activate(spec)
        first, last = (_network(supernet, spec, side)(_images(space)) for side in supernet.sides)
        torch.testing.assert_close(supernet(_images(space)), (first + last) / 2, rtol=0, atol=1e-5)
        torch.testing.assert_close(supernet.extract(spec)(_images(space)), first, rtol=0, atol=1e-6)
        differ += not torch.equal(first, last)
    assert differ > 2  # the largest networks have one side


def test_the_largest_network_is_the_same_on_both_sides():
    space = vitas((32,), 2, (2,), (96,), (32,), 8)
    state = _supernet(space).state_of(next(iter(space)))
    other = _supernet(space).state_of(next(iter(space)), "last")
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_both_ends_and_nothing_between(checkpointing: bool):
    space = vitas((16, 64), 2, (2, 4), (48, 192), (8, 32), 8)
    supernet = _supernet(space).train()
    supernet.net.set_grad_checkpointing(checkpointing)
    supernet.activate(space.make_spec([AutoFormerBlock(2, mlp_hidden=8, head_dim=8)] * 2, 16))
    F.cross_entropy(supernet(_images(space)), torch.arange(4)).backward()
    grads = {name: parameter.grad for name, parameter in supernet.named_parameters() if parameter.grad is not None}
    block = "net.blocks.1."
    for name, axis, used in (
        ("net.pos_embed", 2, 16), ("net.head.weight", 1, 16), ("net.norm.weight", 0, 16), (block + "norm1.bias", 0, 16),
        (block + "mlp.32.fc1.weight", 0, 8), (block + "mlp.32.fc1.weight", 1, 16), (block + "mlp.32.fc2.weight", 1, 8),
    ):  # fmt: skip
        grad = grads[name].movedim(axis, 0).flatten(1).abs().sum(1) if grads[name].ndim > 1 else grads[name].abs()
        assert (grad[:used] > 0).all(), name
        assert (grad[-used:] > 0).all(), name
        assert (grad[used:-used] == 0).all(), name


def _evaluator(space: SearchSpace, private_qk: bool, share: bool = True) -> tuple[Evaluator, list[Tensor], list]:
    calibration = [_images(space, 12, seed) for seed in (2, 3)]
    labels = torch.randint(0, 5, (2, 12), generator=torch.Generator().manual_seed(6))
    search_set = list(zip((_images(space, 12, seed) for seed in (4, 5)), labels, strict=True))
    for_statistics = Images(lambda wanted: [(x, labels[0]) for x in calibration[wanted.start : wanted.stop]], 2)
    for_scores = Images(lambda wanted: search_set[wanted.start : wanted.stop], 2)
    supernet = _supernet(space, private_qk=private_qk)
    return Evaluator(supernet, for_statistics, for_scores, share=share), calibration, search_set


@torch.no_grad()
def _score_alone(model: nn.Module, calibration: list[Tensor], search_set: list) -> Score:
    update_bn(calibration, model)
    model.eval()
    logits = torch.cat([model(images) for images, _ in search_set])
    labels = torch.cat([labels for _, labels in search_set])
    return Score(100 * float((logits.argmax(1) == labels).double().mean()), float(F.cross_entropy(logits, labels)))


@sided
def test_a_score_is_the_mean_of_the_scores_of_both_sides(space: SearchSpace, private_qk: bool):
    evaluator, *data = _evaluator(space, private_qk)
    separate = _evaluator(space, private_qk, share=False)[0]
    rng = random.Random(0)
    specs = list(dict.fromkeys(space.sample(rng) for _ in range(6)))
    scores = evaluator.evaluate(specs)
    assert scores == separate.evaluate(specs)
    extracted = evaluator.evaluate(specs, ["first"])
    losses = evaluator.losses(specs, 2)
    for spec, row in zip(specs, losses, strict=True):
        alone = {side: _score_alone(_network(evaluator.supernet, spec, side), *data) for side in ("first", "last")}  # type: ignore[arg-type]
        assert scores[spec].accuracy == pytest.approx((alone["first"].accuracy + alone["last"].accuracy) / 2)
        assert scores[spec].loss == pytest.approx((alone["first"].loss + alone["last"].loss) / 2, rel=1e-5)
        assert float(row.mean()) == pytest.approx(scores[spec].loss, rel=1e-5)
        assert extracted[spec].loss == pytest.approx(alone["first"].loss, rel=1e-5)
        assert _score_alone(evaluator.extract(spec), *data).loss == pytest.approx(alone["first"].loss, rel=1e-5)


def test_what_cannot_be_shared_from_both_sides_or_be_private_is_refused():
    message = r"^sharing 'both_sides' is impossible in blocks\[0\]: options of several mixers would"
    with pytest.raises(SearchError, match=message):
        Supernet(LOCAL, "both_sides", img_size=32)
    message = r"^sharing 'entangled' with private_qk is impossible in blocks\[0\]: attention has no private"
    with pytest.raises(SearchError, match=message):
        Supernet(UNMIXED, img_size=32, private_qk=True)
    with pytest.raises(SearchError, match=r"^sharing 'independent' has no private_qk"):
        Supernet(UNMIXED, "independent", img_size=32, private_qk=True)


# ---- private queries and keys ----


@pytest.mark.parametrize("sharing", ["entangled", "both_sides"])
def test_queries_and_keys_belong_to_a_number_of_heads_and_all_else_is_shared(sharing: Sharing):
    supernet = _supernet(sharing=sharing)
    few, many = (
        VITAS.make_spec([AutoFormerBlock(heads, mlp_hidden=16, head_dim=16 // heads)] * 3, 24) for heads in (2, 4)
    )
    for side in supernet.sides:
        a, b = supernet.state_of(few, side), supernet.state_of(many, side)
        for name, tensor in a.items():
            if name.endswith(("qkv.weight", "qkv.bias")):
                assert torch.equal(tensor[32:], b[name][32:])
                assert not (tensor[:32] == b[name][:32]).any()
            else:
                assert torch.equal(tensor, b[name]), name
    # A wider one of the same number of heads begins with the same rows.
    wide = VITAS.make_spec([AutoFormerBlock(2, mlp_hidden=16, head_dim=16)] * 3, 24)
    name = "blocks.0.mixer.attn.qkv.weight"
    a, c = supernet.state_of(few)[name].unflatten(0, (3, 16)), supernet.state_of(wide)[name].unflatten(0, (3, 32))
    assert torch.equal(a, c[:, :16])


def test_relative_positions_can_have_private_queries_and_keys():
    supernet = _supernet(AUTOFORMER, "entangled").eval()
    spec = AUTOFORMER.sample(random.Random(0))
    supernet.activate(spec)
    with torch.no_grad():
        torch.testing.assert_close(supernet.extract(spec)(_images(AUTOFORMER)), supernet(_images(AUTOFORMER)))


def test_a_network_fills_the_private_weights_that_it_inherits():
    source, supernet = _supernet(sharing="entangled"), _supernet(sharing="entangled")
    spec = VITAS.sample(random.Random(1))
    model = source.extract(spec)
    for parameter in model.parameters():
        parameter.data.uniform_()
    supernet.fill(model)
    inherited = supernet.state_of(spec)
    assert all(torch.equal(tensor, inherited[name]) for name, tensor in model.state_dict().items())


# ---- identity blocks ----


def test_the_space_holds_the_authors_networks_and_refuses_widths_that_no_heads_divide():
    assert VITAS_B in vitas()
    assert VITAS_E in vitas()
    assert vitas().size == 10 * (1 + 4 * 10 * 10) ** 16
    with pytest.raises(SearchError, match=r"^qkv_widths must be multiples of 3 \* num_heads=12, got 50"):
        vitas(num_heads=(0, 4), qkv_widths=(48, 50))
    with pytest.raises(SearchError, match=r"^num_heads must be integers of at least 0, got \[0, -1\]"):
        vitas(num_heads=(0, -1))
    with pytest.raises(SearchError, match=r"^qkv_widths must be integers of at least 1, got \[\]"):
        vitas(qkv_widths=())


@pytest.mark.parametrize("prob", [0.0, 0.3, 0.99])
def test_blocks_are_identity_blocks_with_the_probability_and_all_other_options_are_as_likely_as_before(prob: float):
    sampler, rng = IdentitySampler(VITAS, prob), random.Random(0)
    drawn = Counter(block for _ in range(4000) for block in sampler.sample(rng).blocks)
    num_identity = drawn.pop(AutoFormerBlock(0), 0)
    assert num_identity / 12000 == pytest.approx(prob, abs=0.015)
    others = [drawn[block] / 12000 for block in VITAS.options(0) if block != AutoFormerBlock(0)]
    assert others == pytest.approx([(1 - prob) / 8] * 8, abs=0.015)
    assert len({sampler.sample(rng).embed_dim for _ in range(50)}) == 2


def test_a_space_without_identity_blocks_is_drawn_as_usual():
    sampler = IdentitySampler(AUTOFORMER, 0.9)
    assert sampler.sample(random.Random(0)) == AUTOFORMER.sample(random.Random(0))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.7, 0.95])
def test_the_probability_is_the_first_of_steps_from_one_half_whose_mean_is_within_the_budget(share: float):
    largest = max(count_macs(spec, 32, 5) for spec in VITAS)
    low, high = largest * (share - 0.03), largest * (share + 0.03)

    def mean(percent: int) -> float:
        sampler = IdentitySampler(VITAS, percent / 100)
        networks = [sampler.sample(random.Random(f"7 identity {place}")) for place in range(1000)]
        return sum(count_macs(spec, 32, 5) for spec in networks) / 1000

    percent = 50
    while not low <= mean(percent) <= high and 0 < percent < 99:
        percent += 1 if mean(percent) > high else -1
    budget = macs_budget(low, high, 32, 5)
    if low <= mean(percent) <= high:
        assert solve_identity_prob(VITAS, budget, 7) == percent / 100
    else:
        with pytest.raises(SearchError, match="no probability of identity blocks gives random networks macs from"):
            solve_identity_prob(VITAS, budget, 7)
    assert (low <= mean(percent) <= high) == (share in (0.2, 0.5, 0.7))


def test_a_budget_between_two_steps_is_refused_with_both_means():
    with pytest.raises(
        SearchError, match=r"on average \(.* at 0\.\d\d, .* at 0\.\d\d\); widen or move budget.params"
    ) as e:
        solve_identity_prob(VITAS, params_budget(15_000, 15_000, 32, 5), 0)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("with_budget", [False, True])
def test_draws_uniform_over_kinds_take_identity_blocks_as_often_as_each_number_of_heads(with_budget: bool):
    costs = sorted(count_macs(spec, 32, 5) for spec in VITAS)
    budget = macs_budget(costs[300] if with_budget else costs[0], costs[900] if with_budget else costs[-1], 32, 5)
    weights = {
        spec: float(prod(1 if block == AutoFormerBlock(0) else 1 / 4 for block in spec.blocks))
        for spec in VITAS
        if budget.admits(count_macs(spec, 32, 5))
    }
    rng, sampler = random.Random(0), BudgetSampler(VITAS, [budget], "kinds")
    assert abs(chi_square(lambda: sampler.sample(rng)[0], weights, 20_000)) < 3
    if not with_budget:
        assert abs(chi_square(lambda: VITAS.sample(rng, "kinds"), weights, 20_000)) < 3


def test_every_step_draws_its_own_paths():
    draw = path_sampling(IdentitySampler(VITAS, 0.5), "identity", 3, seed=1)
    assert draw(4) == draw(4) != draw(5)
    assert len(draw(4)) == 3


def test_identity_blocks_are_not_counted_among_what_is_rarely_trained():
    space = vitas((24,), 2, (0, 2), (48,), (16, 32), 8)
    assert _rarest_value(space) == ("mlp_hidden 16 in block 0", pytest.approx(1 / 3))


# ---- in a search ----

SHORT = (
    f"train.data.root={FIXTURES / 'fashion-mnist'}", "train.data.limit=60", "train.checkpoint_minutes=9",
    "train.optim.epochs=1", "supernet.train.optim.epochs=1", "retrain.top=1", "evolution.population=4",
    "evolution.generations=1", "evolution.num_mutation=2", "evolution.num_crossover=2", "control.networks=0",
    "method=spos", "train.model.name=vitas_a", "train.model.global_pool=token",
    "supernet.sharing=both_sides", "supernet.private_qk=true",
    "space={space: vitas, embed_dim: [24, 32], depth: 3, num_heads: [0, 2, 4], qkv_widths: [48, 96], "
    "mlp_hiddens: [16, 32], patch_size: 8}",
)  # fmt: skip
IDENTITY = ("supernet.sampling=identity", "budget.macs={low: 250000, high: 330000}")


def _recipe(*overrides: str) -> SearchRecipe:
    return load_search_recipe(str(FIXTURES / "search.yaml"), [*SHORT, *overrides])


def test_a_search_by_vitas_is_planned_run_extracted_and_searched_again(tmp_path: Path):
    torch.set_num_threads(1)
    recipe = _recipe(*IDENTITY)
    assert plan_search(recipe, "cpu").stages[0].num_networks == 1458
    search = SearchRun(recipe, tmp_path / "first", "cpu")
    assert search.run() is not None
    assert 0 < search.stages[0].identity_prob < 1
    (network,) = extract_networks(tmp_path / "first", tmp_path / "network", place=1, device="cpu")
    model = load_model(tmp_path / "network").model.eval()
    context = RunContext(recipe, tmp_path / "first", "cpu", None)
    batches, count = context.feed().scoring(context.splits.validation, context.search_order())
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    assert network.accuracy == pytest.approx(100 * right / count)  # of the side that was written
    again = search_again(tmp_path / "first", tmp_path / "again", ["budget.macs={high: 400000}"], device="cpu")
    assert again.run() is not None
    start = f"supernet.from={tmp_path / 'first'}"
    assert SearchRun(_recipe(start), tmp_path / "from", "cpu").run(supernet_only=True) is not None


def test_an_impossible_probability_and_a_start_from_one_network_write_nothing(tmp_path: Path):
    spec = VITAS.sample(random.Random(0))
    with pytest.raises(SearchError, match="supernet.sampling=identity: no probability of identity blocks gives"):
        SearchRun(_recipe(*IDENTITY, "budget.macs={low: 440000, high: 460000}"), tmp_path / "run", "cpu")
    save_folder(_supernet(sharing="entangled").extract(spec), tmp_path / "network")
    with pytest.raises(SearchError, match=r"supernet.from: a network such as .* fills only one of both sides"):
        SearchRun(_recipe(f"supernet.from={tmp_path / 'network'}"), tmp_path / "run", "cpu")
    overrides = ("space=glit_released", "train.model.name=glit_tiny", "supernet.private_qk=false", "budget={}")
    with pytest.raises(SearchError, match="'both_sides' is impossible in blocks"):
        SearchRun(_recipe(*overrides), tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()


def test_keys_that_do_not_go_together_are_refused():
    for keys, message in (
        (
            ["supernet.sampling=identity", "budget.macs={low: null, high: null}"],
            "supernet.sampling=identity needs bounds in budget.macs",
        ),
        ([*IDENTITY, "space=autoformer_tiny"], "supernet.sampling=identity needs a space whose blocks may be identity"),
        (["supernet.sharing=independent"], "supernet.private_qk needs supernet.sharing=entangled or both_sides"),
        ([*IDENTITY, "supernet.widen=0.5"], "supernet.widen needs supernet.sampling=uniform or sandwich, not identity"),
    ):
        with pytest.raises(RecipeError, match=message):
            _recipe(*keys)
