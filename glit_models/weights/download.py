"""Files from the Hugging Face Hub, through its own client and cache, with errors in one line and within seconds.

It knows repositories and files; what is in them, and whether their hash is right, is for the caller to know.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import WeightsError, first_line

__all__ = ["explain", "fetch", "hub_timeout", "quiet_client", "split_revision", "within"]

_COMMIT = "[0-9a-f]{40}"


def split_revision(name: str) -> tuple[str, str | None]:
    """`namespace/name@revision` as repository and revision (None without one)."""
    repo, _, revision = name.partition("@")
    return repo, revision or None


def fetch(repo: str, filename: str, revision: str | None = None) -> Path:
    """The local path of a file of a Hub repository, downloaded unless the client's cache has it.

    A file pinned to a commit needs no network once it is in the cache; nor does any other when offline or when the Hub
    does not answer. The Hub has `$GLIT_HUB_TIMEOUT` seconds (12 unless set) to answer at all.

    Raises:
        WeightsError: offline, unreachable, 401, 403, 404, another status, or a download cut short.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    what = f"{repo}{f'@{revision}' if revision else ''}/{filename}"
    try:
        cached = try_to_load_from_cache(repo, filename, revision=revision)
    except ValueError:
        raise WeightsError(f"{repo!r} is not the name of a Hub repository; it must be NAMESPACE/NAME") from None
    cached_path = Path(cached) if isinstance(cached, str) else None
    if cached_path and revision and re.fullmatch(_COMMIT, revision):
        return cached_path
    if constants.HF_HUB_OFFLINE:
        if cached_path:
            return cached_path
        raise WeightsError(
            f"{what} is not in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set; "
            "unset it, or copy the cache of a machine that has the file"
        )
    seconds = hub_timeout()
    with quiet_client():
        # The client alone would try for minutes; asking for the file's metadata first, it answers at once.
        try:
            url = hf_hub_url(repo, filename, revision=revision)
            within(seconds, lambda: get_hf_file_metadata(url, timeout=seconds))
        except Exception as error:  # the client's own exception types change from version to version
            if cached_path and _status(error) is None:
                return cached_path
            raise WeightsError(f"{what}: {explain(error)}") from None
        try:
            return Path(hf_hub_download(repo, filename, revision=revision, etag_timeout=seconds))
        except Exception as error:
            if _status(error) is not None:
                raise WeightsError(f"{what}: {explain(error)}") from None
            raise WeightsError(f"{what}: the download was cut short ({_cause(error)}); run it again to go on") from None


def explain(error: Exception) -> str:
    """In one line, why a request to the Hub failed and what to do."""
    from huggingface_hub import constants

    status = _status(error)
    if status in (401, 403):
        return (
            f"the Hub refused access ({status}); check the name, and log in with `hf auth login` or HF_TOKEN "
            "if the repository is private or gated"
        )
    if status == 404:
        return "no such repository, revision or file on the Hub (404); check the name"
    if status is not None:
        return f"the Hub answered with an error ({status}); try again later"
    return (
        f"the Hub ({constants.ENDPOINT}) could not be reached ({_cause(error)}); "
        "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is in the cache"
    )


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's warnings about retries off the terminal: our errors say what happened."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def hub_timeout() -> float:
    """Seconds that the Hub has to answer. Raises WeightsError if `$GLIT_HUB_TIMEOUT` is no positive number."""
    text = os.environ.get("GLIT_HUB_TIMEOUT", "12")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise WeightsError(f"GLIT_HUB_TIMEOUT must be a positive number of seconds, got {text!r}")
    return seconds


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of `call`, or TimeoutError. The client's timeouts leave out looking up names, and count each step."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _status(error: BaseException) -> int | None:
    return getattr(getattr(_root(error), "response", None), "status_code", None)


def _cause(error: BaseException) -> str:
    return first_line(_root(error)).rstrip(" .")


def _root(error: BaseException) -> BaseException:
    """What the client's error, which may wrap others, began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
