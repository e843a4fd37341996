"""Save and load weight folders: `model.safetensors`, timm's `config.json`, and `golden.safetensors` (input and logits).

Trained, installed, shipped and published weights are all stored in such folders, which timm loads with `local-dir:`.
`entry.json` holds what else is known of the weights.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor

from ..activations import check_memory
from ..block import Block
from ..cost import count_macs
from ..errors import GlitError, WeightsError, first_line
from ..families import family_of_architecture, named_specs
from ..model import SpecTransformer
from ..preprocessing import preprocessing_problem
from ..reading import parse_json, read_text
from ..runs.files import temporary_folder, whole_folder
from ..spec import Spec
from . import download, resolve
from .files import (
    CONFIG_FILE,
    ENTRY_FILE,
    GOLDEN_FILE,
    MULTILABEL,
    WEIGHTS_FILE,
    check_fits,
    read_state_dict,
    sha256_of,
    write_state_dict,
)
from .registry import WeightEntry

__all__ = ["WeightFolder", "is_repository", "load_folder", "open_folder", "read_config", "save_folder", "spec_of"]

REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
NOTHING = "no such folder, and no MODEL.TAG or Hub repository NAMESPACE/NAME either"
# Keys that timm copies from the initial configuration, and that are true only of the initial weights.
_OF_THE_SOURCE = ("tag", "license", "origin_url", "description", "notes", "label_names")
_GOLDEN_SEED = 0


# ---- saving ----


def save_folder(
    model: SpecTransformer,
    directory: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model as a weight folder, which timm loads with `local-dir:`. Writes all files or none.

    Args:
        model: made by `timm.create_model`; its current state is written, in training or evaluation mode.
        directory: created if missing; other files in it are kept.
        class_names: of the head's outputs; None keeps those of the weights that the model started from.
        data_config: preprocessing (`mean`, `std`, `interpolation`, `crop_pct`) if it differs from
            `model.pretrained_cfg`.
        dtype: of the floating-point tensors in the file.
        name: `model.tag` of these weights.
        facts: fields of the registry entry: `dataset`, `license`, `recipe`, `origin`, `metrics`; and
            `checkpoint_sha256`, of the published file that the weights were converted from.

    Returns:
        The registry entry as stored in `entry.json`, with the fields that are known.

    Raises:
        WeightsError: if the weights are not finite in `dtype`, the model is fused, or the class names are not as many.
        WriteError: if the folder cannot be written.
    """
    directory = Path(directory)
    _refuse_fused(model)
    config = _hub_config(model, class_names, data_config, name, facts or {})
    entry = describe(model, config, name, facts or {})
    state = _stored_state(model, dtype)

    with whole_folder(directory) as folder:
        write_state_dict(state, folder / WEIGHTS_FILE, {"format": "pt"})
        entry["sha256"] = sha256_of(folder / WEIGHTS_FILE)
        metadata = {"format": "pt", "weights_sha256": entry["sha256"]}
        write_state_dict(golden_tensors(model, state), folder / GOLDEN_FILE, metadata)
        (folder / CONFIG_FILE).write_text(to_json(config), encoding="utf-8")
        (folder / ENTRY_FILE).write_text(to_json(entry), encoding="utf-8")
    return entry


def to_json(data: Any) -> str:
    """JSON text with lists of numbers on one line each."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    return (
        re.sub(
            r"\[[\s\d.,e+-]+\]", lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text
        )
        + "\n"
    )


def _hub_config(
    model: SpecTransformer,
    class_names: Sequence[str] | None,
    data_config: Mapping[str, Any] | None,
    name: str | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """timm's Hub configuration of the model, without the keys that are true only of the initial weights."""
    source = getattr(model, "pretrained_cfg", None)
    if source is None:
        raise ValueError("save_folder needs a model made by timm.create_model, which gives it a pretrained_cfg")
    if class_names is None and source.get("num_classes") == model.num_classes:
        class_names = source.get("label_names")
    if class_names is not None and len(class_names) != model.num_classes:
        raise WeightsError(f"class_names must be {model.num_classes} names, got {len(class_names)}")
    with temporary_folder() as folder:
        path = folder / CONFIG_FILE
        save_config_for_hf(
            model,
            str(path),
            model_config=(
                ({"label_names": list(class_names)} if class_names else {})
                | ({"problem_type": MULTILABEL} if getattr(model, "problem_type", None) == MULTILABEL else {})
            ),
            data_config=dict(data_config) if data_config else None,
        )
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # timm passes `num_classes` separately; if it is also here, transformers' wrapper fails.
    config["model_args"].pop("num_classes", None)
    cfg = config["pretrained_cfg"]
    for key in _OF_THE_SOURCE:
        cfg.pop(key, None)
    if not {"input_size", "img_size"} & set(data_config or ()):  # timm keeps that of the source for a dynamic size
        cfg["input_size"] = [model.in_chans, *model.patch_embed.img_size]
    cfg["paper_ids"] = family_of_architecture(config["architecture"]).paper_of(config["architecture"]).identifier
    if name and "." in name:
        cfg["tag"] = name.partition(".")[2]
    if facts.get("license"):
        cfg["license"] = facts["license"]
    return config


def describe(
    model: SpecTransformer, config: Mapping[str, Any], name: str | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    cfg = config["pretrained_cfg"]
    entry: dict[str, Any] = {
        "name": name,
        **{key: facts.get(key) for key in ("dataset", "license", "recipe", "origin", "checkpoint_sha256")},
        "metrics": list(facts.get("metrics") or ()),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": count_macs(
            model.spec, tuple(cfg["input_size"][1:]), model.num_classes, model.in_chans, model.has_class_token
        ),
        **{key: cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")},
        "num_classes": model.num_classes,
        "class_names": config.get("label_names"),
        "multilabel": config.get("problem_type") == MULTILABEL or None,
    }
    return {key: value for key, value in entry.items() if value is not None and value != []}


def _refuse_fused(model: SpecTransformer) -> None:
    for block in model.blocks:
        for part, module in block.part_modules() if isinstance(block, Block) else ():
            names = [name for name, _ in module.named_buffers()]
            if part.has_running_statistics and not any(name.endswith("running_mean") for name in names):
                raise WeightsError("a fused model cannot be saved, its BatchNorm is gone; save it before `fuse()`")


def _stored_state(model: SpecTransformer, dtype: str) -> dict[str, Tensor]:
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


def golden_tensors(model: SpecTransformer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random input [1, C, H, W], in float16 to halve its file, and its float32 logits by `model` with `state`."""
    reference = copy.deepcopy(model).cpu().float().eval()
    reference.load_state_dict(state)
    height, width = reference.patch_embed.img_size
    shape = (1, reference.in_chans, height, width)
    check_memory(reference, shape, torch.device("cpu"), "take a smaller network or image")
    image = torch.randn(shape, generator=torch.Generator().manual_seed(_GOLDEN_SEED)).half()
    with torch.inference_mode():
        logits = reference(image.float())
    return {"input": image, "logits": logits.clone()}


# ---- loading ----


@dataclass(frozen=True)
class WeightFolder:
    """A weight folder, the name under which the user asked for it, and its registry entry if it has one."""

    name: str
    path: Path
    entry: WeightEntry | None = None
    sha256: str | None = None

    @property
    def weights(self) -> Path:
        """Path of the weights file."""
        return self.path / WEIGHTS_FILE

    def config(self) -> dict[str, Any]:
        """The content of `config.json`. Raises WeightsError if it is missing or belongs to another package."""
        return read_config(self.path)


def open_folder(source: str, *, golden: bool = True) -> WeightFolder:
    """Find the weight folder that `source` names: `model.tag`, a folder (or its weights file), or a Hub repository.

    Args:
        golden: also fetch the golden tensors from the Hub.

    Raises:
        WeightsError: if there is none, or it cannot be fetched. The weights are not verified.
    """
    path = Path(source)
    if path.is_dir():
        return WeightFolder(source, path)
    if path.is_file():
        if path.name != WEIGHTS_FILE:
            raise WeightsError(f"{source}: not a weight folder; give the folder with {WEIGHTS_FILE}, or convert it")
        return WeightFolder(source, path.parent)
    if source.partition(".")[0] in named_specs():
        entry = resolve.get_entry(source)
        weights, sha256 = resolve.find_unverified(entry)
        if resolve.where(entry) == "hub":
            for filename in (CONFIG_FILE, *([GOLDEN_FILE] if golden else [])):
                download.fetch(str(entry.repo), filename, entry.revision)
        return WeightFolder(entry.name, weights.parent, entry, sha256)
    if is_repository(source):
        repo, revision = download.split_revision(source)
        files = (WEIGHTS_FILE, CONFIG_FILE, *([GOLDEN_FILE] if golden else []))
        weights, *_ = [download.fetch(repo, file, revision) for file in files]
        return WeightFolder(source, weights.parent)
    raise WeightsError(f"{source}: {NOTHING}")


def is_repository(source: str) -> bool:
    """Whether `source` has the form of a Hub repository, NAMESPACE/NAME or NAMESPACE/NAME@REVISION."""
    return bool(REPO_NAME.fullmatch(source)) and not source.startswith(".")


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` of a weight folder. Raises WeightsError if it is missing, damaged, or of another package."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise WeightsError(f"{directory}: no {CONFIG_FILE} in this folder; `glit convert` makes one")
    try:
        config = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: {first_line(error)}") from None
    if not isinstance(config, dict) or config.get("architecture") not in list(named_specs()):
        raise WeightsError(
            f"{path}: not the configuration of a model of this package; 'architecture' must be one of "
            f"{', '.join(named_specs())}"
        )
    if not all(isinstance(config.get(key), dict) for key in ("pretrained_cfg", "model_args")):
        raise WeightsError(f"{path}: not timm's configuration; it lacks 'pretrained_cfg' or 'model_args'")
    _check_config(config, path)
    return config


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError on a value that would cause an error or a wrong result much later; names it."""
    cfg, count = config["pretrained_cfg"], config.get("num_classes", 1000)
    problem = preprocessing_problem({key: value for key, value in cfg.items() if value is not None})
    if problem is not None:
        raise WeightsError(f"{path}: pretrained_cfg.{problem[0]} must be {problem[1]}, got {cfg[problem[0]]!r:.60}")
    if type(count) is not int or count < 0:
        raise WeightsError(f"{path}: num_classes must be an integer of at least 0, got {count!r:.60}")
    for names in (config.get("label_names"), cfg.get("label_names")):
        if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise WeightsError(f"{path}: label_names must be a list of names, got {names!r:.60}")


def spec_of(config: Mapping[str, Any]) -> Spec:
    """The architecture that a `config.json` describes. Raises SpecError if it is impossible."""
    spec = config["model_args"].get("spec")
    family = family_of_architecture(config["architecture"])
    return family.named[config["architecture"]] if spec is None else family.spec.parse(spec)


def load_folder(directory: str | Path) -> SpecTransformer:
    """Load the model of a weight folder with its weights, in float32 and evaluation mode.

    Raises:
        WeightsError: if a file is missing or damaged, or the weights do not fit the configuration.
        SpecError: if the configuration describes an impossible network.
    """
    directory = Path(directory)
    config = read_config(directory)
    try:
        model: SpecTransformer = timm.create_model(f"local-dir:{directory}")
    except GlitError:
        raise
    except Exception as error:  # a configuration can make timm raise anything
        text = f"timm cannot build {config['architecture']} ({first_line(error)})"
        raise WeightsError(f"{directory / CONFIG_FILE}: {text}") from None
    weights = directory / WEIGHTS_FILE
    state = read_state_dict(weights)
    check_fits(state, model, where=str(weights))
    model.load_state_dict(state)
    setattr(model, "problem_type", config.get("problem_type"))  # noqa: B010 - which torch has no type for
    return model.eval()
