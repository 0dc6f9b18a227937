"""Bytes on a GPU that follow bytes on the host."""

from typing import Any

import numpy as np
from numba import cuda

from ..arrays import gpu as gpu_arrays
from ..arrays.runs import Matrix
from . import driver
from .driver import Event

_MOST_BUFFERS = 32


class Mirror:
    """A table on the device that follows one on the host, in the order of a stream, without waiting for it.

    A copy from ordinary memory would wait. Each copy is made from a pinned buffer, which may not be written again until
    the copy is done. An event tells when; so there is a ring of buffers, of which the one used longest ago is the next.

    Parameters
    ----------
    host : array of int64
        To be written in place; `send` brings the device up to date.

    Attributes
    ----------
    device : Numba's device array
    board : int
        The address of what compiled code needs to send it.
    """

    def __init__(self, host: Matrix) -> None:
        self.host = host
        self.device: Any = cuda.to_device(host)
        self._sent = np.zeros_like(host)
        self._buffers: list[tuple[Matrix, Event]] = []
        self._ring = np.zeros((_MOST_BUFFERS, 2), np.int64)
        self._words = np.zeros(driver.MIRROR_WORDS, np.int64)
        self._words[driver.HOST], self._words[driver.SENT] = host.ctypes.data, self._sent.ctypes.data
        self._words[driver.COUNT], self._words[driver.TARGET] = host.size, self.address
        self._words[driver.RING] = self._ring.ctypes.data
        self.board = int(self._words.ctypes.data)

    @property
    def address(self) -> int:
        """Where it lies on the device."""
        return gpu_arrays.address(self.device)

    def forget(self) -> None:
        """Send it again next time, whether it has changed or not."""
        self._words[driver.IS_SENT] = 0

    def send(self, stream: int) -> None:
        """Bring the device up to date, in the order of a stream; waits if all buffers are under way."""
        code = driver.send(driver.addresses().ctypes.data, self.board, stream)
        while code == driver.BUSY:
            self._free_buffer()
            code = driver.send(driver.addresses().ctypes.data, self.board, stream)
        if code:
            raise RuntimeError(f"a copy to the GPU has failed with CUDA's error {code}; expected a GPU that works")

    def _free_buffer(self) -> None:
        """A new buffer in front; with as many as there may be, wait for the one in front."""
        k = int(self._words[driver.NEXT])
        if len(self._buffers) == _MOST_BUFFERS:
            self._buffers[k][1].synchronize()
            return
        self._buffers.insert(k, (cuda.pinned_array(self.host.shape, np.int64), Event()))
        ring = [(buffer.ctypes.data, event.handle) for buffer, event in self._buffers]
        self._ring[: len(ring)] = ring
        self._words[driver.RING_SIZE] = len(ring)
