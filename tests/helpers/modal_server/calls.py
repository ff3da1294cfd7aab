"""RPCs of a function call: from the caller, and from the container that answers it."""

from __future__ import annotations

import asyncio

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2

from tests.helpers.modal_server.containers import Container
from tests.helpers.modal_server.state import Call, Function, Input, State, unsigned_token

Result = api_pb2.GenericResult
CONTAINERS = 2
"""Containers per function at the same time."""
POLL_S = 15.0
"""How long a container's request for inputs stays open; it asks again afterwards."""


class Calls:
    """The queue between callers and containers."""

    def __init__(self, state: State) -> None:
        self._state = state

    # From the caller

    async def function_map(self, request):
        function = self._state.functions[request.function_id]
        call = Call(self._state.new_id("fc"), function)
        self._state.calls.append(call)
        return api_pb2.FunctionMapResponse(
            function_call_id=call.id,
            function_call_jwt=unsigned_token(function_call_id=call.id),
            retry_policy=function.definition.retry_policy,
            pipelined_inputs=await self._add_inputs(call, request.pipelined_inputs),
            max_inputs_outstanding=1000,
        )

    async def function_put_inputs(self, request):
        call = self._call(request.function_call_id)
        inputs = await self._add_inputs(call, request.inputs)
        return api_pb2.FunctionPutInputsResponse(inputs=inputs)

    async def function_finish_inputs(self, request):
        return Empty()

    def _call(self, call_id: str) -> Call:
        return next(call for call in self._state.calls if call.id == call_id)

    async def _add_inputs(self, call: Call, items) -> list[api_pb2.FunctionPutInputsResponseItem]:
        answers = []
        for item in items:
            entry = Input(self._state.new_id("in"), call, item.idx, item.input)
            self._state.inputs[entry.id] = call.inputs[entry.index] = entry
            token = unsigned_token(idx=entry.index, input_id=entry.id, function_call_id=call.id)
            answers.append(
                api_pb2.FunctionPutInputsResponseItem(
                    idx=entry.index, input_id=entry.id, input_jwt=token
                )
            )
            call.function.pending.append(entry)
            self._start_containers(call.function)
        await self._state.notify()
        return answers

    async def function_get_outputs(self, request):
        call = self._call(request.function_call_id)
        seen = int((request.last_entry_id or "0").partition("-")[0])
        await self._state.wait_for(lambda: len(call.finished) > seen, request.timeout)
        fresh = call.finished[seen:][: request.max_values or None]
        return api_pb2.FunctionGetOutputsResponse(
            outputs=[entry.output for entry in fresh],
            idxs=[entry.index for entry in fresh],
            last_entry_id=f"{seen + len(fresh)}-0",
            num_unfinished_inputs=len(call.inputs) - len(call.finished),
        )

    # From the container

    def _start_containers(self, function: Function) -> None:
        """Starts a container when an input has none and the limits allow one."""
        most = function.definition.autoscaler_settings.max_containers or CONTAINERS
        of_it = [c for c in self._state.containers.values() if c.function is function]
        live = [c for c in of_it if not c.ended and not c.leaving]
        idle = sum(not c.inputs for c in live)
        if len(function.pending) > idle and len(live) < most and not function.app.stopping:
            container = Container(self._state, function)
            self._state.containers[container.id] = container
            self._state.start(self._run(container))

    async def _run(self, container: Container) -> None:
        """Runs a container to its end; its unfinished inputs have failed then."""
        function = container.function
        code = await container.run()
        failure = container.failure or Result(
            status=Result.GENERIC_STATUS_FAILURE,
            exception=f"Runner failed with exit code: {code}",
        )
        lost = list(container.inputs.values())
        container.inputs.clear()
        if not container.started:  # it could not even start, and another one could not either
            while function.pending:
                entry = function.pending.popleft()
                entry.attempts = function.definition.retry_policy.retries + 1
                lost.append(entry)
        for entry in lost:
            await self._finish(entry, failure)
        self._start_containers(function)
        await self._state.notify()

    async def container_hello(self, request):
        return Empty()

    async def container_heartbeat(self, request):
        return api_pb2.ContainerHeartbeatResponse()

    async def task_result(self, request, container):
        container.failure = request.result
        return Empty()

    async def function_get_inputs(self, request, container):
        function = container.function
        container.started = True
        await self._state.wait_for(lambda: function.pending or function.app.stopping, POLL_S)
        if function.app.stopping or container.leaving:
            stop = api_pb2.FunctionGetInputsItem(kill_switch=True)
            return api_pb2.FunctionGetInputsResponse(inputs=[stop])
        response = api_pb2.FunctionGetInputsResponse()
        if function.pending:
            entry = function.pending.popleft()
            entry.attempts += 1
            container.inputs[entry.id] = entry
            container.leaving = function.definition.single_use_containers
            response.inputs.add(
                input_id=entry.id,
                input=entry.payload,
                function_call_id=entry.call.id,
                retry_count=entry.attempts - 1,
                attempt_token=unsigned_token(input_id=entry.id),
                function_call_invocation_type=api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC,
            )
            self._start_containers(function)
        return response

    async def function_put_outputs(self, request, container):
        for item in request.outputs:
            container.inputs.pop(item.input_id, None)
            await self._finish(self._state.inputs[item.input_id], item.result, item.data_format)
        return Empty()

    async def _finish(self, entry: Input, result, data_format=api_pb2.DATA_FORMAT_PICKLE) -> None:
        """Publishes the result of an attempt, or puts its input back for another one."""
        function = entry.call.function
        policy = function.definition.retry_policy
        failed = result.status != Result.GENERIC_STATUS_SUCCESS
        if failed and entry.attempts <= policy.retries and not function.app.stopping:
            delay = policy.initial_delay_ms * policy.backoff_coefficient ** (entry.attempts - 1)
            self._state.start(self._retry(entry, min(delay, policy.max_delay_ms) / 1000))
            return
        # retry_count stays 0: the client counts only retries that it makes itself
        entry.output = api_pb2.FunctionGetOutputsItem(
            result=result, idx=entry.index, input_id=entry.id, data_format=data_format
        )
        entry.call.finished.append(entry)
        await self._state.notify()

    async def _retry(self, entry: Input, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        entry.call.function.pending.append(entry)
        self._start_containers(entry.call.function)
        await self._state.notify()
