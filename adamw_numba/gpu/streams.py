"""The order of a step among everything else on a GPU: the libraries' current streams, and whether one is captured.

CUDA knows a stream by its handle, an integer. Handle 0, also called 1, is the legacy default stream.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numba import cuda

from .. import arrays
from ..arrays import Array, reader
from ..arrays import gpu as gpu_arrays
from . import driver
from .driver import Event
from .memory import SIMULATED

_cuda: Any = cuda  # without stubs
_LEGACY = (0, 1)
_NONE = -1

Call = tuple[Any, ...]


class Streams:
    """The streams in which a step's arrays are made and read: it runs in the first, after and before all others.

    Parameters
    ----------
    device : int
        The number of the GPU.
    variables : list of arrays
        Those that lie there: each of their libraries has a current stream.

    Attributes
    ----------
    handle : int
        Of the stream that kernels are launched in; -1 before the first step.
    is_capturing : bool
        Whether the step that has begun is being captured in a graph.
    board : array of int64
        What compiled code has to know of this GPU: see driver.py.
    """

    def __init__(self, device: int, variables: Sequence[Array]) -> None:
        self.device, self.handle, self.is_capturing = device, _NONE, False
        self._owner: Any = None
        self._all: list[tuple[int, Any]] = []
        foreign = [variable for variable in variables if gpu_arrays.is_foreign(variable)]
        self._has_numba = any(map(gpu_arrays.is_numba, foreign))
        self._has_foreign = bool(foreign)
        self._tells = all(map(gpu_arrays.is_numba, foreign))  # the others have to be asked in turn, array by array
        # All arrays of a library are in its current stream; an array without a library has a stream of its own.
        libraries = {arrays.library_name(v): v for v in variables if not gpu_arrays.is_foreign(v)}
        self._producers = [*libraries.values(), *foreign]
        ask = {name: reader.stream_function(type(v)) for name, v in libraries.items() if name == "torch"}
        self._asked_here = [v for name, v in libraries.items() if not ask.get(name)]
        self._out, self._others = np.zeros(1, np.int64), np.zeros(0, np.int64)
        self.board = np.zeros(driver.BOARD_WORDS, np.int64)
        with self.on_device():
            self._event, self._end = Event(), Event()
            self.board[driver.CONTEXT] = driver.answer("cuCtxGetCurrent")
        self.board[driver.FUNCTIONS] = driver.addresses().ctypes.data
        self.board[driver.OUT], self.board[driver.DEVICE] = self._out.ctypes.data, device
        self.board[driver.ASK], self.board[driver.CLEAR] = ask.get("torch", 0), reader.CLEAR_ERROR
        self._address = int(self.board.ctypes.data)

    def on_device(self) -> AbstractContextManager[Any]:
        """In which this GPU is Numba's current one."""
        return nullcontext() if SIMULATED else _cuda.gpus[self.device]

    def looks_captured(self) -> bool:
        """Whether a step that began now would be."""
        with self.on_device():
            return is_captured(gpu_arrays.current_stream(self._producers[0], self.device)[0])

    def begin_as_before(self, gradients: Sequence[Array | None]) -> bool:
        """Begin a step in the stream of the last one, if that is what `take` would find; addresses are sent.

        To be called once the addresses have been read.
        """
        if self.is_capturing or len(self._all) != 1 or not self._tells:
            return False
        handle = self.handle
        for array in self._asked_here:
            if gpu_arrays.current_stream(array, self.device)[0] != handle:
                return False
        if self._has_numba and any(gpu_arrays.numba_stream(g) != handle for g in gradients if g is not None):
            return False
        return bool(driver.begins_as_before(self._address))

    def take(self, gradients: Sequence[Array | None]) -> None:
        """Run in the first library's current stream from now on, after what the last step's stream has still to do.

        Raises
        ------
        RuntimeError
            If a graph is captured of arrays in several streams.
        """
        before, owner_before = self.handle, self._owner
        self._all = list(self._current_streams(gradients).items())
        self.handle, self._owner = self._all[0]
        self.board[driver.STREAM] = self.handle
        self.board[driver.DEFAULT] = self.handle in _LEGACY and not SIMULATED
        self.is_capturing = is_captured(self.handle)
        # A graph may not wait for what was launched outside it; whoever captures it has synchronized.
        if not self.is_capturing and before not in (_NONE, self.handle):
            if _may_die(before, owner_before):
                self._end.hold(self.handle)
            else:
                self._wait(before, self.handle)
        del owner_before  # only now may the last stream be destroyed
        if self.is_capturing and len(self._all) > 1:
            raise RuntimeError("a graph is captured of a step over arrays of several streams; expected one stream")
        self._others = np.array([handle for handle, _ in self._all[1:]], np.int64)

    def wait_for_others(self) -> None:
        """Have the step begin after all that the other streams have been given to do."""
        for handle, _ in self._all[1:]:
            self._wait(handle, self.handle)

    def ending(self) -> list[Call]:
        """What to call once the step is launched, so that the other streams go on after it."""
        if not (len(self._others) or _may_die(self.handle, self._owner)) or self.is_capturing:
            return []
        return [(driver.hold, self._address, self._end.handle, self._others.ctypes.data, len(self._others))]

    def synchronize(self) -> None:
        """Wait for the stream."""
        driver.call("cuStreamSynchronize", self.handle)

    def _current_streams(self, gradients: Sequence[Array | None]) -> dict[int, Any]:
        """The handle of each stream, and what keeps it alive."""
        streams = dict(gpu_arrays.current_stream(array, self.device) for array in self._producers)
        if self._has_foreign:  # then gradients may be as well, and each has its own stream
            for g in gradients:
                if g is not None and gpu_arrays.is_cuda_array(g) and gpu_arrays.is_foreign(g):
                    streams |= dict([gpu_arrays.current_stream(g, self.device, next(iter(streams)))])
        return streams

    def _wait(self, earlier: int, later: int) -> None:
        self._event.record(earlier)
        self._event.hold(later)


def stream_of(handle: int) -> Any:
    """Numba's stream for a handle.

    Not Numba's own stream 0: with that, a copy waits until it is done.
    """
    return cuda.legacy_default_stream() if SIMULATED or handle in _LEGACY else cuda.external_stream(handle)


def is_captured(handle: int) -> bool:
    """Whether what is launched in a stream now goes into a graph; never in the legacy default stream.

    Raises
    ------
    RuntimeError
        If a graph was being captured, and something has gone wrong: until whoever captures it ends it, nothing can be
        launched.
    """
    if handle == _NONE or (handle in _LEGACY and not SIMULATED):
        return False
    state = driver.capture_of(handle)
    if state == driver.INVALIDATED:
        raise RuntimeError(
            "the capture of a graph in this stream was invalidated by an earlier error; expected it to be ended first"
        )
    return state == driver.ACTIVE


def wait_for_all() -> None:
    """Wait for everything that the current GPU has to do, in any stream."""
    _cuda.synchronize()


def _may_die(handle: int, owner: object) -> bool:
    """Whether a stream may be destroyed before the next step: nobody here keeps alive what an array's interface names.

    Then the end of each step is marked while the stream is there.
    """
    return owner is None and handle not in _LEGACY
