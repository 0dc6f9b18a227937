"""The norms of all ranks' gradients, of those of each: the same bits wherever variables are cut."""

import math
from typing import Any

import numpy as np

from .chunks import Chunks
from .protocol import Ranks, Rows

ROUNDINGS = 64  # on the way from the norms of variables to that of all, at most


class Norms:
    """What norms are made of.

    Parameters
    ----------
    ranks : Ranks
    counts : array of bool
        Which of this rank's variables count.
    where : array of int
        Where each of them is among the variables of all ranks, of which there are `names`.
    chunks : Chunks or None
        How the sums of chunks are added, where that makes norms of float64 those of one process.
    """

    def __init__(self, ranks: Ranks, counts: Any, where: Any, names: int, chunks: Chunks | None) -> None:
        self._ranks, self._counts, self._where, self._names, self._chunks = ranks, counts, where, names, chunks

    def combined(
        self, plans: Any, recipe: Any, norms: Any, each_has: Any, shared: float, additions: Any
    ) -> tuple[float, Any, float]:
        """The norm of all gradients, and as a clip takes them those of each and of all.

        Parameters
        ----------
        norms : array of float64
            Those of this rank's variables.
        each_has : list of float
            Each rank's own norm; `shared` is that of the variables that all have.
        additions : list of float
            Each rank's roundings; -1 where squares are not those of float32.
        """
        if self._chunks is not None and min(additions) < 0:
            of_chunks = self._chunks.norms(self._ranks.gather(self._chunks.row(self._ranks.rank, plans)))
            if of_chunks is not None:
                each, norm = of_chunks
                return norm, np.array([each[name] for name in plans[0].table.names]) if plans else norms, norm
        norm = whole_of([*each_has, shared])
        is_single, most = min(additions) >= 0, max(additions) + ROUNDINGS + self._ranks.size
        if recipe.clips_each and recipe.is_update:
            norms = self._each(plans, recipe, norms, most if is_single else None)
        if not is_single or not recipe.is_update or not math.isfinite(norm):
            return norm, norms, norm
        from ..cpu import exact

        steady = exact.steady(norm, most)
        if steady < 0:  # the same on all ranks
            digits = self._gather_digits(plans, recipe, np.zeros(len(norms), int), 1)
            steady = exact.norms_of(digits).item()
        return norm, norms, steady

    def _each(self, plans: Any, recipe: Any, norms: Any, additions: float | None) -> Any:
        """The norms of whole variables: those of one name on several ranks are the shards of one."""
        row = np.zeros(self._names)
        row[self._where[self._counts]] = norms[self._counts]
        rows = self._ranks.gather(row)
        whole = np.array([whole_of(column) for column in rows.T.tolist()])
        if additions is not None and np.isfinite(whole).all():
            from ..cpu import exact

            if exact.steady_each(whole, additions):
                digits = self._gather_digits(plans, recipe, self._where, self._names)
                whole = np.where(whole < 0, exact.norms_of(digits), whole)
        return whole[self._where]

    def _gather_digits(self, plans: Any, recipe: Any, where: Any, count: int) -> Any:
        """The exact sums of squares of all ranks, of so many variables."""
        from ..cpu import exact

        own = np.zeros((count, exact.DIGITS), np.int64)
        if plans:
            np.add.at(own, where[self._counts], plans[0].exact_squares(recipe)[self._counts])
        rows: Rows = self._ranks.gather(own.astype(np.float64).ravel())
        return rows.astype(np.int64).reshape(-1, count, exact.DIGITS).sum(axis=0)


def whole_of(norms: list[float]) -> float:
    """The norm of norms: the same in whatever order they are, on every machine."""
    if not all(map(math.isfinite, norms)):
        return math.nan if any(map(math.isnan, norms)) else math.inf
    peak = max(norms, default=0.0)
    return peak and peak * math.sqrt(math.fsum((norm / peak) ** 2 for norm in norms))
