"""RPCs that create an app: its image, secrets and functions; its log and its end."""

from __future__ import annotations

import hashlib
import itertools
import time

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.helpers.modal_server.packages import installed_packages
from tests.helpers.modal_server.state import App, Function, State, unsigned_token

GPUS = {"T4", "L4", "A10", "A100", "A100-40GB", "A100-80GB", "L40S", "H100", "H200", "B200"}
"""Kinds that Modal's documentation lists; any other is refused, as Modal does."""
EXIT_S = 5.0
"""Time that idle containers get to exit once an app is stopped."""


class Apps:
    """RPCs of the client until its functions can be called, and after."""

    def __init__(self, state: State) -> None:
        self._state = state

    # Client and environment

    async def client_hello(self, request):
        return api_pb2.ClientHelloResponse()

    async def auth_token_get(self, request):
        token = unsigned_token(exp=int(time.time()) + 86400)
        return api_pb2.AuthTokenGetResponse(token=token)

    async def environment_get_or_create(self, request):
        settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        metadata = api_pb2.EnvironmentMetadata(name="main", settings=settings)
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-main", metadata=metadata)

    # Apps

    async def app_create(self, request):
        detached = request.app_state == api_pb2.APP_STATE_DETACHED
        app = App(self._state.new_id("ap"), detached)
        self._state.apps[app.id] = app
        return api_pb2.AppCreateResponse(app_id=app.id, app_page_url=f"http://localhost/{app.id}")

    async def app_heartbeat(self, request):
        return Empty()

    async def app_publish(self, request):
        self._state.apps[request.app_id].function_ids = dict(request.function_ids)
        return api_pb2.AppPublishResponse(url=f"http://localhost/{request.app_id}")

    async def app_get_logs(self, request):
        app = self._state.apps[request.app_id]
        for number in itertools.count(int(request.last_entry_id or 0)):
            await self._state.wait_for(lambda n=number: app.done or n < len(app.log), None)
            if number == len(app.log):
                break
            yield app.log[number]
        yield api_pb2.TaskLogsBatch(app_done=True)

    async def app_client_disconnect(self, request):
        app = self._state.apps[request.app_id]
        calls = [call for call in self._state.calls if call.function.app is app]
        self._state.start(self._end(app, calls if app.detached else []))
        return Empty()

    async def _end(self, app: App, calls: list) -> None:
        """Waits for the calls, stops the app's containers, and ends its log."""
        await self._state.wait_for(
            lambda: all(len(call.finished) == len(call.inputs) for call in calls), None
        )
        app.stopping = True
        await self._state.notify()
        containers = [c for c in self._state.containers.values() if c.function.app is app]
        for container in containers:
            if container.inputs:
                container.kill()
        await self._state.wait_for(lambda: all(c.ended for c in containers), EXIT_S)
        for container in containers:
            container.kill()
        await self._state.wait_for(lambda: all(c.ended for c in containers), None)
        app.done = True
        await self._state.notify()

    # Images and secrets

    async def image_get_or_create(self, request):
        data = request.image.SerializeToString(deterministic=True)
        image_id = f"im-{hashlib.sha256(data).hexdigest()[:12]}"
        self._state.images[image_id] = request.image
        return api_pb2.ImageGetOrCreateResponse(
            image_id=image_id,
            result=api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS),
            metadata=api_pb2.ImageMetadata(image_builder_version=request.builder_version),
        )

    def _image_commands(self, image_id: str) -> list[str]:
        image = self._state.images[image_id]
        commands = [self._image_commands(base.image_id) for base in image.base_images]
        return [*itertools.chain(*commands), *image.dockerfile_commands]

    async def secret_get_or_create(self, request):
        name = request.deployment_name
        secret_id = f"st-{name}" if name else self._state.new_id("st")
        if request.object_creation_type != api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
            self._state.secrets[secret_id] = dict(request.env_dict)
        elif secret_id not in self._state.secrets:
            raise GRPCError(Status.NOT_FOUND, f"Secret '{name}' not found in environment 'main'")
        metadata = api_pb2.SecretMetadata(name=name)
        return api_pb2.SecretGetOrCreateResponse(secret_id=secret_id, metadata=metadata)

    # Functions

    async def function_precreate(self, request):
        definition = api_pb2.Function(
            function_name=request.function_name, function_type=request.function_type
        )
        function = self._add_function(self._state.new_id("fu"), request.app_id, definition)
        return api_pb2.FunctionPrecreateResponse(
            function_id=function.id, handle_metadata=function.handle()
        )

    async def function_create(self, request):
        ranked = request.function_data.ranked_functions  # one per kind of GPU
        definition = ranked[0].function if ranked else request.function
        function = self._add_function(request.existing_function_id, request.app_id, definition)
        wanted = [item.function.resources for item in ranked] or [definition.resources]
        function.gpus = [gpu_name(item.gpu_config) for item in wanted if item.gpu_config.gpu_type]
        function.image = self._image_commands(definition.image_id)
        function.packages = installed_packages(function.image)
        function.files = sorted(
            file.filename
            for mount_id in definition.mount_ids
            for file in self._state.mounts.get(mount_id, [])
        )
        response = api_pb2.FunctionCreateResponse(
            function_id=function.id, handle_metadata=function.handle()
        )
        if ranked:
            response.function_data.CopyFrom(request.function_data)
        else:
            response.function.CopyFrom(definition)
            response.function_data.ranked_functions.add(function=definition)
        return response

    def _add_function(self, function_id, app_id, definition) -> Function:
        function = Function(function_id, self._state.apps[app_id], definition)
        self._state.functions[function_id] = function
        return function


def gpu_name(config: api_pb2.GPUConfig) -> str:
    """Returns a kind of GPU as users write it; refuses one that Modal does not have."""
    if config.gpu_type not in GPUS:
        raise GRPCError(Status.INVALID_ARGUMENT, f"{config.gpu_type!r} is not a known GPU type")
    return config.gpu_type + (f":{config.count}" if config.count > 1 else "")
