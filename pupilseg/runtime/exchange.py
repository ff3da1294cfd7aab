"""Sums over the processes of one machine, through Unix sockets.

Batch norm exchanges a few hundred bytes 80 times per step. On a CPU, gloo takes about 4 ms for each
of these messages, longer than the computation between them; a write and a read on a socket take
18 us (2 processes, median of 2,000, other work on both cores). Waiting blocks in the kernel,
because spinning would take CPU time from the other processes.
"""

from __future__ import annotations

import contextlib
import select
import socket
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from pupilseg.errors import ParallelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

TIMEOUT_S = 300.0
"""Longest wait for another process. The end of a process is detected at once: its sockets close."""
BUFFER_BYTES = 1 << 20
"""Requested size of a socket's buffer, so that a message of gradients (100 KB) fits."""

Sockets = dict[int, socket.socket]
"""The connections of one rank: other rank -> socket."""


def lost_rank(reason: str) -> ParallelError:
    """Returns the error for a process of the job that is gone."""
    return ParallelError(
        f"another process of this job ended or stopped responding ({reason}); see its message "
        "above, then start the job again with --resume"
    )


def connected_sockets(world_size: int) -> list[Sockets]:
    """Returns the sockets of every rank, each pair of ranks connected."""
    sockets: list[Sockets] = [{} for _ in range(world_size)]
    for first, second in combinations(range(world_size), 2):
        sockets[first][second], sockets[second][first] = socket.socketpair()
    return sockets


def connect_to_ranks(
    rank: int, world_size: int, folder: Path, barrier: Callable[[], object]
) -> Sockets:
    """Returns this rank's sockets, for ranks that were started by another program.

    Args:
        rank: rank of this process.
        world_size: number of ranks; all of them call this.
        folder: the same existing directory for all ranks, for the names of the sockets.
        barrier: waits until all ranks have called it.
    """
    sockets: Sockets = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / str(rank)))
        listener.listen(world_size)
        barrier()
        for other in range(rank):
            sockets[other] = socket.socket(socket.AF_UNIX)
            sockets[other].connect(str(folder / str(other)))
            sockets[other].sendall(rank.to_bytes(4, "big"))
        for _ in range(rank + 1, world_size):
            connection, _address = listener.accept()
            sockets[int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")] = connection
        barrier()
    return sockets


class Exchange:
    """Sums small tensors over ranks; every rank gets the same bits.

    Each rank sends its values to all others and adds the values of all ranks in the order of the
    ranks. The traffic grows with the square of the number of ranks, which is at most the number of
    cores of one machine.

    Args:
        rank: rank of this process.
        sockets: stream sockets that are connected to the other ranks; closed by `close`.
        timeout_s: longest wait for another rank, in seconds.
    """

    def __init__(
        self, rank: int, sockets: Mapping[int, socket.socket], timeout_s: float = TIMEOUT_S
    ) -> None:
        self.rank = rank
        self.world_size = len(sockets) + 1
        self._sockets = dict(sockets)
        self._timeout_ms = int(1000 * timeout_s)
        for connection in self._sockets.values():
            connection.setblocking(False)
            # The system may limit the size; a smaller buffer is only slower.
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces a CPU tensor by its sum over the ranks and returns it.

        Args:
            tensor: contiguous, of the same shape and type on every rank.

        Raises:
            ParallelError: another rank ended, or did not answer in time.
        """
        values = tensor.numpy()
        rows = np.empty((self.world_size, *values.shape), values.dtype)
        rows[self.rank] = values
        self._fill(rows.reshape(self.world_size, -1).view(np.uint8))
        np.sum(rows, axis=0, dtype=values.dtype, out=values)  # shares the tensor's memory
        return tensor

    def _fill(self, rows: np.ndarray) -> None:
        """Sends this rank's row of bytes to the others, and receives theirs."""
        unsent = {rank: memoryview(rows[self.rank]) for rank in self._sockets}
        missing = {rank: memoryview(rows[rank]) for rank in self._sockets}
        try:
            while unsent or missing:
                progress = self._send(unsent)
                progress |= self._receive(missing)
                if not progress:
                    self._wait(unsent, missing)
        except OSError as error:
            raise lost_rank(str(error)) from error

    def _send(self, unsent: dict[int, memoryview]) -> bool:
        """Sends without waiting; returns whether anything was sent."""
        progress = False
        for rank, rest in list(unsent.items()):
            with contextlib.suppress(BlockingIOError):
                unsent[rank] = rest[self._sockets[rank].send(rest) :]
                progress = True
                if not unsent[rank]:
                    del unsent[rank]
        return progress

    def _receive(self, missing: dict[int, memoryview]) -> bool:
        """Receives without waiting; returns whether anything was received."""
        progress = False
        for rank, rest in list(missing.items()):
            with contextlib.suppress(BlockingIOError):
                count = self._sockets[rank].recv_into(rest)
                if count == 0:
                    raise lost_rank(f"process {rank} closed its connection")
                missing[rank] = rest[count:]
                progress = True
                if not missing[rank]:
                    del missing[rank]
        return progress

    def _wait(self, unsent: Mapping[int, memoryview], missing: Mapping[int, memoryview]) -> None:
        """Blocks until a socket is ready."""
        poll = select.poll()
        for rank, connection in self._sockets.items():
            events = (select.POLLIN if rank in missing else 0) | (
                select.POLLOUT if rank in unsent else 0
            )
            if events:
                poll.register(connection, events)
        if not poll.poll(self._timeout_ms):
            waiting = ", ".join(map(str, sorted({*unsent, *missing})))
            raise lost_rank(f"no answer from process {waiting} in {self._timeout_ms / 1000:g} s")

    def close(self) -> None:
        """Closes the sockets; other ranks that wait for this one raise ParallelError."""
        for connection in self._sockets.values():
            connection.close()
