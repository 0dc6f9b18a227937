"""The arrays of one optimizer that lie on one GPU, and how a step is taken there.

What the kernels need is sent ahead: a table of addresses, and the coefficients of the next steps as rows, from which
they choose by a counter of their own. So a step of arrays that have not moved is one compiled call, which launches a
few kernels with three integers each; nothing waits for the GPU, a step that is skipped there uses the same row again,
and a captured graph follows the schedule.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..arrays import Array
from ..arrays.runs import Matrix
from ..arrays.table import AddressTable
from ..coefficients import Numbers, Recipe, Recipes, whole_norm
from ..update import VARYING
from . import driver
from .counter import Counter, Report
from .launcher import Launcher
from .rows import Rows, RowsOf
from .streams import Streams, wait_for_all
from .tables import Mirror
from .words import CLIPPED, CONTROL, COUNTERS, EXHAUSTED, GUARDED, SCALE, STILL
from .workload import Workload

_NONE, _EACH, _ALL = range(0), range(1), range(2)  # of two clips by norm: of each gradient, and of all together

Call = tuple[Any, ...]


class Plan:
    """What `step` knows of a GPU: `begin`, where everything about the arrays can fail, then what the step is to do.

    A plan has a table of addresses, a workload, rows of coefficients, a counter, streams and a launcher, each with a
    state of its own: see their files.

    Parameters
    ----------
    place : str
        ``cuda:0``, for example.
    names : list of str
    variables : list of arrays
        None for a variable that lies elsewhere.
    slots : list of dict of arrays
    which : list of int
        The group of hyperparameters that each variable is in.
    groups : int
        How many there are.
    places : list, optional
        Where the elements of each variable are in the whole one: see `AddressTable`.

    Attributes
    ----------
    table : AddressTable
    workload : Workload
    rows : Rows
    counter : Counter
    streams : Streams
    launcher : Launcher
    """

    additions = None  # see cpu/plan.py: norms are taken as they are

    def __init__(
        self,
        place: str,
        names: Sequence[str],
        variables: Sequence[Array],
        slots: Sequence[dict[str, Array]],
        which: Sequence[int],
        groups: int,
        places: Sequence[Any] | None = None,
    ) -> None:
        here = [variable for variable in variables if variable is not None]
        self.streams = Streams(int(place.partition(":")[2]), here)
        self.counter = Counter()
        self.launcher = Launcher(self.streams)
        self.count = len(names)
        self._which, self._sets = which, groups
        self._arrangement: object = None  # what the workload is made for
        self._described: object = None  # the rows that the descriptors tell of
        with self.current():
            self.table = AddressTable(place, names, variables, slots, places)
            self._sent_table = Mirror(self.table.addresses)
            self.rows = Rows(groups)
            self.streams.board[driver.MIRROR] = self._sent_table.board
            self._arrange_if_changed()

    def current(self) -> AbstractContextManager[Any]:
        """In which this plan's GPU is the current one."""
        return self.streams.on_device()

    # Beginning a step

    def lend(self) -> None:
        """Note that the user has been given the slots."""
        self.table.lend()

    def begins_as_before(self, gradients: Sequence[Array | None]) -> bool:
        """Begin a step for which nothing has changed but values and addresses; otherwise `begin` is to do it."""
        return self.table.reads(gradients) == self.count and self.streams.begin_as_before(gradients)

    def begin(self, gradients: Sequence[Array | None]) -> None:
        """Take the libraries' current streams, check the arrays, and send their addresses if they have moved.

        Raises
        ------
        RuntimeError
            If a graph is being captured and something would have to be made first.
        """
        with self.current():
            self.streams.take(gradients)
            self.table.refresh(gradients)
            self._arrange_if_changed()
            self.streams.wait_for_others()  # also for what the table has just cast in them
            self._send_addresses()

    @property
    def is_capturing(self) -> bool:
        """Whether the step that has begun is being captured."""
        return self.streams.is_capturing

    def looks_captured(self) -> bool:
        """Whether a step that began now would be."""
        return self.streams.looks_captured()

    def _send_addresses(self) -> None:
        """Send the table; a captured graph has one of its own, which its replays need not send again."""
        if self.is_capturing:
            self.streams.board[driver.TABLE] = driver.copy_for_capture(self.table.addresses)
        else:
            self.streams.board[driver.TABLE] = self._sent_table.address
            self._sent_table.send(self.streams.handle)

    # The coefficients

    def expect(self, iteration: int) -> None:
        """Have the GPU count on from `iteration`, unless that is what the host was last told."""
        if self.iteration == iteration:
            return
        if self.is_capturing:
            raise RuntimeError("the iteration has been changed while a graph is captured; expected that before it")
        with self.current():
            self.counter.set(iteration)

    def send_ahead(self, rows_of: RowsOf, key: object) -> None:
        """Send the rows of this step and the next ones, unless they are there.

        Raises
        ------
        RuntimeError
            While a graph is captured, if they are not.
        """
        if not self.is_capturing:
            self.send_rows(*self.counter.next_steps(), rows_of, key)
        elif not self.rows.are_current(key):
            raise RuntimeError(
                "a hyperparameter has changed, or no step was taken yet, when a graph is captured; expected one step, "
                "or update_hyperparameters(), before the capture"
            )

    def send_rows(self, first: int, count: int, rows_of: RowsOf, key: object) -> None:
        """Send the rows of `count` steps from `first` on, and of some more, unless they are there, made with that key.

        A key of None says that a row holds for nothing but this step.
        """
        if self.rows.hold(first, count, key):
            return
        if self.is_capturing:
            raise RuntimeError(
                "the host has something to say at every step; expected that not to be captured in a graph"
            )
        with self.current():
            stream = max(self.streams.handle, 0)
            self.counter.look(stream)
            self.rows.write(first, count, rows_of, key)
            self._describe_if_moved()
            self.rows.send(stream)

    def send_ahead_now(self, first: int, steps: int, recipe_at: Callable[[int], Recipe], key: object) -> None:
        """Send the rows of so many steps, between steps; waits for the GPU, so that it holds in every stream."""
        if self.looks_captured():
            raise RuntimeError("update_hyperparameters() cannot be captured in a graph; expected it before or after")
        with self.current():
            wait_for_all()
            self.streams.take([None] * len(self.table.names))
            self.expect(first)
            self.send_rows(first, steps, lambda numbers: rows_of(map(recipe_at, numbers)), key)
            wait_for_all()

    # A step, as every plan takes it

    def norms(self, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[Matrix, float]:
        """The norm of each variable's gradient, 0 elsewhere, and of all together; waits for the GPU."""
        self._check_not_captured()
        self.send_rows(recipe.number, 1, lambda _: rows_of([recipe]), None)
        found = np.zeros(len(self.table.names))
        with self.current():
            launch, *arguments = self.launcher.norms(self.workload, recipe.variant.accumulate)
            launch(*arguments)
            self.streams.synchronize()
            found[self.table.own] = self.workload.norms.copy_to_host()[self.table.own]
        return found, whole_norm(found)

    def steady_norms(self, recipe: Recipe, norms: Any, norm: float) -> tuple[Any, float]:
        """The same norms."""
        return norms, norm

    def work(self, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[list[Call], list[Call]]:
        """What is to be done that may be repeated: nothing; and the launches of a step that the host has decided."""
        self._check_not_captured()
        if recipe.alone:
            return [], self._work_alone(recipe, gradients)
        self.expect(recipe.number)
        each = recipe.clips is not None and recipe.clips_each
        self.send_rows(recipe.number, 1, lambda _: rows_of([recipe], _EACH if each else _NONE), None)
        # The host knows the norms, but the kernels read from memory what each gradient is multiplied with.
        return [], self._launches(recipe, CLIPPED if each else 0, norms=each)

    def _work_alone(self, recipe: Recipe, gradients: Sequence[Array | None]) -> list[Call]:
        if all(gradients[i] is None for i in self.table.own):
            return []
        if self.has_captures:
            raise RuntimeError("`update_step` would take the rows of a captured graph; expected no capture before it")
        self.send_rows(recipe.number, 1, lambda _: rows_of([recipe], _NONE), None)
        return self._launches(recipe, STILL, norms=False, counts=False)

    def _check_not_captured(self) -> None:
        if self.is_capturing:
            raise RuntimeError(
                "a graph is captured of a step for which the host waits (nonfinite='raise', a LossScaleOptimizer, "
                "arrays at several places); expected nonfinite='propagate' or 'skip', and all arrays on one GPU"
            )

    def decide(
        self, recipe: Recipe, recipes: Recipes, rates_at: Callable[[int], tuple[float, float]], key: object
    ) -> tuple[list[Call], bool]:
        """The launches of a step that the GPU decides and counts by itself, and whether the host can count along."""
        if self.iteration != recipe.number:
            self.expect(recipe.number)
        recipe.shrink = 1.0  # the host may have decided the last step
        is_capturing = self.streams.is_capturing
        if is_capturing or not self.rows.hold(*self.counter.next_steps(), key):
            self._send_ahead(recipe, recipes, rates_at, key)
        clips, guarded = bool(recipe.clips_each or recipe.global_clipnorm), recipe.nonfinite == "skip"
        knows = self.counter.known.is_certain and not guarded and not is_capturing
        # Where the host does not know which step this is, it may be an update, of which norms are clipped.
        clipped = clips and (recipe.is_update or not knows)
        if clips and not clipped:
            self.launcher.norms(self.workload, recipe.variant.accumulate)  # loaded, for a graph to come
        flags = clipped * CLIPPED | guarded * GUARDED
        return self._launches(recipe, flags, norms=guarded or clipped, decides=not knows), knows

    def _send_ahead(self, recipe: Recipe, recipes: Recipes, rates_at: Any, key: object) -> None:
        number, filled = recipe.number, recipe.filled()
        fixed = rates_at(number) if recipes.has_fixed_rates else None

        def recipe_at(k: int) -> Recipe:
            if k != number:
                return recipes.at(k, *(fixed or rates_at(k)))
            recipe.refill(filled)  # it was filled in for others meanwhile
            return recipe

        self.send_ahead(lambda numbers: rows_of(map(recipe_at, numbers)), key)
        recipe_at(number)

    def _launches(
        self, recipe: Recipe, flags: int, *, norms: bool, counts: bool = True, decides: bool = False
    ) -> list[Call]:
        """The call that launches a step, norms first where one is needed, and those that end it.

        Parameters
        ----------
        counts : bool
            Whether the step is counted.
        decides : bool
            Whether the GPU decides if it is, which the host may ask about.
        """
        variant, is_captured = recipe.variant, self.streams.is_capturing
        if variant.clip:
            variant = variant._replace(clip=False)
        launch = self.launcher.step(self.workload, variant, flags, norms=norms)
        if is_captured:
            self.launcher.keep_for_graphs(self.rows.mirror, self.counter.words, self.workload, self._sent_table)
        after = self.counter.after(flags, is_captured, counts, decides, norms)
        return [launch, *self.streams.ending(), (setattr, self.counter, "known", after)]

    def check_captured(self, clipped: bool, guarded: bool) -> None:
        """Refuse options that captured steps cannot follow."""
        flags = clipped * CLIPPED | guarded * GUARDED
        if self.has_captures and flags & ~self.counter.known.captured_flags:
            raise RuntimeError(
                "clipping by norm, or nonfinite='skip', was turned on after a graph was captured without it; expected "
                "another capture"
            )

    # What the GPU has counted

    @property
    def iteration(self) -> int:
        """Steps counted by the GPU, as far as the host knows."""
        return self.counter.known.iteration

    @property
    def is_certain(self) -> bool:
        """Whether the host knows: not after a step that the GPU may have skipped, nor once a graph was captured."""
        return self.counter.known.is_certain

    @property
    def has_captures(self) -> bool:
        """Whether a graph was captured, which may be replayed at any time."""
        return self.counter.known.has_captures

    @property
    def pending(self) -> bool:
        """Whether the GPU may have counted otherwise than the host, and nobody has asked."""
        return self.counter.known.pending

    @property
    def norm_pending(self) -> bool:
        """Whether it holds a norm that nobody has asked for."""
        return self.counter.known.norm_pending

    @property
    def skipped(self) -> int:
        """Steps that were skipped, by the reports so far; whoever counts them sets it back."""
        return self.counter.skipped

    @skipped.setter
    def skipped(self, count: int) -> None:
        self.counter.skipped = count

    def report(self) -> Report:
        """What happened up to now; waits for the GPU.

        Raises
        ------
        RuntimeError
            While a graph is being captured, or if one was replayed beyond the rows that were sent.
        """
        if self.looks_captured():
            raise RuntimeError("the GPU cannot be asked while a graph is captured; expected that before or after")
        with self.current():
            words = self.counter.read()
            if words[EXHAUSTED]:
                self.counter.go_on(int(words[COUNTERS]))
        if not words[EXHAUSTED]:
            return self.counter.report(words)
        self.rows.forget()
        raise RuntimeError(
            f"a captured graph was replayed beyond iteration {words[COUNTERS]}, for which no coefficients "
            "were sent, and did nothing from then on; expected update_hyperparameters(steps) before so many replays"
        )

    # Laying out

    def _arrange_if_changed(self) -> None:
        if self._arrangement is not self.table.arrangement:
            self._arrange()
            self._arrangement = self.table.arrangement
        if self.table.is_new:
            self.table.remember()

    def _arrange(self) -> None:
        if self.is_capturing or self.has_captures:
            raise RuntimeError(
                "arrays have changed their dtype or layout when, or since, a graph was captured; expected them to stay "
                "as they were, or another optimizer"
            )
        workload = Workload(self.table, self._which, self._sets)
        self.counter.renew(len(workload.groups))
        self.workload, self._described = workload, None
        self.launcher.forget()
        self._describe_if_moved()

    def _describe_if_moved(self) -> None:
        """Write the descriptors, if the rows lie elsewhere than they tell."""
        if self._described is not self.rows.mirror:
            self.workload.describe({CONTROL: self.counter.address} | self.rows.addresses)
            self._described = self.rows.mirror


def rows_of(recipes: Iterable[Recipe], limits: range = _ALL) -> tuple[Matrix, int]:
    """The numbers of steps in the columns that the kernels read, all groups of a step in one row; and the seed.

    `limits` says which clips by norm are left to the GPU. Most steps are of one kind, and differ in few numbers.
    """
    kinds: dict[Recipe, int] = {}
    which, varying = [], []
    for recipe in recipes:
        which.append(kinds.setdefault(recipe, len(kinds)))
        varying.append([each.varying() for each in recipe.groups()])
    rows = np.array([[_row(recipe, each, limits) for each in recipe.groups()] for recipe in kinds], np.float64)[which]
    rows[:, :, :VARYING] = varying
    return rows.reshape(len(which), -1), next(iter(kinds)).seed


def _row(recipe: Recipe, group: Numbers, limits: range) -> list[float]:
    norms = [group.clipnorm or 0.0, recipe.global_clipnorm or 0.0]
    numbers = [*group.c, recipe.overwrite, recipe.is_update, recipe.factor]
    numbers[SCALE] *= recipe.shrink
    return numbers + [norm if k in limits else 0.0 for k, norm in enumerate(norms)]
