"""Many arrays become one table of addresses and one work list: built once, refreshed at each step."""

import math
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.runs import ARRAY, COUNT, P_STEP, START, chunks_of
from ..arrays.table import AddressTable
from ..update import Coefficients
from . import kernels as cpu
from .pool import MOST_PARTS, call_helpers, helpers_of, job_call

FAR = 2**23  # elements, from which on arrays are taken to lie in memory, not in a cache
_LARGEST = sys.float_info.max
_NUMBERS = struct.Struct(f"={cpu.HOW_MANY}d")  # packing takes a third of what assigning a tuple does
_RATES = struct.Struct("=2d")  # the first two
RESCUE = 2.0**-600  # brings the square of any finite float64 into range

Call = tuple[Any, ...]
Flag = bool | None  # True or None: None is what Numba compiles away
Matrix = np.ndarray[Any, Any]


class Group(NamedTuple):
    """The chunks that one kernel walks: variables and gradients stored alike."""

    p_type: str
    g_type: str
    compute: str
    strided: bool | None
    master: bool | None
    work: Matrix
    partials: Matrix
    block: Matrix
    block_address: int
    elements: int


class Plan:
    """The arrays of one optimizer that lie on the host, as the compiled kernels see them.

    Attributes
    ----------
    factors : array of float64, shape (2, n)
        What each variable multiplies the decay and the scale of its gradient with.
    threads : int or None
        The most threads to use; None for Numba's own number.
    helpers : pair of int
        How many the calls made last can do with, and for how many elements.
    repeat : object
        What the owner notes about the last step, gone as soon as other numbers are set or the work is laid out anew.
    """

    def __init__(
        self,
        names: Sequence[str],
        variables: Sequence[Array],
        slots: Sequence[dict[str, Array]],
        decayed: Sequence[bool],
    ) -> None:
        self.threads: int | None = None
        self.factors = np.ones((2, len(names)))
        self.factors[cpu.DECAY] = decayed
        self.numbers = np.zeros(cpu.HOW_MANY)
        self._packed = memoryview(self.numbers)  # type: ignore[arg-type]
        self._clipped = False
        # By options and threads: the calls, one for each group, and `helpers`.
        self._made: dict[tuple[Any, ...], tuple[list[Call], tuple[int, int]]] = {}
        self.repeat: Any = None
        self.groups: list[Group] = []
        self._sums = np.zeros((MOST_PARTS, cpu.LANES))
        self.helpers = 0, 0
        self.table = AddressTable("cpu", names, variables, slots)
        self._laid_out: object = None  # the arrangement that `groups` are made for
        self.begin([None] * len(names))

    def begin(self, gradients: Sequence[Array | None]) -> None:
        """Read where all arrays lie, and check those that have changed: see `AddressTable.refresh`."""
        self.table.refresh(gradients)
        if self._laid_out is not self.table.arrangement:
            self._arrange()
            self._laid_out = self.table.arrangement

    def update_calls(
        self, c: Coefficients, top: Flag, average: Flag, total: Flag, limit: Flag, overwrite: bool
    ) -> list[Call]:
        """The calls that update every variable which has a gradient, and move the averages of the others."""
        self.set_numbers(c, overwrite)
        return self._calls(
            ("update", top, average, total, limit),
            lambda g: cpu.update_kernel(g.p_type, g.g_type, g.compute, top, average, total, g.master, limit, g.strided),
        )

    def accumulate_calls(self, c: Coefficients) -> list[Call]:
        """The calls that add every gradient to its accumulator."""
        self.set_numbers(c, False)
        return self._calls(("accumulate",), lambda g: cpu.accumulate_kernel(g.g_type, g.compute, g.strided))

    def set_numbers(self, c: Coefficients, overwrite: bool) -> None:
        """Put the numbers of this step where the kernels read them."""
        self.repeat = None
        _NUMBERS.pack_into(self._packed, 0, *c, overwrite, 1.0)

    def set_rates(self, alpha: float, decay: float, scale: float | None = None) -> None:
        """The same, where all other numbers are those of the last step; so is the scale, if it is not given."""
        _RATES.pack_into(self._packed, 0, alpha, decay)
        if scale is not None:
            self.numbers[cpu.SCALE] = scale

    def set_clips(self, clips: Matrix | None) -> None:
        """What each variable's gradient is multiplied with; None where nothing is clipped by norm."""
        if clips is not None or self._clipped:
            self.factors[cpu.CLIP] = 1.0 if clips is None else clips
            self._clipped = clips is not None

    def _calls(self, key: tuple[Any, ...], kernel: Callable[[Group], Any]) -> list[Call]:
        """What to call, with no Python in between, to run a kernel over every group; what is new is compiled here."""
        made = self._made.get((key, self.threads))
        if made is None:
            calls = [job_call(kernel(g).address, g.block_address, g.elements, self.threads) for g in self.groups]
            helpers = max(map(helpers_of, calls), default=0), max((g.elements for g in self.groups), default=0)
            made = self._made[key, self.threads] = calls, helpers
        calls, self.helpers = made
        self.call_helpers()
        return calls

    def call_helpers(self) -> None:
        """Have helpers stand by for the calls made last."""
        if self.helpers[0]:
            call_helpers(*self.helpers)

    def norms(self, total: Flag, elsewhere: dict[int, float]) -> tuple[Matrix, float]:
        """The norm of each variable's gradient (with what it has accumulated, if `total`), and of all together.

        float64 sums of chunks, added in order. `elsewhere` holds the norms of variables that are not on the host.
        Where the sum of float64 squares over- or underflows, it is taken again at another scale, so that a norm is not
        finite only if an element is not. Beside others that are larger, one below 1e-154 may count as 0.
        """
        if not elsewhere and all(group.compute == "float32" for group in self.groups):
            squares = self._squares(total, 1.0, elsewhere)
            return np.sqrt(squares), math.sqrt(cpu.add_in_order(squares))
        with np.errstate(all="ignore"):
            return self._norms_in_range(total, elsewhere)

    def _norms_in_range(self, total: Flag, elsewhere: dict[int, float]) -> tuple[Matrix, float]:
        squares = self._squares(total, 1.0, elsewhere)
        norms, whole = np.sqrt(squares), cpu.add_in_order(squares)
        if 1e-280 < whole < np.inf:
            return norms, float(np.sqrt(whole))
        for scale, odd in ((RESCUE, ~np.isfinite(squares)), (1 / RESCUE, squares < 1e-280)):
            if odd.any():
                scaled = np.sqrt(self._squares(total, scale, elsewhere))
                rescued = np.where(np.isfinite(scaled), np.minimum(scaled / scale, _LARGEST), scaled)
                norms = np.where(odd, rescued, norms)
        peak = float(norms.max())
        if not 0 < peak < np.inf:
            return norms, peak
        return norms, min(peak * float(np.sqrt(cpu.add_in_order((norms / peak) ** 2))), _LARGEST)

    def _squares(self, total: bool | None, scale: float, elsewhere: dict[int, float]) -> Matrix:
        squares = np.zeros(len(self.table.names))
        self.numbers[cpu.SQUARE_SCALE] = scale
        for function, *arguments in self._calls(
            ("square", total), lambda g: cpu.square_kernel(g.g_type, g.compute, total, g.strided)
        ):
            function(*arguments)
        for group in self.groups:
            if scale != 1 and group.compute == "float32":  # there the kernel knows no scale: no square overflows
                for _ in range(2):
                    np.multiply(group.partials, scale, out=group.partials)
            cpu.gather_squares(group.work, group.partials, squares)
        for i, norm in elsewhere.items():
            squares[i] = np.square(np.float64(norm) * scale)
        return squares

    def _arrange(self) -> None:
        self.repeat = None  # whose calls are those of the blocks that go
        self._made = {}
        self.groups = []
        for (p_type, g_type), runs in self.table.runs():
            sizes = [arrays.ITEMSIZE[p_type], arrays.ITEMSIZE[g_type], arrays.ITEMSIZE[arrays.COMPUTE[p_type]]]
            dense = (runs[:, P_STEP:] == sizes).all(axis=1)
            for strided, own in ((None, runs[dense]), (True, runs[~dense])):
                if len(own):
                    self.groups.append(self._group(p_type, g_type, strided, chunks_of(own)))

    def _group(self, p_type: str, g_type: str, strided: bool | None, work: Matrix) -> Group:
        ends = np.cumsum(work[:, COUNT])
        work[1:, START] = ends[:-1]
        partials, block = np.zeros(len(work)), np.zeros(cpu.BLOCK_WORDS, np.int64)
        own = {
            cpu.WORK: work,
            cpu.TABLE: self.table.addresses,
            cpu.FACTORS: self.factors,
            cpu.NUMBERS: self.numbers,
            cpu.PARTIALS: partials,
            cpu.SUMS: self._sums,
        }
        for entry, array in own.items():
            block[entry] = array.ctypes.data
        block[cpu.CHUNKS], block[cpu.ARRAYS] = len(work), len(self.table.names)
        block[cpu.IS_FAR] = ends[-1] >= FAR
        master = True if "master" in self.table.slots[work[0, ARRAY]] else None
        compute = arrays.COMPUTE[p_type]
        return Group(p_type, g_type, compute, strided, master, work, partials, block, block.ctypes.data, int(ends[-1]))
