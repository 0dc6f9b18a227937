"""The kernels of a step with their launch configurations, as rows that compiled code goes through."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.runs import Matrix
from ..update import Variant
from . import driver, kernels, norm_kernels
from .memory import SIMULATED
from .streams import Streams
from .words import NORMS_ALONE, STILL
from .workload import Workload

_MOST_BLOCKS = 2**31 - 1

Call = tuple[Any, ...]
_Planned = tuple[Any, int, int]  # a kernel, how many blocks of threads, and the address of a group's descriptor

# What captured graphs use. CUDA does not say when a graph is destroyed, so this is never freed.
_kept: list[Any] = []


class Launcher:
    """Makes the one compiled call that launches a step, or the norms alone, in the current stream.

    A call is kept: most steps make the call of the last one.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._board = int(streams.board.ctypes.data)
        self._made: dict[object, tuple[Call, Matrix]] = {}
        self._handles: dict[Any, int] = {}

    def forget(self) -> None:
        """Give up all calls: their groups are no more."""
        self._made = {}

    def step(self, workload: Workload, variant: Variant, flags: int, *, norms: bool) -> Call:
        """What launches a step with every group; the norms, and what is decided by them, first."""
        made = self._made.get((variant, flags, norms))
        if made is None:
            with self._streams.on_device():
                first = self._norms(workload, variant.accumulate) if norms else []
                made = self._make((variant, flags, norms), [*first, *self._updates(workload, variant)], flags)
        return made[0]

    def norms(self, workload: Workload, accumulates: bool) -> Call:
        """What launches the norms of the gradients alone, on which the host decides."""
        key = "norms", accumulates
        if key not in self._made:
            with self._streams.on_device():
                self._make(key, self._norms(workload, accumulates), NORMS_ALONE | STILL)
        return self._made[key][0]

    def keep_for_graphs(self, *things: Any) -> None:
        """Never free what a captured graph reads or writes."""
        _kept.append((self._made, *things))

    def _updates(self, workload: Workload, variant: Variant) -> list[_Planned]:
        return [(kernels.update_kernel(g.storage, variant), g.chunks, g.address) for g in workload.groups]

    def _norms(self, workload: Workload, accumulates: bool) -> list[_Planned]:
        kernel, first = norm_kernels.square_kernel, workload.groups[0]  # whose descriptor tells of the norms of all
        squares = [
            (kernel(g.storage.g, g.storage.compute, accumulates), g.square_chunks, g.address) for g in workload.groups
        ]
        return [*squares, (norm_kernels.decision_kernel(), workload.arrays, first.address)]

    def _make(self, key: object, planned: Sequence[_Planned], flags: int) -> tuple[Call, Matrix]:
        """The call that launches kernels one after another, and the rows that it goes through."""
        rows = np.zeros((len(planned), driver.LAUNCH_WORDS), np.int64)
        rows[:, driver.KERNEL] = [self._handle(kernel) for kernel, _, _ in planned]
        rows[:, driver.GRID] = [min(max(grid, 1), _MOST_BLOCKS) for _, grid, _ in planned]
        rows[:, driver.GROUP] = [group for _, _, group in planned]
        rows[:, driver.FLAGS] = flags
        # Where the driver finds the three arguments of each kernel; the table is another one in each captured graph.
        starts = rows.ctypes.data + 8 * driver.LAUNCH_WORDS * np.arange(len(rows))
        rows[:, driver.AT_GROUP], rows[:, driver.AT_FLAGS] = starts + 8 * driver.GROUP, starts + 8 * driver.FLAGS
        rows[:, driver.AT_TABLE] = self._board + 8 * driver.TABLE
        self._made[key] = (driver.launch, self._board, rows.ctypes.data, len(rows)), rows
        return self._made[key]

    def _handle(self, kernel: Any) -> int:
        """A kernel as the driver knows it; loading one allocates memory, which would end a capture."""
        if kernel not in self._handles:
            if self._streams.is_capturing:
                raise RuntimeError("a kernel is not loaded yet when a graph is captured; expected one step before it")
            self._handles[kernel] = _loaded(kernel)
        return self._handles[kernel]


def _loaded(kernel: Any) -> int:
    """The handle of a kernel that Numba has compiled, on the current device."""
    if SIMULATED:
        from .simulated_driver import handle_of

        return handle_of(kernel)
    (compiled,) = kernel.overloads.values()
    compiled.bind()
    function = compiled.library.get_cufunc()
    handle = getattr(function, "handle", function)
    return int(getattr(handle, "value", handle))
