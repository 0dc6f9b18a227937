"""How ranks decide together: a row of each rank is gathered, and the same rows give the same decision everywhere."""

import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, cut
from ..hyperparameters.table import patterns
from .mesh import Cut, MeshRanks, cut_of, mesh_of
from .ranks import RankError, Ranks, Rows, texts

# The words of a row. Norms are those of the variables that this rank counts, of those that all ranks have, and of those
# that some have; additions as in cpu/plan.py, -1 where there are none; the last two are of DTensors alone.
(
    STATUS, WHAT, ITERATION, RATE, DECAY, OTHERS, SETTINGS, PRESENT, OWN_NORM, SHARED_NORM, ADDITIONS, CUT, TWIN_NORM,
    WORDS,
) = range(14)  # fmt: skip
FINE, FAILED = 0.0, 1.0
CALLS = "build", "apply"
MUST_AGREE = {
    CUT: "the variables, or which of them have gradients, differ",
    ITERATION: "the iterations differ",
    RATE: "the learning rates differ",
    DECAY: "the weight decays differ",
    OTHERS: "the rates of the groups differ",
    SETTINGS: "the hyperparameters differ",
    SHARED_NORM: "the gradients of the replicated variables differ: their norms are",
}
SETTINGS_NAMES = (
    "beta_1", "beta_2", "epsilon", "amsgrad", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum",
    "ema_overwrite_frequency", "gradient_accumulation_steps", "nonfinite", "master_weights", "decouple_lr", "maximize",
    "nesterov", "epsilon_mode",
)  # fmt: skip
ROUNDINGS = 64  # on the way from the norms of variables to that of all, at most


class Agreement:
    """What connects the optimizers of several ranks.

    Parameters
    ----------
    comm : communicator
        Of an engine, or `Ranks`.
    replicated : sequence of str
        Regular expressions for the names of variables that all ranks have, with the same values.

    Attributes
    ----------
    is_shared : array of bool
        Which of this rank's variables are replicated.
    cut : Cut or None
        How DTensors are cut over their mesh.
    """

    def __init__(self, comm: Any, replicated: Sequence[str] = ()) -> None:
        self.ranks = ranks_of(comm)
        self._patterns = [re.compile(pattern) for pattern in patterns("replicated", replicated)]
        self._pending: float | None = None  # the call that is to be decided on
        self._settings: tuple[Any, float] = (None, 0.0)  # of which hyperparameters, and their checksum
        self.is_shared = self._counts = np.zeros(0, bool)
        self.cut: Cut | None = None
        self._cut_sum = 0  # the checksum of what has to be the same of it
        self._present: tuple[Any, bytes] = slice(0), b""  # which variables are trained, and have a gradient
        self._where = np.zeros(0, int)  # of each of this rank's variables, among the names of all ranks
        self._names = 0

    # Deciding

    def begin(self, call: str) -> None:
        """Note which call all ranks are to decide on next."""
        self._pending = float(CALLS.index(call))

    def fail(self, error: BaseException) -> None:
        """Have the others know of what was raised before the decision; afterwards it concerns this rank alone."""
        if self._pending is not None:
            self._decide(np.zeros(WORDS), error)

    @contextmanager
    def deciding(self, call: str) -> Iterator[None]:
        """Both, around what leads to the decision."""
        self.begin(call)
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def _decide(self, row: Rows, error: BaseException | None = None) -> Rows:
        """The rows of all ranks, none of which has failed."""
        row[WHAT], self._pending = self._pending, None
        row[STATUS] = FINE if error is None else FAILED
        rows = self.ranks.gather(row)
        if not np.all(rows[:, STATUS] == FINE):
            told = texts(self.ranks, "" if error is None else cut(f"{type(error).__name__}: {error}", 2000))
            if error is not None:
                return rows
            first = int(np.flatnonzero(rows[:, STATUS])[0])
            raise RankError(f"rank {first}: {told[first]} (nothing has been written on any rank)")
        if not np.all(rows[:, WHAT] == row[WHAT]):
            raise RankError(f"the calls differ: {_values(rows[:, WHAT], lambda k: CALLS[int(k)])}")
        return rows

    def _compare(self, rows: Rows, hyper: Any) -> None:
        for word, what in MUST_AGREE.items():
            values = rows[:, word]
            if np.array_equal(values, np.full(len(values), values[0]), equal_nan=True):
                continue
            if word == CUT:
                told = _different([json.loads(text) for text in texts(self.ranks, json.dumps(self._told()))])
            elif word == SETTINGS:
                found = [json.loads(text) for text in texts(self.ranks, json.dumps(_settings(hyper)))]
                names = [name for name in found[0] if any(each[name] != found[0][name] for each in found)]
                told = "; ".join(f"{name} is {_values([each[name] for each in found], brief)}" for name in names[:4])
            else:
                told = _values(values, int if word == ITERATION else float)
            raise RankError(f"{what}: {told}; expected the same on all ranks")
        for twins in () if self.cut is None else self.cut.twins:
            norms = rows[twins, TWIN_NORM]
            if not np.array_equal(norms, np.full(len(norms), norms[0]), equal_nan=True):
                raise RankError(
                    f"the gradients of parts that ranks have alike differ: their norms are "
                    f"{_values(norms, float, twins)}; expected the same"
                )

    def _told(self) -> list[Any]:
        """Of each variable what it is, and whether it has a gradient."""
        told: list[Any] = [] if self.cut is None else self.cut.told
        trained, present = self._present
        has = dict(zip(np.arange(len(told))[trained].tolist(), present, strict=True))
        return [[*each, "with a gradient" if has.get(k) else "without a gradient"] for k, each in enumerate(told)]

    def left(self) -> "Left":
        """What takes its place in a copy."""
        return Left(self.ranks)

    # Building

    def arrange(self, names: Sequence[str], given: Sequence[Array]) -> None:
        """Note which variables there are, and which of them other ranks have as well."""
        self.is_shared = np.array([any(each.search(name) for each in self._patterns) for name in names], bool)
        self._counts = ~self.is_shared | (self.ranks.rank == 0)  # of replicated variables, those of rank 0
        self._where, self._names = np.arange(len(names)), len(names)
        if isinstance(self.ranks, MeshRanks):
            self.cut = cut_of(self.ranks, names, given)
            self.is_shared, self._counts = self.cut.is_shared, self.cut.counts
            self._cut_sum = zlib.crc32(json.dumps(self.cut.told).encode())

    def meet(
        self, engine: Any, names: list[str], variables: list[Array], unmatched: list[Any], given: list[Array]
    ) -> list[Any]:
        """Tell the others of this rank's variables; returns what of `unmatched` matches none of theirs either.

        Raises
        ------
        RankError
            If a rank has failed, or a replicated variable is not the same everywhere.
        """
        self.arrange(names, given)
        mine: dict[str, list[Any]] = {
            "variables": [[n, list(v.shape), arrays.dtype_name(v)] for n, v in zip(names, variables, strict=True)],
            "shared": [name for name, shared in zip(names, self.is_shared, strict=True) if shared],
            "unmatched": [[called, list(nothing)] for called, nothing in unmatched],
        }
        rows = self._decide(self._row(engine, engine.state.scalars["iteration"].item(), math.nan, math.nan, ()))
        told = [json.loads(text) for text in texts(self.ranks, json.dumps(mine))]
        self._compare(rows, engine.hyper)
        for rank, others in enumerate(told):
            same = [[v for v in each["variables"] if v[0] in each["shared"]] for each in (told[0], others)]
            if sorted(same[0]) != sorted(same[1]):
                raise RankError(
                    f"the replicated variables differ: {brief(same[0])} on rank 0, {brief(same[1])} on rank {rank}; "
                    "expected the same names, shapes and dtypes on all ranks"
                )
        known: dict[str, int] = {}
        for each in told:
            for name, _, _ in each["variables"]:
                known.setdefault(name, len(known))
        self._where, self._names = np.array([known[name] for name in names], int), len(known)
        if not known:
            raise ValueError("`variables` is empty on all ranks; expected at least one array")
        nowhere = [
            set.intersection(*(set(each["unmatched"][k][1]) for each in told)) for k, _ in enumerate(mine["unmatched"])
        ] if len({len(each["unmatched"]) for each in told}) == 1 else []  # fmt: skip
        return [(called, sorted(found)) for (called, _), found in zip(unmatched, nowhere, strict=False) if found]

    # Stepping

    def combine(
        self, engine: Any, rates: Any, recipe: Any, gradients: Sequence[Any], norms: Any
    ) -> tuple[float, Any, float]:
        """The norm of all ranks' gradients together; and for a clip, of each (of a variable that is cut the whole one)
        and of all, as cpu/exact.py makes them steady.

        Raises
        ------
        RankError
            If a rank has failed, or they do not agree.
        ValueError
            If no rank has a gradient.
        """
        workspace = engine.workspace
        trained = slice(None) if workspace.trainable is None else workspace.trainable
        shared, where, counts = self.is_shared[trained], self._where[trained], self._counts[trained]
        self._present = trained, bytes(g is not None for g in gradients)
        row = self._row(engine, recipe.number, *rates)
        row[PRESENT] = sum(self._present[1])
        plans = workspace.plans
        additions = None if norms is None or len(plans) > 1 else plans[0].additions if plans else 0
        row[ADDITIONS] = -1 if additions is None else additions
        if norms is not None:
            row[OWN_NORM], row[SHARED_NORM] = _whole(norms[~shared & counts]), _whole(norms[shared])
            row[TWIN_NORM] = 0 if self.cut is None else _whole(norms[self.cut.has_twins[trained]])
        rows = self._decide(row)
        self._compare(rows, engine.hyper)
        if not rows[:, PRESENT].any():
            raise ValueError("No gradients provided for any variable on any rank.")
        if norms is None:
            return 0.0, None, 0.0
        return self._combined(plans, recipe, norms, (counts, where), rows)

    def _combined(self, plans: Any, recipe: Any, norms: Any, own: Any, rows: Rows) -> tuple[float, Any, float]:
        norm, (counts, _) = _whole(np.append(rows[:, OWN_NORM], rows[0, SHARED_NORM])), own
        is_single = bool((rows[:, ADDITIONS] >= 0).all())
        additions = rows[:, ADDITIONS].max() + ROUNDINGS + self.ranks.size
        if recipe.clips_each and recipe.is_update:
            norms = self._each(plans, recipe, norms, own, additions if is_single else None)
        if not is_single or not recipe.is_update or not math.isfinite(norm):
            return norm, norms, norm
        from ..cpu import exact

        steady = exact.steady(norm, additions)
        if steady < 0:  # the same on all ranks
            digits = self._gather_digits(plans, recipe, counts, np.zeros(len(norms), int), 1)
            steady = exact.norms_of(digits).item()
        return norm, norms, steady

    def _each(self, plans: Any, recipe: Any, norms: Any, own: Any, additions: float | None) -> Any:
        """The norms of whole variables: those of one name on several ranks are the shards of one."""
        counts, where = own
        row = np.zeros(self._names)
        row[where[counts]] = norms[counts]
        rows = self.ranks.gather(row)
        whole = np.array([_whole(column) for column in rows.T])
        if additions is not None and np.isfinite(whole).all():
            from ..cpu import exact

            if exact.steady_each(whole, additions):
                digits = self._gather_digits(plans, recipe, counts, where, self._names)
                whole = np.where(whole < 0, exact.norms_of(digits), whole)
        return whole[where]

    def _gather_digits(self, plans: Any, recipe: Any, counts: Any, where: Any, count: int) -> Any:
        """The exact sums of squares of all ranks, of so many variables."""
        from ..cpu import exact

        own = np.zeros((count, exact.DIGITS), np.int64)
        if plans:
            np.add.at(own, where[counts], plans[0].exact_squares(recipe)[counts])
        rows = self.ranks.gather(own.astype(np.float64).ravel())
        return rows.astype(np.int64).reshape(-1, count, exact.DIGITS).sum(axis=0)

    def _row(self, engine: Any, number: int, rate: float, decay: float, others: Any) -> Rows:
        hyper = engine.hyper
        if self._settings[0] is not hyper.token:
            self._settings = hyper.token, float(zlib.crc32(json.dumps(_settings(hyper)).encode()))
        row = np.zeros(WORDS)
        row[ITERATION], row[RATE], row[DECAY], row[SETTINGS] = number, rate, decay, self._settings[1]
        if self.cut is not None:
            row[CUT] = zlib.crc32(self._present[1], self._cut_sum)
        row[OTHERS] = zlib.crc32(repr(list(others)).encode()) if others else 0
        return row


@contextmanager
def joining(together: Agreement | None, names: Sequence[str], variables: Sequence[Any]) -> Iterator[Agreement | None]:
    """The agreement for the variables that are built inside: the one given, or for DTensors that of their mesh.

    Raises
    ------
    ValueError
        If there are both.
    """
    mesh = mesh_of(names, variables)
    if mesh is None:
        yield together
        return
    if together is not None:
        raise ValueError(
            "`comm` is given, and there are DTensors, whose mesh connects the ranks; expected DTensors without `comm`, "
            "or their local tensors (`to_local()`) with it"
        )
    joined = Agreement(MeshRanks(mesh))
    with joined.deciding("build"):
        yield joined


def rejoined(together: Agreement | None, names: Sequence[str], variables: Sequence[Any]) -> Agreement | None:
    """The agreement for variables that replace others, or None without DTensors: no message is sent."""
    mesh = mesh_of(names, variables)
    if mesh is None:
        return None
    if together is None or not isinstance(together.ranks, MeshRanks) or together.ranks.mesh != mesh:
        together = Agreement(MeshRanks(mesh))
    together.arrange(names, variables)
    return together


class Left:
    """In the place of an agreement, in the copy of an optimizer: the copy cannot go on with the others.

    Parameters
    ----------
    ranks : Ranks
        Of which this keeps the numbers alone.
    """

    def __init__(self, ranks: Any) -> None:
        self.rank: int = ranks.rank
        self.size: int = ranks.size
        self.ranks = self

    def begin(self, call: str) -> None:
        """Refuse to go on."""
        raise RuntimeError(
            "this optimizer is the copy of one that was connected with those of other processes; expected a new one, "
            "built with `comm`, that takes the state by `load` or `restore`"
        )

    def fail(self, error: BaseException) -> None:
        """Nobody is to be told."""

    def left(self) -> "Left":
        """It has left already."""
        return self


def ranks_of(comm: Any) -> Ranks:
    """The processes behind a communicator.

    Raises
    ------
    TypeError
        If it is none.
    """
    mpi, distributed = sys.modules.get("mpi4py.MPI"), sys.modules.get("torch.distributed")
    if mpi is not None and isinstance(comm, mpi.Comm):
        from .mpi import MpiRanks

        return MpiRanks(comm)
    if distributed is not None:
        from . import torch as engine

        if (found := engine.ranks_of(comm)) is not None:
            return found
    if isinstance(comm, Ranks) and not isinstance(comm, type):
        return comm
    raise TypeError(
        f"`comm` is {brief(comm)} of type {type(comm).__name__}; expected a communicator of mpi4py, a process group "
        "or a device mesh of one dimension of torch, or an object with `rank`, `size` and `gather`"
    )


def _settings(hyper: Any) -> dict[str, Any]:
    return {name: getattr(hyper, name) for name in SETTINGS_NAMES}


def _whole(norms: Any) -> float:
    """The norm of norms: the same in whatever order they are, on every machine."""
    peak = float(np.max(norms, initial=0.0))
    if not 0 < peak < math.inf:
        return peak
    return peak * math.sqrt(math.fsum((norm / peak) ** 2 for norm in norms.tolist()))


def _different(told: list[Any]) -> str:
    """The first variable that is not the same everywhere, of what each rank has told of its own."""
    for k in range(max(map(len, told))):
        found = [brief(each[k]) if k < len(each) else "nothing" for each in told]
        if len(set(found)) > 1:
            return f"number {k} is {_values(found, str)}"
    return "in a way that cannot be told"


def _values(values: Iterable[Any], form: Callable[[Any], Any], ranks: Sequence[int] | None = None) -> str:
    """Which values there are on which ranks."""
    found: dict[Any, list[int]] = {}
    for rank, value in zip(count() if ranks is None else ranks, values, strict=False):
        found.setdefault(form(value), []).append(rank)
    return ", ".join(f"{value} on {_ranks(those)}" for value, those in list(found.items())[:4])


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"
