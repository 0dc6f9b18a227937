"""The order of a step among everything else on a GPU: the libraries' current streams, and whether one is captured.

CUDA knows a stream by its handle, an integer. Handle 0, also called 1, is the legacy default stream.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from numba import cuda

from .. import arrays
from ..arrays import Array
from ..arrays import gpu as gpu_arrays
from .memory import SIMULATED

_cuda: Any = cuda  # without stubs
_LEGACY = (0, 1)
_NONE = -1


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
    stream : Numba's stream for it, or None
    is_capturing : bool
        Whether the step that has begun is being captured in a graph.
    """

    def __init__(self, device: int, variables: Sequence[Array]) -> None:
        self.device, self.handle, self.is_capturing = device, _NONE, False
        self.stream: Any = None
        self._owner: Any = None
        self._all: list[tuple[int, Any]] = []
        foreign = [variable for variable in variables if gpu_arrays.is_foreign(variable)]
        self._has_foreign = bool(foreign)
        # All arrays of a library are in its current stream; an array without a library has a stream of its own.
        libraries = {arrays.library_name(v): v for v in variables if not gpu_arrays.is_foreign(v)}
        self._producers = [*libraries.values(), *foreign]
        with self.on_device():
            self._event: Any = _cuda.event()

    def on_device(self) -> AbstractContextManager[Any]:
        """In which this GPU is Numba's current one."""
        return nullcontext() if SIMULATED else _cuda.gpus[self.device]

    def looks_captured(self) -> bool:
        """Whether a step that began now would be captured."""
        with self.on_device():
            return is_captured(gpu_arrays.current_stream(self._producers[0], self.device)[0])

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
        if self.handle != before or self.stream is None:
            self.stream = stream_of(self.handle)
        self.is_capturing = is_captured(self.handle)
        # A graph may not wait for what was launched outside it; whoever captures it has synchronized.
        if not self.is_capturing and before not in (_NONE, self.handle):
            self._wait(before, self.handle)
        del owner_before  # only now may the last stream be destroyed
        if self.is_capturing and len(self._all) > 1:
            raise RuntimeError("a graph is captured of a step over arrays of several streams; expected one stream")

    def wait_for_others(self) -> None:
        """Have the step begin after all that the other streams have been given to do."""
        for handle, _ in self._all[1:]:
            self._wait(handle, self.handle)

    def hold_others(self) -> None:
        """Have the other streams go on after the step."""
        for handle, _ in self._all[1:]:
            self._wait(self.handle, handle)

    def _current_streams(self, gradients: Sequence[Array | None]) -> dict[int, Any]:
        """The handle of each stream, and what keeps it alive."""
        streams = dict(gpu_arrays.current_stream(array, self.device) for array in self._producers)
        if self._has_foreign:  # then gradients may be as well, and each has its own stream
            for g in gradients:
                if g is not None and gpu_arrays.is_cuda_array(g) and gpu_arrays.is_foreign(g):
                    streams |= dict([gpu_arrays.current_stream(g, self.device, next(iter(streams)))])
        return streams

    def _wait(self, earlier: int, later: int) -> None:
        self._event.record(stream_of(earlier))
        self._event.wait(stream_of(later))


def stream_of(handle: int) -> Any:
    """Numba's stream for a handle.

    Not Numba's own stream 0: with that, a copy waits until it is done.
    """
    return cuda.legacy_default_stream() if SIMULATED or handle in _LEGACY else cuda.external_stream(handle)


def is_captured(handle: int) -> bool:
    """Whether what is launched in a stream now goes into a graph; never in the legacy default stream."""
    if SIMULATED or handle in _LEGACY or handle == _NONE:
        return False
    from cuda.bindings import driver

    error, status = driver.cuStreamIsCapturing(handle)
    return bool(error == 0 and int(status) == int(driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE))


def is_over(event: Any) -> bool:
    """Whether what an event marks has happened."""
    return SIMULATED or bool(event.query())


def wait_for_all() -> None:
    """Wait for everything that the current GPU has to do, in any stream."""
    _cuda.synchronize()
