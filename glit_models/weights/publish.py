"""Convert the authors' checkpoints, publish weights to the Hub, and ship weights in the package.

`folder.py` writes weight folders, `card.py` writes model cards.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..errors import Argument, WeightsError, first_line
from ..families import check_layout, family_of_architecture, named_specs
from ..model import SpecTransformer
from ..reading import parse_json, read_text
from ..runs.files import temporary_folder, whole_folder, write_text
from ..spec import Spec
from . import download, resolve
from .files import (
    CONFIG_FILE,
    ENTRY_FILE,
    GOLDEN_FILE,
    WEIGHTS_FILE,
    check_fits,
    installed_folder,
    read_state_dict,
    sha256_of,
    write_state_dict,
)
from .folder import REPO_NAME, WeightFolder, describe, golden_tensors, save_folder, to_json
from .loading import load_model
from .registry import WeightEntry, read_registry
from .space import write_space

__all__ = ["Published", "convert", "publish", "publish_all", "read_entry", "ship"]


# ---- converting ----


def convert(
    checkpoint: str | Path,
    name: str,
    *,
    out: str | Path | None = None,
    install: bool = False,
    spec: str | Spec | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    sha256: str | None = None,
) -> list[Path]:
    """Convert a checkpoint, in the authors' layout or ours, to weight folders.

    Args:
        checkpoint: a torch pickle (`model`, or a bare state dict) or a safetensors file.
        name: `model` or `model.tag` of the checkpoint; the default tag is `in1k`.
        out: folder to write.
        install: also install the weights, for `timm.create_model(name, pretrained=True)` on this machine.
        spec, num_classes, img_size: of the checkpoint, if they differ from the model's defaults; not with `install`.
        sha256: expected hash of the checkpoint, as published by its authors. Without it, the weights count as
            unverified, and the published scores are not recorded for them.
    Returns:
        The folders written.

    Raises:
        WeightsError: if the checkpoint is unreadable, does not fit the model or has another hash, if the name cannot be
            installed, or if the weights to install were never trained.
    """
    if not install and out is None:
        raise WeightsError("nothing to do: give ", Argument("install", True), ", ", Argument("out", ...), ", or both")
    architecture, _, tag = name.partition(".")
    given = {"spec": spec, "num_classes": num_classes, "img_size": img_size}
    given = {key: value for key, value in given.items() if value is not None}
    if install:
        _check_installable(_with_tag(name), custom=bool(given))
    family = family_of_architecture(architecture)
    if sha256 is not None and Path(checkpoint).is_file() and sha256_of(checkpoint) != sha256.lower():
        raise WeightsError(f"{checkpoint}: refused, its sha256 is {sha256_of(checkpoint)} and not {sha256}")
    state = read_state_dict(checkpoint)
    check_layout(state, family, where=str(checkpoint))
    facts: dict[str, Any] = {"origin": f"converted from {Path(checkpoint).name}"}
    if family.model.is_foreign(state):
        state = family.model.convert_foreign(state, family.spec.parse(spec or family.named[architecture]))
        registered = resolve.registry().get(_with_tag(name))
        # Only the authors' code writes this layout, and they released one checkpoint of the named network.
        if registered is not None and not given:
            facts = _facts_of(registered, Path(checkpoint), sha256)
    # The preprocessing of weights of an unknown name is taken to be ImageNet's, not that of the default weights.
    names = (_with_tag(name), f"{architecture}.in1k")
    known = next((known for known in names if known in resolve.registry()), architecture)
    model: SpecTransformer = timm.create_model(known, **given)
    check_fits(state, model, where=str(checkpoint))
    model.load_state_dict(state)
    if install:
        _refuse_untrained(model, str(checkpoint))
    folders = [installed_folder(_with_tag(name))] if install else []
    folders += [Path(out)] if out is not None else []
    for folder in folders:
        save_folder(model, folder, name=name if tag or given else _with_tag(name), facts=facts)
    return folders


def _facts_of(registered: WeightEntry, checkpoint: Path, sha256: str | None) -> dict[str, Any]:
    """The registry's facts about the published checkpoint that also hold for this one."""
    facts = registered.to_dict() | {"checkpoint_sha256": sha256 and sha256.lower()}
    if sha256 is None:
        facts["metrics"] = ()
        facts["origin"] = f"converted from {checkpoint.name}, unverified: it is to be {registered.origin}"
    return facts


def _refuse_untrained(model: SpecTransformer, where: str) -> None:
    """Reject freshly initialised weights: norms that scale by 1 and shift by 0, and initial running statistics."""
    norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))]
    spreads: list[Any] = [norm.running_var for norm in norms if isinstance(norm, nn.BatchNorm2d)]
    if any(
        values and all(bool((value == 1).all()) for value in values) for values in ([n.weight for n in norms], spreads)
    ):
        raise WeightsError(f"{where}: these weights were never trained, all norms in them are as initialised")


def _with_tag(name: str) -> str:
    return name if "." in name else f"{name}.in1k"


def _check_installable(name: str, custom: bool) -> None:
    if custom:
        raise WeightsError(
            Argument("install", True), " is for the model as registered; with ", Argument("spec"),
            " and the like use ", Argument("out", ...),
        )  # fmt: skip
    entry = resolve.registry().get(name)
    if entry is None:
        raise WeightsError(
            f"{name} is not registered, so it cannot be installed; use ", Argument("out", ...), " instead"
        )
    if entry.sha256 is not None:
        raise WeightsError(
            f"{name} already has weights ({resolve.where(entry)}), so it cannot be installed; use ",
            Argument("out", ...),
        )


# ---- publishing ----


@dataclass(frozen=True)
class Published:
    """The result of `publish`: the place, the file's sha256, and the registry entry to add for a named spec."""

    place: str
    sha256: str
    entry: WeightEntry | None
    revision: str | None = None


def publish(
    source: str,
    *,
    repo: str | None = None,
    folder: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
    space: bool = False,
) -> Published:
    """Publish weights with their model card to a Hub repository (created if missing) or a folder.

    Args:
        source: `model.tag`, a weight folder, or a Hub repository.
        repo: NAMESPACE/NAME to upload to, in one commit. folder: to write instead.
        facts: override the registry's or the folder's `entry.json`: `name`, `dataset`, `license`, `recipe`, `origin`,
            `metrics`.
        space: publish a Space, with the page of `glit demo --serve` and the weights.

    Raises:
        WeightsError: if the source is missing or damaged, a fact that the card needs is unknown, or the Hub refuses.
    """
    if (repo is None) == (folder is None):
        raise WeightsError("give one of ", Argument("repo", ...), " and ", Argument("folder", ...))
    if repo is not None and (not REPO_NAME.fullmatch(repo) or "@" in repo):
        raise WeightsError(f"{repo!r} is not the name of a Hub repository; it must be NAMESPACE/NAME")
    with temporary_folder() as temporary:
        staged = temporary / "folder"
        entry, spec = _stage(source, staged, repo, facts or {})
        assert entry.sha256 is not None
        if space:
            whole = temporary / "space"
            write_space(staged, entry, whole)
            revision = None if repo is None else _upload(whole, repo, f"Show {entry.name}", space=True)
            if folder is not None:
                _copy_folder(whole, Path(folder))
            return Published(repo or str(folder), entry.sha256, None, revision)
        registrable = spec == named_specs()[entry.architecture]
        if repo is not None:
            revision = _upload(staged, repo, f"Add {entry.name}")
            pinned = WeightEntry.from_dict(entry.name, entry.to_dict() | {"repo": repo, "revision": revision})
            return Published(repo, entry.sha256, pinned if registrable else None, revision)
        _copy_folder(staged, Path(str(folder)))
        return Published(str(folder), entry.sha256, entry if registrable else None)


def publish_all(*, namespace: str | None = None, folder: str | Path | None = None) -> Iterator[Published]:
    """Publish each of the shipped weights under its own name, and yield what `publish` returns for it.

    Args:
        namespace: user or organisation of the Hub; the repositories are `NAMESPACE/MODEL.TAG`. folder: to write
            `FOLDER/MODEL.TAG` instead.

    Raises:
        WeightsError: what `publish` raises. Weights before the ones that failed are published.
    """
    if (namespace is None) == (folder is None):
        raise WeightsError("give one of ", Argument("namespace", ...), " and ", Argument("folder", ...))
    for name in [name for name, entry in resolve.registry().items() if resolve.where(entry) == "shipped"]:
        if namespace is not None:
            yield publish(name, repo=f"{namespace}/{name}")
        else:
            yield publish(name, folder=Path(str(folder)) / name)


def ship(source: str, name: str, *, facts: Mapping[str, Any] | None = None, package: Path | None = None) -> WeightEntry:
    """Copy weights, with card and golden tensors, into this package's `weights/` folder, and add them to its registry.

    For maintainers, in a checkout. Takes the arguments of `publish` and raises the same errors.
    """
    package = package or resolve.SHIPPED
    with temporary_folder() as temporary:
        staged = temporary / "folder"
        entry, spec = _stage(source, staged, None, {**(facts or {}), "name": name})
        if spec != named_specs()[entry.architecture]:
            raise WeightsError(f"{source}: only the named architectures can be shipped, this is another spec")
        _copy_folder(staged, package / name)
    entries = read_registry(package / "registry.json")
    is_default = name in entries and entries[name].default
    entries[name] = entry = entry._replace(file=f"{name}/{WEIGHTS_FILE}", default=is_default)
    write_text(package / "registry.json", to_json({key: value.to_dict() for key, value in entries.items()}))
    resolve.registry.cache_clear()
    return entry


def _stage(source: str, staged: Path, repo: str | None, facts: Mapping[str, Any]) -> tuple[WeightEntry, Spec]:
    """Prepare the folder to publish: copy weights and configuration, and make golden tensors, card and figure."""
    from ..figure import draw_network
    from .card import model_card

    loaded = load_model(source)
    model, found = loaded.model, loaded.folder
    assert found is not None
    entry = _complete_entry(found, model, facts)
    golden = golden_tensors(model, read_state_dict(found.weights))
    with whole_folder(staged) as folder:
        shutil.copyfile(found.weights, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(to_json(found.config()), encoding="utf-8")
        write_state_dict(golden, folder / GOLDEN_FILE, {"format": "pt", "weights_sha256": str(entry.sha256)})
        (folder / "README.md").write_text(model_card(entry, model.spec, repo, model.has_class_token), encoding="utf-8")
        draw_network(model.spec, folder / "architecture.png")
    return entry, model.spec


def _complete_entry(found: WeightFolder, model: SpecTransformer, facts: Mapping[str, Any]) -> WeightEntry:
    config = found.config()
    registered = found.entry
    if registered is not None and resolve.where(registered) == "installed":
        known = {**read_entry(found.path), "name": registered.name}
    else:
        known = {"name": registered.name, **registered.to_dict()} if registered else read_entry(found.path)
    known |= {key: value for key, value in facts.items() if value not in (None, [], ())}
    name = known.pop("name", None) or config["architecture"]
    name = name if "." in name else f"{name}.custom"
    if name.partition(".")[0] != config["architecture"]:
        raise WeightsError(f"{name}: the name must begin with the architecture, {config['architecture']}")
    entry = known | describe(model, config, None, known)
    for key in ("file", "repo", "revision", "note", "default", "checkpoint_sha256"):
        entry.pop(key, None)
    entry["sha256"] = sha256_of(found.weights)
    for key in ("dataset", "license"):
        if not entry.get(key):
            raise WeightsError(f"{found.name}: the {key} of these weights is not known; give ", Argument(key))
    if not entry.get("recipe") and not entry.get("origin"):
        raise WeightsError(
            f"{found.name}: how these weights came about is not known; give ",
            Argument("recipe", ...), " or ", Argument("origin"),
        )  # fmt: skip
    return WeightEntry.from_dict(name, entry, found.name)


def read_entry(directory: Path) -> dict[str, Any]:
    """The facts about the weights in a folder, as stored in its `entry.json`; empty if it has none.

    Raises:
        WeightsError: if it cannot be read.
    """
    path = directory / ENTRY_FILE
    if not path.is_file():
        return {}
    try:
        entry = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: {first_line(error)}") from None
    if not isinstance(entry, dict):
        raise WeightsError(f"{path}: must be an object of named facts")
    return entry


def _copy_folder(source: Path, target: Path) -> None:
    with whole_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _upload(folder: Path, repo: str, message: str, space: bool = False) -> str:
    """Upload all files of a folder in one commit; returns its hash."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    seconds = download.hub_timeout()
    operations = [
        CommitOperationAdd(path_in_repo=file.relative_to(folder).as_posix(), path_or_fileobj=file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    kind: dict[str, Any] = {"repo_type": "space"} if space else {}
    sdk: dict[str, Any] = {"space_sdk": "gradio"} if space else {}
    try:
        with download.quiet_client():
            download.within(seconds, lambda: api.create_repo(repo, exist_ok=True, **kind, **sdk))
            return str(api.create_commit(repo, operations, commit_message=message, **kind).oid)
    except Exception as error:  # the client's own exception types change from version to version
        raise WeightsError(f"{repo}: not published: {download.explain(error)}") from None
