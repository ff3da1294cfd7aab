"""A real `mlflow server` on loopback with SQLite, behind a gate that can simulate failures."""

import contextlib
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import urllib.error
import urllib.request

from tests.helpers.waiting import eventually

START_SECONDS = 120
"""Request timeout, long enough for a busy machine."""


class Server:
    """`mlflow server` with its store in a directory.

    Attributes:
        artifacts: the directory that holds the artifacts.
        port: its port on loopback.
        uri: its address.
    """

    def __init__(self, folder):
        self.folder = folder
        self.artifacts = folder / "artifacts"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                 "--port", str(self.port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                 "--artifacts-destination", str(self.artifacts)],
                stdout=log, stderr=log, start_new_session=True,
                # Its job runners take half of the start's CPU time (11.5 s to 5.9 s without).
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        eventually(self.answers)

    def answers(self):
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Gate:
    """Passes bytes on to a server, and fails on request. Starting a server again takes seconds.

    Attributes:
        uri: its address.
        arrived: set when a request arrives while the gate hangs.
        hanging: requests get no response.
        losing: requests are passed on, but instead of the response the connection ends.
        fatal: a request with these bytes kills the gate; None for no request.
    """

    def __init__(self, port):
        self.behind = port
        self.arrived = threading.Event()
        self.hanging = self.losing = False
        self.fatal = None
        self.connections = set()
        self._listen(0)
        self.port = self._listener.server_address[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def hang(self):
        """Stops responding to requests."""
        self.arrived.clear()
        self.hanging = True

    def kill(self):
        """Closes all connections and refuses new ones, as if the server had been killed."""
        self._listener.shutdown()
        self._listener.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def revive(self):
        """Accepts connections again at the same address."""
        self.hanging = self.losing = False
        self.fatal = None
        self._listen(self.port)

    def _listen(self, port):
        self._listener = _Listener(("127.0.0.1", port), _Passage)
        self._listener.gate = self
        serve = self._listener.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.01}, daemon=True).start()


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False


class _Passage(socketserver.BaseRequestHandler):
    """One connection through a gate."""

    def handle(self):
        gate = self.server.gate
        gate.connections.add(self.request)
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", gate.behind)) as behind,
        ):
            back = threading.Thread(target=self.answers, args=[behind], daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := self.request.recv(1 << 16):
                    if gate.fatal and gate.fatal in data:
                        gate.kill()
                        break
                    if gate.hanging:
                        gate.arrived.set()
                        while self.request.recv(1 << 16):  # until the client gives up
                            pass
                        break
                    behind.sendall(data)
            with contextlib.suppress(OSError):
                behind.shutdown(socket.SHUT_RDWR)
            back.join()
        gate.connections.discard(self.request)

    def answers(self, behind):
        with contextlib.suppress(OSError):
            while data := behind.recv(1 << 16):
                if self.server.gate.losing:
                    break
                self.request.sendall(data)
            self.request.shutdown(socket.SHUT_RDWR)
