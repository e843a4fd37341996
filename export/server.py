"""`glit serve`: serve exported models over HTTP with the Open Inference Protocol, for Triton's clients and browsers.

See docs/serving.md. FastAPI and uvicorn come with the extra `serve`.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from io import BytesIO
from typing import Any, final

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

import glit_models
from glit_models.data.image_files import open_image
from glit_models.errors import Argument, DataError, ExportError, GlitError, printable
from glit_models.runs.console import say
from glit_models.runs.signals import StopRequest

from . import protocol
from .metrics import CONTENT_TYPE, exposition
from .page import PAGE, POLICY
from .served import MOST_PIXELS, ServedModel, open_models

__all__ = ["ServerOptions", "make_app", "make_server", "serve"]

_CONNECTIONS = 1024
_HELD = 16  # maximum number of bodies of the largest size in memory
_DRAINED = 8  # a body that is too large is read up to this many times the limit, so that its sender gets the error
_DECODERS = 2  # images decoded at the same time


@dataclass(frozen=True)
class ServerOptions:
    """Address and limits of the server.

    Attributes:
        host: name or address to listen on. port: 0 for any free port.
        max_batch: images per run and per request. max_delay_ms: milliseconds that a request waits for others.
        max_body: bytes of a request. timeout: seconds from a request's start to its response.

    Raises:
        ExportError: on a value out of bounds.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 16
    max_delay_ms: float = 2.0
    max_body: int = 20_000_000
    timeout: float = 30.0

    def __post_init__(self) -> None:
        bounds = {
            "port": (0, 65535), "max_batch": (1, 1024), "max_delay_ms": (0, 10_000), "max_body": (1, 2**31),
            "timeout": (0.001, 3600),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            if not least <= getattr(self, name) <= most:
                raise ExportError(Argument(name), f" must be from {least} to {most}, got {getattr(self, name)}")


def serve(
    what: str, options: ServerOptions, *, providers: list[str] | None = None, threads: int | None = None,
    name: str | None = None,
) -> int:  # fmt: skip
    """Serve until SIGTERM or SIGINT, then complete the requests in progress.

    Args:
        what, providers, threads, name: see `served.open_models`.

    Returns:
        The exit status for the signal, 143 or 130.

    Raises:
        ExportError: if the address is not available; also raises as `open_models`.
    """
    with (
        StopRequest() as stop,
        _bound(options.host, options.port) as listener,
        open_models(
            what, providers=providers, threads=threads, max_batch=options.max_batch,
            max_delay=options.max_delay_ms / 1000, name=name,
        ) as models,
    ):  # fmt: skip
        if stop.signal is None:
            listener.listen(_CONNECTIONS)
            host, port = listener.getsockname()[:2]
            for model in models.values():
                about = model.classifier
                say(f"{model.name}: {about.info.source}, {about.info.precision}, {about.provider} of {about.build}")
            say(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C ends it")
            with suppress(KeyboardInterrupt):  # a second signal does not wait for requests in progress
                make_server(models, options).run(sockets=[listener])
    return stop.exit_status


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind a socket without listening, so that a port in use is detected before the models are loaded."""
    try:
        family, kind, protocol_number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol_number)  # the protocol lets asyncio set TCP_NODELAY
    except (OSError, UnicodeError) as error:
        raise ExportError(f"cannot listen on {host!r}: {getattr(error, 'strerror', None) or error}") from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise ExportError(
                f"cannot listen on {host}:{port}: {error.strerror}; ", Argument("port", ...), " takes another"
            ) from None
        yield listener


def make_server(models: Mapping[str, ServedModel], options: ServerOptions) -> uvicorn.Server:
    """Create the server, ready to run on a socket."""
    config = uvicorn.Config(
        make_app(models, options), http="h11", ws="none", lifespan="off", log_level="critical", access_log=False,
        proxy_headers=False, server_header=False, limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=int(options.timeout) + 1,
    )  # fmt: skip
    return uvicorn.Server(config)


# ---- the application ----


def make_app(models: Mapping[str, ServedModel], options: ServerOptions) -> FastAPI:
    """Create the application. `models` are by name, at least one; /classify uses the first by default."""
    app = FastAPI(title="glit serve", version=glit_models.__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(AnyHTTPException, _error)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    gate = _Gate(options)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    @app.get("/models")
    async def names() -> list[str]:
        return list(models)

    @app.get("/metrics")
    async def metrics() -> Response:
        for model in models.values():
            model.metrics.runs = model.batcher.runs
        return Response(exposition({name: model.metrics for name, model in models.items()}), media_type=CONTENT_TYPE)

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        extensions = ["binary_tensor_data", "classification"]
        return {"name": "glit", "version": glit_models.__version__, "extensions": extensions}

    @app.get("/v2/health/live")
    @app.get("/v2/health/ready")
    async def health() -> Response:
        return Response()

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def ready(name: str, version: str | None = None) -> Response:
        _model(models, name, version)
        return Response()

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        return _model(models, name, version).metadata()

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(name: str, request: Request, version: str | None = None) -> Response:
        return await gate.answer(_model(models, name, version), request, _infer)

    @app.post("/classify")
    async def classify(request: Request, model: str | None = None, top_k: int = 5) -> Response:
        async def work(asked: ServedModel, call: _Call) -> Response:
            return await _classify(asked, call, max(top_k, 1))

        return await gate.answer(_model(models, next(iter(models)) if model is None else model, None), request, work)

    return app


def _model(models: Mapping[str, ServedModel], name: str, version: str | None) -> ServedModel:
    model = models.get(name)
    if model is None:
        raise HTTPException(404, f"there is no model {name[:100]!r}; served are {', '.join(models)}")
    if version not in (None, model.version):
        raise HTTPException(404, f"{name} has no version {str(version)[:20]!r}, only {model.version}")
    return model


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AnyHTTPException)
    return JSONResponse({"error": printable(str(error.detail))}, error.status_code, error.headers)


async def _wrong_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": printable(f"{first['loc'][-1]}: {first['msg']}")}, 400)


async def _infer(model: ServedModel, call: _Call) -> Response:
    body, headers = await call.body(), call.request.headers
    classifier = model.classifier
    length = headers.get(protocol.HEADER_LENGTH)
    asked, images = await run_in_threadpool(protocol.parse, body, length, classifier.input_name, classifier.input_dtype)
    logits = await call.logits(model, images)
    found = protocol.answer(model.name, model.version, asked, logits, model.labels)
    if found.header_length is None:
        return Response(found.body, media_type="application/json")
    length_of = {protocol.HEADER_LENGTH: str(found.header_length)}
    return Response(found.body, media_type="application/octet-stream", headers=length_of)


async def _classify(model: ServedModel, call: _Call, top_k: int) -> Response:
    file = _image_file(await call.body(), call.request.headers.get("content-type", ""))

    def prepared() -> np.ndarray:
        return model.classifier.prepare(open_image(BytesIO(file), "the image", MOST_PIXELS))[None]

    async with call.gate.decoders:
        images = await run_in_threadpool(prepared)
    call.hold(images.nbytes)
    (best,) = model.classifier.best(await call.logits(model, images), top_k)
    return JSONResponse([{"class": printable(name), "probability": probability} for name, probability in best])


def _image_file(body: bytes, content_type: str) -> bytes:
    """The file in a request: its body, or the first file of a form (RFC 7578)."""
    header = Message()
    header["content-type"] = content_type
    if header.get_content_type() != "multipart/form-data":
        return body
    boundary = header.get_boundary()
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:] if boundary else ():
        head, _, content = part.partition(b"\r\n\r\n")
        if b"filename=" in head.lower() or b"filename*=" in head.lower():
            return content
    raise DataError("the form has no file; send an image as the body, or as a file of a form")


# ---- limits ----


@final
class _Gate:
    """The limits shared by all requests. Used only from the event loop."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.held = 0  # bytes of requests in progress
        self.decoders = asyncio.Semaphore(_DECODERS)

    async def answer(
        self, model: ServedModel, request: Request, work: Callable[[ServedModel, _Call], Awaitable[Response]]
    ) -> Response:
        """Return the response of `work` within its time limit, and count it.

        Raises:
            HTTPException: if the request is invalid, or the server is overloaded.
        """
        start, call, failed = time.perf_counter(), _Call(self, request), True
        try:
            async with asyncio.timeout(self.options.timeout):
                response = await work(model, call)
            failed = False
            return response
        except DataError as error:
            raise HTTPException(400, str(error)) from None
        except ClientDisconnect:
            return Response(status_code=400)  # the client has disconnected
        except queue.Full:
            raise HTTPException(503, f"{model.name} has more requests than it can answer; try again later") from None
        except TimeoutError:
            raise HTTPException(504, f"no answer within {self.options.timeout:g} s") from None
        except GlitError as error:
            say(f"glit: {error}")
            raise HTTPException(500, f"{model.name} could not be run; the server's log says why") from None
        finally:
            self.held -= call.held
            model.metrics.observe(time.perf_counter() - start, 0 if failed else call.num_images, failed)


@final
class _Call:
    """A request in progress, and the memory that it uses."""

    def __init__(self, gate: _Gate, request: Request) -> None:
        self.gate, self.request, self.held, self.num_images = gate, request, 0, 0

    def hold(self, num_bytes: int) -> None:
        """Count memory. Raises queue.Full if all requests together exceed the server's limit."""
        self.held += num_bytes
        self.gate.held += num_bytes
        if self.gate.held > max(_HELD * self.gate.options.max_body, 4 * MOST_PIXELS):
            raise queue.Full

    async def body(self) -> bytes:
        """The request's body. Raises HTTPException if it is larger than allowed, or compressed."""
        limit, headers, chunks = self.gate.options.max_body, self.request.headers, []
        too_large = HTTPException(413, f"the body has more than {limit:,} bytes")
        if headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "compressed bodies are not supported")
        if "expect" in headers and int(headers.get("content-length", 0)) > limit:
            raise too_large  # the sender waits for a response before it sends
        size = 0
        async for chunk in self.request.stream():
            size += len(chunk)
            if size <= limit:
                self.hold(len(chunk))
                chunks.append(chunk)
            elif size > _DRAINED * limit:
                break
        if size > limit:
            raise too_large
        return b"".join(chunks)

    async def logits(self, model: ServedModel, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] of the images. Raises DataError if the model does not accept them, or queue.Full."""
        model.check(images)
        self.num_images = len(images)
        return await asyncio.wrap_future(model.batcher.submit(images))
