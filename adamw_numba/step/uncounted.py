"""Steps that no counter counts: Adam alone for one variable, and a step as a pure function."""

from collections.abc import Sequence
from typing import Any

from .. import arrays
from ..array_api import stateless
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.tree import Container, flatten, materialized, order, rebuild
from ..coefficients import adam_alone
from ..hyperparameters import table as hp
from ..state import Place
from . import gradients as matching
from .commit import commit
from .engine import Engine


def update_one(engine: Engine, gradient: Array, variable: Array, learning_rate: float) -> None:
    """Adam alone for one variable: see `AdamW.update_step`."""
    with engine.lock:
        workspace = engine.require_built("update_step")
        engine.check_not_swapped()
        if gradient is None:
            raise TypeError("`gradient` is None; expected an array of the variable's shape")
        rate = hp.Rate("learning_rate", lambda: learning_rate)(0)
        (index,) = matching.indices(workspace, [variable])
        if not workspace.slots[index]:
            raise ValueError(f"variable {brief(workspace.names[index])} is not trainable; expected one that is")
        group = engine.hyper.groups[workspace.which[index]]
        updates = max(engine.updates() - group.started, 0)
        number = int(engine.state.scalars["iteration"])
        recipe = adam_alone(group.values(), updates, rate, len(engine.hyper.groups), number)
        gradients = workspace.seen([gradient if k == index else None for k in range(len(workspace.names))])
        gradients = workspace.of_trainable(gradients)
        workspace.begin(gradients)
        arrays.note_writes(workspace.touched(gradients, recipe))
        commit(*workspace.work(recipe, gradients))


def state_of(engine: Engine, places: Sequence[Place]) -> list[Array]:
    """The arrays of the state at these places, for the user: see `AdamW.variables`."""
    variables = engine.workspace.variables if engine.workspace else []
    return [stateless.beside(own[key], variables) for _, own, key in places]


def stateless_apply(
    engine: Engine, state: Sequence[Array], grads: Container, variables: Container, loss_scale: Any, nonfinite: str
) -> tuple[Container, list[Array]]:
    """One step as a pure function: see `AdamW.stateless_apply`."""
    built, container = engine.require_built("stateless_apply"), materialized(variables, "trainable_variables")
    names, leaves = flatten(container, "trainable_variables")
    positions = order(container, names, built.names, "trainable_variables")
    gradients = matching.gradients(built, grads, warn=False)
    if not gradients:
        return rebuild(container, leaves), list(state)
    state_names = [name for name, _, _ in engine.places()]
    gradients = built.seen(gradients)
    given = [arrays.seen(leaves[i], "`trainable_variables`:", names[i]) for i in positions]
    new, new_state = stateless.apply(engine, built, state_names, state, gradients, given, loss_scale, nonfinite)
    for i, leaf in zip(positions, new, strict=True):
        leaves[i] = leaf
    return rebuild(container, leaves), new_state
