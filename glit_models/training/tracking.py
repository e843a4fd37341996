"""Send a run's numbers to experiment trackers, such as wandb and mlflow, through accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from ..errors import Argument, RunError, first_line
from ..runs.console import say

__all__ = ["Trackers", "check_trackers"]

_PROJECT = "glit-models"
_RUN_NAME = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}  # its name in each tracker's library
_OWN = "tensorboard"  # written by `Records` if it is installed


def check_trackers(names: Sequence[str]) -> None:
    """Raise RunError on a tracker that accelerate does not support, or whose library is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RunError(Argument("track"), f" must be of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}; got {name!r}")
        if name not in available:
            raise RunError(Argument("track"), f": {name} is not installed; pip install {name.replace('_', '-')}")


@final
class Trackers:
    """The trackers of one run, in its first process.

    Args:
        names: names of trackers that `check_trackers` has accepted.
        folder: folder of the run; its name is the run's name in each tracker.
        config: the recipe's values.

    Raises:
        RunError: if a tracker cannot be started, for example without a login.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._trackers = []
        for name in names:
            if name == _OWN:
                continue
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS

            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            keywords = {_RUN_NAME[name]: folder.absolute().name} if name in _RUN_NAME else {}
            place = [str(folder)] if tracker_class.requires_logging_directory else []
            try:
                tracker = tracker_class(_PROJECT, *place, **keywords)
                tracker.start()
                tracker.store_init_configuration(dict(_flat("", config)))
            except Exception as error:  # raised by any tracker's library
                raise RunError(Argument("track"), f": {name} cannot be started ({first_line(error)})") from None
            self._trackers.append((name, tracker))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers. A tracker that fails is reported and dropped; training continues."""
        for name, tracker in tuple(self._trackers):
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:  # raised by any tracker's library
                say(f"glit: {name} takes no more numbers ({first_line(error)}); the run continues without it")
                self._trackers.remove((name, tracker))

    def close(self) -> None:
        """Close the trackers."""
        for name, tracker in self._trackers:
            try:
                tracker.finish()
            except Exception as error:  # raised by any tracker's library
                say(f"glit: {name} cannot be ended ({first_line(error)})")


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, str | int | float | bool]]:
    """Pairs of `section.key` and plain value."""
    pairs: list[tuple[str, str | int | float | bool]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(f"{prefix}{key}.", value)
        else:
            pairs.append((f"{prefix}{key}", value if isinstance(value, (str, int, float, bool)) else str(value)))
    return pairs
