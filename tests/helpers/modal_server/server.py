"""The server: an event loop in a thread, which answers gRPC and HTTP requests on loopback."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import grpclib.server
from aiohttp import web
from grpclib import GRPCError, Status
from modal_proto import api_grpc

from tests.helpers.modal_server.apps import Apps
from tests.helpers.modal_server.calls import Calls
from tests.helpers.modal_server.containers import HEADER, namespaces_work
from tests.helpers.modal_server.state import State
from tests.helpers.modal_server.storage import Storage
from tests.helpers.paths import ROOT

if TYPE_CHECKING:
    from tests.helpers.modal_server.state import Call, Function


class ModalServer:
    """A stand-in for Modal's servers, for one `with` block.

    Args:
        folder: an empty or new directory for volumes, uploads and containers.
        secrets: variables of each secret of the workspace.
        isolated: give containers a file system of their own; None where the machine allows it.

    Attributes:
        isolated: whether containers have a file system of their own.
        env: variables for commands of the client.
    """

    def __init__(
        self,
        folder: Path,
        *,
        secrets: dict[str, dict[str, str]] | None = None,
        isolated: bool | None = None,
    ) -> None:
        self.folder = folder.resolve()
        if isolated is None:
            isolated = namespaces_work(self.folder / "trial")
        self.isolated = isolated
        self.env: dict[str, str] = {}
        self._secrets = secrets or {}
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> ModalServer:
        self._thread.start()
        self._ready.wait()
        home = self.folder / "home"
        home.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MODAL_", "PYTHONPATH"))}
        self.env = kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "NO_PROXY": "*",
            "PYTHONUNBUFFERED": "1",
            "MODAL_SERVER_URL": self._state.grpc_url,
            "MODAL_TOKEN_ID": "ak-test",
            "MODAL_TOKEN_SECRET": "as-test",
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def run(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs a command of the client to its end, such as `modal run FILE`."""
        self.hide(cwd)
        return subprocess.run(
            words, cwd=cwd, env=self.env, capture_output=True, text=True, check=False
        )

    def hide(self, folder: Path) -> None:
        """Hides a directory from containers, as the project's is on Modal."""
        if str(folder) not in self._state.hidden:
            self._state.hidden.append(str(folder))

    def volume(self, name: str) -> Path:
        """Returns the directory of a volume, whether it exists yet or not."""
        return self._state.volume(f"vo-{name}")

    @property
    def calls(self) -> list[Call]:
        """The calls of functions so far; a test may clear the list."""
        return self._state.calls

    def function(self, name: str) -> Function:
        """Returns the function of this name that was created last."""
        return [f for f in self._state.functions.values() if f.name == name][-1]

    def kill_containers(self) -> None:
        """Kills the containers that work on an input, as when a machine is lost."""
        for container in list(self._state.containers.values()):
            if container.inputs:
                container.kill()

    def wait_for_containers(self) -> None:
        """Returns when no container is running."""
        asyncio.run_coroutine_threadsafe(self._no_container(), self._loop).result()

    # In the thread

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._state = State(self.folder, self._secrets, self.isolated, [str(ROOT)])
        storage = Storage(self._state)
        handlers = (storage, Apps(self._state), Calls(self._state))
        http = web.AppRunner(storage.http_app(), access_log=None)
        await http.setup()
        await web.TCPSite(http, "127.0.0.1", 0).start()
        self._state.http_url = f"http://127.0.0.1:{http.addresses[0][1]}"
        grpc = grpclib.server.Server([self._servicer(handlers)])
        await grpc.start("127.0.0.1", 0)
        port = grpc._server.sockets[0].getsockname()[1]
        self._state.grpc_url = f"http://127.0.0.1:{port}"
        self._ready.set()
        await self._stop.wait()
        for app in self._state.apps.values():
            app.stopping = True
        for container in self._state.containers.values():
            container.kill()
        await self._no_container()
        await self._state.cancel_background()
        grpc.close()
        await grpc.wait_closed()
        await http.cleanup()

    async def _no_container(self) -> None:
        containers = self._state.containers.values()
        await self._state.wait_for(lambda: all(c.ended for c in containers), None)

    def _servicer(self, handlers: tuple[object, ...]) -> api_grpc.ModalClientBase:
        """Returns a gRPC servicer whose RPCs are the handlers' methods, in snake case."""
        rpcs = {}
        for name in api_grpc.ModalClientBase.__abstractmethods__:
            snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
            methods = (getattr(handler, snake, None) for handler in handlers)
            rpcs[name] = self._rpc(name, next(filter(None, methods), None))
        return type("Servicer", (api_grpc.ModalClientBase,), rpcs)()

    def _rpc(self, name, method):
        async def rpc(_, stream) -> None:
            request = await stream.recv_message()
            if method is None:
                raise GRPCError(Status.UNIMPLEMENTED, f"the stand-in for Modal has no {name}")
            words = [request]
            if "container" in inspect.signature(method).parameters:
                words.append(self._state.containers[stream.metadata[HEADER]])
            try:
                if inspect.isasyncgenfunction(method):
                    async for response in method(*words):
                        await stream.send_message(response)
                else:
                    await stream.send_message(await method(*words))
            except (GRPCError, asyncio.CancelledError, ConnectionError):
                raise
            except Exception as error:
                traceback.print_exc()
                raise GRPCError(Status.INVALID_ARGUMENT, f"{name}: {error!r}") from error

        return rpc
