"""One stage of a search in its folder: train the supernet, evolve, retrain the best, choose the winner.

It knows its space; that there are other stages is `pipeline`'s. Every file is written whole, and each part of the work
is taken up again from the files of the parts before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from glit_models.errors import SearchError
from glit_models.glit import GLIT_TINY
from glit_models.spec import BlockSpec, GLiTSpec
from glit_models.training import Trainer
from glit_models.training.checkpoints import write_atomically

from .ask_tell import Search
from .budget import Budget
from .budget_sampler import BudgetSampler
from .evaluate import Evaluator, Score
from .evolution import Evolution, RandomSearch
from .named_spaces import load_space
from .run_context import Interrupted, RunContext, read_json, write_json
from .space import SearchSpace
from .supernet_training import SupernetTrainee

__all__ = ["Retrained", "Stage"]

_STATES = ("evolution.json", "evolution.previous.json")


@final
@dataclass(frozen=True)
class Retrained:
    """A network that was trained by itself.

    Attributes:
        spec: the network. inherited: its accuracy under the supernet's weights, in percent.
        accuracy: on the search set, in percent.
        folder: of its run.
    """

    spec: GLiTSpec
    inherited: float
    accuracy: float
    folder: Path


@final
class Stage:
    """One stage.

    Args:
        name: of it, which is its folder's.
        space: what it searches.
        context: of the whole search.
        initial: networks of its first generation.
        known: what earlier stages retrained; the same training is not done twice.
    """

    def __init__(
        self,
        name: str,
        space: SearchSpace,
        context: RunContext,
        initial: Sequence[GLiTSpec] = (),
        known: Sequence[Retrained] = (),
    ) -> None:
        self.name, self.space, self.context = name, space, context
        self.folder = context.folder / name
        self.recipe = context.recipe
        self._initial, self._known = initial, known
        self._images: dict[GLiTSpec, int] = {}  # that each network was scored on
        self._seconds = 0.0  # of the evolution
        self._evaluator: Evaluator | None = None
        self._on_batch: Callable[[int, int], None] = lambda done, total: None
        self._correct: dict[GLiTSpec, Score] = {}  # of the best, where networks are given up early
        self.search = self._new_search()  # impossible budgets are found before anything is trained

    def _new_search(self) -> Search:
        method = RandomSearch if self.recipe.method == "random" else Evolution
        config = asdict(self.recipe.evolution_config())
        return method(self.space, self.context.budgets, seed=self.recipe.seed, initial=self._initial, **config)

    def run(self) -> list[Retrained]:
        """All of it, as far as it is not done; returns the retrained networks, the winner first.

        Raises:
            Interrupted: if asked to stop; what was done is kept.
        """
        done = self.folder / "retrained.json"
        if done.is_file():
            return self._read_retrained(read_json(done), done)
        path = self.folder / "space.yaml"
        if path.is_file() and load_space(path) != self.space:
            raise SearchError(f"{path} is another space than the recipe's is now; take another --out")
        if self.context.rank == 0:
            self.folder.mkdir(exist_ok=True)
            text = self.space.to_yaml()
            write_atomically(path, lambda aside: aside.write_text(text))
        self.context.wait()
        self._train_supernet()
        self._evolve()
        retrained = self._retrain()
        if self.context.rank == 0:
            entries = [{**self._describe(r.spec), "inherited": r.inherited, "accuracy": r.accuracy,
                        "folder": str(r.folder.relative_to(self.context.folder))} for r in retrained]  # fmt: skip
            write_json(self.folder / "winner.json", retrained[0].spec.to_dict())
            write_json(done, entries)
        self.context.wait()
        return retrained

    def _describe(self, spec: GLiTSpec) -> dict[str, Any]:
        costs = {budget.name: budget.cost(spec) for budget in self.context.budgets if budget.additive}
        return {"spec": spec.to_dict(), **costs}

    def _read_retrained(self, entries: Any, path: Path) -> list[Retrained]:
        try:
            return [
                Retrained(
                    GLiTSpec.from_dict(entry["spec"]), entry["inherited"], entry["accuracy"],
                    self.context.folder / entry["folder"],
                )
                for entry in entries
            ]  # fmt: skip
        except (KeyError, TypeError, ValueError):
            raise SearchError(f"{path} is damaged; delete it, and the same command makes it again") from None

    # ---- the supernet ----

    @property
    def weights(self) -> Path:
        """The supernet's."""
        return self.folder / "supernet" / "model.safetensors"

    def _train_supernet(self) -> None:
        recipe = self.recipe.supernet_recipe()
        if (self.folder / "supernet" / "result.json").is_file() and self.weights.is_file():
            return
        self.context.say(f"{self.name}: training the supernet, {self.space.size:.4g} networks in one")
        sampler = None
        if self.recipe.supernet.sampling == "budget":
            sampler = BudgetSampler(self.space, self.context.budgets, self.recipe.evolution.uniform_over)
        trainee = SupernetTrainee(self.space, self.recipe.supernet.sharing, recipe, sampler)
        self.run_trainer(Trainer(
            recipe, self.folder / "supernet", self.context.device, self.context.minutes_left, trainee=trainee,
        ))  # fmt: skip

    def run_trainer(self, trainer: Trainer) -> dict[str, Any]:
        """Train to the end. Raises Interrupted if stopped before it."""
        result = trainer.run()
        if result is None:
            raise Interrupted(trainer.stop_signal or f"--max-minutes {self.context.max_minutes or 0:g}")
        self.context.check_stop(together=True)
        return result

    # ---- the evolution ----

    def _evolve(self) -> None:
        self._restore()
        search, context = self.search, self.context
        generations = self.recipe.evolution_config().generations
        if search.outcome is None or not (self.folder / "references.json").is_file():
            with context.progress() as progress:
                task = progress.add_task(f"{self.name}: evolution", total=generations)
                self._on_batch = lambda done, total: progress.update(
                    task, completed=max(search.generation, 0) + done / total
                )
                while search.outcome is None and (specs := search.ask()):
                    self._evaluate_generation(specs)
                self._write_references()
            self._evaluator = None  # gives its memory back
        if context.rank == 0:
            write_json(self.folder / "front.json", {budget.name: self._front(budget) for budget in context.budgets})
        context.say(f"{self.name}: {search.outcome}; best {self._best():.2f} % under inherited weights")
        context.wait()

    def _front(self, budget: Budget) -> list[dict[str, Any]]:
        """The networks that no other one beats in accuracy without costing more, cheapest first."""
        fields = ((c.to_dict(), self._images[c.spec]) for c in self.search.front(budget.name))
        return [{"spec": c["spec"], **c["costs"], "accuracy": c["accuracy"], "images": n} for c, n in fields]

    def _best(self) -> float:
        best = self.search.best
        assert best is not None  # a search without candidates has raised
        assert best.accuracy is not None
        return best.accuracy

    def _make_evaluator(self) -> Evaluator:
        if self._evaluator is None:

            def on_batch(done: int, total: int) -> None:
                self._on_batch(done, total)
                self.context.check_stop(together=False)

            self._evaluator = self.context.evaluator(self.space, self.weights, on_batch)
        return self._evaluator

    def _evaluate_generation(self, specs: Sequence[GLiTSpec]) -> None:
        began = time.monotonic()
        self.context.check_stop(together=True)
        evaluator = self._make_evaluator()
        config = self.recipe.evolution_config()
        top = self.search.top(max(config.num_parents, self.recipe.retrain.top))
        evaluator.retain([candidate.spec for candidate in top])
        # The recipe's risk is that of all networks of all stages together.
        num_networks = self.recipe.num_stages * config.population * config.generations
        reference, risk = None, self.recipe.evaluation.early_stop_risk / num_networks
        if risk and len(top) == max(config.num_parents, self.recipe.retrain.top):
            reference = self._reference(evaluator, top[-1].spec)
        scores = self._evaluate_shared(evaluator, specs, reference, risk)
        for spec in specs:
            self.search.tell(spec, scores[spec].accuracy)
            self._images[spec] = scores[spec].images
        if risk:
            known = {**self._correct, **scores}
            best = (candidate.spec for candidate in self.search.top(len(top) or config.num_parents))
            self._correct = {spec: known[spec] for spec in best if spec in known}
        self._seconds += time.monotonic() - began
        self._save()
        done = sorted(scores[spec].accuracy for spec in specs)
        self.context.say(
            f"{self.name}: generation {self.search.generation + 1}/{config.generations}, {len(specs)} networks: "
            f"median {done[len(done) // 2]:.2f} %, best {done[-1]:.2f} %, best so far {self._best():.2f} %"
        )

    def _reference(self, evaluator: Evaluator, spec: GLiTSpec) -> Score:
        """Of the last of the best; evaluated again if this process has not seen it, which gives the same."""
        if spec not in self._correct:
            self._correct[spec] = evaluator.evaluate([spec])[spec]
        return self._correct[spec]

    def _evaluate_shared(
        self, evaluator: Evaluator, specs: Sequence[GLiTSpec], reference: Score | None, risk: float
    ) -> dict[GLiTSpec, Score]:
        """Each process evaluates networks that begin alike; all get to know all scores."""
        places = [{block: place for place, block in enumerate(self.space.options(i))} for i in range(self.space.depth)]
        ordered = sorted(specs, key=lambda spec: [place[b] for place, b in zip(places, spec.blocks, strict=True)])
        share = np.array_split(np.arange(len(ordered)), self.context.world_size)[self.context.rank]
        mine = evaluator.evaluate([ordered[index] for index in share], reference, risk) if len(share) else {}
        pairs = [(spec.to_dict(), score.accuracy, score.images, np.packbits(score.correct).tobytes())
                 for spec, score in mine.items()]  # fmt: skip
        scores = {}
        for data, accuracy, images, bits in self.context.gather(pairs):
            correct = np.unpackbits(np.frombuffer(bits, np.uint8), count=images).astype(bool)
            scores[GLiTSpec.from_dict(data)] = Score(accuracy, images, correct)
        return scores

    def _write_references(self) -> None:
        """Networks that the reader knows, under the same weights where these hold them."""
        specs = _references(self.space)
        members = [spec for spec in specs.values() if spec in self.space]
        scores = self._make_evaluator().evaluate(members) if members else {}
        if self.context.rank == 0:
            entries = []
            for name, spec in specs.items():
                score = scores.get(self.space.canonical(spec)) if spec in self.space else None
                entries.append({"name": name, **self._describe(spec), "accuracy": score and score.accuracy})
            write_json(self.folder / "references.json", entries)
        self.context.wait()

    # ---- the state of the evolution ----

    def _save(self) -> None:
        if self.context.rank:
            return
        images = [self._images[candidate.spec] for candidate in self.search.candidates]
        state = {"search": self.search.state_dict(), "images": images, "seconds": self._seconds}
        path, previous = (self.folder / name for name in _STATES)
        text = json.dumps(state)

        def write(aside: Path) -> None:
            aside.write_text(text)
            if path.exists():
                os.replace(path, previous)

        write_atomically(path, write)
        self._write_candidates()

    def _write_candidates(self) -> None:
        lines = []
        for candidate in self.search.candidates:
            fields = candidate.to_dict()
            entry = {
                "spec": fields["spec"], **candidate.costs, "accuracy": candidate.accuracy,
                "images": self._images[candidate.spec], "generation": candidate.generation, "origin": candidate.origin,
            }  # fmt: skip
            lines.append(json.dumps(entry) + "\n")
        write_atomically(self.folder / "candidates.jsonl", lambda aside: aside.write_text("".join(lines)))

    def _restore(self) -> None:
        """Go on from the newest readable state. A damaged one is named, and the one before it taken."""
        damaged = None
        for path in (self.folder / name for name in _STATES):
            if not path.is_file():
                continue
            try:
                state = json.loads(path.read_text())
                search = type(self.search).from_state(state["search"], self.space, self.context.budgets)
                images = dict(zip((c.spec for c in search.candidates), state["images"], strict=True))
                seconds = float(state["seconds"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged = path
                print(f"glit: {path} is damaged ({error}); trying the one before it", file=sys.stderr)
                continue
            self.search, self._images, self._seconds = search, images, seconds
            if self.context.rank == 0:
                self._write_candidates()
            return
        if damaged is not None:
            raise SearchError(f"{damaged}: no readable state is left; delete it to evolve again from the start")

    # ---- retraining ----

    def _retrain(self) -> list[Retrained]:
        best = self.search.top(self.recipe.retrain.top)
        retrained = []
        for place, candidate in enumerate(best, 1):
            assert candidate.accuracy is not None
            known = next((other for other in self._known if other.spec == candidate.spec), None)
            if known is not None:
                retrained.append(Retrained(candidate.spec, candidate.accuracy, known.accuracy, known.folder))
                continue
            folder = self.folder / "retrain" / str(place)
            self.context.say(f"{self.name}: retraining network {place} of {len(best)}")
            result = self.run_trainer(Trainer(
                self.recipe.retrain_recipe(candidate.spec), folder, self.context.device, self.context.minutes_left,
                self.context.command, score_test=False,
            ))  # fmt: skip
            retrained.append(Retrained(candidate.spec, candidate.accuracy, result["validation_top1"], folder))
        return sorted(retrained, key=lambda network: -network.accuracy)

    def seconds(self) -> Mapping[str, float]:
        """What each part took, interruptions left out, as far as it is done."""
        runs = [self.folder / "supernet", *sorted((self.folder / "retrain").glob("*"))]
        minutes = [read_json(run / "result.json")["minutes"] for run in runs if (run / "result.json").is_file()]
        return {
            "supernet": 60 * sum(minutes[:1]),
            "evolution": round(self._seconds or self._saved_seconds(), 1),
            "retrain": 60 * sum(minutes[1:]),
        }

    def _saved_seconds(self) -> float:
        path = self.folder / _STATES[0]
        return float(read_json(path)["seconds"]) if path.is_file() else 0.0


def _references(space: SearchSpace) -> dict[str, GLiTSpec]:
    """Networks of the space's width and depth by the names of those they are like; they need not be members."""
    width = {"embed_dim": space.embed_dim, "num_heads": space.num_heads, "patch_size": space.patch_size}
    all_global = BlockSpec(space.num_heads, 0, mlp_ratio=4, qkv_ratio=1)
    references = {"all global, as DeiT": GLiTSpec((all_global,) * space.depth, **width)}
    if space.depth == GLIT_TINY.depth and space.num_heads % GLIT_TINY.num_heads == 0:
        scaled = GLIT_TINY.scaled(space.embed_dim, space.num_heads)
        references["GLiT-Tiny's blocks"] = GLiTSpec(scaled.blocks, **width)
    return references
