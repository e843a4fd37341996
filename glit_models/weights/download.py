"""Download files from the Hugging Face Hub into its client's cache, with timeouts and one-line errors.

The caller reads the files and checks their hashes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import GlitError, WeightsError, first_line
from ..runs.console import progress_bar
from ..runs.files import whole_file, write_text

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "WEIGHTS",
    "explain",
    "fetch",
    "fetch_first",
    "fetch_model",
    "hub_timeout",
    "quiet_client",
    "split_revision",
    "within",
]

T = TypeVar("T")

_COMMIT = "[0-9a-f]{40}"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the files that timm looks for, in its order
_LEAST_BYTES = 1 << 14  # that a download must receive within the Hub's timeout


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `namespace/name@revision` into repository and revision (None without one)."""
    repo, _, revision = name.partition("@")
    return repo, revision or None


def _looks_local(repo: str) -> bool:
    """Whether the name may have been meant as a folder, such as the `model` of a run."""
    first, _, last = repo.partition("/")
    return os.path.isdir(first) or last == "model"


class _NotFoundError(WeightsError):
    """The repository, revision or file does not exist."""


def fetch(repo: str, filename: str, revision: str | None = None) -> Path:
    """The local path of a file of a Hub repository, downloaded unless the client's cache has it.

    A file pinned to a commit needs no network once it is cached; other cached files need none when offline or when the
    Hub does not respond. The Hub must respond within `$GLIT_HUB_TIMEOUT` seconds (default: 12), and a download must
    receive at least 16 KiB in each such period. There are no retries.

    Raises:
        WeightsError: if offline or unreachable, on status 401, 403, 404 or another, or if the download is cut short.
        WriteError: if the cache cannot be written.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    what = f"{repo}{f'@{revision}' if revision else ''}/{filename}"
    failed = f"{repo}: no such folder here; as NAMESPACE/NAME on the Hub" if _looks_local(repo) else what
    try:
        cached = try_to_load_from_cache(repo, filename, revision=revision)
        url = hf_hub_url(repo, filename, revision=revision)
    except ValueError:
        raise WeightsError(f"{repo!r} is not the name of a Hub repository; it must be NAMESPACE/NAME") from None
    if ".." in (revision or "").split("/"):
        raise WeightsError(f"{what}: {revision!r} is not the name of a revision")
    cached_path = Path(cached) if isinstance(cached, str) else None
    if cached_path and revision and re.fullmatch(_COMMIT, revision):
        return cached_path
    if constants.HF_HUB_OFFLINE:
        if cached_path:
            return cached_path
        raise WeightsError(
            f"{failed}: not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; "
            "unset it, or copy the cache of a machine that has the file"
        )
    seconds = hub_timeout()
    transfer = _Transfer(Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}", filename, revision)
    try:
        with quiet_client(), _download_bar() as bar:
            bar.add_task(what, total=None)
            return within(seconds, lambda: transfer.run(url, seconds), lambda: _show(bar, transfer.received))
    except GlitError as error:
        raise type(error)(f"{failed}: ", *error.message.parts) from None
    except Exception as error:  # the client's own exception types change from version to version
        if transfer.received:
            raise WeightsError(f"{what}: the download was cut short ({_cause(error)}); run it again") from None
        if cached_path:
            return cached_path
        raise WeightsError(f"{failed}: {explain(error)}") from None
    finally:
        transfer.is_wanted = False


def fetch_model(name: str, *, weights: bool = True) -> Path:
    """The local folder of a Hub repository NAMESPACE/NAME[@REVISION] with its `config.json` and, if asked for, weights.

    Raises:
        WeightsError, WriteError: as in `fetch`.
    """
    repo, revision = split_revision(name)
    config = fetch(repo, "config.json", revision)
    if weights:
        fetch_first(repo, WEIGHTS, revision)
    return config.parent


def fetch_first(repo: str, filenames: Sequence[str], revision: str | None = None) -> Path:
    """Fetch the first of these files that the repository has; see `fetch`."""
    for filename in filenames[:-1]:
        with contextlib.suppress(_NotFoundError):
            return fetch(repo, filename, revision)
    return fetch(repo, filenames[-1], revision)


class _Transfer:
    """The transfer of one file into the Hub client's cache.

    Attributes:
        received: bytes so far.
        is_wanted: whether to continue.
    """

    def __init__(self, folder: Path, filename: str, revision: str | None) -> None:
        self.folder, self.filename, self.revision = folder, filename, revision
        self.received = 0
        self.is_wanted = True

    def run(self, url: str, seconds: float) -> Path:
        """Request the file, and read it unless this commit of it is cached. `seconds`: timeout of each read."""
        from huggingface_hub import constants, get_session, get_token

        headers = {"Accept-Encoding": "identity"}
        if (token := get_token()) and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            headers["Authorization"] = f"Bearer {token}"
        # On a redirect to another host, the client drops the token.
        with get_session().stream("GET", url, headers=headers, timeout=seconds, follow_redirects=True) as response:
            if response.status_code != 200:
                raise _refusal(response.status_code, response.headers)
            answers = [*response.history, response]
            commit = next((a.headers["X-Repo-Commit"] for a in answers if "X-Repo-Commit" in a.headers), "")
            if not re.fullmatch(_COMMIT, commit):  # it becomes part of the path
                raise WeightsError(f"{url} is not answered by a Hub; check HF_ENDPOINT and the proxy")
            path = self.folder / "snapshots" / commit / self.filename
            if not path.is_file():
                sizes = [int(size) for a in answers if (size := a.headers.get("X-Linked-Size", "")).isdecimal()]
                self._write(path, response.iter_bytes(), sizes)
        write_text(self.folder / "refs" / (self.revision or "main"), commit, parents=True)
        return path

    def _write(self, path: Path, chunks: Iterable[bytes], sizes: list[int]) -> None:
        with whole_file(path, parents=True) as temporary:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    self.received += len(chunk)
                    if not self.is_wanted:
                        raise TimeoutError("given up")
            if sizes and self.received != sizes[0]:
                raise WeightsError(f"{self.received:,} bytes came of {sizes[0]:,}; run it again")


def _download_bar() -> Progress:
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return progress_bar("{task.description}", DownloadColumn(), TransferSpeedColumn())


def _show(bar: Progress, received: int) -> int:
    bar.update(bar.task_ids[0], completed=received)
    return received


def _refusal(status: int, headers: Mapping[str, str]) -> WeightsError:
    if status == 404:
        return _NotFoundError(_explain_status(status))
    return WeightsError(_explain_status(status, headers.get("Retry-After")))


def explain(error: Exception) -> str:
    """Explain in one line why a request to the Hub failed and what to do."""
    from huggingface_hub import constants

    response = getattr(_root(error), "response", None)
    if response is not None:
        if response.status_code in (400, 422):
            return f"the Hub refused the request ({response.status_code}): {_server_message(error)}"
        return _explain_status(response.status_code, response.headers.get("Retry-After"))
    return (
        f"the Hub ({constants.ENDPOINT}) could not be reached ({_cause(error)}); "
        "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use what is in the cache"
    )


def _explain_status(status: int, retry_after: str | None = None) -> str:
    if status in (401, 403):
        return (
            f"the Hub refused access ({status}); check the name, and log in with `hf auth login` or HF_TOKEN "
            "if the repository is private or gated"
        )
    if status == 404:
        return "no such repository, revision or file on the Hub (404); check the name"
    later = f"in {retry_after} seconds" if retry_after and retry_after.isdecimal() else "later"
    if status == 429:
        return f"the Hub answers too many requests (429); try again {later}"
    return f"the Hub answered with an error ({status}); try again {later}"


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Hide the client's warnings about retries; our errors explain what happened."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def hub_timeout() -> float:
    """The Hub's timeout in seconds. Raises WeightsError if `$GLIT_HUB_TIMEOUT` is not a positive number."""
    text = os.environ.get("GLIT_HUB_TIMEOUT", "12")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise WeightsError(f"GLIT_HUB_TIMEOUT must be a positive number of seconds, got {text!r}")
    return seconds


def within(seconds: float, call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """Return the result of `call`; raise TimeoutError if `progress` grows by less than 16 KiB in `seconds`.

    The client's own timeouts do not cover name resolution, and apply to each read separately.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    seen, last = progress(), time.monotonic()
    while True:
        try:
            return outcome.result(min(seconds, 0.25))
        except TimeoutError:
            if outcome.done():
                raise  # raised by the call itself
        if (now := progress()) - seen >= _LEAST_BYTES:
            seen, last = now, time.monotonic()
        elif time.monotonic() - last >= seconds:
            text = f"less than {_LEAST_BYTES:,} bytes" if now else "no answer"
            raise TimeoutError(f"{text} within {seconds:g} s")


def _cause(error: BaseException) -> str:
    return first_line(_root(error)).rstrip(" .")


def _server_message(error: BaseException) -> str:
    """What the Hub said of the request that it refused, in one line."""
    text = "no reason given"
    cause: BaseException | None = error
    while cause is not None:
        text = getattr(cause, "server_message", None) or text
        cause = cause.__cause__
    return "; ".join(text.split("\n"))


def _root(error: BaseException) -> BaseException:
    """The root cause of the client's error, which may wrap others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
