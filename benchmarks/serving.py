"""Measure the requests per second of `glit serve`, and their latency, with several concurrent clients.

    python -m benchmarks.serving --file model.onnx

It starts a server of the file and sends requests from threads, each of which sends one image after another over a
separate connection, as raw uint8 pixels in the binary form of the protocol. Clients and server share the machine.
Without --file, glit_tiny.fashion_mnist is exported first.
"""

import argparse
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from . import report

CLIENTS = (1, 16, 64)


def main() -> None:
    """Measure and print."""
    options = report.parser(__doc__, rounds=1)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--file", default="glit_tiny.fashion_mnist", help="file for `glit serve`, with preprocessing")
    options.add_argument("--clients", default=",".join(map(str, CLIENTS)), help="client counts, separated by commas")
    options.add_argument("--seconds", type=float, default=10, help="duration of each measurement")
    options.add_argument("--max-batch", type=int, default=16, help="maximum batch size of the server")
    options.add_argument("--side", type=int, default=64, help="height and width of the image in pixels")
    args = options.parse_args()
    rows = []
    with served(args) as port:
        for clients in map(int, args.clients.split(",")):
            before = counted(port)
            times = measure(port, clients, args.seconds, args.side)
            images, runs = (after - value for after, value in zip(counted(port), before, strict=True))
            rows.append({
                "clients": clients,
                "requests/s": len(times) / args.seconds,
                "p50, ms": 1e3 * float(np.quantile(times, 0.5)),
                "p99, ms": 1e3 * float(np.quantile(times, 0.99)),
                "images in a batch": images / runs,
            })  # fmt: skip
    report.show("serving", args, rows)


@contextmanager
def served(args: argparse.Namespace) -> Iterator[int]:
    """Start a server in a separate process; yields its port."""
    command = [sys.executable, "-m", "glit_models", "serve", args.file, "--port", "0"]
    command += ["--threads", str(args.threads), "--max-batch", str(args.max_batch)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = None
        for line in process.stderr:
            if found := re.search(r"serving on http://[\d.]+:(\d+)", line):
                break
            sys.stderr.write(line)
        if found is None:
            sys.exit(process.wait())
        try:
            yield int(found[1])
        finally:
            process.terminate()


def counted(port: int) -> tuple[int, int]:
    """The numbers of images and of runs of the server so far."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    images, runs = (int(re.findall(rf"^glit_{name}_total.* (\d+)$", text, re.M)[0]) for name in ("images", "runs"))
    return images, runs


def measure(port: int, clients: int, seconds: float, side: int) -> list[float]:
    """The seconds that each request took, over all clients."""
    ask = asker(port, side)
    times: list[float] = []
    ready = threading.Barrier(clients)

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        ask(connection)  # connects
        ready.wait()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            ask(connection)
            times.append(time.perf_counter() - start)
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def asker(port: int, side: int) -> Callable[[http.client.HTTPConnection], None]:
    """Return a function that sends one request and reads its response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/models")
    (model, *_) = json.loads(connection.getresponse().read())
    connection.close()
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(image.shape)}
    header = json.dumps({
        "inputs": [{**tensor, "parameters": {"binary_data_size": image.nbytes}}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }).encode()  # fmt: skip
    body, headers = header + image.tobytes(), {"Inference-Header-Content-Length": str(len(header))}

    def ask(connection: http.client.HTTPConnection) -> None:
        connection.request("POST", f"/v2/models/{model}/infer", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content.decode()}")

    return ask


if __name__ == "__main__":
    main()
