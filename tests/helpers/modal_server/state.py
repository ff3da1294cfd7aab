"""Apps, functions, calls and containers that the server knows, and waiting for a change of them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modal_proto import api_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from tests.helpers.modal_server.containers import Container


@dataclass
class App:
    """A running app. `done` ends the stream of its log."""

    id: str
    detached: bool
    function_ids: dict[str, str] = field(default_factory=dict)
    log: list[api_pb2.TaskLogsBatch] = field(default_factory=list)
    stopping: bool = False
    done: bool = False


@dataclass
class Function:
    """A function of an app, with the inputs that wait for a container.

    Attributes:
        gpus: kinds in the order in which they are tried, such as "A100" or "A100:2".
        image: commands of its image, the base image's first.
        packages: normalized names of the Python packages that these commands install.
        files: paths of the uploaded files in a container.
    """

    id: str
    app: App
    definition: api_pb2.Function
    gpus: list[str] = field(default_factory=list)
    image: list[str] = field(default_factory=list)
    packages: set[str] = field(default_factory=set)
    files: list[str] = field(default_factory=list)
    pending: deque[Input] = field(default_factory=deque)

    @property
    def name(self) -> str:
        """The function's name in its module."""
        return self.definition.function_name

    def handle(self) -> api_pb2.FunctionHandleMetadata:
        """Returns what the client and containers keep about the function."""
        return api_pb2.FunctionHandleMetadata(
            function_name=self.name,
            function_type=self.definition.function_type,
            definition_id=f"de-{self.id}",
            app_id=self.app.id,
            function_schema=self.definition.function_schema,
            supported_input_formats=self.definition.supported_input_formats,
            supported_output_formats=self.definition.supported_output_formats,
        )


@dataclass
class Call:
    """One `.remote()` or `.map()` of a function."""

    id: str
    function: Function
    inputs: dict[int, Input] = field(default_factory=dict)
    finished: list[Input] = field(default_factory=list)


@dataclass
class Input:
    """One input of a call, through all its attempts."""

    id: str
    call: Call
    index: int
    payload: api_pb2.FunctionInput
    attempts: int = 0
    output: api_pb2.FunctionGetOutputsItem | None = None


class State:
    """All of it, used from the server's event loop only.

    Args:
        folder: gets uploads, volumes and what containers need.
        secrets: variables of each secret of the workspace.
        isolated: give containers a file system of their own.
        hidden: directories of this machine that containers do not see.
    """

    def __init__(
        self, folder: Path, secrets: dict[str, dict[str, str]], isolated: bool, hidden: list[str]
    ) -> None:
        self.folder = folder
        self.isolated = isolated
        self.hidden = hidden
        self.secrets = {f"st-{name}": values for name, values in secrets.items()}
        self.grpc_url = ""
        self.http_url = ""
        self.apps: dict[str, App] = {}
        self.mounts: dict[str, list[api_pb2.MountFile]] = {}
        self.images: dict[str, api_pb2.Image] = {}
        self.functions: dict[str, Function] = {}
        self.calls: list[Call] = []
        self.inputs: dict[str, Input] = {}
        self.containers: dict[str, Container] = {}
        self._changed = asyncio.Condition()
        self._counts: Counter[str] = Counter()
        self._background: set[asyncio.Task] = set()
        (folder / "contents").mkdir(parents=True)

    def content(self, key: str) -> Path:
        """Returns the file of an uploaded content, by its SHA-256 or its blob id."""
        return self.folder / "contents" / key

    def volume(self, volume_id: str) -> Path:
        """Returns the directory of a volume; it exists once the volume does."""
        return self.folder / "volumes" / volume_id

    def new_id(self, prefix: str) -> str:
        """Returns an id that no other object has."""
        self._counts[prefix] += 1
        return f"{prefix}-{self._counts[prefix]}"

    def start(self, work: Coroutine) -> None:
        """Runs a coroutine in the background."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def cancel_background(self) -> None:
        """Cancels whatever still runs in the background and waits for its end."""
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def notify(self) -> None:
        """Wakes everything that waits for a change."""
        async with self._changed:
            self._changed.notify_all()

    async def wait_for(self, condition: Callable[[], object], timeout_s: float | None) -> None:
        """Returns when `condition` holds, or after the timeout."""

        async def wait() -> None:
            async with self._changed:
                await self._changed.wait_for(condition)

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(wait(), timeout_s)


def unsigned_token(**claims: object) -> str:
    """Returns a JWT without a signature: the client only reads its claims."""
    parts = ({"alg": "none", "typ": "JWT"}, claims)
    words = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in parts]
    return b".".join(word.rstrip(b"=") for word in words).decode() + "."
