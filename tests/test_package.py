"""Tests of the installed package: a complete wheel, no unnecessary imports, and use without installation."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import glit_models
from glit_models.errors import DISTRIBUTION, pip_install

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CODE = {"glit_models": "glit_models", "search": "glit_models/search", "export": "glit_models/export"}


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of_the_package() -> dict[str, Path]:
    """Each file under the three code folders, by its place in an installed package."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}": path
        for folder, package in CODE.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built in a copy of the sources and without a network."""
    source = tmp_path_factory.mktemp("source")
    for folder in CODE:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", "dist", ".", cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_and_every_data_file(wheel: zipfile.ZipFile) -> None:
    assert set(files_of_the_package()) - set(wheel.namelist()) == set()


def test_documents_install_what_errors_tell_to_install() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {command}"
        for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
        for command, distribution in re.findall(r'(pip install "([^"\[]*)\[[^"]*")', path.read_text())
        if distribution in {".", "glit-models"} - {DISTRIBUTION}
    ]
    assert wrong == []
    assert pip_install("train").startswith(f'pip install "{DISTRIBUTION}[train]"')


def test_the_wheel_holds_nothing_but_the_package(wheel: zipfile.ZipFile) -> None:
    info = f"glit_models-{glit_models.__version__}.dist-info/"
    assert [name for name in wheel.namelist() if not name.startswith(("glit_models/", info))] == []
    assert wheel.read(f"{info}licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    folders = {name.rpartition("/")[0].replace("/", ".") for name in files_of_the_package() if name.endswith(".py")}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_version_is_the_same_everywhere() -> None:
    assert glit_models.__version__ == PROJECT["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[?{re.escape(glit_models.__version__)}\b", changelog, re.MULTILINE)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == glit_models.__version__


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_the_files_of_the_forge_are_yaml_and_their_commands_exist(path: Path) -> None:
    text = path.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    targets = {word for line in re.findall(r"run: make (.*)", text) for word in line.split() if "=" not in word}
    rules = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv"), re.MULTILINE)
    assert targets - set(rules) == set()


LOADED_BY_THE_ZOO = """
import sys
import timm
before = set(sys.modules)
import glit_models
from glit_models.errors import DISTRIBUTION, pip_install
print(*sorted({name for name in set(sys.modules) - before if not name.startswith("glit_models")}))
print(*sorted(name for name in sys.modules if name.startswith("glit_models")))
"""


def test_importing_the_zoo_loads_little_beyond_timm() -> None:
    others, ours = run(sys.executable, "-c", LOADED_BY_THE_ZOO, cwd=ROOT, PYTHONPATH=str(ROOT)).split("\n")[:2]
    heavy = {"huggingface_hub", "matplotlib", "rich", "yaml", "onnx", "transformers", "torchvision", "PIL", "requests"}
    assert {name.partition(".")[0] for name in others.split()} & heavy == set()
    assert not re.search(r"glit_models\.(search|export|cli|training)\b", ours)


def test_a_plain_checkout_works_without_being_installed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "glit_models", tmp_path / "glit_models", ignore=shutil.ignore_patterns("__pycache__"))
    program = "import timm, glit_models; print(glit_models.__file__); timm.create_model('glit_tiny', device='meta')"
    where = run(sys.executable, "-S", "-c", _with_site_packages(program), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert where.strip() == str(tmp_path / "glit_models" / "__init__.py")


def _with_site_packages(program: str) -> str:
    """The program with the environment's packages but without its `.pth` files, through which an install works."""
    folders = [path for path in sys.path if path.endswith("site-packages")]
    return f"import sys; sys.path += {folders!r}; {program}"


@pytest.mark.parametrize(
    ("place", "statement", "allowed"),
    [
        ("glit_models/x.py", "import glit_models.search.space", False),
        ("glit_models/x.py", "from glit_models import export", False),
        ("glit_models/x.py", "def f():\n    from glit_models.export import onnx", False),
        ("search/x.py", "from glit_models.export import onnx", False),
        ("export/x.py", "from glit_models.search.space import SearchSpace", False),
        ("export/x.py", "from glit_models.model import GLiT", True),
        ("search/x.py", "from .space import SearchSpace", True),
        ("glit_models/cli/x.py", "from glit_models.search import pipeline", True),
    ],
)
def test_the_linter_holds_who_may_import_whom(place: str, statement: str, allowed: bool) -> None:
    ruff = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if ruff is None:
        pytest.skip("ruff is not installed")
    command = [ruff, "check", "--select", "TID251", "--output-format", "concise", "--stdin-filename", place, "-"]
    done = subprocess.run(command, cwd=ROOT, input=statement + "\n", capture_output=True, text=True)
    assert ("TID251" not in done.stdout) is allowed, done.stdout + done.stderr
