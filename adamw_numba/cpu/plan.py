"""Many arrays become one table of addresses and one work list: built once, refreshed at each step."""

import itertools
import math
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.compiled import cache_folder
from ..arrays.masters import kept_by
from ..arrays.moments import BLOCK, MOMENTS, NARROWER, name_word
from ..arrays.runs import ARRAY, COUNT, P_STEP, PLACE, PLACE_STEP, START, chunks_of
from ..arrays.table import AddressTable
from ..coefficients import Recipe
from ..update import M_SCALE, MASTER, V_SCALE, M, Storage, V
from . import blocks, exact
from . import kernels as cpu
from .pool import MOST_PARTS, MOST_THREADS, call_helpers, helpers_of, job_call
from .prefetch import NONE, Trial, Way, way_of
from .walk import walk_kernel

FAR = 2**23  # elements, from which on arrays are taken to lie in memory, not in a cache
_LARGEST = sys.float_info.max
# Packing takes a third of what assigning a tuple to an array does.
_pack_numbers = struct.Struct(f"={blocks.HOW_MANY}d").pack_into
_pack_rates = struct.Struct("=2d").pack_into  # the first two
_pack_noise, _NOISE_AT = struct.Struct("=2d").pack_into, 8 * blocks.SEED
_pack_varying = struct.Struct("=4d").pack_into  # all that vary
RESCUE = 2.0**-600  # brings the square of any finite float64 into range

Call = tuple[Any, ...]
Ready = tuple[list[Call], tuple[int, int]]  # calls; how many helpers they can do with, for how many elements
Matrix = np.ndarray[Any, Any]


class Group(NamedTuple):
    """The chunks that one kernel walks: variables and gradients stored alike."""

    storage: Storage
    work: Matrix
    partials: Matrix
    block: Matrix
    elements: int


class Plan:
    """The arrays of one optimizer that lie on the host, as the compiled kernels see them.

    Attributes
    ----------
    count : int
        How many variables there are, those of other places included.
    factors : array of float64, shape (3, n)
        Of each variable, the group that it is in, what the scale of its gradient is multiplied with, and its name.
    numbers : array of float64, one row for each group
        Those of the step that is taken, as the kernels read them.
    groups : list of Group
    additions : int or None
        The most roundings on the way from squares to the sum of all; None where squares are not those of float32.
    """

    def __init__(
        self,
        names: Sequence[str],
        variables: Sequence[Array],
        slots: Sequence[dict[str, Array]],
        which: Sequence[int],
        groups: int,
        places: Sequence[Any] | None = None,
    ) -> None:
        self._threads: int | None = None
        self.count = len(names)
        self.factors = np.ones((blocks.FACTOR_ROWS, len(names)))
        self.factors[blocks.WHICH] = which
        self.factors[blocks.NAME] = list(map(name_word, names))
        self.numbers = np.zeros((groups, blocks.HOW_MANY))
        self._packed = memoryview(self.numbers.reshape(-1))  # type: ignore[arg-type]
        self._rows = range(0, self.numbers.nbytes, self.numbers.strides[0])  # where each begins
        self._clipped = False
        self._made: dict[object, Ready] = {}
        self._tasks: list[Matrix] = []
        self._loaded: Recipe | None = None  # whose numbers and calls are ready
        self._loaded_calls: Ready = [], (0, 0)
        self._is_single = True  # float32 arithmetic alone, in which no square of a finite number is out of range
        self.groups: list[Group] = []
        self._far: list[Group] = []  # those whose arrays lie in memory
        self._trial: Trial | None = None
        self._has_more = False  # whether a step rounds moments, or goes a way that is tried
        self._trials: dict[str, Trial] = {}
        self._sums = np.zeros((MOST_PARTS, cpu.LANES))
        self.additions: int | None = None
        self._scale = 1.0  # of the last sums of squares
        self.table = AddressTable("cpu", names, variables, slots, places)
        self._rounds = set(self.table.moments.values()) != {"float32"}
        self._laid_out: object = None  # the arrangement that `groups` are made for
        self._lay_out()
        walk_kernel()  # is compiled now: all updates share it

    def lend(self) -> None:
        """Note that the user has been given the slots."""
        self.table.lend()

    def begins_as_before(self, gradients: Sequence[Array | None]) -> bool:
        """Begin a step for which nothing has changed but values and addresses; otherwise `begin` is to do it."""
        return self.table.reads(gradients) == self.count

    def begin(self, gradients: Sequence[Array | None]) -> None:
        """Read where all arrays lie, and check those that have changed: see `AddressTable.refresh`."""
        self.table.refresh(gradients)
        self._lay_out()

    def _lay_out(self) -> None:
        """Arrange the work again, and have the table remember, if anything but addresses has changed."""
        if self._laid_out is not self.table.arrangement:
            self._arrange()
            self._laid_out = self.table.arrangement
        if self.table.is_new:
            self.table.remember()

    def norms(self, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[Matrix, float]:
        """The norm of each variable's gradient (with what it has accumulated), 0 elsewhere, and of all together.

        float64 sums of chunks, added in order. Where the sum of float64 squares over- or underflows, it is taken again
        at another scale, so that a norm is not finite only if an element is not. Beside others that are larger, one
        below 1e-154 may count as 0.
        """
        if recipe is not self._loaded:
            self._load(recipe)
        if self._is_single:
            squares = self._squares(recipe, 1.0)
            return np.sqrt(squares), math.sqrt(cpu.add_in_order(squares))
        with np.errstate(all="ignore"):
            return self._norms_in_range(recipe)

    def steady_norms(self, recipe: Recipe, norms: Matrix, norm: float) -> tuple[Matrix, float]:
        """The same norms, of gradients that are finite, as a clip takes them: see exact.py.

        Those of single variables only where each clips its own gradient.
        """
        if self.additions is None:
            return norms, norm
        norms = norms.copy() if recipe.clips_each else norms
        odd = recipe.clips_each and exact.steady_each(norms, self.additions)
        norm = exact.steady(norm, self.additions)
        if odd or norm < 0:  # about once in ten thousand steps
            digits = self.exact_squares(recipe)
            norms = np.where(norms < 0, exact.norms_of(digits), norms)
            norm = exact.norms_of(digits.sum(axis=0, keepdims=True)).item()
        return norms, norm

    def chunk_squares(self) -> dict[str, Matrix] | None:
        """The sums of squares of each variable's chunks as the last norms had them; None where they are scaled."""
        if self._scale != 1 and any(group.partials.any() for group in self.groups):
            return None
        found: dict[str, list[Matrix]] = {}
        for group in self.groups:
            which = group.work[:, ARRAY]
            ends = np.flatnonzero(np.diff(which)) + 1
            for a, sums in zip(which[np.append(0, ends)].tolist(), np.split(group.partials, ends), strict=True):
                found.setdefault(self.table.names[a], []).append(sums)
        return {name: np.concatenate(sums) for name, sums in found.items()}

    def exact_squares(self, recipe: Recipe) -> Matrix:
        """The exact sum of the squares of each variable's gradient, as digits."""
        digits = np.zeros((len(self.table.names), exact.DIGITS), np.int64)
        for group in self.groups:
            storage = group.storage
            likes = cpu.LIKE[storage.g], cpu.LIKE[storage.compute]
            flags = storage.strided or None, recipe.variant.accumulate or None
            exact.add_squares(group.block.ctypes.data, *likes, *flags, digits)
        return digits

    def work(self, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[Sequence[Call], list[Call]]:
        """What is to be done that may be repeated: nothing; and what may not: compiled calls, once."""
        if recipe is not self._loaded:
            self._load(recipe)
        if recipe.takes_norm:
            self.numbers[:, blocks.SCALE] = recipe.scales()
            if recipe.clips is not None or self._clipped:
                self._set_clips(recipe.clips)
        calls, helpers = self._loaded_calls
        if helpers[0]:
            call_helpers(*helpers)
        if self._has_more:
            calls = self._more(recipe, calls)
        if recipe.is_plain:
            return (), [(_pack_rates, self._packed, 0, recipe.alpha, recipe.decay), *calls]
        if not recipe.others:
            varying = recipe.alpha, recipe.decay, recipe.epsilon, recipe.lead
            return (), [(_pack_varying, self._packed, 0, *varying), *calls]
        rows = zip(self._rows, recipe.groups(), strict=True)
        return (), [*[(_pack_varying, self._packed, at, *each.varying()) for at, each in rows], *calls]

    def _load(self, recipe: Recipe) -> None:
        """Make ready for steps of another kind than the last one: all their numbers, and what they call."""
        self._loaded = None
        if recipe.threads != self._threads:
            self._made, self._tasks, self._threads = {}, [], recipe.threads
        for at, each in zip(self._rows, recipe.groups(), strict=True):
            _pack_numbers(self._packed, at, *each.c, recipe.overwrite, 1.0, 0.0, 0.0)
        if self._clipped:
            self._set_clips(None)
        kernel = (cpu.update_kernel, recipe.variant) if recipe.is_update else (cpu.accumulate_kernel,)
        self._loaded_calls = self._calls(*kernel)
        self._choose_way(recipe)
        self._loaded = recipe

    def _choose_way(self, recipe: Recipe) -> None:
        """Have large steps ask for elements in the way that is best for their kind, or try which that is."""
        self._trial, storages = None, [group.storage for group in self._far]
        if recipe.is_update and not all(storage.strided for storage in storages):
            kind = f"{recipe.threads or MOST_THREADS} threads, {recipe.variant}, {storages}"
            way = way_of(kind, cache_folder())
            if isinstance(way, Way):
                self._go(way)
            else:
                self._trial = self._trials.setdefault(kind, way)
        self._has_more = self._rounds or self._trial is not None

    def _more(self, recipe: Recipe, calls: list[Call]) -> list[Call]:
        """The calls of a step that rounds moments, or goes a way that is tried."""
        if self._rounds:
            calls = [(_pack_noise, self._packed, _NOISE_AT, float(recipe.seed), float(recipe.number % 2**32)), *calls]
        return calls if self._trial is None else self._tried(calls)

    def _tried(self, calls: list[Call]) -> list[Call]:
        """The calls of a step that goes one of the ways, and is timed."""
        trial: Trial = self._trial  # type: ignore[assignment]
        way, is_known = trial.next()
        self._go(way)
        if is_known:
            self._trial, self._has_more = None, self._rounds
        return calls if is_known else trial.timed(calls)

    def _go(self, way: Way) -> None:
        for group in self._far:
            group.block[blocks.PIECE : blocks.LEVEL + 1] = way

    def _set_clips(self, clips: Matrix | None) -> None:
        """What each variable's gradient is multiplied with; None where nothing is clipped by norm."""
        self.factors[blocks.CLIP] = 1.0 if clips is None else clips
        self._clipped = clips is not None

    def _calls(self, kernel: Callable[..., Any], *options: Any) -> Ready:
        """What to call, with no Python in between, to run a kernel over every group; what is new is compiled here."""
        made = self._made.get((kernel, *options))
        if made is None:
            kernels = [kernel(group.storage, *options) for group in self.groups]
            tasks = [
                np.array([group.block.ctypes.data, *own.others], np.int64)
                for own, group in zip(kernels, self.groups, strict=True)
            ]
            calls = [
                job_call(own.address, task.ctypes.data, group.elements, self._threads)
                for own, task, group in zip(kernels, tasks, self.groups, strict=True)
            ]
            self._tasks += tasks  # whose addresses are in the calls
            most = max((group.elements for group in self.groups), default=0)
            made = self._made[kernel, *options] = calls, (max(map(helpers_of, calls), default=0), most)
        return made

    def _norms_in_range(self, recipe: Recipe) -> tuple[Matrix, float]:
        squares = self._squares(recipe, 1.0)
        norms, whole = np.sqrt(squares), cpu.add_in_order(squares)
        if 1e-280 < whole < np.inf:
            return norms, float(np.sqrt(whole))
        for scale, odd in ((RESCUE, ~np.isfinite(squares)), (1 / RESCUE, squares < 1e-280)):
            if odd.any():
                scaled = np.sqrt(self._squares(recipe, scale))
                rescued = np.where(np.isfinite(scaled), np.minimum(scaled / scale, _LARGEST), scaled)
                norms = np.where(odd, rescued, norms)
        peak = float(norms.max())
        if not 0 < peak < np.inf:
            return norms, peak
        return norms, min(peak * float(np.sqrt(cpu.add_in_order((norms / peak) ** 2))), _LARGEST)

    def _squares(self, recipe: Recipe, scale: float) -> Matrix:
        squares = np.zeros(len(self.table.names))
        self.numbers[0, blocks.SQUARE_SCALE] = self._scale = scale
        calls, helpers = self._calls(cpu.square_kernel, recipe.variant.accumulate)
        if helpers[0]:
            call_helpers(*helpers)
        for function, *arguments in calls:
            function(*arguments)
        for group in self.groups:
            if (
                scale != 1 and group.storage.compute == "float32"
            ):  # there the kernel takes no scale: no square overflows
                for _ in range(2):
                    np.multiply(group.partials, scale, out=group.partials)
            cpu.gather_squares(group.work, group.partials, squares)
        return squares

    def _arrange(self) -> None:
        self._made, self._tasks, self._loaded, self.groups = {}, [], None, []
        has_maximum = np.array(["velocity_hat" in own for own in self.table.slots])
        kinds = np.array(
            [MOMENTS.index(self.table.moments.get(i, "float32")) for i in range(len(self.table.names))], int
        )
        for (p_type, g_type), runs in self.table.runs():
            sizes = [arrays.ITEMSIZE[p_type], arrays.ITEMSIZE[g_type], arrays.ITEMSIZE[arrays.COMPUTE[p_type]]]
            own_kinds, amsgrad = kinds[runs[:, ARRAY]], has_maximum[runs[:, ARRAY]]
            strided = (runs[:, P_STEP:PLACE] != sizes).any(axis=1)
            strided |= (own_kinds != 0) & (runs[:, PLACE_STEP] != 1)  # noise follows from where elements are
            for is_strided, has_top, kind in itertools.product((False, True), (False, True), range(len(MOMENTS))):
                own = runs[(strided == is_strided) & (amsgrad == has_top) & (own_kinds == kind)]
                if len(own):
                    self.groups.append(self._group(p_type, g_type, is_strided, has_top, MOMENTS[kind], chunks_of(own)))
        self._far = [group for group in self.groups if group.elements >= FAR]
        self._is_single = all(group.storage.compute == "float32" for group in self.groups)
        chunks = sum(len(group.work) for group in self.groups)
        self.additions = exact.IN_CHUNK + chunks + len(self.table.names) if self._is_single else None

    def _group(self, p_type: str, g_type: str, strided: bool, amsgrad: bool, moments: str, work: Matrix) -> Group:
        ends = np.cumsum(work[:, COUNT])
        work[1:, START] = ends[:-1]
        partials, block = np.zeros(len(work)), np.zeros(blocks.BLOCK_WORDS, np.int64)
        own = {
            blocks.WORK: work,
            blocks.TABLE: self.table.addresses,
            blocks.FACTORS: self.factors,
            blocks.NUMBERS: self.numbers,
            blocks.PARTIALS: partials,
            blocks.SUMS: self._sums,
        }
        for entry, array in own.items():
            block[entry] = array.ctypes.data
        master = kept_by(self.table.slots[work[0, ARRAY]])
        block[blocks.CHUNKS], block[blocks.ARRAYS] = len(work), len(self.table.names)
        block[blocks.IS_FAR], block[blocks.STRIDED] = ends[-1] >= FAR, strided
        for row in (M, V):
            block[blocks.HALVED + row] = NARROWER[moments]
        for row in (M_SCALE, V_SCALE):  # which have four bytes for a block, where other slots have four for an element
            block[blocks.HALVED + row] = BLOCK.bit_length() - 1
        block[blocks.HALVED + MASTER] = master == "remainder"
        block[blocks.PIECE : blocks.LEVEL + 1] = NONE
        storage = Storage(p_type, g_type, arrays.COMPUTE[p_type], strided, master, amsgrad, moments)
        return Group(storage, work, partials, block, int(ends[-1]))
