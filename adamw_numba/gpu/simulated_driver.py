"""What stands in for CUDA's driver where Numba simulates a GPU: the host's memory, and kernels that are Python.

The compiled functions of driver.py call it as they call the driver.
"""

import ctypes
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .words import THREADS

_OWN_STREAM = 7  # of whoever makes one
_UNKNOWN_ERROR = 999

calls: "deque[tuple[str, tuple[Any, ...]]]" = deque(maxlen=1000)  # the last ones: functions and their arguments
kernels: list[Any] = [None]  # by their handles
recorded: list[Callable[[], object]] | None = None  # what goes into the graph that is captured at the moment
_one_at_a_time = threading.Lock()  # Numba's simulator changes the globals of what it runs
_contexts = [0]  # the last one is current
_kept: list[Any] = []  # memory that is never freed


def function(name: str, arguments: Sequence[Any]) -> Any:
    """A function of C, with the arguments of the driver's, that notes its calls."""

    def noted(*given: Any) -> int:
        calls.append((name, given))
        try:
            stand_in: Callable[..., int | None] = STAND_INS.get(name, _succeed)
            return int(stand_in(*given) or 0)
        except BaseException:  # from here it can go nowhere else
            traceback.print_exc()
            return _UNKNOWN_ERROR

    make: Any = ctypes.CFUNCTYPE
    return make(ctypes.c_int, *arguments)(noted)


def handle_of(kernel: Any) -> int:
    """The handle of a kernel of the simulator."""
    if kernel not in kernels:
        kernels.append(kernel)
    return kernels.index(kernel)


def _succeed(*arguments: Any) -> None:
    """Events and streams: everything is done at once."""


def _put(address: int, value: int, kind: Any = ctypes.c_int64) -> None:
    kind.from_address(address).value = value


def _get_context(out: int) -> None:
    _put(out, _contexts[-1])


def _push_context(context: int | None) -> None:
    _contexts.append(context or 0)


def _pop_context(out: int) -> None:
    _put(out, _contexts.pop())


def _launch(kernel: int, grid: int, *rest: Any) -> None:
    stream, parameters = rest[-3:-1]
    where = (ctypes.c_int64 * 3).from_address(parameters)
    words = [ctypes.c_int64.from_address(at).value for at in where]
    _run(stream, lambda: _run_kernel(kernels[kernel], grid, words))


def _run_kernel(kernel: Any, grid: int, words: Sequence[int]) -> None:
    with _one_at_a_time:
        kernel[grid, THREADS](*words)


def _copy(target: int, source: int, count: int, stream: int | None) -> None:
    data = ctypes.string_at(source, count)
    _run(stream, lambda: ctypes.memmove(target, data, count))


def _run(stream: int | None, action: Callable[[], object]) -> None:
    """Do something, or have the graph do it that is captured of a stream."""
    if recorded is None or stream == _OWN_STREAM:
        action()
    else:
        recorded.append(action)


def _is_capturing(stream: int | None, out: int) -> None:
    _put(out, recorded is not None, ctypes.c_int32)


def _allocate(out: int, count: int) -> None:
    _kept.append(ctypes.create_string_buffer(count + 256))
    _put(out, -(-ctypes.addressof(_kept[-1]) // 256) * 256)


def _create(out: int, flags: int) -> None:
    _put(out, _OWN_STREAM)


STAND_INS: dict[str, Callable[..., int | None]] = {
    "cuCtxGetCurrent": _get_context,
    "cuCtxPushCurrent_v2": _push_context,
    "cuCtxPopCurrent_v2": _pop_context,
    "cuLaunchKernel": _launch,
    "cuMemcpyHtoDAsync_v2": _copy,
    "cuStreamIsCapturing": _is_capturing,
    "cuMemAlloc_v2": _allocate,
    "cuEventCreate": _create,
    "cuStreamCreate": _create,
}
