"""Measure the speed-up from local worker processes: the wall time of a search's retraining on 1, 2, 4 workers.

Each number of workers trains the same networks, in a new folder. The workers are started before; the time for that and
for a first short training is a separate column.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from glit_models.search import SearchRun, load_search_recipe, open_executor
from glit_models.search.run.context import RunContext

from . import report


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, rounds=1)
    parser.add_argument("--recipe", default="smoke", help="a search recipe; its retrain.top networks are trained")
    parser.add_argument("--set", action="append", default=["retrain.top=4"], metavar="KEY=VALUE", help="override")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    rows = []
    for workers in options.workers:
        rounds = [_measure(options.recipe, options.set, workers) for _ in range(options.rounds)]
        start, seconds = (statistics.median(values) for values in zip(*rounds, strict=True))
        rows.append({"workers": workers, "start, s": start, "retraining, s": seconds})
    first = rows[0]["retraining, s"]
    report.show("engines", options, [{**row, "faster": f"{first / row['retraining, s']:.2f}x"} for row in rows])


def _measure(name: str, overrides: list[str], workers: int) -> tuple[float, float]:
    """Seconds until each worker has finished its first task, and seconds of the trainings."""
    recipe = load_search_recipe(name, overrides)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        context = RunContext(recipe, out, "cpu", None, executor=open_executor("local", out, workers))
        (out / "recipe.yaml").write_text(recipe.to_yaml())
        search = SearchRun(recipe, out, "cpu").stages[0].search
        specs = search.ask()[: recipe.retrain.top]
        trainings = [
            context.training(f"network {place}", recipe.retrain_recipe(spec), out / "retrain" / str(place))
            for place, spec in enumerate(specs)
        ]
        assert context.executor is not None
        with context.executor:
            began = time.perf_counter()
            warm = recipe.retrain_recipe(specs[0], epochs=1)
            context.run([context.training("warm", warm, out / "warm" / str(place)) for place in range(workers)])
            started = time.perf_counter()
            context.run(trainings)
            return started - began, time.perf_counter() - started


if __name__ == "__main__":
    main()
