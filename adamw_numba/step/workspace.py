"""What an optimizer is built on: its variables in order, the arrays of their state, and one plan for each place."""

from typing import Any, NamedTuple

from .. import arrays
from ..arrays import Array


class Workspace(NamedTuple):
    """What an optimizer has been built on: its variables in order, and their state."""

    names: list[str]
    variables: list[Array]
    slots: list[dict[str, Array]]
    decayed: list[bool]
    plan: Any  # of the variables on the host; None if there are none
    devices: list[Any]  # the plans of GPUs
    elsewhere: list[int]  # the variables without compiled kernels
    tensors: list[tuple[int, Array]]  # the variables whose versions torch counts

    @property
    def resident(self) -> Any:
        """The plan of the one GPU that everything lies on, which can then decide by itself; None otherwise."""
        return self.devices[0] if len(self.devices) == 1 and self.plan is None and not self.elsewhere else None


def build(
    names: list[str], variables: list[Array], slots: list[dict[str, Array]], excluded: frozenset[str]
) -> Workspace:
    """Check that variables do not overlap, and lay out the work of a step.

    Raises
    ------
    ValueError
        If two variables share memory.
    """
    places = [arrays.place(variable) for variable in variables]
    elsewhere = [i for i, place in enumerate(places) if place is None]
    for i in elsewhere:
        if arrays.is_mutable(variables[i]):
            _check_writable(names[i], variables[i])
    for i in elsewhere:
        if any(variables[j] is variables[i] for j in elsewhere if j < i):
            raise ValueError(f"variable {names[i]!r} is given twice; expected every array once")
    decayed = [name not in excluded for name in names]
    plan, devices = None, []
    for where in dict.fromkeys(place for place in places if place is not None):
        here = [v if place == where else None for v, place in zip(variables, places, strict=True)]
        if where == "cpu":
            from ..cpu.plan import Plan  # compiled code, imported at first use

            plan = Plan(names, here, slots, decayed)
        else:
            from ..gpu.plan import Plan as DevicePlan

            devices.append(DevicePlan(where, names, here, slots, decayed))
    tensors = [(i, variable) for i, variable in enumerate(variables) if arrays.has_version(variable)]
    return Workspace(names, variables, slots, decayed, plan, devices, elsewhere, tensors)


def _check_writable(name: str, array: Array) -> None:
    try:
        array[...] = array[...]
    except (TypeError, ValueError) as error:
        raise ValueError(f"variable {name!r} cannot be written ({error}); expected an array that can") from None
