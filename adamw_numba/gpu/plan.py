"""The arrays of one optimizer that lie on one GPU: its tables there, and the launches of a step.

What a step needs is sent ahead: a table of addresses, and the coefficients of the next steps as rows, from which the
kernels choose by a counter of their own. So a step of arrays that have not moved is a few launches with three integers
each, nothing waits for the GPU, a step that is skipped there selects the same row again, and a captured graph follows
the schedule.
"""

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from .. import arrays
from ..arrays import Array
from ..arrays import gpu as gpu_arrays
from ..arrays.runs import Matrix
from ..arrays.table import AddressTable
from ..coefficients import Recipe, Recipes, whole_norm
from ..update import LEAST_EPSILON
from . import kernels
from .memory import SIMULATED

Flag = bool | None  # True or None: None is what Numba compiles away
Call = tuple[Any, ...]
_cuda: Any = cuda  # without stubs
AHEAD = 64  # rows that are sent at once
_MOST_PINNED = 32  # buffers, so that sending need not wait for what was sent before
_SPARES = 8  # buffers for steps that are captured
_NO_STREAM = (0, 1)  # the legacy default stream, which cannot be captured

Launch = tuple[Any, int, int, int]  # a configured kernel, and what it is called with


class Group(NamedTuple):
    """Variables and gradients stored alike, which one launch walks."""

    p_type: str
    g_type: str
    compute: str
    master: Flag
    chunks: int
    square_chunks: int
    block: Any  # device array of words
    address: int


class Report(NamedTuple):
    """What the GPU has to say about the steps so far."""

    iteration: int
    norm: float | None  # of the last step, if it took one
    applied: bool  # the last step


class Mirror:
    """Bytes on the device that follow bytes on the host, through pinned memory and without waiting."""

    def __init__(self, host: Matrix) -> None:
        self.host = host
        self._sent = np.empty_like(host)
        self.device = cuda.to_device(host)
        self._ring: deque[tuple[Matrix, Any]] = deque()
        self._spares: list[Matrix] = []  # never sent, so that no event has to be asked while a graph is captured
        self._is_sent = False
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
        if len(self._ring) < _MOST_PINNED and not (self._ring and _is_over(self._ring[0][1])):
            self._ring.appendleft((self._buffer(), cuda.event()))
        buffer, event = self._ring[0]
        event.synchronize()
        buffer[...] = self._sent[...] = self.host
        self.device.copy_to_device(buffer, stream)
        event.record(stream)
        self._ring.rotate(-1)
        self._is_sent = True

    def send_captured(self, stream: Any) -> None:
        """Have a graph send what is here now at each of its replays: from a buffer that is its own from now on."""
        if not self._spares:
            raise RuntimeError(f"more than {_SPARES} steps are captured; expected an eager step between two captures")
        buffer = self._spares.pop()
        buffer[...] = self.host
        self.device.copy_to_device(buffer, stream)
        _KEPT.append(buffer)
        self._is_sent = False

    def refill(self) -> None:
        """Replace the buffers that captured graphs have taken."""
        while len(self._spares) < _SPARES:
            self._spares.append(self._buffer())

    def _buffer(self) -> Matrix:
        buffer: Matrix = cuda.pinned_array(self.host.shape, self.host.dtype)
        return buffer


_KEPT: list[Any] = []  # what captured graphs use, whose end nobody tells


class Plan:
    """A step is `begin` (where all can fail), then `launches`, then `run`.

    Attributes
    ----------
    iteration : int
        Steps counted by the GPU, as far as the host knows.
    is_certain : bool
        Whether the host knows: not after a step that the GPU may have skipped, nor once a graph was captured.
    pending : bool
        Whether the GPU may have counted otherwise than the host, and nobody has asked.
    norm_pending : bool
        Whether it holds a norm that nobody has asked for.
    skipped : int
        Steps that were skipped, by the reports so far; whoever counts them sets it back.
    """

    def __init__(
        self,
        place: str,
        names: Sequence[str],
        variables: Sequence[Array],
        slots: Sequence[dict[str, Array]],
        decayed: Sequence[bool],
    ) -> None:
        self._device = int(place.partition(":")[2])
        self._decayed = decayed
        self.groups: list[Group] = []
        self.iteration = 0
        # The GPU had counted `_least` steps when `_at_least` had been launched, of `_launched` by now.
        self._least = self._at_least = self._launched = 0
        self._glance: tuple[Matrix, Any, int] | None = None
        self.is_certain, self.pending, self.norm_pending, self.has_captures = True, False, False, False
        self._completed: object = None
        self._loaded: set[Any] = set()
        self._captured_flags = 0
        self.has_norm, self.is_guarded = False, False
        self._interrupted: list[Launch] = []
        self._key: object = None
        self._header = (0, 0)  # the steps that the rows are for
        self._configured: dict[tuple[Any, int, int], Any] = {}
        self._stream: Any = None
        self._streams: list[tuple[int, Any]] = []
        self._handle, self._owner, self._is_capturing = -1, None, False
        self.skipped = self._skipped_before = 0
        here = [variable for variable in variables if variable is not None]
        foreign = [variable for variable in here if gpu_arrays.is_foreign(variable)]
        self._has_foreign = bool(foreign)
        self._producers = [
            *{arrays.library_name(v): v for v in here if not gpu_arrays.is_foreign(v)}.values(),
            *foreign,
        ]
        with self.current():
            self._event: Any = cuda.event()
            self._sent_table = Mirror(np.zeros((8, len(names)), np.int64))
            self._make_rows(4 * AHEAD)
            self.table = AddressTable(place, names, variables, slots)
            self._laid_out: object = None  # the arrangement that `groups` are made for
            self._arrange_if_changed()

    def current(self) -> AbstractContextManager[Any]:
        """In which this plan's GPU is the current one."""
        return nullcontext() if SIMULATED else cuda.gpus[self._device]

    # Beginning a step

    def begin(self, gradients: Sequence[Array | None]) -> None:
        """Take the libraries' current streams, check the arrays, and send their addresses if they have moved.

        Raises
        ------
        RuntimeError
            If a graph is being captured and something would have to be made first.
        """
        with self.current():
            self._take_streams(gradients)
            self.table.refresh(gradients)
            self._arrange_if_changed()
            for handle, _ in self._streams[1:]:  # also after what the table has cast in them
                self._wait(handle, self._handle)
            self._sent_table.host[...] = self.table.addresses
            if self._is_capturing:
                self._sent_table.send_captured(self._stream)
                return
            self._sent_table.refill()
            if self.has_captures:
                self._sent_table.forget()  # a replay may have sent its own
            self._sent_table.send(self._stream)
            if self._interrupted:
                self._run(self._interrupted)

    @property
    def is_capturing(self) -> bool:
        """Whether the step that has begun is being captured."""
        return self._is_capturing

    def looks_captured(self) -> bool:
        """Whether a step that began now would be."""
        with self.current():
            return _is_capturing(gpu_arrays.current_stream(self._producers[0], self._device)[0])

    def _take_streams(self, gradients: Sequence[Array | None]) -> None:
        """Launch on the first library's stream, after all that the last step's has under way."""
        streams = dict(gpu_arrays.current_stream(array, self._device) for array in self._producers)
        if self._has_foreign:  # whose stream is each array's own
            for g in gradients:
                if g is not None and gpu_arrays.is_cuda_array(g) and gpu_arrays.is_foreign(g):
                    streams |= dict([gpu_arrays.current_stream(g, self._device, next(iter(streams)))])
        before, owner_before = self._handle, self._owner
        self._streams = list(streams.items())
        self._handle, self._owner = self._streams[0]
        if self._handle != before or self._stream is None:
            self._stream = _stream(self._handle)
        self._is_capturing = _is_capturing(self._handle)
        if not self._is_capturing and before not in (-1, self._handle):
            self._wait(before, self._handle)
            del owner_before
        if self._is_capturing and len(self._streams) > 1:
            raise RuntimeError("a graph is captured of a step over arrays of several streams; expected one stream")

    def _wait(self, earlier: int, later: int) -> None:
        self._event.record(_stream(earlier))
        self._event.wait(_stream(later))

    # The coefficients

    def expect(self, iteration: int) -> None:
        """Have the GPU count on from `iteration`, unless that is what the host was last told."""
        if self.iteration != iteration:
            self.set_iteration(iteration)

    def send_ahead(self, row_at: Callable[[int], Sequence[float]], key: object) -> None:
        """Send the rows of this step and the next ones, unless they are there.

        Raises
        ------
        RuntimeError
            While a graph is captured, if they are not.
        """
        if not self._is_capturing:
            self.send_rows(self._least, 1 + self._launched - self._at_least, row_at, key)
        elif not self._header[1] or key != self._key:
            raise RuntimeError(
                "a hyperparameter has changed, or no step was taken yet, when a graph is captured; expected one step, "
                "or update_hyperparameters(), before the capture"
            )

    def send_rows(self, first: int, count: int, row_at: Callable[[int], Sequence[float]], key: object) -> None:
        """Send the rows of `count` steps from `first` on, and of some more, unless they are there, made with that key.

        A key of None says that a row holds for nothing but this step.
        """
        low, high = self._header
        if key is not None and key == self._key and low <= first and first + count <= high:
            return
        if self._is_capturing:
            raise RuntimeError(
                "the host has something to say at every step; expected that not to be captured in a graph"
            )
        with self.current():
            self._look_ahead()
            wanted = count if key is None else count + AHEAD
            rows = np.array([row_at(k) for k in range(first, first + wanted)])
            if wanted > self._capacity:
                self._make_rows(wanted)
                self._write_blocks()
            self._fill_rows(first, rows)
            self._rows.send(self._stream or _stream(0))
            self._header, self._key = (first, first + wanted), key

    def send_rows_now(self, first: int, count: int, row_at: Callable[[int], Sequence[float]], key: object) -> None:
        """The same between steps; waits for the GPU, so that it holds in every stream."""
        if self.looks_captured():
            raise RuntimeError("update_hyperparameters() cannot be captured in a graph; expected it before or after")
        self._is_capturing = False
        with self.current():
            _wait_for_all()
            self._take_streams([None] * len(self.table.names))
            self.expect(first)
            self.send_rows(first, count, row_at, key)
            _wait_for_all()

    def _look_ahead(self) -> None:
        """Learn, without waiting, how far the GPU had counted when this was last called."""
        if self.is_certain or self._is_capturing:
            return
        if self._glance is None:
            self._glance = cuda.pinned_array(self._control.shape, np.int64), cuda.event(), -1
        words, event, launched = self._glance
        if not _is_over(event):
            return
        if launched >= self._at_least:
            self._least, self._at_least = int(words[kernels.COUNTERS]), launched
        self._control.copy_to_host(words, self._stream)
        event.record(self._stream)
        self._glance = words, event, self._launched

    def _make_rows(self, capacity: int) -> None:
        """A header of two words, rows of float64, and the same rows in float32."""
        columns = kernels.ROW_COLUMNS
        self._capacity = capacity
        self._rows = Mirror(np.zeros(2 + capacity * columns + (capacity * columns + 1) // 2, np.int64))
        self._header = (0, 0)

    def _fill_rows(self, first: int, rows: Matrix) -> None:
        words, size = self._rows.host, rows.size
        at = 2 + self._capacity * kernels.ROW_COLUMNS
        words[:2] = first, len(rows)
        words[2 : 2 + size].view(np.float64)[:] = rows.reshape(-1)
        with np.errstate(over="ignore", under="ignore"):
            single = rows.astype(np.float32)
        single[:, 5] = np.maximum(single[:, 5], np.float32(LEAST_EPSILON))
        words[at:].view(np.float32)[:size] = single.reshape(-1)

    def set_iteration(self, iteration: int) -> None:
        """Have the GPU count on from another number; waits for it."""
        if self._is_capturing:
            raise RuntimeError("the iteration has been changed while a graph is captured; expected that before it")
        with self.current():
            _wait_for_all()
            self._collect(self._control.copy_to_host())
            self._control.copy_to_device(self._control_words(iteration))
            _wait_for_all()
        self._count_from(iteration)
        self.is_certain, self._skipped_before = not self.has_captures, 0

    def _collect(self, words: Matrix) -> None:
        """Count the skipped steps that the control words tell of."""
        self.skipped += int(words[kernels.SKIPPED]) - self._skipped_before
        self._skipped_before = int(words[kernels.SKIPPED])

    def _count_from(self, iteration: int) -> None:
        self.iteration = self._least = iteration
        self._at_least = self._launched

    def _control_words(self, iteration: int) -> Matrix:
        words = np.zeros(kernels.COUNTERS + len(self.groups), np.int64)
        words[kernels.GO], words[kernels.COUNTERS :] = 1, iteration
        return words

    # Launching

    def launches(
        self,
        top: Flag,
        average: Flag,
        total: Flag,
        norm: bool,
        clipped: bool,
        guarded: bool,
        still: bool = False,
        loads_norm: bool = False,
    ) -> list[Launch]:
        """What to launch for one step; norms, where one is needed, first (or only loaded, for a graph to come)."""
        self.is_guarded = guarded
        flags = clipped * kernels.CLIPPED | guarded * kernels.GUARDED | still * kernels.STILL
        knows = self.is_certain and not self._is_capturing and not guarded and not still
        expected = self.iteration if knows else -1
        with self.current():
            result = self.norm_launches(total, flags & kernels.STILL) if norm or loads_norm else []
            result = result if norm else []
            for group in self.groups:
                kernel = kernels.update_kernel(
                    group.p_type, group.g_type, group.compute, top, average, total, group.master
                )
                result.append((self._configure(kernel, group.chunks), group.address, flags, expected))
        return result

    def norm_launches(self, total: Flag, flags: int, decide: bool = True) -> list[Launch]:
        """What to launch for the norms of the gradients, and for what follows from them."""
        result = [
            (self._configure(kernels.square_kernel(g.g_type, g.compute, total), g.square_chunks), g.address, flags, -1)
            for g in self.groups
        ]
        first = self.groups[0].address
        result.append((self._configure(kernels.norm_kernel(), len(self.table.names)), first, flags, -1))
        if decide:
            result.append((self._configure(kernels.decide_kernel(), 1), first, flags, -1))
        return result

    def _configure(self, kernel: Any, grid: int) -> Any:
        """A kernel with its launch configuration, which is kept."""
        grid = min(max(grid, 1), 2**31 - 1)
        if SIMULATED:
            return lambda *words: kernel[grid, kernels.BLOCK](*words)
        key = kernel, grid, self._handle
        if key not in self._configured:
            if self._is_capturing and kernel not in self._loaded:
                raise RuntimeError("a kernel is not loaded yet when a graph is captured; expected one step before it")
            self._loaded.add(kernel)
            if len(self._configured) > 256:
                self._configured.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # few arrays make few blocks
                self._configured[key] = kernel[grid, kernels.BLOCK, self._stream]
        return self._configured[key]

    def run(self, launches: Sequence[Launch], counts: bool = True, decides: bool = False, normed: bool = False) -> None:
        """Launch a step.

        What an interrupt cuts off is launched nevertheless, once something was written; repeated with the very same
        list, this does nothing then.

        Parameters
        ----------
        counts : bool
            Whether the step is counted.
        decides : bool
            Whether the GPU decides if it is, which the host may ask about.
        normed : bool
            Whether a norm is taken.
        """
        if launches is self._completed:
            return
        first = len(launches) - len(self.groups)
        begun: list[bool] = []
        with self.current():
            try:
                for kernel, *words in launches[:first]:
                    kernel(*words)
                begun.append(True)
                self._run(launches[first:])
                self._finish(launches, counts, decides, normed)
            except BaseException:
                if begun and self._completed is not launches:
                    # Where the GPU decides, the first may have been launched: only then the others do something.
                    self._interrupted = list(launches[first + 1 if decides else first :])
                    self._run(self._interrupted)
                    self._finish(launches, counts, decides, normed)
                raise

    def _run(self, launches: Sequence[Launch]) -> None:
        for kernel, *words in launches:
            kernel(*words)
        self._interrupted = []

    def _finish(self, launches: Sequence[Launch], counts: bool, decides: bool, normed: bool) -> None:
        """Have the other streams wait, and note the step, at once."""
        for handle, _ in self._streams[1:]:
            self._wait(self._handle, handle)
        changes: dict[str, Any] = {"_completed": launches, "has_norm": normed}
        if self._is_capturing:
            tables = self._sent_table, self._rows, self._control, self._partials, self._norms, self._scales
            _KEPT.append((tables, self._ranges_of_partials, self._lists, self.groups))
            changes |= {"has_captures": True, "is_certain": False, "pending": True}
            changes["_captured_flags"] = launches[-1][2] & (kernels.CLIPPED | kernels.GUARDED)
        elif counts:
            changes["_launched"] = self._launched + 1
            changes["is_certain"] = self.is_certain and not decides
            changes["pending"], changes["norm_pending"] = decides or self.has_captures, normed
            if not decides:
                changes |= {"iteration": self.iteration + 1, "_least": self.iteration + 1}
                changes["_at_least"] = self._launched + 1
        self.__dict__.update(changes)

    def check_captured(self, clipped: bool, guarded: bool) -> None:
        """Refuse options that captured steps cannot follow."""
        if self.has_captures and (clipped * kernels.CLIPPED | guarded * kernels.GUARDED) & ~self._captured_flags:
            raise RuntimeError(
                "clipping by norm, or nonfinite='skip', was turned on after a graph was captured without it; expected "
                "another capture"
            )

    # Asking

    def report(self) -> Report:
        """What happened up to now; waits for the GPU.

        Raises
        ------
        RuntimeError
            While a graph is being captured, or if one was replayed beyond the rows that were sent.
        """
        if self.looks_captured():
            raise RuntimeError("the GPU cannot be asked while a graph is captured; expected that before or after")
        self._is_capturing = False
        with self.current():
            _wait_for_all()  # a graph may have been replayed in any stream
            words = self._control.copy_to_host()
        if words[kernels.EXHAUSTED]:
            self.set_iteration(int(words[kernels.COUNTERS]))
            self._key = None
            raise RuntimeError(
                f"a captured graph was replayed beyond iteration {words[kernels.COUNTERS]}, for which no coefficients "
                "were sent, and did nothing from then on; expected update_hyperparameters(steps) before so many replays"
            )
        self._collect(words)
        self._count_from(int(words[kernels.COUNTERS]))
        self.pending = self.norm_pending = self.has_captures
        self.is_certain = not self.has_captures
        norm = float(words[kernels.NORM : kernels.NORM + 1].view(np.float64)[0])
        applied = bool(words[kernels.GO]) or not self.is_guarded
        return Report(self.iteration, norm if self.has_norm else None, applied)

    def norms_of(self, total: Flag) -> dict[int, float]:
        """The norm of each variable's gradient, as the row that was sent says; waits for the GPU."""
        with self.current():
            self._run(self.norm_launches(total, kernels.STILL, decide=False))
            self._stream.synchronize()
            norms = self._norms.copy_to_host()
        return {i: float(norms[i]) for i in self.table.own}

    # A step, as every plan takes it

    def norms(self, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[Matrix, float]:
        """The norm of each variable's gradient, 0 elsewhere, and of all together; waits for the GPU."""
        self._check_not_captured()
        self.send_rows(recipe.number, 1, lambda _: row(recipe), None)
        norms = np.zeros(len(self.table.names))
        for i, norm in self.norms_of(True if recipe.variant.accumulate else None).items():
            norms[i] = norm
        return norms, whole_norm(norms)

    def work(self, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[list[Call], list[Call]]:
        """The launches of a step that the host has decided, which may be repeated."""
        self._check_not_captured()
        if recipe.alone:
            return self._work_alone(recipe, gradients), []
        self.expect(recipe.number)
        each = recipe.clipnorm if recipe.clips is not None and recipe.clipnorm else 0.0
        self.send_rows(recipe.number, 1, lambda _: row(recipe, each), None)
        return [(self.run, self.launches(*_options(recipe), bool(each), bool(each), False))], []

    def _work_alone(self, recipe: Recipe, gradients: Sequence[Array | None]) -> list[Call]:
        if all(gradients[i] is None for i in self.table.own):
            return []
        if self.has_captures:
            raise RuntimeError("`update_step` would take the rows of a captured graph; expected no capture before it")
        self.send_rows(0, 1, lambda _: row(recipe, 0.0), None)
        return [(self.run, self.launches(*_options(recipe), False, False, False, still=True), False)]

    def _check_not_captured(self) -> None:
        if self.is_capturing:
            raise RuntimeError(
                "a graph is captured of a step for which the host waits (nonfinite='raise', a LossScaleOptimizer, "
                "arrays at several places); expected nonfinite='propagate' or 'skip', and all arrays on one GPU"
            )

    def decide(
        self, recipe: Recipe, recipes: Recipes, rates_at: Callable[[int], tuple[float, float]], key: object
    ) -> tuple[list[Call], bool]:
        """The launches of a step that the GPU decides and counts by itself, and whether the host can count along."""
        number, here = recipe.number, row(recipe)
        clips, is_update = bool(recipe.clipnorm or recipe.global_clipnorm), recipe.is_update
        options, guarded = _options(recipe), recipe.nonfinite == "skip"
        self.expect(number)
        self.send_ahead(lambda k: here if k == number else row(recipes.at(k, *rates_at(k))), key)
        knows = self.is_certain and not guarded and not self.is_capturing
        clipped = clips and (is_update or not knows)
        launches = self.launches(*options, guarded or clipped, clipped, guarded, loads_norm=clips)
        return [(self.run, launches, True, not knows, guarded or clipped)], knows

    def send_ahead_now(self, first: int, steps: int, recipe_at: Callable[[int], Recipe], key: object) -> None:
        """Send the rows of so many steps, between steps; waits for the GPU."""
        self.send_rows_now(first, steps, lambda k: row(recipe_at(k)), key)

    # Laying out

    def _arrange_if_changed(self) -> None:
        if self._laid_out is not self.table.arrangement:
            self._arrange()
            self._laid_out = self.table.arrangement

    def _arrange(self) -> None:
        if self._is_capturing or self.has_captures:
            raise RuntimeError(
                "arrays have changed their dtype or layout when, or since, a graph was captured; expected them to stay "
                "as they were, or another optimizer"
            )
        kinds: dict[tuple[str, str], list[Matrix]] = {}
        for types, runs in self.table.runs():
            kinds.setdefault(types, []).append(_with_decay(runs, self._decayed))
        works = {kind: np.concatenate(runs) for kind, runs in kinds.items()}
        works = works or {("float32", "float32"): np.zeros((0, kernels.RUN_COLUMNS), np.int64)}
        told, was_certain, was_pending = self.iteration, self.is_certain, self.pending
        iteration = self.report().iteration if self.groups else self.iteration
        with self.current():
            self._lay_out(works)
        self.set_iteration(iteration)
        if not was_certain:  # the owner has yet to be told
            self.iteration, self.is_certain, self.pending = told, False, was_pending

    def _lay_out(self, works: dict[tuple[str, str], Matrix]) -> None:
        n = len(self.table.names)
        chunk = chunk_of(sum(int(work[:, kernels.COUNT].sum()) for work in works.values()), _processors())
        ends = [np.cumsum(-(-work[:, kernels.COUNT] // chunk)) for work in works.values()]
        square_ends = [np.cumsum(-(-work[:, kernels.COUNT] // kernels.SQUARES)) for work in works.values()]
        totals = [int(end[-1]) if len(end) else 0 for end in square_ends]
        offsets = np.cumsum([0, *totals])
        ranges = np.zeros((n, 2), np.int64)
        for work, own_ends, offset in zip(works.values(), square_ends, offsets, strict=False):
            for i in np.unique(work[:, kernels.ARRAY]):
                rows = np.flatnonzero(work[:, kernels.ARRAY] == i)
                ranges[i] = offset + (own_ends[rows[0] - 1] if rows[0] else 0), offset + own_ends[rows[-1]]
        self._control = cuda.to_device(np.zeros(kernels.COUNTERS + len(works), np.int64))
        self._skipped_before = 0
        self._partials, self._norms = cuda.to_device(np.zeros((max(offsets[-1], 1), 3))), cuda.to_device(np.zeros(n))
        self._scales = cuda.to_device(np.zeros(n, np.float32)), cuda.to_device(np.zeros(n))
        self._ranges_of_partials = cuda.to_device(ranges)
        self._lists = [
            tuple(cuda.to_device(np.ascontiguousarray(_or_one(x))) for x in lists)
            for lists in zip(works.values(), ends, square_ends, strict=True)
        ]
        self._words = []
        for k, (work, own_ends) in enumerate(zip(works.values(), ends, strict=True)):
            words = np.zeros(kernels.BLOCK_WORDS, np.int64)
            words[kernels.ARRAYS], words[kernels.CHUNK], words[kernels.RUN_COUNT] = n, chunk, len(work)
            words[kernels.CHUNKS] = own_ends[-1] if len(own_ends) else 0
            words[kernels.SQUARE_CHUNKS] = totals[k]
            words[kernels.GROUP], words[kernels.GROUPS] = k, len(works)
            words[kernels.PARTIALS] = gpu_arrays.address(self._partials) + 24 * int(offsets[k])
            self._words.append(words)
        self.groups = []
        for (p_type, g_type), work, words in zip(works, works.values(), self._words, strict=True):
            master = True if len(work) and "master" in self.table.slots[work[0, kernels.ARRAY]] else None
            block = cuda.to_device(words)
            self.groups.append(
                Group(
                    p_type,
                    g_type,
                    arrays.COMPUTE[p_type],
                    master,
                    int(words[kernels.CHUNKS]),
                    int(words[kernels.SQUARE_CHUNKS]),
                    block,
                    gpu_arrays.address(block),
                )
            )
        self._write_blocks()

    def _write_blocks(self) -> None:
        """Tell the kernels where everything is."""
        rows = self._rows.address
        at = rows + 16
        addresses = {
            kernels.TABLE: self._sent_table.address,
            kernels.CONTROL: gpu_arrays.address(self._control),
            kernels.HEADER: rows,
            kernels.ROWS_DOUBLE: at,
            kernels.ROWS: at + 8 * self._capacity * kernels.ROW_COLUMNS,
            kernels.SCALES: gpu_arrays.address(self._scales[0]),
            kernels.SCALES_DOUBLE: gpu_arrays.address(self._scales[1]),
            kernels.RANGES: gpu_arrays.address(self._ranges_of_partials),
            kernels.NORMS: gpu_arrays.address(self._norms),
        }
        for group, words, (runs, ends, square_ends) in zip(self.groups, self._words, self._lists, strict=True):
            lists = {kernels.RUNS: runs, kernels.ENDS: ends, kernels.SQUARE_ENDS: square_ends}
            for entry, address in (addresses | {k: gpu_arrays.address(x) for k, x in lists.items()}).items():
                words[entry] = address
            group.block.copy_to_device(words)
        _wait_for_all()  # a copy from ordinary memory may still be under way, in no other stream's order


def row(recipe: Recipe, clipnorm: float | None = None) -> list[float]:
    """The numbers of a step in the columns that the kernels read."""
    limits = [recipe.clipnorm or 0.0, recipe.global_clipnorm or 0.0] if clipnorm is None else [clipnorm, 0.0]
    decisions = float(recipe.overwrite), float(recipe.is_update), recipe.factor
    return [*map(float, recipe.coefficients()), *decisions, *limits]


def _options(recipe: Recipe) -> tuple[Flag, Flag, Flag]:
    amsgrad, average, accumulate, _ = (True if wanted else None for wanted in recipe.variant)
    return amsgrad, average, accumulate


def chunk_of(elements: int, processors: int) -> int:
    """How many elements a block of threads treats: enough blocks for all processors, and not too little for each."""
    unit = 4 * kernels.BLOCK
    return unit * int(np.clip(elements // (8 * processors * unit), 1, 8))


def _with_decay(runs: Matrix, decayed: Sequence[bool]) -> Matrix:
    """The runs of an address table, as the kernels of a GPU want them."""
    result = np.zeros((len(runs), kernels.RUN_COLUMNS), np.int64)
    result[:, kernels.ARRAY], result[:, kernels.COUNT] = runs[:, 0], runs[:, 2]
    result[:, kernels.DECAYED] = np.asarray(decayed)[runs[:, 0]]
    result[:, kernels.P_AT :] = runs[:, 3:]
    return result


def _or_one(x: Matrix) -> Matrix:
    """At least one row, since nothing has no address."""
    return x if len(x) else np.zeros((1, *x.shape[1:]), x.dtype)


def _processors() -> int:
    return 1 if SIMULATED else int(_cuda.get_current_device().MULTIPROCESSOR_COUNT)


def _is_over(event: Any) -> bool:
    """Whether what an event marks has happened."""
    return SIMULATED or bool(event.query())


def _wait_for_all() -> None:
    """Wait for whatever the current GPU has to do, in any stream."""
    _cuda.synchronize()


def _stream(handle: int) -> Any:
    """Numba's stream for a handle; never its 0, with which copies wait."""
    return cuda.legacy_default_stream() if SIMULATED or handle in (0, 1) else cuda.external_stream(handle)


def _is_capturing(handle: int) -> bool:
    if SIMULATED or handle in _NO_STREAM or handle < 0:
        return False
    from cuda.bindings import driver

    error, status = driver.cuStreamIsCapturing(handle)
    return bool(error == 0 and int(status) == int(driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE))
