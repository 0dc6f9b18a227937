"""The addresses of an optimizer's arrays that lie at one place: checked, claimed, and read again at each step."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..update import SLOTS, G, P
from . import reader
from .checks import check_gradient, check_tensor, check_variable, read_directly
from .layout import Layout, address, extent, layout_of, memory, share_memory, signature
from .library import SLOT, Array, device, dtype_name, family, place
from .runs import Matrix, real_dtype, runs_of
from .torch_storage import Tensors
from .transfer import cast, zeros_like

_FAILED = -1
_SLOT_OF_ROW = {row: key for key, row in SLOTS.items()}

Arrangement = Sequence[tuple[Layout, Layout]]


class Seen(NamedTuple):
    """What a full check of an array found; it holds as long as the array's signature does."""

    signature: object
    layout: Layout
    low: int  # the extent, relative to the address
    high: int
    direct: bool
    record: list[int]  # the same, for `reader.read`; of a gradient


_UNSEEN = Seen("no gradient yet", Layout(0, (), (), "float32"), 0, 0, True, reader.UNSEEN)


class AddressTable:
    """Where the variables, gradients and slots of an optimizer lie that are at one place, and what is known of them.

    Parameters
    ----------
    place : str
        ``cpu``, or a GPU: ``cuda:0``.
    names : list of str
    variables : list of arrays
        None for a variable that lies elsewhere, which the table skips.
    slots : list of dict
        The state of each variable, by the names of `update.SLOTS`: arrays of one layout.

    Attributes
    ----------
    addresses : array of int64, shape (8, n)
        The address of each variable, its gradient and its slots, in the rows of `update`.
    own : list of int
        Which variables lie here.
    arrangement : list of pairs of Layout
        How each of them and its gradient are laid out; another list where any of that has changed.
    """

    def __init__(
        self, place: str, names: Sequence[str], variables: Sequence[Array], slots: Sequence[dict[str, Array]]
    ) -> None:
        self.place, self.names, self.variables, self.slots = place, names, variables, slots
        self.own = [i for i, variable in enumerate(variables) if variable is not None]
        self.addresses = np.zeros((8, len(names)), np.int64)
        self.arrangement: Arrangement = []
        self._seen: dict[tuple[str, int], Seen] = {}
        self._scratch: dict[int, Array] = {}
        self._held: list[Array | None] = []
        # What a step writes: row and column in the table, and the array; the variables first.
        self._places = [(P, i, variables[i]) for i in self.own]
        self._places += [(SLOTS[key], i, slot) for i in self.own for key, slot in slots[i].items()]
        self._slot_layouts = [layout_of(array) for _, _, array in self._places]
        self._layout_of_slots = {i: layout_of(slots[i]["momentum"]) for i in self.own}
        self._claimed: list[Layout] = []
        self._memory: list[tuple[int, int]] = []
        self._ranges = np.zeros((2, 0), np.int64)
        self._reader: reader.Reader | None = None
        self._tensors: Tensors | None = None
        self._known: tuple[list[object], list[Seen], Matrix] | None = None
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
        if arrangement != self.arrangement:
            self.arrangement = arrangement
        for (row, i, _), layout in zip(self._places, written, strict=True):
            self.addresses[row, i] = layout.address
        for i, (_, g) in zip(self.own, pairs, strict=True):
            self.addresses[G, i] = g.address
        self._memory = [memory(array) for _, _, array in self._places]
        self._known = self._signatures()
        self._remember()

    def reads(self, gradients: Sequence[Array | None]) -> int:
        """Read the address of every array in one compiled call; how many gradients there are, -1 if that fails."""
        known = self._reader
        if known is None or type(gradients) is not list or len(gradients) != known.count:
            return _FAILED
        present: int = reader.read(id(gradients), known.address)
        if present < 0 or self._tensors is None or self._tensors.are_as_known(gradients):
            return present
        return _FAILED

    def runs(self) -> Iterator[tuple[tuple[str, str], Matrix]]:
        """For each variable, how it and its gradient are stored, and its elements as evenly spaced runs."""
        for i, (p, g) in zip(self.own, self.arrangement, strict=True):
            runs = runs_of(i, p, g, self._layout_of_slots[i])
            if len(runs):
                yield (real_dtype(p.dtype), real_dtype(g.dtype)), runs

    def _is_as_known(
        self, gradients: Sequence[Array | None], signatures: list[object], known: list[Seen], spans: Matrix
    ) -> bool:
        """Read all addresses, where nothing else has changed; False where a closer look is needed."""
        found = [gradients[i] for i in self.own]
        if [signature(self.variables[i]) for i in self.own] != signatures:
            return False
        if any(g is not None and signature(g) != seen.signature for g, seen in zip(found, known, strict=True)):
            return False
        if [memory(array) for _, _, array in self._places] != self._memory:
            return False
        addresses = np.array([0 if g is None else address(g) for g in found], np.int64)
        lows, highs = self._ranges
        nearest = np.searchsorted(highs, addresses + spans[0], side="right")
        beginnings = np.append(lows, np.iinfo(np.int64).max)[nearest]
        if ((addresses != 0) & (beginnings < addresses + spans[1])).any():
            return False
        for k, (g, seen) in enumerate(zip(found, known, strict=True)):
            if g is not None and not seen.direct:
                addresses[k] = self._cast(self.own[k], g).address
        self.addresses[G, self.own] = addresses
        return True

    def _signatures(self) -> tuple[list[object], list[Seen], Matrix]:
        """What `_is_as_known` compares the next step's arrays with."""
        known = [self._seen.get(("gradient", i), _UNSEEN) for i in self.own]
        spans = np.array([[seen.low for seen in known], [seen.high for seen in known]], np.int64)
        return [self._seen["variable", i].signature for i in self.own], known, spans

    def _written_layout(self, k: int) -> Layout:
        """Where a variable or a slot lies now; it must still be what it was when the optimizer was built."""
        row, i, array = self._places[k]
        known = self._slot_layouts[k]
        if row != P:
            if family(array) == "torch":
                check_tensor(self._name(k), array)
            layout = layout_of(array)
            if layout[1:] != known[1:] or not getattr(getattr(array, "flags", None), "writeable", True):
                raise ValueError(
                    f"{self._name(k)} has become an array of shape {layout.shape} and dtype "
                    f"{layout.dtype}, or read-only; expected it to stay as it was built"
                )
            return layout
        seen, found = self._seen.get(("variable", i)), signature(array)
        if seen is None or seen.signature != found:
            if place(array) != self.place:
                raise ValueError(
                    f"variable {self.names[i]!r} has moved to {device(array)}; expected it on {self.place}"
                )
            check_variable(self.names[i], array)
            layout = layout_of(array)
            if (layout.shape, layout.dtype) != (known.shape, known.dtype):
                raise ValueError(
                    f"variable {self.names[i]!r} has become an array of shape {layout.shape} and dtype {layout.dtype}; "
                    f"expected shape {known.shape} and dtype {known.dtype}, as built"
                )
            seen = self._seen["variable", i] = _seen(array, found, layout, True)
        return seen.layout._replace(address=address(array))

    def _gradient_layout(self, i: int, gradient: Array | None) -> Layout:
        """Where a kernel reads a gradient; at address 0, laid out like the last one, where there is none."""
        seen = self._seen.get(("gradient", i))
        if gradient is None:
            if seen is not None and seen.direct:
                return seen.layout._replace(address=0)
            return (layout_of(self._scratch[i]) if seen else self._layout_of_slots[i])._replace(address=0)
        found = signature(gradient)
        if seen is None or found is None or seen.signature != found:
            check_gradient(self.names[i], gradient, self.variables[i])
            direct = read_directly(gradient, self.variables[i])
            seen = _seen(gradient, found, layout_of(gradient), direct)
        self._check_apart(i, address(gradient), seen)
        layout = seen.layout._replace(address=address(gradient)) if seen.direct else self._cast(i, gradient)
        self._seen["gradient", i] = seen
        return layout

    def _cast(self, i: int, gradient: Array) -> Layout:
        """Where a gradient lies that has been cast to what the kernels read."""
        if i not in self._scratch:
            self._scratch[i] = zeros_like(self.variables[i], SLOT[dtype_name(self.variables[i])])
        cast(self._scratch[i], gradient)
        return layout_of(self._scratch[i])

    def _claim(self, written: list[Layout]) -> None:
        """Note the ranges of memory that a step writes; refuse variables that overlap."""
        whole = [(*extent(layout), k) for k, layout in enumerate(written)]
        variables = sorted(whole[: len(self.own)])
        for position, (_, high, k) in enumerate(variables):
            for low, _, other in variables[position + 1 :]:
                if low >= high:
                    break
                if share_memory(written[k], written[other]):
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
        return f"variable {self.names[i]!r}" if row == P else f"the {_SLOT_OF_ROW[row]} of {self.names[i]!r}"

    def _check_apart(self, i: int, where: int, seen: Seen) -> None:
        """Refuse a gradient that shares memory with what a step writes."""
        lows, highs = self._ranges
        nearest = int(np.searchsorted(highs, where + seen.low, side="right"))
        if nearest == lows.size or lows[nearest] >= where + seen.high or seen.low == seen.high:
            return
        layout = seen.layout._replace(address=where)
        for k, other in enumerate(self._claimed):
            low, high = extent(other)
            if low < where + seen.high and where + seen.low < high and share_memory(layout, other):
                raise ValueError(
                    f"the gradient of {self.names[i]!r} shares memory with {self._name(k)}; expected a copy"
                )

    def _remember(self) -> None:
        """Note what `reads` compares the next step's arrays with, if it can read them all."""
        gradients = [self._seen.get(("gradient", i), _UNSEEN) for i in range(len(self.names))]
        if len(self.own) < len(self.names) or not all(seen.direct for seen in gradients):
            return
        records = []
        for (_, _, array), layout in zip(self._places, self._claimed, strict=True):
            low, high = extent(layout)
            flags = reader.ALIGNED | reader.WRITEABLE
            records.append(reader.record(array, layout, low - layout.address, high - layout.address, flags))
        if reader.UNSEEN in records:
            return
        owned, places = [array for _, _, array in self._places], [place[:2] for place in self._places]
        found = [seen.record for seen in gradients]
        known = reader.Reader(owned, places, records, found, self._ranges, self.addresses)
        columns = [i for i in self.own if not isinstance(self.variables[i], np.ndarray)]
        if columns:
            written = [array for array in owned if not isinstance(array, np.ndarray)]
            signatures = [None if gradients[i] is _UNSEEN else gradients[i].signature for i in columns]
            self._tensors = Tensors(written, [self.variables[i] for i in columns], columns, signatures)
        self._reader = known  # last: from here on `reads` trusts it


def _seen(array: Array, found: object, layout: Layout, direct: bool) -> Seen:
    low, high = (end - layout.address for end in extent(layout))
    record = reader.record(array, layout, low, high, reader.ALIGNED)
    return Seen(found, layout, low, high, direct, record)
