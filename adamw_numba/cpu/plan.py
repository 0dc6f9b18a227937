"""Many arrays become one table of addresses and one work list: built once, refreshed at each step."""

import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array, Layout
from ..arrays import reader as headers
from ..arrays.torch_storage import Tensors
from ..update import Coefficients
from . import kernels as cpu
from .pool import MOST_PARTS, call_helpers, helpers_of, job_call

CHUNK = 16_384  # elements
FAR = 2**23  # elements, from which on arrays are taken to lie in memory, not in a cache
_LARGEST = sys.float_info.max
_NUMBERS = struct.Struct(f"={cpu.HOW_MANY}d")  # packing takes a third of what assigning a tuple does
_FAILED = -1
_RATES = struct.Struct("=2d")  # the first two
RESCUE = 2.0**-600  # brings the square of any finite float64 into range

Call = tuple[Any, ...]
Flag = bool | None  # True or None: None is what Numba compiles away
Matrix = np.ndarray[Any, Any]
_ROWS = {
    "momentum": cpu.M,
    "velocity": cpu.V,
    "velocity_hat": cpu.TOP,
    "average": cpu.AVERAGE,
    "gradient_accumulator": cpu.TOTAL,
    "master": cpu.MASTER,
}
_NAMES = {row: key for key, row in _ROWS.items()}


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


class Verdict(NamedTuple):
    """What a full check of an array found; it holds as long as the array's signature does."""

    signature: object
    layout: Layout
    low: int  # the extent, relative to the address
    high: int
    direct: bool
    record: list[int]  # the same, for `headers.read`; of a gradient


_UNSEEN = Verdict("no gradient yet", Layout(0, (), (), "float32"), 0, 0, True, headers.UNSEEN)


class Plan:
    """The arrays of one optimizer that lie at one place: where they are, and what is known of them.

    Parameters
    ----------
    place : str
        ``cpu``, or a GPU: ``cuda:0``.
    names : list of str
    variables : list of arrays
        None for a variable that lies elsewhere, which the plan skips.
    slots : list of dict
        The state of each variable, by the names of `_ROWS`: arrays of one layout.

    Attributes
    ----------
    table : array of int64, shape (8, n)
        The address of each variable, its gradient and its slots.
    own : list of int
        Which variables lie here.
    """

    def __init__(
        self, place: str, names: Sequence[str], variables: Sequence[Array], slots: Sequence[dict[str, Array]]
    ) -> None:
        self.place, self.names, self.variables, self.slots = place, names, variables, slots
        self.own = [i for i, variable in enumerate(variables) if variable is not None]
        self.table = np.zeros((8, len(names)), np.int64)
        self._verdicts: dict[tuple[str, int], Verdict] = {}
        self._scratch: dict[int, Array] = {}
        self._held: list[Array | None] = []
        self._arrangement: list[tuple[Layout, Layout]] = []
        # What a step writes: row and column in the table, and the array; the variables first.
        self._places = [(cpu.P, i, variables[i]) for i in self.own]
        self._places += [(_ROWS[key], i, slot) for i in self.own for key, slot in slots[i].items()]
        self._slot_layouts = [arrays.layout_of(array) for _, _, array in self._places]
        self._layout_of_slots = {i: arrays.layout_of(slots[i]["momentum"]) for i in self.own}
        self._claimed: list[Layout] = []
        self._memory: list[tuple[int, int]] = []
        self._ranges = np.zeros((2, 0), np.int64)
        self._reader: headers.Reader | None = None
        self._tensors: Tensors | None = None
        self._known: tuple[list[object], list[Verdict], Matrix] | None = None
        self.refresh([None] * len(names))

    def refresh(self, gradients: Sequence[Array | None]) -> None:
        """Read the address of every array, and check whatever has changed since the last step.

        Raises
        ------
        TypeError, ValueError
            If a gradient does not fit its variable or shares memory with what a step writes, or a variable has become
            another kind of array. Nothing that the user owns has been written.
        """
        if self.reads(gradients) != _FAILED:
            return
        if any(issubclass(kind, np.generic) for kind in set(map(type, gradients))):
            gradients = self._held = [np.asarray(g) if isinstance(g, np.generic) else g for g in gradients]
            if self.reads(gradients) != _FAILED:
                return
        if self._reader is None and self._known is not None and self._is_as_known(gradients, *self._known):
            return
        self._reader = self._tensors = self._known = None
        written = [self._written_layout(k) for k in range(len(self._places))]
        if written != self._claimed:
            self._claim(written)
        pairs = [(written[k], self._gradient_layout(i, gradients[i])) for k, i in enumerate(self.own)]
        arrangement = [(p._replace(address=0), g._replace(address=0)) for p, g in pairs]
        if arrangement != self._arrangement:
            self._arrangement = []
            self._arrange(arrangement)
            self._arrangement = arrangement
        for (row, i, _), layout in zip(self._places, written, strict=True):
            self.table[row, i] = layout.address
        for i, (_, g) in zip(self.own, pairs, strict=True):
            self.table[cpu.G, i] = g.address
        self._memory = [arrays.memory(array) for _, _, array in self._places]
        self._known = self._signatures()
        self._remember()

    def reads(self, gradients: Sequence[Array | None]) -> int:
        """Read the address of every array in one compiled call; how many gradients there are, -1 if that fails."""
        reader = self._reader
        if reader is None or type(gradients) is not list or len(gradients) != reader.count:
            return _FAILED
        present: int = headers.read(id(gradients), reader.address)
        if present < 0 or self._tensors is None or self._tensors.are_as_known(gradients):
            return present
        return _FAILED

    def _is_as_known(
        self, gradients: Sequence[Array | None], signatures: list[object], known: list[Verdict], spans: Matrix
    ) -> bool:
        """Read all addresses, where nothing else has changed; False where a closer look is needed."""
        found = [gradients[i] for i in self.own]
        if [arrays.signature(self.variables[i]) for i in self.own] != signatures:
            return False
        if any(g is not None and arrays.signature(g) != seen.signature for g, seen in zip(found, known, strict=True)):
            return False
        if [arrays.memory(array) for _, _, array in self._places] != self._memory:
            return False
        addresses = np.array([0 if g is None else arrays.address(g) for g in found], np.int64)
        lows, highs = self._ranges
        nearest = np.searchsorted(highs, addresses + spans[0], side="right")
        beginnings = np.append(lows, np.iinfo(np.int64).max)[nearest]
        if ((addresses != 0) & (beginnings < addresses + spans[1])).any():
            return False
        for k, (g, seen) in enumerate(zip(found, known, strict=True)):
            if g is not None and not seen.direct:
                addresses[k] = self._cast(self.own[k], g).address
        self.table[cpu.G, self.own] = addresses
        return True

    def _signatures(self) -> tuple[list[object], list[Verdict], Matrix]:
        """What `_is_as_known` compares the next step's arrays with."""
        known = [self._verdicts.get(("gradient", i), _UNSEEN) for i in self.own]
        spans = np.array([[seen.low for seen in known], [seen.high for seen in known]], np.int64)
        return [self._verdicts["variable", i].signature for i in self.own], known, spans

    def _written_layout(self, k: int) -> Layout:
        """Where a variable or a slot lies now; it must still be what it was when the optimizer was built."""
        row, i, array = self._places[k]
        known = self._slot_layouts[k]
        if row != cpu.P:
            if arrays.family(array) == "torch":
                arrays.check_tensor(self._name(k), array)
            layout = arrays.layout_of(array)
            if layout[1:] != known[1:] or not getattr(getattr(array, "flags", None), "writeable", True):
                raise ValueError(
                    f"{self._name(k)} has become an array of shape {layout.shape} and dtype "
                    f"{layout.dtype}, or read-only; expected it to stay as it was built"
                )
            return layout
        seen, signature = self._verdicts.get(("variable", i)), arrays.signature(array)
        if seen is None or seen.signature != signature:
            if arrays.place(array) != self.place:
                raise ValueError(
                    f"variable {self.names[i]!r} has moved to {arrays.device(array)}; expected it on {self.place}"
                )
            arrays.check_variable(self.names[i], array)
            layout = arrays.layout_of(array)
            if (layout.shape, layout.dtype) != (known.shape, known.dtype):
                raise ValueError(
                    f"variable {self.names[i]!r} has become an array of shape {layout.shape} and dtype {layout.dtype}; "
                    f"expected shape {known.shape} and dtype {known.dtype}, as built"
                )
            seen = self._verdicts["variable", i] = _verdict(array, signature, layout, True)
        return seen.layout._replace(address=arrays.address(array))

    def _gradient_layout(self, i: int, gradient: Array | None) -> Layout:
        """Where a kernel reads a gradient; at address 0, laid out like the last one, where there is none."""
        seen = self._verdicts.get(("gradient", i))
        if gradient is None:
            if seen is not None and seen.direct:
                return seen.layout._replace(address=0)
            return (arrays.layout_of(self._scratch[i]) if seen else self._layout_of_slots[i])._replace(address=0)
        signature = arrays.signature(gradient)
        if seen is None or signature is None or seen.signature != signature:
            arrays.check_gradient(self.names[i], gradient, self.variables[i])
            direct = arrays.read_directly(gradient, self.variables[i])
            seen = _verdict(gradient, signature, arrays.layout_of(gradient), direct)
        self._check_apart(i, arrays.address(gradient), seen)
        layout = seen.layout._replace(address=arrays.address(gradient)) if seen.direct else self._cast(i, gradient)
        self._verdicts["gradient", i] = seen
        return layout

    def _cast(self, i: int, gradient: Array) -> Layout:
        """Where a gradient lies that has been cast to what the kernels read."""
        if i not in self._scratch:
            dtype = arrays.SLOT[arrays.dtype_name(self.variables[i])]
            self._scratch[i] = arrays.zeros_like(self.variables[i], dtype)
        arrays.cast(self._scratch[i], gradient)
        return arrays.layout_of(self._scratch[i])

    def _claim(self, written: list[Layout]) -> None:
        """Note the ranges of memory that a step writes; refuse variables that overlap."""
        whole = [(*arrays.extent(layout), k) for k, layout in enumerate(written)]
        variables = sorted(whole[: len(self.own)])
        for position, (_, high, k) in enumerate(variables):
            for low, _, other in variables[position + 1 :]:
                if low >= high:
                    break
                if arrays.share_memory(written[k], written[other]):
                    raise ValueError(
                        f"{self._name(k)} and {self._name(other)} share memory; expected arrays that do not overlap"
                    )
        ranges: list[list[int]] = []
        for low, high, _ in sorted(whole):
            if ranges and low < ranges[-1][1]:
                ranges[-1][1] = max(ranges[-1][1], high)
            elif low < high:
                ranges.append([low, high])
        self._ranges = np.array(ranges, np.int64).reshape(-1, 2).T.copy()
        self._claimed = written

    def _name(self, k: int) -> str:
        row, i, _ = self._places[k]
        return f"variable {self.names[i]!r}" if row == cpu.P else f"the {_NAMES[row]} of {self.names[i]!r}"

    def _check_apart(self, i: int, address: int, seen: Verdict) -> None:
        """Refuse a gradient that shares memory with what a step writes."""
        lows, highs = self._ranges
        nearest = int(np.searchsorted(highs, address + seen.low, side="right"))
        if nearest == lows.size or lows[nearest] >= address + seen.high or seen.low == seen.high:
            return
        layout = seen.layout._replace(address=address)
        for k, other in enumerate(self._claimed):
            low, high = arrays.extent(other)
            if low < address + seen.high and address + seen.low < high and arrays.share_memory(layout, other):
                raise ValueError(
                    f"the gradient of {self.names[i]!r} shares memory with {self._name(k)}; expected a copy"
                )

    def _arrange(self, arrangement: Sequence[tuple[Layout, Layout]]) -> None:
        """Lay out the work for variables and gradients of these layouts."""
        raise NotImplementedError

    def _runs(self, arrangement: Sequence[tuple[Layout, Layout]]) -> Iterator[tuple[tuple[str, str], Matrix]]:
        """For each variable, how it and its gradient are stored, and its elements as evenly spaced runs."""
        for i, (p, g) in zip(self.own, arrangement, strict=True):
            runs = _runs(i, p, g, self._layout_of_slots[i])
            if len(runs):
                yield (_real(p.dtype), _real(g.dtype)), runs

    def _remember(self) -> None:
        """Note what `reads` compares the next step's arrays with, if it can read them all."""
        gradients = [self._verdicts.get(("gradient", i), _UNSEEN) for i in range(len(self.names))]
        if len(self.own) < len(self.names) or not all(seen.direct for seen in gradients):
            return
        records = []
        for (_, _, array), layout in zip(self._places, self._claimed, strict=True):
            low, high = arrays.extent(layout)
            flags = headers.ALIGNED | headers.WRITEABLE
            records.append(headers.record(array, layout, low - layout.address, high - layout.address, flags))
        if headers.UNSEEN in records:
            return
        owned, places = [array for _, _, array in self._places], [place[:2] for place in self._places]
        found = [seen.record for seen in gradients]
        reader = headers.Reader(owned, places, records, found, self._ranges, self.table)
        columns = [i for i in self.own if not isinstance(self.variables[i], np.ndarray)]
        if columns:
            written = [array for array in owned if not isinstance(array, np.ndarray)]
            signatures = [None if gradients[i] is _UNSEEN else gradients[i].signature for i in columns]
            self._tensors = Tensors(written, [self.variables[i] for i in columns], columns, signatures)
        self._reader = reader  # last: from here on `reads` trusts it


class HostPlan(Plan):
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
        super().__init__("cpu", names, variables, slots)

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
        squares = np.zeros(len(self.names))
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

    def _arrange(self, arrangement: Sequence[tuple[Layout, Layout]]) -> None:
        self.repeat = None  # whose calls are those of the blocks that go
        rows: dict[tuple[str, str, bool | None], list[Matrix]] = {}
        for types, runs in self._runs(arrangement):
            work = _chunks(runs)
            sizes = [arrays.ITEMSIZE[types[0]], arrays.ITEMSIZE[types[1]], arrays.ITEMSIZE[arrays.COMPUTE[types[0]]]]
            strided = None if (work[0, cpu.P_STEP :] == sizes).all() else True
            rows.setdefault((*types, strided), []).append(work)
        self._made = {}
        self.groups = [self._group(*kind, np.concatenate(works)) for kind, works in rows.items()]

    def _group(self, p_type: str, g_type: str, strided: bool | None, work: Matrix) -> Group:
        ends = np.cumsum(work[:, cpu.COUNT])
        work[1:, cpu.START] = ends[:-1]
        partials, block = np.zeros(len(work)), np.zeros(cpu.BLOCK_WORDS, np.int64)
        own = {
            cpu.WORK: work,
            cpu.TABLE: self.table,
            cpu.FACTORS: self.factors,
            cpu.NUMBERS: self.numbers,
            cpu.PARTIALS: partials,
            cpu.SUMS: self._sums,
        }
        for entry, array in own.items():
            block[entry] = array.ctypes.data
        block[cpu.CHUNKS], block[cpu.ARRAYS] = len(work), len(self.names)
        block[cpu.IS_FAR] = ends[-1] >= FAR
        master = True if "master" in self.slots[work[0, cpu.ARRAY]] else None
        compute = arrays.COMPUTE[p_type]
        return Group(p_type, g_type, compute, strided, master, work, partials, block, block.ctypes.data, int(ends[-1]))


def _verdict(array: Array, signature: object, layout: Layout, direct: bool) -> Verdict:
    low, high = (end - layout.address for end in arrays.extent(layout))
    record = headers.record(array, layout, low, high, headers.ALIGNED)
    return Verdict(signature, layout, low, high, direct, record)


def _real(dtype: str) -> str:
    return arrays.COMPUTE[dtype] if dtype.startswith("complex") else dtype


def _runs(i: int, p: Layout, g: Layout, slot: Layout) -> Matrix:
    """The work of one variable: as few runs along one axis as the strides of all its arrays allow."""
    operands = [_axes(layout) for layout in (p, g, slot)]
    shape = operands[0][0]
    if 0 in shape:
        return np.zeros((0, 9), np.int64)
    axes = sorted(
        ((size, strides) for size, *strides in zip(shape, *(o[1] for o in operands), strict=True) if size > 1),
        key=lambda axis: -abs(axis[1][2]),
    )
    sizes = [arrays.ITEMSIZE[_real(layout.dtype)] for layout in (p, g, slot)]
    merged: list[tuple[int, list[int]]] = []
    for size, strides in axes:
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = merged[-1][0] * size, strides
        else:
            merged.append((size, strides))
    if not merged:
        merged.append((1, sizes))
    inner = max(range(len(merged)), key=lambda k: (merged[k][1] == sizes and merged[k][0] >= 64, merged[k][0]))
    count, steps = merged.pop(inner)
    offsets = np.zeros((1, 3), np.int64)
    for size, strides in merged:
        offsets = (offsets[:, None, :] + np.arange(size)[None, :, None] * np.array(strides)).reshape(-1, 3)
    runs = np.zeros((len(offsets), 9), np.int64)
    runs[:, cpu.ARRAY], runs[:, cpu.COUNT] = i, count
    runs[:, cpu.P_AT : cpu.S_AT + 1] = offsets
    runs[:, cpu.P_STEP :] = steps
    return runs


def _chunks(runs: Matrix) -> Matrix:
    """Runs of one variable cut into chunks whose size depends on nothing but its shape."""
    starts = np.arange(0, runs[0, cpu.COUNT], CHUNK)
    work = np.repeat(runs[:, None, :], len(starts), axis=1)
    work[:, :, cpu.COUNT] = np.minimum(runs[0, cpu.COUNT] - starts, CHUNK)
    work[:, :, cpu.P_AT : cpu.S_AT + 1] += starts[None, :, None] * runs[0, cpu.P_STEP :]
    return work.reshape(-1, 9)


def _axes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides in real numbers: a complex array has one more axis, of its real and imaginary parts."""
    if not layout.dtype.startswith("complex"):
        return layout.shape, layout.strides
    return (*layout.shape, 2), (*layout.strides, arrays.ITEMSIZE[layout.dtype] // 2)
