"""The share of a rank: its pieces of the variables, and the bytes that it exchanges with the others."""

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.overlap import overlapping
from ..arrays.pieces import Piece
from ..arrays.runs import CHUNK, real_dtype
from ..arrays.tree import Container, flatten
from ..hyperparameters.groups import make_groups
from ..ranks.chunks import WIDE
from ..ranks.protocol import BulkRanks, Bytes
from ..step import gradients as matching
from ..step.workspace import Workspace
from .cuts import ALIGNED, Run, buckets, shares

WORD = 8  # bytes, at a multiple of which each run begins in a buffer
LARGE = 1 << 16  # bytes from which a run is sent from where it lies, which takes no memory
MOST_AT_ONCE = 1 << 26  # bytes of such runs that a rank sends to another: engines have limits
SAMPLED, OF_EACH = 8, 32  # variables, and elements of each, at most


class _Bucket(NamedTuple):
    """What the ranks exchange at once: in a buffer, the runs of all of them, those of each rank together."""

    counts: list[int]  # bytes of each rank
    places: list[list[tuple[Run, slice, slice]]]  # of each rank: its runs, and their bytes in a variable and in a part


class _Sum(NamedTuple):
    """Where the gradients of one piece are added."""

    array: Array  # of the variable's library
    host: np.ndarray[Any, Any]  # the same memory, or of an array on a GPU what is to be written there


class Shares:
    """What a `Sharded` has been built on.

    Parameters
    ----------
    engine : step.engine.Engine
        Of the optimizer that is to be built on this rank's pieces.
    names : list of str
    given : list of arrays
    ranks : BulkRanks
    most_bytes : int
        The size of a buffer.

    Attributes
    ----------
    own : list of (name, array) pairs
        Of this rank: flat views of variables.
    pieces : dict
        Where they lie in the variables.
    """

    def __init__(self, engine: Any, names: list[str], given: list[Array], ranks: BulkRanks, most_bytes: int) -> None:
        arrays.check_variables(names, given)
        variables = arrays.seen_all(names, given)
        for name, variable in zip(names, variables, strict=True):
            _check_contiguous(name, variable)
        _check_apart(names, variables)
        groups, which, _ = make_groups(engine, engine.hyper.overrides, names, given)
        trainable = [groups[k].trainable for k in which]
        if not any(trainable):
            raise ValueError("no variable is trainable; expected one at least")
        # What is matched with gradients: it has no plans, and never takes a step.
        slots: Any = [{"state": v} if moves else {} for v, moves in zip(variables, trainable, strict=True)]
        foreign = [i for i, (one, other) in enumerate(zip(given, variables, strict=True)) if one is not other]
        moving = None if all(trainable) else [i for i, moves in enumerate(trainable) if moves]
        self.whole = Workspace(names, variables, slots, which, moving, [], None, None, [], [], [], given, foreign)
        self.sizes = [math.prod(v.shape) if moves else 0 for v, moves in zip(variables, trainable, strict=True)]
        self._flat = [_flat(v) for v in variables]
        self._addresses = [arrays.address(v) for v in variables]
        self._rank, self._size, self._most_bytes = ranks.rank, ranks.size, most_bytes
        # Between chunks, where that makes norms those of one process: see ranks/chunks.py.
        is_wide = not WIDE.keys().isdisjoint(arrays.dtype_name(v) for v in variables)
        self._shares = shares(self.sizes, ranks.size, CHUNK if is_wide else ALIGNED)
        self._own = self._shares[ranks.rank]
        # What is not trainable is cut as if it had no elements, so that one rank has all of it.
        runs = [run._replace(stop=run.stop or math.prod(variables[run.variable].shape)) for run in self._own]
        self.own = [(names[i], self._flat[i][start:stop]) for i, start, stop in runs]
        self.pieces = {names[i]: Piece(tuple(variables[i].shape), (at,), (end - at,)) for i, at, end in runs}
        self._plans: dict[tuple[Any, ...], list[_Bucket]] = {}
        self._signatures: list[object] = [None] * len(names)
        self._sums: dict[int, _Sum] = {}
        self._buffer = np.empty(0, np.uint8)

    def described(self) -> list[list[Any]]:
        """The variables, as all ranks have to have them."""
        given = zip(self.whole.names, self.whole.variables, self.whole.slots, strict=True)
        return [[name, list(v.shape), arrays.dtype_name(v), bool(own)] for name, v, own in given]

    def checksums(self) -> list[list[Any]]:
        """The variables by name, with the checksums of their elements."""
        found = (zlib.crc32(_bytes(flat)) for flat in self._flat)  # type: ignore[arg-type]
        return [[name, crc] for name, crc in zip(self.whole.names, found, strict=True)]

    def check(self, engine: Any) -> None:
        """Refuse to go on with variables that have moved, or that have become trainable.

        Raises
        ------
        ValueError
            If one has.
        """
        for name, variable, before in zip(self.whole.names, self.whole.variables, self._addresses, strict=True):
            if arrays.address(variable) != before:
                raise ValueError(
                    f"variable {brief(name)} lies elsewhere in memory than at `build`; expected arrays that are "
                    "changed in place, or a new `Sharded`"
                )
            if isinstance(variable, np.ndarray) and not variable.flags.writeable:
                raise ValueError(f"variable {brief(name)} is read-only; expected an array that can be written")
        frozen = [self.whole.names[run.variable] for run in self._own if not self.whole.slots[run.variable]]
        has_state = engine.workspace.slots if frozen else []
        thawed = [name for name, own in zip(engine.workspace.names, has_state, strict=False) if own and name in frozen]
        if thawed:
            raise ValueError(f"variable {brief(thawed[0])} was not trainable at `build`; expected a new `Sharded`")

    def matched(self, grads: Container, variables: Container | None) -> list[Array | None]:
        """The gradients in the order of the variables, checked, in a dtype that the ranks can exchange.

        Raises
        ------
        TypeError, ValueError
            As from `AdamW.apply`.
        """
        found: Any
        if variables is None:
            found = matching.gradients(self.whole, grads, warn=False, may_be_none=True)
        else:
            targets, given = flatten(variables)
            found = matching.gradients_of(self.whole, grads, targets, given, may_be_none=True, warn=False)
        found = self.whole.seen(found) or [None] * len(self.sizes)
        for i, (name, variable) in enumerate(zip(self.whole.names, self.whole.variables, strict=True)):
            if found[i] is None or not self.whole.slots[i]:
                found[i] = None
                continue
            signature = arrays.signature(found[i])
            if signature is not None and signature == self._signatures[i]:  # like the one that was checked before
                continue
            self._signatures[i] = None
            arrays.check_gradient(name, found[i], variable)
            if arrays.read_directly(found[i], variable):
                self._signatures[i] = signature
            else:
                gradient = arrays.zeros_like(variable, arrays.dtype_name(variable))
                arrays.cast(gradient, found[i])
                found[i] = gradient
        return list(found)

    def sample(self, gradients: Sequence[Array | None]) -> float:
        """A weighted sum of some elements, by which gradients that are not the same on all ranks are noticed."""
        given = [g for g in gradients if g is not None]
        total = 0.0
        for k, gradient in enumerate(given[:: -(-len(given) // SAMPLED) or 1]):
            flat = _flat(gradient)
            some = arrays.to_numpy(flat[:: -(-flat.shape[0] // OF_EACH) or 1])
            weights = np.linspace(1, 2, len(some)) * (1 + k / SAMPLED)
            # Apart, so that signs count, and that no sum of both is 0 beside large elements.
            for part in (some.real, some.imag):
                total += float((np.abs(part, dtype=np.float64) * weights * np.where(part < 0, 2.0, 1.0)).sum())
        return total

    def without(self, gradients: Sequence[Array | None]) -> list[str]:
        """The names of variables that are trained, and have no gradient on any rank."""
        each = zip(self.whole.names, self.whole.slots, gradients, strict=True)
        return [name for name, own, g in each if own and g is None]

    def prepare(self, kinds: Sequence[str | None]) -> None:
        """Take the memory that adding gradients of these dtypes needs, so that it is not lacking in the midst of it."""
        for k, run in enumerate(self._own if kinds else ()):
            self._sum(k, kinds[run.variable])
        for bucket in self._buckets(_widths(kinds)) if kinds else ():
            self._buffers(sum(bucket.counts), self._size * bucket.counts[self._rank])

    def of_own(self, gradients: Sequence[Array | None]) -> list[Array | None]:
        """The parts of whole gradients that belong to the pieces."""
        found = [gradients[run.variable] for run in self._own]
        return [None if g is None else _flat(g)[run.start : run.stop] for g, run in zip(found, self._own, strict=True)]

    def reduced(self, ranks: BulkRanks, gradients: Sequence[Array | None], divisor: int) -> list[Array | None]:
        """The sums of all ranks' gradients of the pieces, added in the order of the ranks, and divided."""
        from ..cpu.sums import STORED, add

        given = [None if g is None else _bytes(_flat(g)) for g in gradients]
        kinds = [None if g is None else arrays.dtype_name(g) for g in gradients]
        sums = [self._sum(k, kinds[run.variable]) for k, run in enumerate(self._own)]
        first = {run.variable: (k, run.start) for k, run in enumerate(self._own)}
        for bucket in self._buckets(_widths(kinds)):
            total, own = sum(bucket.counts), bucket.counts[self._rank]
            send, receive = self._buffers(total, self._size * own)
            _pack(bucket, range(self._size), given, send)
            ranks.exchange(send, bucket.counts, receive, [own] * self._size)
            for run, _, part in bucket.places[self._rank]:
                kind: Any = kinds[run.variable]
                k, start = first[run.variable]
                dtype: Any = STORED.get(kind) or np.dtype(real_dtype(kind))
                width = 1 + kind.startswith("complex")
                result = sums[k].host[width * (run.start - start) : width * (run.stop - start)]
                for rank in range(self._size):
                    row = receive[rank * own + part.start : rank * own + part.stop].view(dtype)
                    add(row, rank == 0, divisor if rank == self._size - 1 else 1, result)
        for each in sums:
            if each is not None and arrays.place(each.array) != "cpu":
                arrays.write(each.array, each.host.view(arrays.dtype_name(each.array)))
        return [None if each is None else each.array for each in sums]

    def spread(self, ranks: BulkRanks, frozen: bool = False) -> None:
        """Give the elements of the pieces to all ranks; also of what is not trainable, where that has been loaded."""
        variables: Any = [_bytes(flat) for flat in self._flat]
        widths = [arrays.ITEMSIZE[arrays.dtype_name(v)] for v in self.whole.variables]
        large, small = (
            [
                [run for run in runs if is_large == ((run.stop - run.start) * widths[run.variable] >= LARGE)]
                for runs in self._shares
            ]
            for is_large in (True, False)
        )
        if frozen:
            of_each = [[run.variable for run in runs if not self.sizes[run.variable]] for runs in self._shares]
            ranks.spread([[variables[i] for i in which] for which in of_each])
        for those in buckets(large, MOST_AT_ONCE // max(widths)):
            ranks.spread([[_part_of(variables, run, widths) for run in runs] for runs in those])
        for bucket in self._buckets(widths, small):
            buffer, _ = self._buffers(sum(bucket.counts), 0)
            _pack(bucket, [self._rank], variables, buffer)
            parts = np.split(buffer, np.cumsum(bucket.counts[:-1]))
            ranks.spread([[part] for part in parts])
            for rank, (part, places) in enumerate(zip(parts, bucket.places, strict=True)):
                if rank != self._rank:
                    for run, here, there in places:
                        variables[run.variable][here] = part[there]
        moving = [v for v, own in zip(self.whole.variables, self.whole.slots, strict=True) if own or frozen]
        arrays.note_writes([v for v in moving if arrays.has_version(v)])
        for flat, held in zip(self._flat, variables, strict=True):
            if arrays.place(flat) != "cpu":
                flat = arrays.bits(flat)
                arrays.write(flat, held.view(arrays.dtype_name(flat)))

    def _sum(self, k: int, kind: str | None) -> Any:
        """Where the gradients of a piece are added: 16-bit ones in float32, and there they stay."""
        if not kind:
            return None
        dtype = arrays.SLOT[kind]
        if k not in self._sums or arrays.dtype_name(self._sums[k].array) != dtype:
            array = arrays.zeros_like(self.own[k][1], dtype)
            self._sums[k] = _Sum(array, arrays.as_numpy(array).view(real_dtype(dtype)))
        return self._sums[k]

    def _buffers(self, *sizes: int) -> list[Bytes]:
        if sum(sizes) > self._buffer.size:
            self._buffer = np.empty(sum(sizes), np.uint8)
        return [self._buffer[: sizes[0]], self._buffer[sizes[0] : sum(sizes)]]

    def _buckets(self, widths: list[int], runs: list[list[Run]] | None = None) -> list[_Bucket]:
        """The buckets of elements that have so many bytes, for each variable: of all, or of some runs of each rank."""
        key = runs is None, *widths
        if key not in self._plans:
            most = self._most_bytes // (self._size * max(max(widths, default=1), 1))
            found = buckets(self._shares if runs is None else runs, max(most, 1))
            self._plans[key] = [self._bucket(parts, widths) for parts in found]
        return self._plans[key]

    def _bucket(self, parts: list[list[Run]], widths: list[int]) -> _Bucket:
        counts, places = [], []
        for runs in parts:
            at, found = 0, []
            for run in runs:
                if width := widths[run.variable]:
                    here = slice(run.start * width, run.stop * width)
                    found.append((run, here, slice(at, at + here.stop - here.start)))
                    at = -(-found[-1][2].stop // WORD) * WORD
            counts.append(at)
            places.append(found)
        return _Bucket(counts, places)


def _pack(bucket: _Bucket, those: Sequence[int], held: Sequence[Any], buffer: Bytes) -> None:
    """Copy the runs of some ranks into their parts of a buffer."""
    starts = np.cumsum([0, *bucket.counts]).tolist()
    for rank in those:
        at = starts[rank]
        for run, here, part in bucket.places[rank]:
            buffer[at + part.start : at + part.stop] = held[run.variable][here]


def _widths(kinds: Sequence[str | None]) -> list[int]:
    """The bytes of an element; 0 where there is no gradient."""
    return [0 if kind is None else arrays.ITEMSIZE[kind] for kind in kinds]


def _part_of(variables: Sequence[Bytes], run: Run, widths: Sequence[int]) -> Bytes:
    width = widths[run.variable]
    return variables[run.variable][run.start * width : run.stop * width]


def _flat(array: Array) -> Array:
    """The elements in order; of a contiguous array the same memory."""
    return arrays.detached(array).reshape(-1)


def _bytes(flat: Array) -> Bytes:
    """The bytes of a flat array: where they lie if it is on the host, else a copy."""
    return arrays.as_numpy(flat).view(np.uint8)


def _check_contiguous(name: str, array: Array) -> None:
    if arrays.place(array) is None:
        raise TypeError(
            f"variable {brief(name)} is an array of {arrays.library_name(array)}; expected one that is changed in place"
        )
    layout, expected = arrays.layout_of(array), arrays.ITEMSIZE[arrays.dtype_name(array)]
    for length, stride in zip(reversed(layout.shape), reversed(layout.strides), strict=True):
        if length != 1 and stride != expected and 0 not in layout.shape:
            raise ValueError(
                f"variable {brief(name)} has shape {layout.shape} and strides {layout.strides} bytes; expected an "
                "array that lies in memory in the order of its axes"
            )
        expected *= length


def _check_apart(names: list[str], variables: list[Array]) -> None:
    extents = np.array([arrays.extent(arrays.layout_of(v)) for v in variables], np.int64).reshape(-1, 2).T
    for one, other in overlapping(*extents):
        if arrays.place(variables[one]) == arrays.place(variables[other]):
            raise ValueError(
                f"variables {brief(names[one])} and {brief(names[other])} share memory; expected arrays that do not "
                "overlap"
            )
