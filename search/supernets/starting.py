"""Load the weights that a supernet starts from: those of one network, or of another supernet."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from glit_models import Spec
from glit_models.errors import GlitError, SearchError, WeightsError, first_line
from glit_models.model import checkpoint_filter_fn
from glit_models.weights.loading import load_model

from .supernet import Supernet

__all__ = ["fill_supernet", "is_supernet", "start_network"]

_WEIGHTS = "supernet/model.safetensors"  # in a stage's folder
_HEAD = ("head.weight", "head.bias")


def fill_supernet(supernet: Supernet, source: str) -> None:
    """Load trained weights into a supernet. The position embedding is resampled to its image size, as in timm.

    Args:
        supernet: its other weights are unchanged.
        source: MODEL.TAG, a weight folder or a repository of a network of the supernet's space; or the folder of a
            search, or of its only stage, whose supernet has tensors of the same shapes. The head is loaded if the
            number of classes is the same.

    Raises:
        SearchError: if the network is not a member of the space, the supernet has other shapes, or the source is a
            network and weights are shared from both sides, of which it could fill only one.
        WeightsError: if the weights cannot be read.
    """
    if files := _supernet_files(source):
        _fill_from_supernet(supernet, files[0])
    elif len(supernet.sides) > 1:
        raise SearchError(
            f"supernet.from: a network such as {source} fills only one of both sides; start from another search's "
            "supernet, or set supernet.sharing=entangled"
        )
    else:
        _fill_from_network(supernet, source)


def start_network(source: str) -> Spec | None:
    """The network whose weights `fill_supernet` loads; None if they are a supernet's.

    Raises:
        WeightsError: if the weights cannot be read.
    """
    return None if is_supernet(source) else load_model(source).model.spec


def is_supernet(source: str) -> bool:
    """Whether the weights that `fill_supernet` loads are a supernet's."""
    return bool(_supernet_files(source))


def _supernet_files(source: str) -> list[Path]:
    return [path for path in (Path(source) / _WEIGHTS, Path(source) / "joint" / _WEIGHTS) if path.is_file()]


def _fill_from_network(supernet: Supernet, source: str) -> None:
    try:
        model = load_model(source).model
    except GlitError as error:
        raise type(error)(f"supernet.from: {error}") from None
    if model.spec not in supernet.space:
        raise SearchError(f"supernet.from: {source} is no network of the space that is searched")
    model.set_input_size(supernet.net.patch_embed.img_size)
    supernet.fill(model)


def _fill_from_supernet(supernet: Supernet, path: Path) -> None:
    net = supernet.net
    try:
        stored = {name.removeprefix("net."): tensor for name, tensor in load_file(path).items()}
        state = checkpoint_filter_fn(stored, net)
    except (OSError, SafetensorError, WeightsError) as error:
        raise SearchError(f"supernet.from: {path} is no supernet of this space: {first_line(error)}") from None
    if any(state[name].shape != net.get_parameter(name).shape for name in _HEAD if name in state):
        state = {name: tensor for name, tensor in state.items() if name not in _HEAD}
    net.load_state_dict(state, strict=False)  # only the head may be missing
