"""Tests of imports: every module imports only from modules that precede it in the lists below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"glit_models": "glit_models", "glit_models.search": "search", "glit_models.export": "export"}

# Modules and packages of one line do not import each other. A package without a dot is one unit.
ZOO = """
errors reading preprocessing
extensions spec
depthwise
parts
block cost figure
runs
recipes page activations
weights.files weights.registry weights.download
model
families
weights.resolve
weights.folder weights.card weights.space
weights.loading
weights.publish weights.verify
entry
glit autoformer
data
prediction
predict
explain embed neighbours
prediction_table explanation_sheet
evaluate demo
training
cli
__main__
"""
SEARCH = """
spaces.choices
spaces.definition
spaces.space
spaces.named spaces.budget
spaces.budget_sampler spaces.latency
evidence.correlation evidence.control
evidence.ranking
evidence.table
methods.config methods.candidates methods.surrogate
methods.screening methods.ask_tell
methods.evolution
methods.nsga2 methods.transform
supernets.block supernets.path_sampling
supernets.supernet
supernets.starting supernets.path_optimizer supernets.scoring
supernets.training
fitness
executors
recipe_sections
recipe relative_budget
report.findings
report.panels
report.figures
report.reliability
report.page
run.retraining run.kept_supernets
run.context
run.division
run.stage
run.trial run.prediction
run.plan run.pipeline run.rank run.extract
run.work run.again
run.worker
"""
EXPORT = """
extras batching metrics page
metadata
binding sessions form protocol
preprocessing graph
source images tracing
runtime sensitivity
quantize verify
writing
targets
onnx program
timing serving huggingface openvino executorch products
kserve litert coreml bench
served
server
"""


def _ranks(text: str) -> dict[str, int]:
    return {name: rank for rank, line in enumerate(text.split("\n")) for name in line.split()}


RANKS = {"glit_models": _ranks(ZOO), "glit_models.search": _ranks(SEARCH), "glit_models.export": _ranks(EXPORT)}
SPLIT = {name.partition(".")[0] for ranks in RANKS.values() for name in ranks if "." in name}  # a unit for each module


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _imports(name: str, path: Path) -> Iterator[str]:
    """Modules of ours that a module imports, also inside functions, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{module}.{alias.name}"
                if target in MODULES or module in MODULES:
                    yield target if target in MODULES else module


def _split(name: str) -> tuple[str, str]:
    """The package of three that a module lies in, and its unit there."""
    package = next(p for p in reversed(FOLDERS) if name == p or name.startswith(f"{p}."))
    parts = name.removeprefix(package).strip(".").split(".")
    return package, ".".join(parts[:2]) if parts[0] in SPLIT and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_only_from_those_before_it(name: str) -> None:
    package, unit = _split(name)
    if not unit:  # an __init__ collects what is public
        return
    if unit in SPLIT:  # the __init__ of a package
        assert not list(_imports(name, MODULES[name]))
        return
    assert unit in RANKS[package], f"{name} is in no line of this file; add it where it belongs"
    for other in _imports(name, MODULES[name]):
        other_package, other_unit = _split(other)
        if package == other_package:
            if not other_unit:
                continue  # the package's version
            assert other_unit == unit or RANKS[package][other_unit] < RANKS[package][unit], f"{name} imports {other}"
        elif package == "glit_models":
            assert unit == "cli", f"{name} imports {other}: only the command line may know search and export"
        else:
            assert other_package == "glit_models", f"{name} imports {other}: search and export do not know each other"


def test_the_lists_name_only_what_exists() -> None:
    units = {_split(name) for name in MODULES}
    for package, ranks in RANKS.items():
        assert {(package, unit) for unit in ranks} <= units
