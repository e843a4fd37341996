"""Models as folders: saving and loading them, converting the authors' checkpoint, publishing to the Hub.

A weight folder is `model.safetensors`, timm's `config.json`, and `golden.safetensors` (an input and its logits). What
is known of the weights beside these goes into `entry.json`. The registry, and where files lie, are `hub.py`'s.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor

from . import download, hub, store
from .checkpoint import check_fits, convert_official_state_dict, is_official, read_state_dict, sha256_of
from .cost import count_macs
from .errors import WeightsError
from .glit import NAMED_SPECS
from .hub import WeightEntry
from .model import GLiT
from .spec import GLiTSpec

__all__ = ["Published", "WeightFolder", "convert", "load_folder", "open_folder", "publish", "save_folder", "ship"]

_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# What timm copies from the configuration that the model started from, true only of those weights.
_OF_THE_SOURCE = ("tag", "license", "origin_url", "description", "notes", "paper_ids", "label_names")
_GOLDEN_SEED = 0


# ---- saving ----


def save_folder(
    model: GLiT,
    directory: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model as a weight folder, which timm loads with `local-dir:`; all its files or none.

    Args:
        model: made by `timm.create_model`; its state is written as it is now, whatever mode it is in.
        directory: made if missing; files of other names in it stay.
        class_names: of the head's outputs; None keeps those of the weights that the model started from.
        data_config: preprocessing (`mean`, `std`, `interpolation`, `crop_pct`) where it is not that of
            `model.pretrained_cfg`.
        dtype: of the floating-point tensors in the file.
        name: `model.tag` of these weights.
        facts: what a registry entry says of them: `dataset`, `license`, `recipe`, `origin`, `metrics`.

    Returns:
        The registry entry as far as it is known, as it stands in `entry.json`.

    Raises:
        WeightsError: if the weights are not finite numbers in `dtype`, the class names are too few or too many, or the
            folder cannot be written.
    """
    directory = Path(directory)
    config = _hub_config(model, class_names, data_config, name, facts or {})
    entry = _describe(model, config, name, facts or {})
    state = _stored_state(model, dtype)

    def write_weights(path: Path) -> None:
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
        entry["sha256"] = sha256_of(path)

    def write_golden(path: Path) -> None:
        metadata = {"format": "pt", "weights_sha256": entry["sha256"]}
        safetensors.torch.save_file(golden_tensors(model, state), path, metadata=metadata)

    writers = {
        store.WEIGHTS_FILE: write_weights,
        store.CONFIG_FILE: lambda path: path.write_text(to_json(config), encoding="utf-8"),
        store.GOLDEN_FILE: write_golden,
        store.ENTRY_FILE: lambda path: path.write_text(to_json(entry), encoding="utf-8"),
    }
    try:
        store.write_files(directory, writers)
    except OSError as error:
        raise WeightsError(f"{directory}: cannot be written ({error.strerror or error})") from None
    return entry


def to_json(data: Any) -> str:
    """JSON text with lists of numbers on one line each."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    return re.sub(r"\[[\s\d.,e+-]+\]", lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text) + "\n"


def _hub_config(
    model: GLiT,
    class_names: Sequence[str] | None,
    data_config: Mapping[str, Any] | None,
    name: str | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """timm's Hub configuration of the model as it is now, without what was true only of the weights it started from."""
    source = getattr(model, "pretrained_cfg", None)
    if source is None:
        raise ValueError("save_folder needs a model made by timm.create_model, which gives it a pretrained_cfg")
    if class_names is None and source.get("num_classes") == model.num_classes:
        class_names = source.get("label_names")
    if class_names is not None and len(class_names) != model.num_classes:
        raise WeightsError(f"class_names must be {model.num_classes} names, got {len(class_names)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / store.CONFIG_FILE
        save_config_for_hf(
            model,
            str(path),
            model_config={"label_names": list(class_names)} if class_names else None,
            data_config=dict(data_config) if data_config else None,
        )
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # timm passes `num_classes` on its own; standing here too, it makes transformers' wrapper fail.
    config["model_args"].pop("num_classes", None)
    cfg = config["pretrained_cfg"]
    for key in _OF_THE_SOURCE:
        cfg.pop(key, None)
    cfg["paper_ids"] = hub.PAPER
    if name and "." in name:
        cfg["tag"] = name.partition(".")[2]
    if facts.get("license"):
        cfg["license"] = facts["license"]
    return config


def _describe(model: GLiT, config: Mapping[str, Any], name: str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    cfg = config["pretrained_cfg"]
    entry: dict[str, Any] = {
        "name": name,
        **{key: facts.get(key) for key in ("dataset", "license", "recipe", "origin")},
        "metrics": list(facts.get("metrics") or ()),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(
            model.spec, tuple(cfg["input_size"][1:]), model.num_classes, model.in_chans, model.has_class_token
        ),
        **{key: cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")},
        "num_classes": model.num_classes,
        "class_names": config.get("label_names"),
    }
    return {key: value for key, value in entry.items() if value is not None and value != []}


def _stored_state(model: GLiT, dtype: str) -> dict[str, Tensor]:
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype must be 'float32' or 'float16', got {dtype!r}")
    state = {}
    for key, tensor in model.state_dict().items():
        stored = tensor.detach().cpu()
        if stored.is_floating_point():
            stored = stored.to(getattr(torch, dtype))
            if not bool(stored.isfinite().all()):
                raise WeightsError(f"{key!r} holds values that are not finite in {dtype}; these weights are not saved")
        state[key] = stored.contiguous()
    return state


def golden_tensors(model: GLiT, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random input [1, C, H, W] and its logits by `model` with the weights `state`, in float32 on the CPU."""
    reference = copy.deepcopy(model).cpu().float().eval()
    reference.load_state_dict(state)
    height, width = reference.patch_embed.img_size
    shape = (1, reference.in_chans, height, width)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(_GOLDEN_SEED))
    with torch.inference_mode():
        logits = reference(image)
    return {"input": image, "logits": logits.clone()}


# ---- loading ----


@dataclass(frozen=True)
class WeightFolder:
    """A weight folder that was found, under the name the user gave, and its registry entry where there is one."""

    name: str
    path: Path
    entry: WeightEntry | None = None
    sha256: str | None = None

    @property
    def weights(self) -> Path:
        """Path of the weights file."""
        return self.path / store.WEIGHTS_FILE

    def config(self) -> dict[str, Any]:
        """The content of `config.json`. Raises WeightsError if it is missing or of no GLiT."""
        return read_config(self.path)


def open_folder(source: str) -> WeightFolder:
    """Find the weight folder that `source` names: `model.tag`, a folder (or its weights file), or a Hub repository.

    Raises:
        WeightsError: if there is none, or it cannot be fetched. The weights are not verified.
    """
    path = Path(source)
    if path.is_dir():
        return WeightFolder(source, path)
    if path.is_file():
        if path.name != store.WEIGHTS_FILE:
            raise WeightsError(f"{source}: not a weight folder; give the folder with {store.WEIGHTS_FILE}, or convert it")
        return WeightFolder(source, path.parent)
    if source.partition(".")[0] in NAMED_SPECS:
        entry = hub.get_entry(source)
        weights, sha256 = hub.find_unverified(entry)
        if hub.where(entry) == "hub":
            for filename in (store.CONFIG_FILE, store.GOLDEN_FILE):
                download.fetch(str(entry.repo), filename, entry.revision)
        return WeightFolder(entry.name, weights.parent, entry, sha256)
    if _REPO.fullmatch(source) and not source.startswith((".", "/")):
        repo, revision = download.split_revision(source)
        files = (store.WEIGHTS_FILE, store.CONFIG_FILE, store.GOLDEN_FILE)
        return WeightFolder(source, [download.fetch(repo, file, revision) for file in files][0].parent)
    raise WeightsError(f"{source}: no such folder, and no MODEL.TAG or Hub repository NAMESPACE/NAME either")


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a weight folder. Raises WeightsError if it is missing, damaged, or of no GLiT."""
    path = directory / store.CONFIG_FILE
    if not path.is_file():
        raise WeightsError(f"{directory}: no {store.CONFIG_FILE} in this folder; `glit convert` makes one")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("architecture") not in NAMED_SPECS:
        raise WeightsError(f"{path}: not the configuration of a GLiT; 'architecture' must be one of {', '.join(NAMED_SPECS)}")
    if not all(isinstance(config.get(key), dict) for key in ("pretrained_cfg", "model_args")):
        raise WeightsError(f"{path}: not timm's configuration; it lacks 'pretrained_cfg' or 'model_args'")
    return config


def spec_of(config: Mapping[str, Any]) -> GLiTSpec:
    """The architecture that a `config.json` describes. Raises SpecError on an impossible one."""
    spec = config["model_args"].get("spec")
    return NAMED_SPECS[config["architecture"]] if spec is None else GLiTSpec.parse(spec)


def load_folder(directory: str | Path) -> GLiT:
    """The model of a weight folder with its weights, in float32 and evaluation mode.

    Raises:
        WeightsError: if a file is missing or damaged, or the weights do not fit the configuration.
        SpecError: if the configuration describes an impossible network.
    """
    directory = Path(directory)
    config = read_config(directory)
    try:
        model: GLiT = timm.create_model(f"local-dir:{directory}")
    except (TypeError, KeyError, AssertionError) as error:
        raise WeightsError(f"{directory / store.CONFIG_FILE}: timm cannot build {config['architecture']} ({error})") from None
    weights = directory / store.WEIGHTS_FILE
    state = read_state_dict(weights)
    check_fits(state, model, where=str(weights))
    model.load_state_dict(state)
    return model.eval()


# ---- converting ----


def convert(
    checkpoint: str | Path,
    name: str,
    *,
    out: str | Path | None = None,
    install: bool = False,
    spec: str | GLiTSpec | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
) -> list[Path]:
    """Turn a checkpoint, in the authors' layout or ours, into weight folders.

    Args:
        checkpoint: a torch pickle (`model`, or a bare state dict) or a safetensors file.
        name: `model` or `model.tag` that it belongs to; the tag `in1k` unless given.
        out: a folder to write.
        install: also put it into the store, for `timm.create_model(name, pretrained=True)` on this machine.
        spec, num_classes, img_size: of the checkpoint, where they are not the model's own; not with `install`.

    Returns:
        The folders written.

    Raises:
        WeightsError: on an unreadable checkpoint, one that does not fit the model, or a name that cannot be installed.
    """
    if not install and out is None:
        raise WeightsError("nothing to do: give --install, --out DIR, or both")
    custom = any(value is not None for value in (spec, num_classes, img_size))
    entry = _entry_to_install(name) if install and not custom else hub.registry().get(_with_tag(name))
    if install and custom:
        raise WeightsError("--install is for the model as registered; with another spec, class count or size use --out DIR")
    architecture = name.partition(".")[0]
    if architecture not in NAMED_SPECS:
        raise WeightsError(f"{architecture}: no such model; known: {', '.join(NAMED_SPECS)}")
    given = {"spec": spec, "num_classes": num_classes, "img_size": img_size}
    state = read_state_dict(checkpoint)
    if is_official(state):
        state = convert_official_state_dict(state)
    model: GLiT = timm.create_model(architecture, **{key: value for key, value in given.items() if value is not None})
    check_fits(state, model, where=str(checkpoint))
    model.load_state_dict(state)
    facts = entry.to_dict() if entry is not None and not custom else {"origin": f"converted from {Path(checkpoint).name}"}
    folders = [store.installed_folder(_with_tag(name))] if install else []
    folders += [Path(out)] if out is not None else []
    for folder in folders:
        save_folder(model, folder, name=_with_tag(name), facts=facts)
    return folders


def _with_tag(name: str) -> str:
    return name if "." in name else f"{name}.in1k"


def _entry_to_install(name: str) -> WeightEntry:
    entry = hub.registry().get(_with_tag(name))
    if entry is None:
        raise WeightsError(f"{_with_tag(name)} is not registered, so it cannot be installed; use --out DIR instead")
    if entry.sha256 is not None:
        raise WeightsError(f"{entry.name} has weights of its own ({hub.where(entry)}); use --out DIR instead")
    return entry


# ---- publishing ----


@dataclass(frozen=True)
class Published:
    """What `publish` made: the place, the file's sha256, and the registry entry to add if the spec is a named one."""

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
) -> Published:
    """Put weights with their model card into a Hub repository (made if missing) or a folder.

    Args:
        source: `model.tag`, a weight folder, or a Hub repository.
        repo: NAMESPACE/NAME to upload to, in one commit. folder: to write instead.
        facts: replaces what the registry or the folder's `entry.json` says: `name`, `dataset`, `license`, `recipe`,
            `origin`, `metrics`.

    Raises:
        WeightsError: if the source is missing or damaged, a fact that the card needs is unknown, or the Hub refuses.
    """
    if (repo is None) == (folder is None):
        raise WeightsError("give one of --repo NAMESPACE/NAME and --to-folder DIR")
    if repo is not None and (not _REPO.fullmatch(repo) or "@" in repo):
        raise WeightsError(f"{repo!r} is not the name of a Hub repository; it must be NAMESPACE/NAME")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "folder"
        entry, spec = _stage(source, staged, repo, facts or {})
        assert entry.sha256 is not None
        registrable = spec == NAMED_SPECS[entry.architecture]
        if repo is not None:
            revision = _upload(staged, repo, f"Add {entry.name}")
            pinned = dataclasses.replace(entry, repo=repo, revision=revision)
            return Published(repo, entry.sha256, pinned if registrable else None, revision)
        _copy_folder(staged, Path(str(folder)))
        return Published(str(folder), entry.sha256, entry if registrable else None)


def ship(source: str, name: str, *, facts: Mapping[str, Any] | None = None, package: Path | None = None) -> WeightEntry:
    """Put weights into this package's own `weights/` folder, card and golden tensors too, and into its registry.

    For those who maintain the package, from a checkout. Takes what `publish` takes, raises what it raises.
    """
    package = package or hub.SHIPPED
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "folder"
        entry, spec = _stage(source, staged, None, {**(facts or {}), "name": name})
        if spec != NAMED_SPECS[entry.architecture]:
            raise WeightsError(f"{source}: only the named architectures can be shipped, this is another spec")
        _copy_folder(staged, package / name)
    entry = dataclasses.replace(entry, file=f"{name}/{store.WEIGHTS_FILE}")
    entries = hub.read_registry(package / "registry.json") | {name: entry}
    store.write_text(package / "registry.json", to_json({key: value.to_dict() for key, value in entries.items()}))
    hub.registry.cache_clear()
    return entry


def _stage(source: str, staged: Path, repo: str | None, facts: Mapping[str, Any]) -> tuple[WeightEntry, GLiTSpec]:
    """Make the folder to publish: weights and configuration as they are, golden tensors, card and figure anew."""
    from .model_card import draw_architecture, model_card

    found = open_folder(source)
    if found.entry is not None:
        hub.find(found.entry)  # verified
    model = load_folder(found.path)
    entry = _complete_entry(found, model, facts)
    golden = golden_tensors(model, read_state_dict(found.weights))
    metadata = {"format": "pt", "weights_sha256": str(entry.sha256)}
    card = model_card(entry, model.spec, repo)
    writers = {
        store.WEIGHTS_FILE: lambda path: shutil.copyfile(found.weights, path),
        store.CONFIG_FILE: lambda path: path.write_text(to_json(found.config()), encoding="utf-8"),
        store.GOLDEN_FILE: lambda path: safetensors.torch.save_file(golden, path, metadata=metadata),
        "README.md": lambda path: path.write_text(card, encoding="utf-8"),
        "architecture.png": lambda path: draw_architecture(model.spec, path),
    }
    store.write_files(staged, writers)
    return entry, model.spec


def _complete_entry(found: WeightFolder, model: GLiT, facts: Mapping[str, Any]) -> WeightEntry:
    config = found.config()
    if found.entry is not None:
        known = {"name": found.entry.name, **found.entry.to_dict()}
    else:
        known = _read_entry(found.path)
    known |= {key: value for key, value in facts.items() if value not in (None, [], ())}
    name = known.pop("name", None) or f"{config['architecture']}.custom"
    if name.partition(".")[0] != config["architecture"]:
        raise WeightsError(f"{name}: the name must begin with the architecture, {config['architecture']}")
    entry = known | _describe(model, config, None, known)
    for key in ("file", "repo", "revision", "note"):
        entry.pop(key, None)
    entry["sha256"] = sha256_of(found.weights)
    for key in ("dataset", "license"):
        if not entry.get(key):
            raise WeightsError(f"{found.name}: the {key} of these weights is not known; give --{key}")
    if not entry.get("recipe") and not entry.get("origin"):
        raise WeightsError(f"{found.name}: how these weights came about is not known; give --recipe COMMAND or --origin")
    return WeightEntry.from_dict(name, entry, found.name)


def _read_entry(directory: Path) -> dict[str, Any]:
    path = directory / store.ENTRY_FILE
    if not path.is_file():
        return {}
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise WeightsError(f"{path}: must be an object of named facts")
    return entry


def _copy_folder(source: Path, target: Path) -> None:
    try:
        store.write_files(
            target, {file.name: lambda path, file=file: shutil.copyfile(file, path) for file in sorted(source.iterdir())}
        )
    except OSError as error:
        raise WeightsError(f"{target}: cannot be written ({error.strerror or error})") from None


def _upload(folder: Path, repo: str, message: str) -> str:
    """Upload all files of a folder in one commit; returns its hash."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    seconds = download.hub_timeout()
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in sorted(folder.iterdir())]
    try:
        with download.quiet_client():
            download.within(seconds, lambda: api.create_repo(repo, exist_ok=True))
            return str(api.create_commit(repo, operations, commit_message=message).oid)
    except Exception as error:  # the client's own exception types change from version to version
        raise WeightsError(f"{repo}: not published: {download.explain(error, seconds)}") from None
