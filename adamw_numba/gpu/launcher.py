"""Kernels with their launch configurations, and a step that is launched whole, whatever interrupts it."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..update import Variant
from . import kernels, norm_kernels
from .counter import Counter
from .memory import SIMULATED
from .streams import Streams
from .tables import keep_for_graphs
from .words import NORMS_ALONE, STILL, THREADS
from .workload import Group, Workload

_MOST_BLOCKS = 2**31 - 1
_MOST_CONFIGURED = 256


class Launch(NamedTuple):
    """A kernel with its launch configuration, and what it is called with."""

    kernel: Any
    group: int  # the address of its descriptor
    flags: int
    expected: int  # the step it belongs to; -1 if only the GPU knows


class Launches(NamedTuple):
    """The launches of one step."""

    norms: Sequence[Launch]  # what they write does not last
    updates: Sequence[Launch]  # one for each group, in order


class Launcher:
    """Launches kernels in the current stream, and notes each step that was launched.

    Attributes
    ----------
    in_use : tuple
        What the kernels read and write; a captured graph keeps it.
    """

    def __init__(self, streams: Streams, counter: Counter) -> None:
        self._streams, self._counter = streams, counter
        self._configured: dict[tuple[Any, int, int], Any] = {}
        self._loaded: set[Any] = set()
        self._interrupted: Sequence[Launch] = ()
        self.in_use: tuple[Any, ...] = ()

    def updates(self, groups: Sequence[Group], variant: Variant, flags: int, expected: int) -> list[Launch]:
        """What takes a step with every group."""
        found = [(kernels.update_kernel(group.storage, variant), group) for group in groups]
        return [
            Launch(self.configured(kernel, group.chunks), group.address, flags, expected) for kernel, group in found
        ]

    def norms(self, workload: Workload, accumulates: bool, flags: int, *, decides: bool = True) -> list[Launch]:
        """What takes the norms of the gradients, and decides what follows from them, unless the host does."""
        kernel = norm_kernels.square_kernel
        found = [(kernel(g.storage.g, g.storage.compute, accumulates), g.square_chunks, g) for g in workload.groups]
        first = workload.groups[0]  # its descriptor tells of the norms of all
        found.append((norm_kernels.decision_kernel(), workload.arrays, first))
        flags = flags & STILL if decides else NORMS_ALONE | STILL
        return [Launch(self.configured(kernel, grid), group.address, flags, -1) for kernel, grid, group in found]

    def configured(self, kernel: Any, grid: int) -> Any:
        """A kernel with its launch configuration, which is kept: making one takes longer than a launch."""
        grid = min(max(grid, 1), _MOST_BLOCKS)
        if SIMULATED:
            return lambda *words: kernel[grid, THREADS](*words)
        key = kernel, grid, self._streams.handle
        if key not in self._configured:
            if self._streams.is_capturing and kernel not in self._loaded:  # loading allocates, which ends a capture
                raise RuntimeError("a kernel is not loaded yet when a graph is captured; expected one step before it")
            self._loaded.add(kernel)
            if len(self._configured) > _MOST_CONFIGURED:
                self._configured.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Numba warns of few blocks, which is what few arrays make
                self._configured[key] = kernel[grid, THREADS, self._streams.stream]
        return self._configured[key]

    def run(self, launches: Launches, counts: bool = True, decides: bool = False, normed: bool = False) -> None:
        """Launch a step.

        Kernels do nothing unless it is their turn. So what an interrupt cuts off is launched nevertheless, once
        something may have been written; and to run the very same launches again does nothing.

        Parameters
        ----------
        counts : bool
            Whether the step is counted.
        decides : bool
            Whether the GPU decides if it is, which the host may ask about.
        normed : bool
            Whether a norm is taken.
        """
        if launches is self._counter.known.completed:
            return
        begun: list[bool] = []
        with self._streams.on_device():
            try:
                self.launch(launches.norms)
                begun.append(True)
                self.launch(launches.updates)
                self._finish(launches, counts, decides, normed)
            except BaseException:
                if begun and self._counter.known.completed is not launches:
                    # If the step has no number, the first kernel would take the next one if it was launched already.
                    # So only the others are launched again: they follow the first, and do nothing if it was not.
                    self._interrupted = launches.updates[1 if decides else 0 :]
                    self.complete()
                    self._finish(launches, counts, decides, normed)
                raise

    def launch(self, launches: Sequence[Launch]) -> None:
        """Launch kernels one after another."""
        for kernel, *words in launches:
            kernel(*words)

    def complete(self) -> None:
        """Launch what an interrupt has cut off, if even that was interrupted."""
        self.launch(self._interrupted)
        self._interrupted = ()

    def forget(self) -> None:
        """Give up what an interrupt has cut off: its groups are no more."""
        self._interrupted = ()

    def _finish(self, launches: Launches, counts: bool, decides: bool, normed: bool) -> None:
        """Have the other streams wait for the step, and note it."""
        self._streams.hold_others()
        flags, is_captured = launches.updates[0].flags, self._streams.is_capturing
        if is_captured:
            keep_for_graphs(self.in_use)
        self._counter.note(launches, flags, is_captured=is_captured, counts=counts, decides=decides, normed=normed)
