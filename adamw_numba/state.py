"""The arrays of an optimizer's state: named, live, and in the positions that Keras gives them."""

import math
from typing import Any

import numpy as np

from . import arrays
from .arrays import Array
from .arrays.brief import brief, brief_names
from .arrays.moments import SCALES
from .hyperparameters.table import scale

Slots = dict[str, Array]
Place = tuple[str, dict[str, Array], str]


_ORDER = (["average"], ["gradient_accumulator"], ["momentum", "velocity"], ["velocity_hat"], ["master"], list(SCALES))
_SCALARS = ("iteration", "learning_rate", "step_counter", "dynamic_scale")


class State:
    """The counter, the learning rate and the slots of every variable, as plain arrays.

    Attributes
    ----------
    scalars : dict
        0-d arrays: ``iteration`` (int64, calls of `apply`) and, while it is a number, ``learning_rate`` (float64); of a
        loss scale ``step_counter`` (int64) and ``dynamic_scale`` (float64).
    slots : list of dict
        For each variable ``momentum`` and ``velocity``, and what the options ask for: ``velocity_hat``, ``average``,
        ``gradient_accumulator``, ``master``. float32 for a 16-bit variable, else of its dtype; laid out like it.
        Moments of fewer bits are bfloat16 (in NumPy uint16), or uint8 with ``momentum_scale`` and ``velocity_scale``.
    """

    def __init__(self) -> None:
        self.scalars: dict[str, Array] = {"iteration": np.zeros((), np.int64)}
        self.names: list[str] = []
        self.slots: list[Slots] = []
        self.added: tuple[dict[str, Array], dict[str, Array]] = ({}, {})  # before and after `build`

    def places(self) -> list[Place]:
        """Name, dict and key of every array, in Keras's order; what Keras lacks comes last."""
        scalars = [(key, self.scalars, key) for key in _SCALARS if key in self.scalars]
        before, after = ([(name, added, name) for name in added] for added in self.added)
        slots: list[Place] = []
        for group in _ORDER:
            for name, own in zip(self.names, self.slots, strict=True):
                slots += [(f"{key}/{name}", own, key) for key in group if key in own]
        return [*scalars, *before, *slots, *after]

    def add(self, name: Any, array: Array, initializer: Any, late: bool) -> Array:
        """Another array to be saved and restored with the rest; Keras keeps it where it was in time."""
        taken = (self.scalars, *self.added, {"learning_rate": None})  # the names of slots have a "/"
        if not isinstance(name, str) or "/" in name or any(name in own for own in taken):
            raise ValueError(
                f"`name` must be a new string without '/'. Received: name={brief(name)}; there are "
                f"{brief_names(place for place, _, _ in self.places())}"
            )
        if callable(initializer):
            arrays.write(array, initializer(tuple(array.shape), dtype=array.dtype))
        elif initializer == "ones":
            arrays.write(array, np.ones(tuple(array.shape)))
        elif initializer != "zeros":
            raise ValueError(f"`initializer` must be 'zeros', 'ones' or a callable. Received: {brief(initializer)}")
        self.added[late][name] = array
        return array


def check_scalar(key: str, value: Array, what: str) -> None:
    """Refuse a counter, learning rate or loss scale that no step could have left."""
    if key in ("iteration", "step_counter") and not 0 <= int(value) < 2**62:
        raise ValueError(f"{what}: {key!r} is {int(value)}; expected an integer >= 0")
    if key == "learning_rate" and not 0 <= float(value) < math.inf:
        raise ValueError(f"{what}: {key!r} is {float(value)}; expected a finite number >= 0")
    if key == "dynamic_scale":
        scale(f"{what}: dynamic_scale", float(value))
