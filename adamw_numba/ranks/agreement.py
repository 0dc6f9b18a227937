"""How ranks decide together: a row of each rank is gathered, and the same rows give the same decision everywhere."""

import json
import math
import re
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import cut
from ..arrays.pieces import Piece
from ..hyperparameters.groups import comparable
from ..hyperparameters.table import patterns
from . import pieces
from .chunks import Chunks, chunks_of
from .engines import ranks_of
from .hosts import place, threads_of
from .left import Left
from .meeting import check_overrides, check_shared, checksums, plain, sampled
from .mesh import Cut, MeshRanks, cut_of
from .norms import Norms, whole_of
from .protocol import RankError, Rows, texts
from .settings import different_settings, rates_of, settings_of
from .telling import different, different_calls, different_sample, values
from .words import (
    ADDITIONS,
    CALLS,
    CUT,
    DECAY,
    FAILED,
    FINE,
    ITERATION,
    MARKED,
    MOST_MARKS,
    MOST_WORDS,
    MUST_AGREE,
    OTHERS,
    OWN_NORM,
    PRESENT,
    RATE,
    SAMPLE,
    SETTINGS,
    SHARED_NORM,
    STATUS,
    TWIN_NORM,
    WHAT,
    WORDS,
)

_NOTHING: dict[int, str] = {}


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
    shared : list of int
        The same, in the order of their names.
    counts : array of bool
        Which of them count in what is added over all ranks: of replicated ones, rank 0's.
    pieces : dict
        Where this rank's variables lie in the whole ones, by name; None where they do not make a whole.
    known : dict
        The ranks that have each variable of any rank, and its pieces there.
    asked, group_of : dict
        For each variable of any rank the overrides that are for it, and the number of its group.
    mark : int
        Of this optimizer, alike on all ranks: another one's steps cannot be taken for its own.
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
        self._settings: tuple[Any, float] = (None, 0.0)  # of which hyperparameters and recipes, and their checksum
        self.is_shared = self.counts = np.zeros(0, bool)
        self.shared: list[int] = []
        self._shares_any = False
        self._sampled: list[Any] = []  # of the replicated gradients, what the last row has a checksum of
        self._others: Any = ()  # the rates of the groups, of which it has one too
        self.mark = 0
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
        self.asked: Mapping[str, Sequence[int]] = {}
        self.group_of: dict[str, int] = {}

    def share(self, replicated: Sequence[str], places: Any = None) -> list[str]:
        """Take regular expressions for the names of variables that all ranks have, with the same values; and where in
        the whole variables this rank's pieces are."""
        given = patterns("replicated", replicated)
        self._patterns, self._given = [re.compile(pattern) for pattern in given], places
        return given

    # Deciding

    def begin(self, call: str) -> None:
        """Note which call all ranks are to decide on next."""
        self._pending = float(CALLS.index(call) + MARKED * self.mark)

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
            told = texts(self.ranks, "" if error is None else cut(f"{type(error).__name__}: {error}", 500))
            if error is not None:
                return rows
            first = int(np.flatnonzero(rows[:, STATUS])[0])
            what = "nothing has been written on any rank" if self._around is None else "all ranks have stopped"
            raise RankError(f"rank {first}: {told[first]} ({what})")
        if not np.all(rows[:, WHAT] == row[WHAT]):
            raise RankError(f"the calls differ: {different_calls(rows[:, WHAT])}; expected the same on all ranks")
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
                told = different_settings(self.tell(settings()))
            elif word == OTHERS:
                told = different_settings(self.tell(rates_of(self._others)))
            elif word == SAMPLE and self._around is None:
                told = different_sample(self.tell(self._sampled))
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
        return self._settled(call, row, partial(settings_of, engine), must_agree)

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
            self.pieces = {**self.cut.pieces}  # which `meet` asks of all ranks, where they do not follow from a mesh
            self._cut_sum = zlib.crc32(json.dumps(self.cut.told).encode())
        self.shared = sorted(np.flatnonzero(self.is_shared).tolist(), key=names.__getitem__)  # alike on all ranks
        self._shares_any = bool(self.shared)

    def introduce(
        self, overrides: Sequence[Any], names: Sequence[str], asked: Sequence[Sequence[int]], unmatched: list[list[str]]
    ) -> tuple[Sequence[Sequence[int]], list[list[str]]]:
        """Which overrides are for the variables of all ranks, and what of `unmatched` matches none of them.

        Raises
        ------
        RankError
            If a rank has failed, or has other overrides.
        """
        call, row = self._pending, np.zeros(self._words)
        row[OTHERS] = len(overrides)
        if self._decide(row)[:, OTHERS].any():
            own = [[each.called, comparable(each.own), each.patterns] for each in overrides]
            told = self.tell([own, list(zip(names, asked, strict=True)), unmatched])
            self.asked = check_overrides(told)
            asked, nowhere = list(self.asked.values()), zip(*(each[2] for each in told), strict=True)
            unmatched = [sorted(set.intersection(*map(set, each))) for each in nowhere]
        self._pending = call  # the decision of `meet`
        return asked, unmatched

    def meet(self, engine: Any, names: list[str], variables: list[Array], given: list[Array]) -> None:
        """Tell the others of this rank's variables.

        Raises
        ------
        RankError
            If a rank has failed, or a replicated variable is not the same everywhere.
        """
        self.arrange(names, given)
        places = pieces.read(self._given, names, variables, self.is_shared)
        mine: dict[str, Any] = {
            "variables": [
                [name, list(variable.shape), arrays.dtype_name(variable), place]
                for name, variable, place in zip(names, variables, places, strict=True)
            ],
            "shared": [name for name, shared in zip(names, self.is_shared, strict=True) if shared],
            "place": place(),
            "patterns": [each.pattern for each in self._patterns if any(map(each.search, names))],
            "values": checksums(names, variables, self.is_shared),
            "mark": secrets.randbelow(MOST_MARKS - 1) + 1,
        }
        rows = self._decide(self._row(engine, engine.state.scalars["iteration"].item(), math.nan, math.nan, ()))
        told = self.tell(mine)
        self._compare(rows, partial(settings_of, engine))
        self.mark = told[0]["mark"]
        check_shared(told, [each.pattern for each in self._patterns])
        self.threads = threads_of(self.ranks.rank, [each["place"] for each in told])
        self.known = pieces.placed([each["variables"] for each in told], set(told[0]["shared"]))
        self.pieces = {name: dict(self.known[name])[self.ranks.rank] for name in names}
        self._chunks = chunks_of([each["variables"] for each in told], self.known, told[0]["shared"])
        self.group_of = dict.fromkeys(self.known, 0) | self.group_of
        number = {name: k for k, name in enumerate(self.known)}
        self._where, self._names = np.array([number[name] for name in names], int), len(number)
        has_any = any(math.prod(shape) for each in told for _, shape, *_ in each["variables"])
        if not (number if self._around is None else has_any):
            what = "`variables`" if self._around is None else "`x0`"
            raise ValueError(f"{what} is empty on all ranks; expected at least one array")
        self._resume()

    # Stepping

    def idle(self, engine: Any, rates: Any) -> None:
        """Make sure that no other rank has a gradient either.

        Raises
        ------
        RankError
            If one has, or they do not agree on the step.
        """
        if self.cut is not None:
            moving = None if engine.workspace is None else engine.workspace.trainable
            self._present = (slice(None), bytes(len(self.cut.told))) if moving is None else (moving, bytes(len(moving)))
        self._compare(self._decide(self._row(engine, engine.count(), *rates)), partial(settings_of, engine))
        self._resume()

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
        if self._shares_any:
            of = dict(zip(np.arange(len(workspace.names))[trained].tolist(), gradients, strict=True))
            self._sampled = sampled([(workspace.names[i], of[i]) for i in self.shared if i in of], recipe.number)
            row[SAMPLE] = zlib.crc32(json.dumps(self._sampled).encode())
        plans = workspace.plans
        if norms is not None:
            shared, counts, where = self.is_shared[trained], self.counts[trained], self._where[trained]
            is_simple = not self._shares_any and self.cut is None
            row[OWN_NORM] = whole_of((norms if is_simple else norms[~shared & counts]).tolist())
            row[SHARED_NORM] = whole_of(norms[shared].tolist()) if self._shares_any else 0
            row[TWIN_NORM] = 0 if self.cut is None else whole_of(norms[self.cut.has_twins[trained]].tolist())
            additions = plans[0].additions if len(plans) == 1 else 0 if not plans else None
            row[ADDITIONS] = -1 if additions is None else additions
        rows = self._decide(row)
        self._compare(rows, partial(settings_of, engine))
        if not row[PRESENT] and not rows[:, PRESENT].any():
            raise ValueError("No gradients provided for any variable on any rank.")
        found: tuple[float, Any, float] = 0.0, None, 0.0
        if norms is not None:
            of_all = Norms(self.ranks, counts, where, self._names, self._chunks)
            numbers = rows[:, OWN_NORM].tolist(), rows.item(0, SHARED_NORM), rows[:, ADDITIONS].tolist()
            found = of_all.combined(plans, recipe, norms, *numbers)
        self._resume()
        return found

    def _row(self, engine: Any, number: int, rate: float, decay: float, others: Any) -> Rows:
        known = engine.hyper.token, engine.recipes
        if self._settings[0] != known:
            self._settings = known, float(zlib.crc32(json.dumps(settings_of(engine)).encode()))
        row = np.zeros(self._words)
        row[ITERATION], row[RATE], row[DECAY], row[SETTINGS] = number, rate, decay, self._settings[1]
        if self.cut is not None:
            row[CUT] = zlib.crc32(self._present[1], self._cut_sum)
        self._others, row[OTHERS] = others, zlib.crc32(repr(others).encode()) if others else 0
        return row
