"""Containers: one subprocess each, which runs modal's own container runtime."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from modal_proto import api_pb2

from tests.helpers.modal_server import inside
from tests.helpers.modal_server.packages import missing_modules

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.modal_server.state import Function, Input, State

HEADER = "x-test-container"
"""Request header in which a container sends its id."""


class Container:
    """A container of a function.

    Attributes:
        inputs: those it works on, by id.
        started: it has asked for an input, so its function could be imported.
        leaving: it gets no further inputs.
        ended: its process has exited.
        failure: what its runtime reported, such as an error at import.
    """

    def __init__(self, state: State, function: Function) -> None:
        self._state = state
        self.function = function
        self.id = state.new_id("ta")
        self.inputs: dict[str, Input] = {}
        self.started = False
        self.leaving = False
        self.ended = False
        self.failure: api_pb2.GenericResult | None = None
        self._folder = state.folder / "containers" / self.id
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Runs the container, with its output in the app's log; returns its exit code."""
        try:
            command, env = self._prepare()
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=env,
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            await asyncio.gather(
                self._forward(self._process.stdout, api_pb2.FILE_DESCRIPTOR_STDOUT),
                self._forward(self._process.stderr, api_pb2.FILE_DESCRIPTOR_STDERR),
            )
            return await self._process.wait()
        finally:
            self.kill()
            self.ended = True

    def kill(self) -> None:
        """Kills the container's processes."""
        if self._process is not None and not self.ended:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _forward(self, stream: asyncio.StreamReader, descriptor: int) -> None:
        log = self.function.app.log
        while data := await stream.read(1 << 16):
            text = data.decode(errors="replace")
            item = api_pb2.TaskLogs(data=text, file_descriptor=descriptor)
            log.append(
                api_pb2.TaskLogsBatch(
                    task_id=self.id,
                    function_id=self.function.id,
                    entry_id=str(len(log) + 1),
                    items=[item],
                )
            )
            await self._state.notify()

    # What it sees

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        """Writes what the container needs; returns its command and environment."""
        state = self._state
        files = self._stage_files()
        volumes = {
            mount.mount_path.rstrip("/"): str(state.volume(mount.volume_id))
            for mount in self.function.definition.volume_mounts
        }
        kept = {sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), str(state.folder)}
        plan = {
            "isolated": state.isolated,
            "root": str(self._folder / "root"),
            "code": str(files / "root"),
            "volumes": volumes,
            "hidden": state.hidden,
            "kept": sorted(kept),
            "missing": missing_modules(frozenset(self.function.packages)),
            "module": self.function.definition.module_name,
        }
        (self._folder / "root").mkdir(parents=True)
        (self._folder / "plan.json").write_text(json.dumps(plan))
        (self._folder / "arguments").write_bytes(self._arguments().SerializeToString())
        namespace = namespace_command() if state.isolated else []
        command = [*namespace, sys.executable, inside.__file__, str(self._folder / "plan.json")]
        return command, self._environment({} if state.isolated else volumes)

    def _stage_files(self) -> Path:
        """Returns a folder with the uploaded files by their paths; one for equal containers."""
        mount_ids = sorted(set(self.function.definition.mount_ids) & set(self._state.mounts))
        folder = self._state.folder / "files" / "-".join(mount_ids)
        if not folder.exists():
            (folder / "root").mkdir(parents=True)
            for mount_id in mount_ids:
                for file in self._state.mounts[mount_id]:
                    target = folder / file.filename.lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self._state.content(file.sha256_hex), target)
        return folder

    def _arguments(self) -> api_pb2.ContainerArguments:
        """Returns what modal's runtime reads when it starts."""
        app = self.function.app
        layout = api_pb2.AppLayout(function_ids=app.function_ids)
        for function_id in app.function_ids.values():
            metadata = self._state.functions[function_id].handle()
            layout.objects.add(object_id=function_id, function_handle_metadata=metadata)
        for dependency in self.function.definition.object_dependencies:
            item = layout.objects.add(object_id=dependency.object_id)
            if dependency.object_id.startswith("vo-"):
                item.volume_metadata.version = api_pb2.VOLUME_FS_VERSION_V1
        return api_pb2.ContainerArguments(
            task_id=self.id,
            function_id=self.function.id,
            app_id=app.id,
            function_def=self.function.definition,
            environment_name="main",
            app_layout=layout,
        )

    def _environment(self, volumes: dict[str, str]) -> dict[str, str]:
        """Returns the image's, the secrets' and Modal's variables; `volumes` replaces paths."""
        env = {"PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # tests share few cores
        for command in self.function.image:
            if command.startswith("ENV "):
                env |= dict(word.split("=", 1) for word in shlex.split(command[4:]))
        for mount, directory in volumes.items():
            env = {k: re.sub(rf"^{mount}(?=/|$)", directory, v) for k, v in env.items()}
        for secret_id in self.function.definition.secret_ids:
            env |= self._state.secrets[secret_id]
        return env | {
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": "*",
            "MODAL_IS_REMOTE": "1",
            "MODAL_SERVER_URL": self._state.grpc_url,
            "MODAL_TASK_ID": self.id,
            "MODAL_IMAGE_ID": self.function.definition.image_id,
            "MODAL_ENVIRONMENT": "main",
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(self._folder / "arguments"),
            "MODAL_OVERRIDE_HEADERS": f"{HEADER}:{self.id}",
        }


def namespace_command() -> list[str]:
    """Returns the words that run a command in a mount namespace of its own."""
    return ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]


def namespaces_work(folder: Path) -> bool:
    """Returns True if containers can get a file system of their own on this machine."""
    folder.mkdir(parents=True)
    command = [*namespace_command(), sys.executable, inside.__file__, "--try", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
