"""Run one stage of a search in its folder: train the supernet, evolve, retrain the best, choose the winner.

It handles one space; `pipeline` combines the stages. Files are written atomically, and each part of the work continues
from the files of the previous parts.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import numpy as np

from glit_models import Spec, count_macs, parse_spec
from glit_models.errors import Argument, SearchError
from glit_models.families import FAMILIES
from glit_models.runs.files import write_json, write_text
from glit_models.runs.state import StateFiles
from glit_models.training import Recipe

from ..executors.tasks import Task, read_json
from ..fitness import Fitness, Setting
from ..methods.ask_tell import Search
from ..methods.candidates import Candidates
from ..methods.screening import Confirmation, describe_noise
from ..spaces.budget import Budget, extremes
from ..spaces.budget_sampler import BudgetSampler
from ..spaces.named import load_space
from ..spaces.space import SearchSpace
from ..supernets.path_sampling import IdentitySampler, path_sampling, solve_identity_prob
from ..supernets.starting import fill_supernet
from ..supernets.supernet import Supernet
from ..supernets.training import SupernetTrainee
from .context import RunContext
from .division import Division, digest, score_divided
from .kept_supernets import adopt_supernet, has_supernet, keeps_supernets
from .retraining import Retrained, retrain

__all__ = ["Stage", "find_stage"]

_NUM_FOR_NOISE = 8  # number of networks for estimating how often their order is wrong


@final
class Stage:
    """One stage of a search.

    Args:
        name: name of the stage and of its folder.
        space: space to search.
        context: context of the whole search.
        initial: networks of its first generation.
        known: networks that earlier stages retrained; the same training is not repeated.
    """

    def __init__(
        self,
        name: str,
        space: SearchSpace,
        context: RunContext,
        initial: Sequence[Spec] = (),
        known: Sequence[Retrained] = (),
    ) -> None:
        self.name, self.space, self.context = name, space, context
        self.folder = context.folder / name
        self.state = StateFiles(self.folder / "evolution.json", self.folder / "evolution.previous.json")
        self.recipe = context.recipe
        self._initial, self._known = initial, known
        self._seconds = 0.0  # duration of the evolution
        self._rounds: list[dict[int, float]] = []  # scores of the rounds on more images, by the candidates' numbers
        self._fitness: Fitness | None = None
        self.fitness_class = self.recipe.fitness_class
        self._on_batch: Callable[[int, int], None] = lambda done, total: None
        context.stage = self

    @functools.cached_property
    def search(self) -> Search:
        """The search method, which proposes networks. Raises SearchError if a budget cannot be met."""
        config = asdict(self.recipe.evolution_config())
        method = self.recipe.method_class
        return method(self.space, self.context.budgets, seed=self.recipe.seed, initial=self._initial, **config)

    @property
    def is_finished(self) -> bool:
        """Whether `run` has finished."""
        return (self.folder / "retrained.json").is_file()

    def run(self) -> list[Retrained]:
        """Run the remaining work of the stage; returns the retrained networks, the winner first.

        Raises:
            Interrupted: if a stop was requested; finished work is kept.
        """
        done = self.folder / "retrained.json"
        context = self.context
        entries = context.decide(lambda: read_json(done) if self.is_finished else None)
        if entries is not None:
            return self._read_retrained(entries, done)
        _ = self.search  # impossible budgets are found before anything is trained
        self.prepare()
        self._evolve()
        retrained = retrain(
            self.recipe, self.folder, self.candidates, self._initial, self._known, self._train_all,
            self.search.finalists,
        )  # fmt: skip
        if context.rank == 0:
            entries = [{**self._describe(r.spec), "fitness": r.fitness, "accuracy": r.accuracy,
                        "images": len(context.splits.validation),
                        "folder": str(r.folder.relative_to(context.folder))} for r in retrained]  # fmt: skip
            write_json(self.folder / "winner.json", retrained[0].spec.to_dict())
            write_json(done, entries)
        context.wait()
        return retrained

    def prepare(self) -> None:
        """Write the settings of the stage, and train the supernet if the fitness needs one.

        Raises:
            Interrupted: if a stop was requested; finished work is kept.
        """
        self._write_space()
        if self.fitness_class.needs_supernet and not self.context.decide(self._find_supernet):
            title = f"{self.name}: training the supernet, {self.space.size:.4g} networks in one"
            if self.recipe.supernet.sampling == "identity":
                title += f", identity blocks with probability {self.identity_prob:.2f}"
            self.context.run([Task("supernet", {"stage": self.name}, title, is_collective=True)])

    def _write_space(self) -> None:
        path = self.folder / "space.yaml"
        if self.context.decide(lambda: path.is_file() and load_space(path) != self.space):
            raise SearchError(f"{path} is another space than the recipe's is now; take another ", Argument("out"))
        if self.context.rank == 0:
            self.folder.mkdir(exist_ok=True)
            write_text(path, self.space.to_yaml())
        self.context.wait()

    def _say(self, line: str) -> None:
        self.context.say(f"{self.name}: {line}")

    def _describe(self, spec: Spec) -> dict[str, Any]:
        costs = {budget.name: budget.cost(spec) for budget in self.context.budgets if budget.additive}
        return {"spec": spec.to_dict(), **costs}

    def _read_retrained(self, entries: Any, path: Path) -> list[Retrained]:
        try:
            return [
                Retrained(
                    parse_spec(entry["spec"]), entry.get("fitness", entry.get("inherited")), entry["accuracy"],
                    self.context.folder / entry["folder"],
                )
                for entry in entries
            ]  # fmt: skip
        except (KeyError, TypeError, ValueError):
            raise SearchError(f"{path} is damaged; delete it, and the same command makes it again") from None

    # ---- the supernet ----

    @property
    def weights(self) -> Path:
        """Path of the supernet's weights."""
        return self.folder / "supernet" / "model.safetensors"

    def check_start(self) -> None:
        """Check that the supernet can be trained. Raises the errors of `fill_supernet` and `solve_identity_prob`."""
        if self.weights.is_file() or keeps_supernets(self.context.folder):
            return
        supernet = self.recipe.supernet
        if supernet.from_ is not None or supernet.sharing != "entangled" or supernet.private_qk:
            self.create_supernet()
        if supernet.sampling == "identity":
            _ = self.identity_prob

    def create_supernet(self) -> Supernet:
        """The supernet before its training. Raises the errors of `fill_supernet`."""
        supernet, start = self.context.create_supernet(self.space), self.recipe.supernet.from_
        if start is not None:
            fill_supernet(supernet, start)
        return supernet

    def _find_supernet(self) -> bool:
        """Whether the supernet is trained, here or in an earlier search whose supernets are kept."""
        folder = self.context.folder
        if has_supernet(self.folder):
            return True
        found = adopt_supernet(folder, self.space, self.context.supernet_recipe, self.folder)
        if found:
            self._say("the supernet is that of an earlier search")
        elif keeps_supernets(folder):
            self._say("no supernet of the earlier search is of this space, which depends on the first stage's winner")
        return found

    def train_supernet(self) -> None:
        """Train the supernet in this process, unless it is trained."""
        self.context.train(self.context.supernet_recipe, self.folder / "supernet", self.create_trainee())

    def create_trainee(self) -> SupernetTrainee:
        """The trainee for a training of the supernet."""
        recipe = self.context.supernet_recipe
        supernet = self.recipe.supernet
        sampler: BudgetSampler | IdentitySampler = BudgetSampler(self.space)
        if supernet.sampling == "budget":
            sampler = self.context.sampler(self.space)
        if supernet.sampling == "identity":
            sampler = IdentitySampler(self.space, self.identity_prob)
        ends: tuple[Spec, ...] = self._ends(recipe) if supernet.distill or supernet.sampling == "sandwich" else ()
        steps = len(self.context.splits.train) // recipe.optim.batch_size * recipe.optim.epochs
        widen_steps = supernet.widen * steps
        draw_paths = path_sampling(sampler, supernet.sampling, supernet.paths, recipe.seed, ends, widen_steps)
        teacher = ends[0] if supernet.distill else None
        return SupernetTrainee(
            self.space, supernet.sharing, recipe, draw_paths, supernet.from_, teacher, supernet.distill,
            supernet.private_qk,
        )  # fmt: skip

    @functools.cached_property
    def identity_prob(self) -> float:
        """The probability of identity blocks in the supernet's paths. Raises SearchError if there is none."""
        macs = next(budget for budget in self.context.budgets if budget.name == "macs")
        return solve_identity_prob(self.space, macs, self.recipe.seed)

    def _ends(self, recipe: Recipe) -> tuple[Spec, Spec]:
        """The largest and the smallest network of the space, by multiply-adds."""
        size, num_classes = recipe.model.img_size, self.context.num_classes
        smallest, largest = extremes(self.space, lambda spec: count_macs(spec, size, num_classes))
        return largest, smallest

    # ---- the evolution ----

    def _evolve(self) -> None:
        self._restore()
        search, context = self.search, self.context
        generations = self.recipe.evolution_config().generations
        references = self.folder / "references.json"
        if search.outcome is None or not context.decide(references.is_file):
            with context.progress() as progress:
                task = progress.add_task(f"{self.name}: evolution", total=generations)
                self._on_batch = lambda done, total: progress.update(
                    task, completed=max(search.generation, 0) + done / total
                )
                while search.outcome is None and (specs := search.ask()):
                    self._evaluate_generation(specs)
                self._confirm()
                self._write_references()
            self.release()
        if context.rank == 0:
            write_json(self.folder / "front.json", {budget.name: self._front(budget) for budget in context.budgets})
        self._say(f"{search.outcome}; best {self._best()} ({self.fitness_class.label})")
        context.wait()

    def _front(self, budget: Budget) -> list[dict[str, Any]]:
        """The Pareto front of fitness and cost, cheapest first."""
        fields = (candidate.to_dict() for candidate in self.candidates.front(budget.name))
        return [{"spec": c["spec"], **c["costs"], "fitness": c["fitness"]} for c in fields]

    def _best(self) -> str:
        best = next(iter(self.candidates.ranked()), None)
        assert best is not None  # a search without candidates has raised
        assert best.fitness is not None
        return self.fitness_class.show(best.fitness)

    def fitness(self) -> Fitness:
        """The fitness, ready to score networks."""
        if self._fitness is None:
            self._fitness = self.fitness_class(self.setting())
        return self._fitness

    def release(self) -> None:
        """Release the memory of the fitness."""
        self._fitness = None

    def setting(self) -> Setting:
        """The setting of this stage for a fitness."""
        context = self.context
        return Setting(
            self.space, self.recipe.seed, self.folder, context.device, context.supernet_recipe.model.img_size,
            context.num_classes, context.create_model, self._train_alone,
            lambda: context.evaluator(self.space, self.weights, self._check_batch),
        )  # fmt: skip

    def _check_batch(self, done: int, total: int) -> None:
        self._on_batch(done, total)
        self.context.check_stop(together=False)

    def _train_alone(self, spec: Spec, out: Path, epochs: int | None = None) -> float:
        """Train a stand-alone network in this process; returns its accuracy on the search set in percent."""
        recipe = self.recipe.retrain_recipe(spec, epochs or self.recipe.standalone.epochs)
        return float(self.context.train(recipe, out)["validation_top1"])

    def _train_all(self, trainings: Sequence[tuple[str, Recipe, Path]]) -> list[float]:
        """Train stand-alone networks (title, training, folder); returns their accuracies on the search set."""
        tasks = [self.context.training(f"{self.name}: {title}", recipe, out) for title, recipe, out in trainings]
        return [float(result["validation_top1"]) for result in self.context.run(tasks)]

    def _evaluate_generation(self, specs: Sequence[Spec]) -> None:
        began = time.monotonic()
        self.context.check_stop(together=True)
        config = self.recipe.evolution_config()
        batches = self._screen_batches
        if batches and not self.search.generation:
            losses = self.context.run([self._division.task("screen", specs[:_NUM_FOR_NOISE], batches)])[0]
            if len(losses) > 1:
                self._say(describe_noise(np.array(losses)))
        top = self.search.top(max(config.num_parents, self.recipe.retrain.top))
        scores = self._score(specs, batches, [candidate.spec for candidate in top])
        for spec in specs:
            self.search.tell(spec, scores[spec])
        self._seconds += time.monotonic() - began
        self._save()
        show = "{:.4g}".format if batches else self.fitness_class.show
        done = sorted(scores[spec] for spec in specs)
        best = self.search.top(1)[0].fitness or 0.0
        self._say(
            f"generation {self.search.generation + 1}/{config.generations}, {len(specs)} networks: "
            f"median {show(done[len(done) // 2])}, best {show(done[-1])}, best so far {show(best)}"
        )

    @property
    def _screen_batches(self) -> int | None:
        """Number of batches on which the evolution compares networks; None for all, by the fitness."""
        num_images = self.recipe.evaluation.screen_images
        return None if num_images is None else math.ceil(num_images / self.context.supernet_recipe.eval_batch_size)

    def _confirmation(self) -> Confirmation | None:
        """The rounds on more images, if the evolution uses few."""
        if (batches := self._screen_batches) is None:
            return None
        confirm, candidates = self.recipe.evaluation.confirm, self.search.candidates
        return Confirmation(candidates, batches, self.context.num_batches, confirm, self._initial, self._rounds)

    def _confirm(self) -> None:
        confirmation = self._confirmation()
        while confirmation and (asked := confirmation.ask()):
            began = time.monotonic()
            self.context.check_stop(together=True)
            specs, batches = asked
            images = f"{batches * self.context.supernet_recipe.eval_batch_size} images" if batches else "all images"
            self._say(f"comparing {len(specs)} networks on {images}")
            confirmation.tell(self._score(specs, batches))
            self._rounds = confirmation.scores
            self._seconds += time.monotonic() - began
            self._save()

    @property
    def candidates(self) -> Candidates:
        """The evaluated networks with their fitness; after screening, only the confirmed networks have one."""
        confirmation = self._confirmation()
        return confirmation.confirmed() if confirmation else Candidates(self.search.candidates)

    def _score(self, specs: Sequence[Spec], batches: int | None, retain: Sequence[Spec] = ()) -> dict[Spec, float]:
        """Score networks on all workers. `batches`: None for all, by the fitness."""
        return score_divided(self.context, self._division, specs, batches, retain)

    @functools.cached_property
    def _division(self) -> Division:
        """The common arguments of all tasks that score networks of this stage, including the weights."""
        weights = self.weights if self.context.executor and self.fitness_class.needs_supernet else None
        return Division(self.name, self.space, self.fitness_class, None if weights is None else digest(weights))

    def _write_references(self) -> None:
        """Write the scores of known networks, with the supernet's weights if they are members."""
        specs = self._references()
        members = [spec for spec in specs.values() if spec in self.space]
        scores = self._score(members, None) if members else {}
        if self.context.rank == 0:
            entries = []
            for name, spec in specs.items():
                score = scores.get(self.space.canonical(spec)) if spec in self.space else None
                entries.append({"name": name, **self._describe(spec), "fitness": score})
            write_json(self.folder / "references.json", entries)
        self.context.wait()

    def _references(self) -> dict[str, Spec]:
        """Known networks of the family by name; they need not be members."""
        family = FAMILIES[self.space.family]
        given = self.recipe.given_spec
        known = {} if given is None else {"the given network": given}
        known |= dict(family.references(self.space.depth, self.space.embed_dims[-1], self.space.network))
        return known | {n: s for n, s in family.named.items() if s in self.space and s not in known.values()}

    # ---- the state of the evolution ----

    def _save(self) -> None:
        if self.context.rank:
            return
        rounds = [list(scores.items()) for scores in self._rounds]
        state = {"search": self.search.state_dict(), "seconds": self._seconds, "rounds": rounds}
        text = json.dumps(state)
        self.state.save(lambda path: path.write_text(text))
        self._write_candidates()

    def _write_candidates(self) -> None:
        lines = []
        for candidate in self.candidates:
            fields = candidate.to_dict()
            entry = {
                "spec": fields["spec"], **candidate.costs, "fitness": candidate.fitness,
                "generation": candidate.generation, "origin": candidate.origin,
            }  # fmt: skip
            lines.append(json.dumps(entry) + "\n")
        write_text(self.folder / "candidates.jsonl", "".join(lines))

    def _restore(self) -> None:
        """Resume from the newest readable state. Raises RunError if states exist, but none is readable."""
        state = self.context.decide(lambda: self.state.load(self._read_state))
        if state is None:
            return
        self.search, self._seconds, self._rounds = self._parse_state(state)
        if self.context.rank == 0:
            self._write_candidates()

    def _read_state(self, path: Path) -> Any:
        state = json.loads(path.read_text())
        self._parse_state(state)  # raises if it is damaged
        return state

    def _parse_state(self, state: Any) -> tuple[Search, float, list[dict[int, float]]]:
        search = self.recipe.method_class.from_state(state["search"], self.space, self.context.budgets)
        rounds = [{int(index): float(score) for index, score in scores} for scores in state.get("rounds", [])]
        return search, float(state["seconds"]), rounds

    # ---- retraining ----

    def seconds(self) -> Mapping[str, float]:
        """Duration of each finished part, without interruptions."""

        def trained(part: str) -> float:
            runs = sorted((self.folder / part).rglob("result.json"))
            return 60 * float(sum(read_json(run)["minutes"] for run in runs))

        evolution = round(self._seconds or self._saved_seconds(), 1)
        return {"supernet": trained("supernet"), "evolution": evolution, "retrain": trained("retrain")}

    def _saved_seconds(self) -> float:
        path = self.state.newest
        return float(read_json(path)["seconds"]) if path.is_file() else 0.0


def find_stage(context: RunContext, name: str) -> Stage:
    """Find a stage by name: the current one of this process, or the one of its task."""
    stage = context.stage
    if stage is None or stage.name != name:
        stage = Stage(name, load_space(context.folder / name / "space.yaml"), context)
    found: Stage = stage
    return found
