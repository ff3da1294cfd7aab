"""A local server with the part of the Hugging Face Hub API for downloading data sets, with faults.

Works with the real `huggingface_hub` client: repository info, tree, HEAD and GET of files with
ETag, X-Repo-Commit, X-Linked-Size and Range.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """A fault for requests whose method and path match a regular expression.

    `kind` is a status with the Hub's error code ("403 GatedRepo"), "cut" (close halfway through the
    body), "short" (a complete response without the end of the body), "alter" (one flipped bit),
    "drop" (close without a response), "stall" (half of the body, then nothing), "slow" (the body in
    pieces, over two seconds) or "move" (the branch main becomes another commit). It happens `times`
    times.
    """

    match: str
    kind: str
    times: int = 1_000_000


@dataclass
class HubServer:
    """A Hub with one data set repository; a context manager, which stops its thread.

    With a `token`, requests without it are refused.
    """

    repository: str
    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    lfs: bool = True
    token: str | None = None
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> HubServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops the server; its port then refuses connections."""
        self.stalled.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, line: str) -> str | None:
        """Returns the fault of a request, if any, and counts it."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.match, line):
                fault.times -= 1
                return fault.kind
        return None

    def commit(self, revision: str) -> str | None:
        """Returns the commit of a branch or commit, None if unknown."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Logs nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: HubServer = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        fault = hub.fault(f"{self.command} {path}")
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "move":
            hub.branches["main"] = next(c for c in hub.commits if c != hub.branches["main"])
        if fault and fault[0].isdigit():
            code, _, name = fault.partition(" ")
            self._send(int(code), b"{}", {"X-Error-Code": name} if name else {})
            return
        api, files = f"/api/datasets/{hub.repository}", f"/datasets/{hub.repository}/resolve/"
        if path == api:
            self._info("main")
        elif path.startswith(f"{api}/revision/"):
            self._info(path.removeprefix(f"{api}/revision/"))
        elif path.startswith(f"{api}/tree/"):
            self._tree(path.removeprefix(f"{api}/tree/").rstrip("/"))
        elif path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            self._file(revision, name, fault)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _info(self, revision: str) -> None:
        hub: HubServer = self.server.hub
        commit = hub.commit(revision)
        if commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in hub.commits[commit]]
        body = {"id": hub.repository, "sha": commit, "siblings": siblings, "private": False}
        body |= {"tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _tree(self, revision: str) -> None:
        hub: HubServer = self.server.hub
        commit = hub.commit(revision)
        if commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        entries = []
        for name, content in hub.commits[commit].items():
            git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry = {"type": "file", "path": name, "size": len(content), "oid": git}
            if hub.lfs:
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _file(self, revision: str, name: str, fault: str | None) -> None:
        hub: HubServer = self.server.hub
        commit = hub.commit(revision)
        content = hub.commits.get(commit or "", {}).get(name)
        if content is None:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        code, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            code, start = 206, int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault == "alter":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "short":
            body = body[: len(body) // 2]
        self._send(code, body, headers, fault)

    def _send(
        self, code: int, body: bytes, headers: dict[str, str], fault: str | None = None
    ) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "slow":
            piece = -(-len(body) // 10)
            for start in range(0, len(body), piece):
                self.wfile.write(body[start : start + piece])
                time.sleep(0.2)
            return
        self.wfile.write(body[: len(body) // 2] if fault in ("cut", "stall") else body)
        if fault == "stall":
            self.server.hub.stalled.wait()
        if fault in ("cut", "stall"):
            self.close_connection = True
