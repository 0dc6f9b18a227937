"""What an optimizer is built on: its variables in order, the arrays of their state, and a plan for each place."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.dtensors import check_alike, is_dtensor
from ..arrays.moments import kind_of
from ..arrays.overlap import overlapping
from ..arrays.pieces import Piece, places_of, whole
from ..arrays.runs import Places
from ..coefficients import Recipe
from .commit import Call


class Workspace(NamedTuple):
    """What an optimizer has been built on.

    A variable that is not trainable has no slots, and the plans know nothing of it: they have lists of the trainable
    variables, and of their gradients.

    Each plan takes its own variables through a step by the same methods: ``begin(gradients)`` checks them and finds out
    where they lie, ``norms(recipe, gradients)`` gives the norm of each gradient and of all together, and
    ``work(recipe, gradients)`` gives what is to be done, as two lists of calls: those that may be repeated, and those
    that may not.
    """

    names: list[str]
    variables: list[Array]
    slots: list[dict[str, Array]]
    which: list[int]  # the group of each variable
    trainable: list[int] | None  # which variables have slots; None if all have
    plans: list[Any]
    alone: Any  # the plan if there is only one and it has compiled kernels, else None
    resident: Any  # the plan of the one GPU that everything lies on, which can then decide by itself, else None
    gpus: list[Any]  # the plans of GPUs
    versioned: list[tuple[int, Array]]  # the trainable variables whose versions torch counts, by number
    tensors: list[Array]  # the same without their numbers
    given: list[Array]  # what `build` was given: what is seen of it are the variables
    foreign: list[int]  # which variables are seen: see `arrays.foreign`

    @property
    def trained(self) -> tuple[list[str], list[int]]:
        """The names and the groups of the trainable variables."""
        if self.trainable is None:
            return self.names, self.which
        return [self.names[i] for i in self.trainable], [self.which[i] for i in self.trainable]

    def of_trainable(self, gradients: Sequence[Any]) -> Any:
        """The gradients that count; none where there are not as many as variables."""
        if self.trainable is None:
            return gradients
        return [gradients[i] for i in self.trainable] if len(gradients) == len(self.names) else ()

    def seen(self, gradients: Sequence[Array | None]) -> list[Array | None]:
        """The gradients, and what is seen of those of foreign variables.

        Raises
        ------
        TypeError
            If the memory of one cannot be seen.
        """
        found = list(gradients)
        for i in self.foreign:
            if found[i] is not None:
                check_alike("the gradient of", self.names[i], found[i], self.given[i])
                found[i] = arrays.seen(found[i], "the gradient of", self.names[i])
        return found

    def seen_again(self) -> list[Array] | None:
        """The variables as they are seen now; None if no foreign one has moved.

        Raises
        ------
        TypeError, ValueError
            If one cannot be trained any more, or has another shape or dtype.
        """
        found = list(self.variables)
        for i in self.foreign:
            name, given, before = self.names[i], self.given[i], self.variables[i]
            now = found[i] = arrays.seen_again(name, given, before)
            if now is before:
                continue
            arrays.check_variable(name, given)
            if (now.shape, now.dtype, arrays.device(now)) != (before.shape, before.dtype, arrays.device(before)):
                raise ValueError(
                    f"variable {brief(name)} has become an array of shape {tuple(now.shape)} and dtype {now.dtype} on "
                    f"{arrays.device(now)}; expected shape {tuple(before.shape)} and dtype {before.dtype} on "
                    f"{arrays.device(before)}, as built"
                )
        has_moved = any(now is not before for now, before in zip(found, self.variables, strict=True))
        return found if has_moved else None

    def begin(self, gradients: Sequence[Array | None]) -> None:
        """Check everything that has changed since the last step.

        Raises
        ------
        TypeError, ValueError
            Nothing that the user owns has been written.
        """
        for plan in self.plans:
            plan.begin(gradients)

    def lend(self) -> None:
        """Note that the user has been given the slots: see `AddressTable.lend`."""
        for plan in self.plans:
            plan.lend()

    def work(self, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[list[Call], list[Call]]:
        """The work of all plans: calls that may be repeated, and calls that may not."""
        if len(self.plans) == 1:
            return self.plans[0].work(recipe, gradients)  # type: ignore[no-any-return]
        works = [plan.work(recipe, gradients) for plan in self.plans]
        return [call for repeatable, _ in works for call in repeatable], [call for _, calls in works for call in calls]

    def touched(
        self, gradients: Sequence[Array | None], recipe: Recipe, is_complete: bool = False, counted: bool = True
    ) -> list[Array]:
        """The variables that a step changes, as far as torch counts their versions.

        All of them may change where a GPU decides what the step is: `counted` is false.
        """
        if recipe.overwrite or not counted or (is_complete and recipe.is_update):
            return self.tensors
        return [v for i, v in self.versioned if gradients[i] is not None] if recipe.is_update else []


def build(
    names: list[str],
    variables: list[Array],
    slots: list[dict[str, Array]],
    which: list[int],
    groups: int,
    given: list[Array] | None = None,
    may_be_empty: bool = False,
    pieces: Mapping[str, Piece | None] | None = None,
) -> Workspace:
    """Check that variables do not overlap, and lay out the work of a step.

    Of variables that are parts of whole ones, `pieces` say which: the rounding of moments of fewer bits depends on it.

    Raises
    ------
    ValueError
        If two variables share memory, or none is trainable.
    """
    trainable = [i for i, own in enumerate(slots) if own]
    if not trainable and not may_be_empty:
        raise ValueError("no variable is trainable; expected one at least")
    if len(trainable) < len(names):
        _check_apart_from_frozen(names, variables, slots)
    trained: Any = [[each[i] for i in trainable] for each in (names, variables, slots, which)]
    whole_ones = _places(trained[0], trained[1], trained[2], pieces or {})
    places = [arrays.place(variable) for variable in trained[1]]
    has_kernels = "cpu" in places and compiles()
    plans = []
    for where in dict.fromkeys(places):
        here = [v if place == where else None for v, place in zip(trained[1], places, strict=True)]
        plans.append(_plan(where, has_kernels, trained[0], here, *trained[2:], groups, whole_ones))
    gpus = [plan for plan, where in zip(plans, dict.fromkeys(places), strict=True) if where not in ("cpu", None)]
    alone = plans[0] if len(plans) == 1 else None
    resident = alone if gpus else None
    given = variables if given is None else given
    foreign = [i for i, (one, other) in enumerate(zip(given, variables, strict=True)) if one is not other]
    alone = alone if (has_kernels or gpus) and not foreign else None  # gradients of the latter have to be seen first
    versioned = [(i, variable) for i, variable in enumerate(trained[1]) if arrays.has_version(variable)]
    # A DTensor has a version of its own, besides that of its local tensor.
    versioned += [
        (k, given[i]) for k, i in enumerate(trainable) if given[i] is not variables[i] and is_dtensor(given[i])
    ]
    tensors = [variable for _, variable in versioned]
    some = trainable if len(trainable) < len(names) else None
    return Workspace(
        names, variables, slots, which, some, plans, alone, resident, gpus, versioned, tensors, given, foreign
    )


def _check_apart_from_frozen(names: list[str], variables: list[Array], slots: list[dict[str, Array]]) -> None:
    """Refuse a variable that is not trainable, and would change with one that is: the plans see the latter alone."""
    seen = [i for i, variable in enumerate(variables) if arrays.place(variable) is not None]
    layouts = [arrays.layout_of(variables[i]) for i in seen]
    extents = np.array([arrays.extent(layout) for layout in layouts], np.int64).reshape(-1, 2).T
    for one, other in overlapping(*extents):
        i, j = seen[one], seen[other]
        if bool(slots[i]) != bool(slots[j]) and arrays.share_memory(layouts[one], layouts[other]):
            raise ValueError(
                f"variables {brief(names[i])} and {brief(names[j])} share memory, and one of them is not trainable; "
                "expected arrays that do not overlap"
            )


def _places(
    names: list[str], variables: list[Array], slots: list[dict[str, Array]], pieces: Mapping[str, Piece | None]
) -> list[Places] | None:
    """Where the elements of variables are in the whole ones; None where nothing depends on it."""
    of_all = zip(variables, slots, strict=True)
    if all(kind_of(arrays.dtype_name(own["momentum"]), arrays.is_complex(v)) == "float32" for v, own in of_all):
        return None
    of_each = [pieces.get(name) or whole(variable.shape) for name, variable in zip(names, variables, strict=True)]
    return [places_of(piece) for piece in of_each]


def compiles() -> bool:
    """Whether there are kernels: ``NUMBA_DISABLE_JIT``, which users set to debug their own code, takes them away."""
    from numba import config

    return not config.DISABLE_JIT  # type: ignore[attr-defined]


def _plan(where: str | None, has_kernels: bool, *described: Any) -> Any:
    """The plan of one place; compiled code is imported where the first array needs it."""
    if where is None or (where == "cpu" and not has_kernels):
        from ..array_api.plan import Plan as ArrayPlan

        return ArrayPlan(where, *described)
    if where == "cpu":
        from ..cpu.plan import Plan

        return Plan(*described)
    from ..gpu.plan import Plan as GpuPlan

    return GpuPlan(where, *described)
