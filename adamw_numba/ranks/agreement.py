"""How ranks decide together: a row of each rank is gathered, and the same rows give the same decision everywhere."""

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, cut
from ..arrays.pieces import Piece
from ..hyperparameters.table import patterns
from . import pieces
from .chunks import Chunks, chunks_of
from .engines import ranks_of
from .hosts import place, threads_of
from .left import Left
from .meeting import check_shared, checksums, plain
from .mesh import Cut, MeshRanks, cut_of
from .protocol import RankError, Rows, texts
from .telling import different, values

# The words of a row. Norms are those of the variables that this rank counts, of those that all ranks have, and of those
# that some have; additions as in cpu/plan.py, -1 where there are none; the cut and the last norm are of DTensors alone.
(
    STATUS, WHAT, ITERATION, RATE, DECAY, OTHERS, SETTINGS, CUT, PRESENT, OWN_NORM, SHARED_NORM, ADDITIONS, TWIN_NORM,
    WORDS,
) = range(14)  # fmt: skip
# Where a loop goes around the steps (see `looping`), each row has more words, which minimizer/ranks.py explains.
VALUE, GRADIENT, MOVE, SIZE, SECONDS, STOPS, SHARED_X, SHARED_GRADIENT, MOST_WORDS = range(WORDS, WORDS + 9)
FINE, FAILED = 0.0, 1.0
CALLS = (
    "build", "apply", "start", "evaluate", "callback", "recover", "end", "build of a Sharded", "apply of a Sharded",
    "save", "load", "restore",
)  # fmt: skip
MUST_AGREE = {
    CUT: "the variables, or which of them have gradients, differ",
    ITERATION: "the iterations differ",
    RATE: "the learning rates differ",
    DECAY: "the weight decays differ",
    OTHERS: "the rates of the groups differ",
    SETTINGS: "the hyperparameters differ",
    SHARED_NORM: "the gradients of the replicated variables differ: their norms are",
    SHARED_X: "the replicated variables differ: their checksums are",
    SHARED_GRADIENT: "the gradients of the replicated variables differ: their checksums are",
}
SETTINGS_NAMES = (
    "beta_1", "beta_2", "epsilon", "amsgrad", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum",
    "ema_overwrite_frequency", "gradient_accumulation_steps", "nonfinite", "master_weights", "decouple_lr", "maximize",
    "nesterov", "epsilon_mode", "moments", "seed",
)  # fmt: skip
_NOTHING: dict[int, str] = {}
ROUNDINGS = 64  # on the way from the norms of variables to that of all, at most


class Agreement:
    """What connects the optimizers of several ranks.

    Parameters
    ----------
    comm : communicator
        Of an engine, or `Ranks`.

    Attributes
    ----------
    is_shared : array of bool
        Which of this rank's variables are replicated.
    counts : array of bool
        Which of them count in what is added over all ranks: of replicated ones, rank 0's.
    pieces : dict
        Where this rank's variables lie in the whole ones, by name; None where they do not make a whole.
    known : dict
        The ranks that have each variable of any rank, and its pieces there.
    held : callable or None
        What an interrupt in the middle of a decision would have called: it is called at its end.
    threads : int or None
        The most that this rank should use, where several are on its cores.
    cut : Cut or None
        How DTensors are cut over their mesh.
    """

    def __init__(self, comm: Any) -> None:
        self.ranks = ranks_of(comm)
        self._patterns: list[re.Pattern[str]] = []
        self._pending: float | None = None  # the call that is to be decided on
        self._around: float | None = None  # the same, between the decisions of a loop
        self._told: Rows | None = None  # what the next row of a loop says of the step before it
        self.held: Callable[[], Any] | None = None
        self._settings: tuple[Any, float] = (None, 0.0)  # of which hyperparameters, and their checksum
        self.is_shared = self.counts = np.zeros(0, bool)
        self._shares_any = False
        self.pieces: dict[str, Piece | None] = {}
        self.known: dict[str, list[tuple[int, Piece | None]]] = {}
        self._given: Any = None  # what the user says of the pieces
        self.threads: int | None = None
        self._chunks: Chunks | None = None
        self.cut: Cut | None = None
        self._cut_sum = 0  # the checksum of what has to be the same of it
        self._present: tuple[Any, bytes] = slice(0), b""  # which variables are trained, and have a gradient
        self._where = np.zeros(0, int)  # of each of this rank's variables, among the names of all ranks
        self._names = 0
        self._groups: list[int] = []  # those that all ranks have, of the groups after the common one

    def share(self, replicated: Sequence[str], places: Any = None) -> list[str]:
        """Take regular expressions for the names of variables that all ranks have, with the same values; and where in
        the whole variables this rank's pieces are."""
        given = patterns("replicated", replicated)
        self._patterns, self._given = [re.compile(pattern) for pattern in given], places
        return given

    # Deciding

    def begin(self, call: str) -> None:
        """Note which call all ranks are to decide on next."""
        self._pending = float(CALLS.index(call))

    def fail(self, error: BaseException) -> None:
        """Have the others know of what was raised before the decision; afterwards it concerns this rank alone."""
        if self._pending is not None:
            self._decide(np.zeros(self._words), error)

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
        if error is None and (rows[:, :PRESENT] == row[:PRESENT]).all():  # most decisions: nobody has failed, all agree
            return rows
        if not np.all(rows[:, STATUS] == FINE):
            told = texts(self.ranks, "" if error is None else cut(f"{type(error).__name__}: {error}", 2000))
            if error is not None:
                return rows
            first = int(np.flatnonzero(rows[:, STATUS])[0])
            what = "nothing has been written on any rank" if self._around is None else "all ranks have stopped"
            raise RankError(f"rank {first}: {told[first]} ({what})")
        if not np.all(rows[:, WHAT] == row[WHAT]):
            raise RankError(f"the calls differ: {values(rows[:, WHAT], lambda k: CALLS[int(k)])}")
        return rows

    def agree(self, number: float = 0.0) -> bool:
        """Whether all ranks, none of which has failed, have the same number.

        Raises
        ------
        RankError
            If another one has, or makes another call.
        """
        return bool((self.told_with(number)[:, 0] == number).all())

    def told_with(self, number: float, other: float = 0.0) -> Rows:
        """Two numbers of each rank, none of which has failed: see `agree`."""
        row = np.zeros(WORDS)
        row[SETTINGS], row[OWN_NORM] = number, other
        return self._decide(row)[:, [SETTINGS, OWN_NORM]]

    def tell(self, own: Any) -> list[Any]:
        """What each rank tells, of what JSON can hold."""
        return [json.loads(text) for text in texts(self.ranks, json.dumps(own, default=plain))]

    def _resume(self) -> None:
        """After a decision: in a loop, the next one is pending from now on."""
        self._pending, held, self.held = self._around, self.held, None
        if held is not None:
            held()

    def _compare(self, rows: Rows, settings: Callable[[], dict[str, Any]], more: dict[int, str] = _NOTHING) -> None:
        for word, what in (MUST_AGREE | more).items():
            if word >= rows.shape[1]:
                continue
            found = rows[:, word].tolist()
            if found.count(found[0]) == len(found) or all(map(math.isnan, found)):
                continue
            if word == CUT:
                told = different(self.tell(self._of_cut()))
            elif word == SETTINGS:
                each_has = self.tell(settings())
                given = {name: [own.get(name) for own in each_has] for own in each_has for name in own}
                names = [name for name, each in given.items() if any(value != each[0] for value in each)]
                told = "; ".join(f"{name} is {values(given[name], brief)}" for name in names[:4])
            else:
                told = values(found, int if word == ITERATION else float)
            raise RankError(f"{what}: {told}; expected the same on all ranks")
        for twins in () if self.cut is None else self.cut.twins:
            norms = rows[twins, TWIN_NORM].tolist()
            if norms.count(norms[0]) < len(norms) and not all(map(math.isnan, norms)):
                raise RankError(
                    f"the gradients of parts that ranks have alike differ: their norms are "
                    f"{values(norms, float, twins)}; expected the same"
                )

    def _of_cut(self) -> list[Any]:
        """Of each variable what it is, and whether it has a gradient."""
        told: list[Any] = [] if self.cut is None else self.cut.told
        trained, present = self._present
        has = dict(zip(np.arange(len(told))[trained].tolist(), present, strict=True))
        return [[*each, "with a gradient" if has.get(k) else "without a gradient"] for k, each in enumerate(told)]

    def left(self) -> Left:
        """What takes its place in a copy."""
        return Left(self.ranks)

    # Deciding again and again

    @contextmanager
    def looping(self, call: str) -> Iterator[None]:
        """Around a loop, up to its end: a decision is always pending, so that what one rank raises ends all."""
        self._around = float(CALLS.index(call))
        try:
            with self.deciding(call):
                yield
        finally:
            self._around = self._pending = None

    @property
    def is_deciding(self) -> bool:
        """Whether this rank is in the middle of a decision of a loop, which it cannot leave alone."""
        return self._around is not None and self._pending is None

    def settle(self, settings: Mapping[str, Any], words: Mapping[int, float]) -> Rows:
        """The rows of all ranks, which have to have the same settings."""
        row = self._row_of(words)
        row[SETTINGS] = zlib.crc32(json.dumps(settings).encode())
        return self._settled("start", row, lambda: dict(settings), {SETTINGS: "the arguments differ"})

    def decide(self, call: str, engine: Any, words: Mapping[int, float], must_agree: dict[int, str] = _NOTHING) -> Rows:
        """The rows of all ranks with these words, and with what the last step was taken by.

        Raises
        ------
        RankError
            If a rank has failed, or they do not agree on the step or on what they must.
        """
        row, self._told = self._row_of(words), None
        return self._settled(call, row, partial(_settings, engine.hyper), must_agree)

    def _settled(self, call: str, row: Rows, settings: Callable[[], dict[str, Any]], must_agree: Any) -> Rows:
        self.begin(call)
        rows = self._decide(row)
        self._compare(rows, settings, must_agree)
        if call == "end":  # what is raised from now on concerns this rank alone: the others may have gone
            self._around = None
        self._resume()
        return rows

    def _row_of(self, words: Mapping[int, float]) -> Rows:
        row = np.zeros(self._words) if self._told is None else self._told
        for word, number in words.items():
            row[word] = number
        return row

    @property
    def _words(self) -> int:
        """Of a row: rows that may meet, where a rank has failed, are of one length."""
        return WORDS if self._around is None else MOST_WORDS

    # Building

    def arrange(self, names: Sequence[str], given: Sequence[Array]) -> None:
        """Note which variables there are, and which of them other ranks have as well."""
        self.is_shared = np.array([any(each.search(name) for each in self._patterns) for name in names], bool)
        # Of replicated variables, those of rank 0 count in what is added over all ranks.
        self.counts = ~self.is_shared | (self.ranks.rank == 0)
        self._where, self._names = np.arange(len(names)), len(names)
        if isinstance(self.ranks, MeshRanks):
            self.cut = cut_of(self.ranks, names, given)
            self.is_shared, self.counts, self._given = self.cut.is_shared, self.cut.counts, self.cut.pieces
            self._cut_sum = zlib.crc32(json.dumps(self.cut.told).encode())
        self._shares_any = bool(self.is_shared.any())

    def meet(
        self,
        engine: Any,
        names: list[str],
        variables: list[Array],
        given: list[Array],
        groups: list[Any],
        unmatched: list[Any],
    ) -> list[Any]:
        """Tell the others of this rank's variables; returns what of `unmatched` matches none of theirs either.

        Raises
        ------
        RankError
            If a rank has failed, or a replicated variable is not the same everywhere.
        """
        self.arrange(names, given)
        places = pieces.read(self._given, names, variables)
        mine: dict[str, list[Any]] = {
            "variables": [
                [name, list(variable.shape), arrays.dtype_name(variable), place]
                for name, variable, place in zip(names, variables, places, strict=True)
            ],
            "shared": [name for name, shared in zip(names, self.is_shared, strict=True) if shared],
            "groups": [", ".join(group.told()) for group in groups[1:]],
            "place": place(),
            "patterns": [each.pattern for each in self._patterns if any(map(each.search, names))],
            "values": [] if self.cut else checksums(names, variables, self.is_shared),
            "unmatched": [[called, list(nothing)] for called, nothing in unmatched],
        }
        rows = self._decide(self._row(engine, engine.state.scalars["iteration"].item(), math.nan, math.nan, ()))
        told = self.tell(mine)
        self._compare(rows, partial(_settings, engine.hyper))
        check_shared(told, [each.pattern for each in self._patterns])
        self.threads = threads_of(self.ranks.rank, [each["place"] for each in told])
        everywhere = sorted(set.intersection(*(set(each["groups"]) for each in told)))
        self._groups = [mine["groups"].index(group) for group in everywhere]
        self.known = pieces.placed([each["variables"] for each in told], set(told[0]["shared"]))
        self.pieces = {name: dict(self.known[name])[self.ranks.rank] for name in names}
        self._chunks = chunks_of([each["variables"] for each in told], self.known, told[0]["shared"])
        number = {name: k for k, name in enumerate(self.known)}
        self._where, self._names = np.array([number[name] for name in names], int), len(number)
        has_any = any(math.prod(shape) for each in told for _, shape, *_ in each["variables"])
        if not (number if self._around is None else has_any):
            what = "`variables`" if self._around is None else "`x0`"
            raise ValueError(f"{what} is empty on all ranks; expected at least one array")
        self._resume()
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
        if self.cut is not None:
            self._present = trained, bytes(g is not None for g in gradients)
        row = self._row(engine, recipe.number, *rates)
        if norms is None and self._around is not None:
            self._told = row
            self._resume()
            return 0.0, None, 0.0
        row[PRESENT] = any(g is not None for g in gradients)
        plans = workspace.plans
        if norms is not None:
            shared, counts, where = self.is_shared[trained], self.counts[trained], self._where[trained]
            is_simple = not self._shares_any and self.cut is None
            row[OWN_NORM] = _whole((norms if is_simple else norms[~shared & counts]).tolist())
            row[SHARED_NORM] = _whole(norms[shared].tolist()) if self._shares_any else 0
            row[TWIN_NORM] = 0 if self.cut is None else _whole(norms[self.cut.has_twins[trained]].tolist())
            additions = plans[0].additions if len(plans) == 1 else 0 if not plans else None
            row[ADDITIONS] = -1 if additions is None else additions
        rows = self._decide(row)
        self._compare(rows, partial(_settings, engine.hyper))
        if not row[PRESENT] and not rows[:, PRESENT].any():
            raise ValueError("No gradients provided for any variable on any rank.")
        found = (0.0, None, 0.0) if norms is None else self._combined(plans, recipe, norms, (counts, where), rows)
        self._resume()
        return found

    def _combined(self, plans: Any, recipe: Any, norms: Any, own: Any, rows: Rows) -> tuple[float, Any, float]:
        (counts, _), found = own, rows[:, ADDITIONS].tolist()
        if self._chunks is not None and min(found) < 0:
            of_chunks = self._chunks.norms(self.ranks.gather(self._chunks.row(self.ranks.rank, plans)))
            if of_chunks is not None:
                each, norm = of_chunks
                return norm, np.array([each[name] for name in plans[0].table.names]) if plans else norms, norm
        norm = _whole([*rows[:, OWN_NORM].tolist(), rows.item(0, SHARED_NORM)])
        is_single = min(found) >= 0
        additions = max(found) + ROUNDINGS + self.ranks.size
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
        whole = np.array([_whole(column) for column in rows.T.tolist()])
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
        row = np.zeros(self._words)
        row[ITERATION], row[RATE], row[DECAY], row[SETTINGS] = number, rate, decay, self._settings[1]
        if self.cut is not None:
            row[CUT] = zlib.crc32(self._present[1], self._cut_sum)
        row[OTHERS] = zlib.crc32(repr([others[k] for k in self._groups]).encode()) if others and self._groups else 0
        return row


def _settings(hyper: Any) -> dict[str, Any]:
    return {name: getattr(hyper, name) for name in SETTINGS_NAMES}


def _whole(norms: list[float]) -> float:
    """The norm of norms: the same in whatever order they are, on every machine."""
    if not all(map(math.isfinite, norms)):
        return math.nan if any(map(math.isnan, norms)) else math.inf
    peak = max(norms, default=0.0)
    return peak and peak * math.sqrt(math.fsum((norm / peak) ** 2 for norm in norms))
