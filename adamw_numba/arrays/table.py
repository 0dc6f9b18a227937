"""The addresses of an optimizer's arrays that lie at one place: checked, claimed, and read again at each step."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_torch_array

from ..update import ROWS, SLOTS, G, P
from . import reader
from .brief import brief
from .checks import check_gradient, check_tensor, check_variable, read_directly
from .garbage import without_collections
from .layout import Layout, address, extent, is_c_contiguous, layout_of, memory, share_memory, signature
from .library import SLOT, Array, device, dtype_name, family, is_complex, place
from .moments import NARROWER, kind_of
from .overlap import Addresses, covered, overlapping, touching
from .runs import ARRAY, PLACE_STEP, Matrix, Places, runs_by_kind
from .torch_storage import Tensors
from .transfer import cast, zeros_like

_FAILED = -1
_SLOT_OF_ROW = {row: key for key, row in SLOTS.items()}
_FLAGS = reader.ALIGNED | reader.WRITEABLE  # of what a step writes

Arrangement = Sequence[tuple[Layout, Layout]]


class Seen(NamedTuple):
    """What a full check of an array found; it holds while the signature stays, and for others that share it."""

    signature: object
    layout: Layout  # at address 0
    low: int  # the extent, relative to the address
    high: int
    direct: bool  # of a gradient: kernels read it where it lies
    record: list[int]  # the same, for `reader.read`


_UNSEEN = Seen("no gradient yet", Layout(0, (), (), "float32"), 0, 0, True, reader.UNSEEN)


class AddressTable:
    """Where the variables, gradients and slots of an optimizer lie that are at one place, and what is known of them.

    Parameters
    ----------
    place : str
        ``cpu``, or a GPU: ``cuda:0``.
    names : list of str
    variables : list of arrays
        Those that lie here, checked (see `check_variable`); None for one that lies elsewhere, which is skipped.
    slots : list of dict
        The state of each variable, by the names of `update.SLOTS`: arrays of one layout.
    places : list, optional
        Where the elements of each variable are in the whole one (see `pieces.places_of`).

    Attributes
    ----------
    addresses : array of int64, shape (ROWS, n)
        The address of each variable, its gradient and its slots, in the rows of `update`.
    own : list of int
        Which variables lie here.
    is_new : bool
        Whether something has changed that has not been remembered yet.
    arrangement : list of pairs of Layout
        How each of them and its gradient are laid out; another list where any of that has changed.
    moments : dict
        Of each of them, what its moments are kept in: one of `moments.MOMENTS`.
    """

    def __init__(
        self,
        place: str,
        names: Sequence[str],
        variables: Sequence[Array],
        slots: Sequence[dict[str, Array]],
        places: Sequence[Places] | None = None,
    ) -> None:
        self.place, self.names, self.variables, self.slots = place, names, variables, slots
        self._whole = places
        self.own = [i for i, variable in enumerate(variables) if variable is not None]
        self.addresses = np.zeros((ROWS, len(names)), np.int64)
        self.arrangement: Arrangement = []
        self._scratch: dict[int, Array] = {}
        self._held: list[Array | None] = []
        # What a step writes: row and column in the table, and the array; the variables first.
        self._places = [(P, i, variables[i]) for i in self.own]
        self._places += [(SLOTS[key], i, slot) for i in self.own for key, slot in slots[i].items()]
        rows, columns = np.array([place[:2] for place in self._places], np.intp).reshape(-1, 2).T
        self._cells = rows, columns
        once: dict[object, Seen] = {}
        self._written = [_shared(once, array, signature(array)) for _, _, array in self._places]
        self._as_built = [seen.layout for seen in self._written]
        where = {cell: k for k, cell in enumerate(place[:2] for place in self._places)}
        self.moments = {i: kind_of(dtype_name(slots[i]["momentum"]), is_complex(variables[i])) for i in self.own}
        self._slot_layouts = [self._of_wide_slots(i, self._as_built[where[SLOTS["momentum"], i]]) for i in self.own]
        self._gradients = [_UNSEEN] * len(self.own)
        self._references: list[Any] = []  # to gradients: see `reader.Reader`
        self._claimed: list[int] = []  # where all of them lay when `_extents` and `_ranges` were made
        self._extents = self._ranges = np.zeros((2, 0), np.int64)
        self._is_lent = False
        self._reader: reader.Reader | None = None
        self._tensors: Tensors | None = None
        self._memory: list[tuple[int, int]] | None = None
        self._claim([address(array) for _, _, array in self._places], self._written)
        self._look_at_gradients([None] * len(self.own))
        self.is_new = True

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
        own = [gradients[i] for i in self.own]
        self._reader = self._tensors = self._memory = None
        with without_collections():
            self._look_at_written()
            self.is_new = True
            self._look_at_gradients(own)

    def reads(self, gradients: Sequence[Array | None]) -> int:
        """Read the address of every array, if nothing else has changed; how many gradients there are, -1 if it has.

        In one compiled call, where that knows the arrays.
        """
        known = self._reader
        if known is None:
            return self._reads_one_by_one(gradients)
        if type(gradients) is not list or len(gradients) != known.count:
            return _FAILED
        present: int = reader.read(id(gradients), known.address)
        if present < 0 or self._tensors is None:
            return present
        if not self._tensors.are_as_known(gradients, known.has_new):
            return _FAILED
        known.has_new = False
        return present

    def lend(self) -> None:
        """From now on, look at the slots at each step as well: the user has been given them, and may change them.

        Until then nobody can, and looking at them would take half of the time of a step of many small tensors.
        """
        self._is_lent = True
        if self._reader is not None:
            self._watch(self._reader)

    def runs(self) -> Iterator[tuple[tuple[str, str], Matrix]]:
        """The elements of all variables as evenly spaced runs, by how a variable and its gradient are stored.

        Raises
        ------
        ValueError
            If elements of a variable whose moments have 8 bits do not follow each other, as those of a block have to.
        """
        triples = ((p, g, slot) for (p, g), slot in zip(self.arrangement, self._slot_layouts, strict=True))
        places = None if self._whole is None else [self._whole[i] for i in self.own]
        in_blocks = [i for i in self.own if self.moments[i] == "8bit"]
        for kind, runs in runs_by_kind(self.own, triples, places).items():
            if in_blocks:
                self._check_blocks(runs[np.isin(runs[:, ARRAY], in_blocks)])
            yield kind, runs

    def _check_blocks(self, runs: Matrix) -> None:
        odd = np.flatnonzero((np.diff(runs[:, ARRAY], append=-1) == 0) | (runs[:, PLACE_STEP] != 1))
        if len(odd):
            name = brief(self.names[runs[odd[0], ARRAY]])
            raise ValueError(
                f"moments='8bit': variable {name} is laid out in another way than when it was built; expected its "
                "elements in the order of its axes"
            )

    def _of_wide_slots(self, i: int, layout: Layout) -> Layout:
        """How slots of a variable are laid out that are not of fewer bits, if its momentum has that layout."""
        if self.moments[i] == "float32":
            return layout
        strides = tuple(stride << NARROWER[self.moments[i]] for stride in layout.strides)
        return layout._replace(strides=strides, dtype=SLOT[dtype_name(self.variables[i])])

    def _reads_one_by_one(self, gradients: Sequence[Array | None]) -> int:
        if self._memory is None or len(gradients) != len(self.names):
            return _FAILED
        own = [gradients[i] for i in self.own]
        return sum(g is not None for g in own) if self._is_as_known(own, self._memory) else _FAILED

    def _is_as_known(self, gradients: list[Array | None], known: list[tuple[int, int]]) -> bool:
        """Read all addresses, where nothing else has changed; False where a closer look is needed."""
        variables = zip(self.own, self._written, strict=False)
        if any(signature(self.variables[i]) != seen.signature for i, seen in variables):
            return False
        seen_before = list(zip(gradients, self._gradients, strict=True))
        if any(g is not None and signature(g) != seen.signature for g, seen in seen_before):
            return False
        if [memory(array) for _, _, array in self._places] != known:
            return False
        found = [0 if g is None else address(g) for g in gradients]
        if any(
            g is not None and _has_lost_memory(where, seen) for where, (g, seen) in zip(found, seen_before, strict=True)
        ):
            return False
        addresses = np.array(found, np.int64)
        if len(self._not_apart(addresses)):
            return False
        for k, (g, seen) in enumerate(seen_before):
            if g is not None and not seen.direct:
                addresses[k] = self._cast(self.own[k], g)
        self.addresses[G, self.own] = addresses
        return True

    def _look_at_written(self) -> None:
        """Check what a step writes, where it has changed, and note where it lies."""
        found = [address(array) for _, _, array in self._places]
        written = [self._seen_again(k, where) for k, where in enumerate(found)]
        if found != self._claimed or written != self._written:
            self._claim(found, written)

    def _seen_again(self, k: int, where: int) -> Seen:
        """What is known of a variable or a slot; it must still be what it was when the optimizer was built."""
        array, seen = self._places[k][2], self._written[k]
        found = signature(array)
        if found is not None and found == seen.signature and not _has_lost_memory(where, seen):
            return seen
        self._check_as_built(k)
        return _seen(array, found, True, _FLAGS)

    def _check_as_built(self, k: int) -> None:
        row, i, array = self._places[k]
        built = self._as_built[k]
        if row == P:
            if place(array) != self.place:
                raise ValueError(f"{self._name(k)} has moved to {device(array)}; expected it on {self.place}")
            check_variable(self.names[i], array)
            layout = layout_of(array)
            if (layout.shape, layout.dtype) != (built.shape, built.dtype):
                raise ValueError(
                    f"{self._name(k)} has become an array of shape {layout.shape} and dtype {layout.dtype}; "
                    f"expected shape {built.shape} and dtype {built.dtype}, as built"
                )
            return
        if family(array) == "torch":
            check_tensor(self._name(k), array, of_state=True)
        layout = layout_of(array)
        if layout[1:] != built[1:] or not getattr(getattr(array, "flags", None), "writeable", True):
            raise ValueError(
                f"{self._name(k)} has become an array of shape {layout.shape} and dtype "
                f"{layout.dtype}, or read-only; expected it to stay as it was built"
            )

    def _claim(self, found: list[int], written: list[Seen]) -> None:
        """Note the memory that a step writes; refuse variables that overlap."""
        where = np.array(found, np.int64)
        extents = where + np.array([[seen.low for seen in written], [seen.high for seen in written]], np.int64)
        for one, other in overlapping(*extents[:, : len(self.own)]):
            if share_memory(*(written[k].layout._replace(address=found[k]) for k in (one, other))):
                one, other = sorted((one, other))
                raise ValueError(
                    f"{self._name(one)} and {self._name(other)} share memory; expected arrays that do not overlap"
                )
        self._written, self._claimed = written, found
        self._extents, self._ranges = extents, covered(*extents)
        self.addresses[self._cells] = where

    def _look_at_gradients(self, gradients: list[Array | None]) -> None:
        """Check gradients that have changed, note where they lie, and cast those that kernels cannot read."""
        once: dict[object, Seen] = {}
        found = [self._seen_of_gradient(k, g, once) for k, g in enumerate(gradients)]
        before, self._gradients = self._gradients, [seen for seen, _ in found]
        addresses = np.array([where for _, where in found], np.int64)
        try:
            self._check_apart(addresses)
        except ValueError:
            self._gradients = before
            raise
        self._references = [_reference(self.variables[i], g) for i, g in zip(self.own, gradients, strict=True)]
        layouts = []
        for k, (g, seen) in enumerate(zip(gradients, self._gradients, strict=True)):
            if g is not None and not seen.direct:
                addresses[k] = self._cast(self.own[k], g)
            layouts.append(self._layout_read(k, seen))
        arrangement = [(each.layout, layout) for each, layout in zip(self._written, layouts, strict=False)]
        if arrangement != self.arrangement:
            self.arrangement = arrangement
        self.addresses[G, self.own] = addresses

    def _seen_of_gradient(self, k: int, gradient: Array | None, once: dict[object, Seen]) -> tuple[Seen, int]:
        """What is known of a gradient, and where it lies; where there is none, what is known of the last one, and 0."""
        seen, i = self._gradients[k], self.own[k]
        if gradient is None:
            return seen, 0
        # Whether a gradient fits follows from both signatures: of many layers that are alike, one is looked at.
        found, variable = signature(gradient), self.variables[i]
        key = found, id(getattr(gradient, "dtype", None)), self._written[k].signature, self.moments[i]
        if found != seen.signature:
            seen = once.get(key, _UNSEEN)
        if found is not None and found == seen.signature and gradient is not variable:
            where = address(gradient)
            if not _has_lost_memory(where, seen):
                return seen, where
        check_gradient(self.names[i], gradient, variable)
        direct = read_directly(gradient, variable)
        if self.moments[i] == "8bit":  # whose blocks are of elements in the order of the axes
            direct = direct and is_c_contiguous(gradient)
        seen = once[key] = _seen(gradient, found, direct, reader.ALIGNED)
        return seen, address(gradient)

    def _layout_read(self, k: int, seen: Seen) -> Layout:
        """How what a kernel reads as a gradient is laid out."""
        if seen is _UNSEEN:
            return self._slot_layouts[k]
        return seen.layout if seen.direct else layout_of(self._scratch[self.own[k]])._replace(address=0)

    def _cast(self, i: int, gradient: Array) -> int:
        """Where a gradient lies that has been cast to what the kernels read."""
        if i not in self._scratch:
            self._scratch[i] = zeros_like(self.variables[i], SLOT[dtype_name(self.variables[i])])
        cast(self._scratch[i], gradient)
        return address(self._scratch[i])

    # A gradient that shares memory with a variable or a slot would change while it is read, and what came out would
    # depend on the number of threads.

    def _not_apart(self, addresses: Addresses) -> Addresses:
        """Which gradients may share memory with what a step writes."""
        known = self._gradients
        lows = addresses + np.array([seen.low for seen in known], np.int64)
        highs = addresses + np.array([seen.high for seen in known], np.int64)
        return touching(np.where(addresses == 0, highs, lows), highs, self._ranges)

    def _check_apart(self, addresses: Addresses) -> None:
        """Refuse a gradient that shares memory with what a step writes."""
        for suspect in self._not_apart(addresses).tolist():
            seen, where = self._gradients[suspect], int(addresses[suspect])
            layout, (lows, highs) = seen.layout._replace(address=where), self._extents
            for k in np.flatnonzero((lows < where + seen.high) & (where + seen.low < highs)).tolist():
                if share_memory(layout, self._written[k].layout._replace(address=int(self._claimed[k]))):
                    raise ValueError(
                        f"the gradient of {brief(self.names[self.own[suspect]])} shares memory with {self._name(k)}; "
                        "expected a copy"
                    )

    def _name(self, k: int) -> str:
        row, i, _ = self._places[k]
        name = brief(self.names[i])
        return f"variable {name}" if row == P else f"the {_SLOT_OF_ROW[row]} of {name}"

    def remember(self) -> None:
        """Note what the next step's arrays are compared with: by `reads`, if it can read them all.

        To be called once the work has been laid out for what `refresh` has found. If that is interrupted, nothing is
        noted, and the next step looks at everything again.
        """
        with without_collections():
            if not self._remember_for_reader():
                self._memory = [memory(array) for _, _, array in self._places]
        self.is_new = False

    def _remember_for_reader(self) -> bool:
        if len(self.own) < len(self.names) or not all(seen.direct for seen in self._gradients):
            return False
        records = [seen.record for seen in self._written]
        if reader.UNSEEN in records:
            return False
        owned = [array for _, _, array in self._places]
        found = [seen.record for seen in self._gradients]
        known = reader.Reader(owned, self._cells, records, found, self._ranges, self.addresses, self._references)
        columns = [i for i in self.own if is_torch_array(self.variables[i])]
        if columns:
            known_of = [self._gradients[i] for i in columns]
            signatures = [None if seen is _UNSEEN else seen.signature for seen in known_of]
            self._tensors = Tensors([self.variables[i] for i in columns], columns, signatures)
        self._watch(known)
        self._reader = known  # last: from here on `reads` trusts it
        return True

    def _watch(self, known: reader.Reader) -> None:
        """Look at what a step writes and others may have changed: the variables, and the slots once they are lent."""
        watched = self._places if self._is_lent else self._places[: len(self.own)]
        known.watch(len(watched))
        if self._tensors is not None:
            self._tensors.watch([array for _, _, array in watched if is_torch_array(array)])


def _reference(variable: Array, gradient: Array | None) -> Any:
    """What tells that a gradient is the object that was looked at, without keeping it alive: only torch's need it."""
    if not is_torch_array(variable):
        return False
    if gradient is None or gradient.numel() < 2 or not gradient.is_contiguous():
        return None  # it may become a view that is yet to be negated: see `Tensors`
    return weakref.ref(gradient)


def _has_lost_memory(where: int, seen: Seen) -> bool:
    """Whether an array that has elements lies nowhere: a tensor may, and keep all that its signature tells."""
    return where == 0 and seen.low < seen.high


def _shared(once: dict[object, Seen], array: Array, found: object) -> Seen:
    """What is known of an array that a step writes, noted once for all that have one signature and one dtype object."""
    key = found, id(array.dtype)  # the compiled reader compares dtypes by their address
    if found is None or key not in once:
        once[key] = _seen(array, found, True, _FLAGS)
    return once[key]


def _seen(array: Array, found: object, direct: bool, flags: int) -> Seen:
    layout = layout_of(array)._replace(address=0)
    low, high = extent(layout)
    return Seen(found, layout, low, high, direct, reader.record(array, layout, low, high, flags))
