"""Norms of float64 gradients that are those of one process, bit for bit: where variables are cut between chunks.

A kernel adds up the squares of a chunk, and the sums of chunks are added in order. So the sums of all chunks, gathered,
give the norms of the whole. (Those of float32 need no such thing: see cpu/exact.py.)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays.pieces import Piece, make_whole
from ..arrays.runs import CHUNK
from .protocol import Rows

WIDE = {"float64": 1, "complex128": 2}  # reals in an element


class Chunks(NamedTuple):
    """How many sums each rank has of each variable, and in which order they are added.

    Attributes
    ----------
    own : list of lists of (str, int)
        For each rank, in its order, the names of variables and how many sums it has of them.
    order : dict
        For each variable the ranks that have parts of it, from its first element to the last.
    """

    own: list[list[tuple[str, int]]]
    order: dict[str, list[int]]

    def row(self, rank: int, plans: Sequence[Any]) -> Rows:
        """The sums of a rank, as long as the longest of any; NaN where it has others."""
        most = max(sum(count for _, count in own) for own in self.own)
        found = _sums(plans)
        row = np.zeros(most)
        at = 0
        for name, count in self.own[rank]:
            sums = None if found is None else found.get(name, np.zeros(count))
            if sums is None or len(sums) != count:
                return np.full(most, math.nan)
            row[at : at + count] = sums
            at += count
        return row

    def norms(self, rows: Rows) -> tuple[dict[str, float], float] | None:
        """The norm of each variable's gradient, and of all; None where a sum is out of a float64's range."""
        from ..cpu.kernels import add_in_order

        if not np.isfinite(rows).all():
            return None
        of: dict[tuple[str, int], Any] = {}
        for rank, own in enumerate(self.own):
            at = 0
            for name, count in own:
                of[name, rank] = rows[rank, at : at + count]
                at += count
        parts = {name: np.concatenate([of[name, rank] for rank in ranks]) for name, ranks in self.order.items()}
        squares = {name: add_in_order(part) for name, part in parts.items()}
        whole = add_in_order(np.array(list(squares.values())))
        if not 1e-280 < whole < math.inf:
            return None
        return {name: math.sqrt(square) for name, square in squares.items()}, math.sqrt(whole)


def chunks_of(
    told: Sequence[Sequence[Any]], known: Mapping[str, Sequence[tuple[int, Piece | None]]], shared: Sequence[str]
) -> Chunks | None:
    """The chunks of variables of which some are of float64; None where they are not cut between chunks.

    None too where nobody has said where the parts lie in the whole: then this would be a message more for parts that
    the user cuts anywhere.
    """
    dtypes = {each[0]: each[2] for own in told for each in own}
    is_told = all(each[3] is not None and each[3][0] is not None for own in told for each in own)
    if shared or not is_told or WIDE.keys().isdisjoint(dtypes.values()):
        return None
    own: list[list[tuple[str, int]]] = [[] for _ in told]
    order = {}
    for name, parts in known.items():
        runs = [(rank, piece.as_run() if piece else None) for rank, piece in parts]
        found = [(run.start[0], run.own[0], rank) for rank, run in runs if run is not None]
        if len(found) < len(parts) or not make_whole([piece for _, piece in parts if piece]):
            return None
        size, width = math.prod(parts[0][1].shape) if parts[0][1] else 0, WIDE.get(dtypes[name], 1)
        if any(start % CHUNK or ((start + count) % CHUNK and start + count != size) for start, count, _ in found):
            return None
        for _, count, rank in found:
            own[rank].append((name, -(-count * width // CHUNK)))
        order[name] = [rank for *_, rank in sorted(found)]
    return Chunks(own, order)


def _sums(plans: Sequence[Any]) -> dict[str, Any] | None:
    """The sums of chunks of each variable, in order; None where there are none, or not at their own scale."""
    if not plans:
        return {}
    read = getattr(plans[0], "chunk_squares", None)
    return read() if read and len(plans) == 1 else None
