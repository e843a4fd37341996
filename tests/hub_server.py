"""A small server with the part of the Hugging Face Hub's HTTP interface that its client uses for weights.

Repositories are kept in memory. Faults are switched on per server: see `HubServer.fault`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

Fault = Literal[
    "", "hang", "truncate", "long", "corrupt", "slow", "stall", "loop", "reset", "elsewhere", "401", "403", "429", "500"
]


class HubServer:
    """A running Hub; use it as a context manager.

    Attributes:
        repos: files by repository, commit and name.
        fault: how downloads go wrong. 'hang': no answer, ever; 'truncate': half the body; 'long': a
            Content-Length of one byte more than comes; 'corrupt': another body of
            the same length under the right ETag; 'slow': ten bytes a second; 'stall': half the body, then nothing;
            'loop': redirects to itself; 'reset': the connection is closed at once; 'elsewhere': headers that are paths
            out of the cache; a number: that status, 429 with a time to wait of an hour.
        token: if set, requests without it get 401.
        requests: method and path of each request so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.fault: Fault = ""
        self.token: str | None = None
        self.requests: list[tuple[str, str]] = []
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that give up
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """Commit files on top of what the repository holds; returns the commit's hash."""
        commits = self.repos.setdefault(repo, {})
        before = commits[list(commits)[-1]] if commits else {}
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = before | files
        return commit

    def head(self, repo: str) -> str:
        """The newest commit of a repository."""
        return list(self.repos[repo])[-1]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._download(with_body=False)

        def do_GET(self) -> None:
            self._download(with_body=True)

        def do_PUT(self) -> None:
            body = self._body()
            oid = self.path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:
                self._answer(400, {"error": "hash of the upload differs"})
                return
            hub.blobs[oid] = body
            self._answer(200, {})

        def do_POST(self) -> None:
            body = self._body()
            if self._allowed():
                self._answer(*_answer_post(hub, self.path, body))

        def _body(self) -> bytes:
            hub.requests.append((self.command, self.path))
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _allowed(self) -> bool:
            if hub.fault == "hang":
                hub.closing.wait()
                self.close_connection = True
                return False
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._answer(401, {"error": "Invalid username or password."})
                return False
            if hub.fault == "reset":
                self.close_connection = True
                self.connection.shutdown(2)
                return False
            if hub.fault == "loop":
                self._answer(307, {}, {"Location": self.path})
                return False
            if hub.fault.isdigit():
                headers = {"Retry-After": "3600"} if hub.fault == "429" else {}
                self._answer(int(hub.fault), {"error": "as asked for"}, headers)
                return False
            return True

        def _download(self, with_body: bool) -> None:
            hub.requests.append((self.command, self.path))
            if not self._allowed():
                return
            commit, content, problem = _look_up(hub, self.path)
            if problem:
                self._answer(404, {}, {"X-Error-Code": problem})
                return
            outside = "../" * 5 + "outside" if hub.fault == "elsewhere" else ""
            self.send_response(200)
            self.send_header("X-Repo-Commit", outside or commit)
            self.send_header("ETag", f'"{outside or hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) + (hub.fault == "long")))
            self.end_headers()
            if not with_body:
                return
            if hub.fault in ("truncate", "long"):
                self.wfile.write(content[: len(content) // 2] if hub.fault == "truncate" else content)
                self.close_connection = True
            elif hub.fault == "stall":
                self.wfile.write(content[: len(content) // 2])
                hub.closing.wait()
            elif hub.fault == "slow":
                for start in range(len(content)):
                    self.wfile.write(content[start : start + 1])
                    if hub.closing.wait(0.1):
                        return
            else:
                self.wfile.write(content[::-1] if hub.fault == "corrupt" else content)

        def _answer(self, status: int, data: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _look_up(hub: HubServer, path: str) -> tuple[str, bytes, str]:
    """The commit and content that a download's path names, and the Hub's code for what is wrong with it, or ''."""
    match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    if match is None or match[1] not in hub.repos:
        return "", b"", "RepoNotFound"
    commit = hub.head(match[1]) if match[2] == "main" else match[2]
    if commit not in hub.repos[match[1]]:
        return "", b"", "RevisionNotFound"
    files = hub.repos[match[1]][commit]
    return (commit, files[match[3]], "") if match[3] in files else (commit, b"", "EntryNotFound")


def _is_repo_id(name: str) -> bool:
    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        return True
    return False


def _answer_post(hub: HubServer, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON for the steps of an upload: make the repository, ask how, ask where to, commit."""
    if path == "/api/repos/create":
        request = json.loads(body)
        repo = f"{request['organization']}/{request['name']}"
        status = 409 if repo in hub.repos else 200
        hub.repos.setdefault(repo, {})
        return status, {"url": f"{hub.endpoint}/{repo}"}
    if path == "/api/validate-yaml":
        names = ModelCard(json.loads(body)["content"], ignore_metadata_errors=True).data.datasets or ()
        errors = [{"message": f'"datasets" must be names, got {name}'} for name in names if not _is_repo_id(name)]
        return 400 if errors else 200, {"warnings": [], "errors": errors}
    if re.fullmatch(r"/api/models/.+/preupload/main", path):
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if name.endswith((".safetensors", ".png")) else "regular" for name in paths]
        files = [
            {"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in zip(paths, modes, strict=True)
        ]
        return 200, {"files": files}
    if re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
        wanted = json.loads(body)["objects"]
        objects = [thing | {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{thing['oid']}"}}} for thing in wanted]
        return 200, {"transfer": "basic", "objects": objects}
    if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
        items = [json.loads(line) for line in body.splitlines()]
        values = {item["value"]["path"]: item["value"] for item in items if item["key"] in ("file", "lfsFile")}
        commit = hub.add(
            match[1],
            {
                name: hub.blobs[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
                for name, value in values.items()
            },
        )
        return 200, {"commitUrl": f"{hub.endpoint}/{match[1]}/commit/{commit}", "commitOid": commit}
    return 404, {"error": f"not spoken here: {path}"}
