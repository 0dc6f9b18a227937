"""The variables of one optimizer that have no compiled kernels: a step of theirs is whole-array functions.

They are those of other libraries and, while ``NUMBA_DISABLE_JIT`` is set, those of NumPy and torch on the host.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..coefficients import Recipe, whole_norm
from ..update import Coefficients
from . import functions, moments

Call = tuple[Any, ...]
Slots = dict[str, Array]


class Plan:
    """What cpu.plan.Plan is for compiled kernels. New arrays are computed first, and written in the commit.

    Parameters
    ----------
    place : str or None
        ``cpu`` for arrays whose memory can be seen: they are checked as those with kernels are.
    names, variables, slots, which : lists
        As of the other plans.

    Attributes
    ----------
    own : list of int
        Which variables these are.
    """

    additions = None  # see cpu/plan.py: norms are taken as they are

    def __init__(
        self,
        place: str | None,
        names: Sequence[str],
        variables: Sequence[Array | None],
        slots: Sequence[Slots],
        which: Sequence[int],
        groups: int,
        places: Sequence[Any] | None = None,
    ) -> None:
        self.names, self.slots, self.which = names, slots, which
        self.variables = {i: variable for i, variable in enumerate(variables) if variable is not None}
        self.own = list(self.variables)
        self._table: Any = None
        self._places = places
        if place:
            from ..arrays.table import AddressTable  # imports Numba, which arrays of other libraries do without

            self._table = AddressTable(place, names, variables, slots, places)
        seen: set[int] = set()
        for i, variable in self.variables.items():
            if arrays.is_mutable(variable):
                _check_writable(names[i], arrays.detached(variable))
            if id(variable) in seen:
                raise ValueError(f"variable {brief(names[i])} is given twice; expected every array once")
            seen.add(id(variable))

    def lend(self) -> None:
        """Note that the user has been given the slots."""
        if self._table is not None:
            self._table.lend()

    def begin(self, gradients: Sequence[Array | None]) -> None:
        """Check the variables and their gradients."""
        if self._table is not None:
            self._table.refresh(gradients)
            if self._table.is_new:
                self._table.remember()
            return
        for i, variable in self.variables.items():
            arrays.check_variable(self.names[i], variable)
            if not arrays.is_mutable(variable):
                raise TypeError(
                    f"variable {brief(self.names[i])} is an immutable array of {arrays.library_name(variable)}; "
                    "expected one that can be updated in place: use `stateless_apply`"
                )
            if gradients[i] is not None:
                arrays.check_gradient(self.names[i], gradients[i], variable)

    def norms(self, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[Any, float]:
        """The norm of each variable's gradient (with what it has accumulated), 0 elsewhere, and of all together."""
        norms, (c, *_) = np.zeros(len(self.names)), recipe.coefficients()
        for i in self.own:
            if gradients[i] is not None:
                norms[i] = float(
                    functions.norm(arrays.detached(gradients[i]), self.slots[i].get("gradient_accumulator"), c)
                )
        return norms, whole_norm(norms)

    def steady_norms(self, recipe: Recipe, norms: Any, norm: float) -> tuple[Any, float]:
        """The same norms."""
        return norms, norm

    def work(self, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[list[Call], list[Call]]:
        """What is to be done that may be repeated, writing included, and what may not: nothing."""
        made = self._updates if recipe.is_update else self._accumulations
        return [(arrays.write_all, made(recipe, recipe.coefficients(), gradients))], []

    def _noise(self, i: int, recipe: Recipe) -> Any:
        """What the moments of a variable are rounded by; None where there are no places of its elements."""
        if self._places is None:
            return None
        return moments.noise_of(recipe.seed, self.names[i], recipe.number, self._places[i])

    def _accumulations(
        self, recipe: Recipe, c: Sequence[Coefficients], gradients: Sequence[Array | None]
    ) -> list[tuple[Array, Array]]:
        totals = {i: self.slots[i]["gradient_accumulator"] for i in self.own if gradients[i] is not None}
        return [
            (total, functions.accumulated(total, arrays.detached(gradients[i]), c[0])) for i, total in totals.items()
        ]

    def _updates(
        self, recipe: Recipe, c: Sequence[Coefficients], gradients: Sequence[Array | None]
    ) -> list[tuple[Array, Array]]:
        unused = ("average", "gradient_accumulator") if recipe.alone else ()
        writes: list[tuple[Array, Array]] = []
        for i, p in self.variables.items():
            slots = {key: slot for key, slot in self.slots[i].items() if key not in unused}
            if gradients[i] is None and "average" not in slots:
                continue
            clip = 1.0 if recipe.clips is None else float(recipe.clips[i])
            own = c[self.which[i]]
            limit = own.limit if recipe.variant.clip else None
            own = own._replace(scale=own.scale * clip)
            p, g = arrays.detached(p), gradients[i]
            if g is None:
                new, changed = functions.blended(p, slots, own, recipe.overwrite)
            else:
                g, nesterov = arrays.detached(g), recipe.variant.nesterov
                new, changed = functions.updated(
                    p, g, slots, own, limit, nesterov, recipe.overwrite, self._noise(i, recipe)
                )
            writes += [(p, new), *((slots[key], changed[key]) for key in slots)]
        return writes


def _check_writable(name: str, array: Array) -> None:
    try:
        array[...] = array[...]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"variable {brief(name)} cannot be written ({brief(error)}); expected an array that can"
        ) from None
