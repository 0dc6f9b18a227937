"""Bytes on a GPU that follow bytes on the host."""

from collections import deque
from typing import Any

import numpy as np
from numba import cuda

from ..arrays import gpu as gpu_arrays
from ..arrays.runs import Matrix
from .streams import is_over

_MOST_BUFFERS = 32
_SPARES = 8  # buffers for steps that are captured

# What captured graphs use. CUDA does not say when a graph is destroyed, so this is never freed.
_kept: list[Any] = []


class Mirror:
    """A table on the device that follows one on the host, in the order of a stream, without waiting for it.

    A copy from ordinary memory would wait. Each copy is made from a pinned buffer, which may not be written again until
    the copy is done. An event tells when; so there is a ring of buffers, the one used longest ago in front.

    Parameters
    ----------
    host : array
        To be written in place; `send` brings the device up to date.

    Attributes
    ----------
    device : Numba's device array
    """

    def __init__(self, host: Matrix) -> None:
        self.host = host
        self.device: Any = cuda.to_device(host)
        self._sent = np.empty_like(host)
        self._is_sent = False
        self._ring: deque[tuple[Matrix, Any]] = deque()
        self._spares: list[Matrix] = []
        self.refill()

    @property
    def address(self) -> int:
        """Where it lies on the device."""
        return gpu_arrays.address(self.device)

    def forget(self) -> None:
        """Send it again next time, whether it has changed or not."""
        self._is_sent = False

    def send(self, stream: Any) -> None:
        """Bring the device up to date, in the order of a stream."""
        if self._is_sent and np.array_equal(self.host, self._sent):
            return
        self._is_sent = False  # also if this is interrupted
        buffer, event = self._free_buffer()
        buffer[...] = self._sent[...] = self.host
        self.device.copy_to_device(buffer, stream)
        event.record(stream)
        self._ring.rotate(-1)
        self._is_sent = True

    def send_captured(self, stream: Any) -> None:
        """Have a graph send what is here now at each of its replays, from a buffer that is its own from now on.

        Raises
        ------
        RuntimeError
            If there is no buffer left. Pinned memory cannot be had, nor an event asked, while a graph is captured; so
            there are spare buffers that were never sent.
        """
        if not self._spares:
            raise RuntimeError(f"more than {_SPARES} steps are captured; expected an eager step between two captures")
        buffer = self._spares.pop()
        buffer[...] = self.host
        self.device.copy_to_device(buffer, stream)
        keep_for_graphs(buffer)
        self._is_sent = False

    def refill(self) -> None:
        """Replace the spare buffers that captured graphs have taken."""
        while len(self._spares) < _SPARES:
            self._spares.append(self._buffer())

    def _free_buffer(self) -> tuple[Matrix, Any]:
        """The buffer in front, if its copy is done; else a new one; with as many as there may be, wait for it."""
        if len(self._ring) < _MOST_BUFFERS and not (self._ring and is_over(self._ring[0][1])):
            self._ring.appendleft((self._buffer(), cuda.event()))
        buffer, event = self._ring[0]
        event.synchronize()
        return buffer, event

    def _buffer(self) -> Matrix:
        buffer: Matrix = cuda.pinned_array(self.host.shape, self.host.dtype)
        return buffer


def keep_for_graphs(*things: Any) -> None:
    """Never free what a captured graph reads or writes."""
    _kept.append(things)
