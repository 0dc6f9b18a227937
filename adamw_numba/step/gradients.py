"""Which variables there are, and which gradient belongs to which of them."""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ..arrays import Array, are_arrays
from ..arrays.brief import brief, brief_names
from ..arrays.tree import Container, flatten, form_of, in_jax_order, matched, materialized, order
from ..ranks.joining import deciding
from .workspace import Workspace


def variables_of(engine: Any, variables: Container) -> tuple[list[str], list[Array]]:
    """The names and the arrays to build on, in an order that does not depend on whether JAX traces them."""
    container = materialized(variables, "variables")
    names, leaves = flatten(container)
    # What another library has saved, or says of some, goes by the order that the user has given.
    by_position = engine.loaded is not None and engine.loaded.positional
    if by_position or any(override.positions for override in engine.hyper.overrides):
        return names, leaves
    return in_jax_order(container, names, leaves)


def groups_of(engine: Any) -> dict[str, int]:
    """The number of the group that each variable is in, those of other ranks included."""
    built = engine.require_built("group_of")
    others = {} if engine.together is None else engine.together.group_of
    return {**others, **dict(zip(built.names, built.which, strict=True))}


def match(engine: Any, grads: Container, variables: Container | None) -> Sequence[Array | None]:
    """The gradients in the order of the variables, which are built if need be; an empty list if there are none."""
    engine.check_not_swapped()
    found = _match(engine, grads, variables)
    if found and engine.workspace.foreign:
        engine.look_again()
        return engine.workspace.seen(found)  # type: ignore[no-any-return]
    return found


def _match(engine: Any, grads: Container, variables: Container | None) -> Sequence[Array | None]:
    if variables is not None:
        names, given = flatten(variables)
        grads = materialized(grads, "grads")
        if not flatten(grads, "grads", absent=True)[1]:
            return []
        if engine.workspace is None:
            engine.build(names, given)
            if engine.together is not None:  # by the mesh of DTensors
                engine.together.begin("apply")
        workspace = engine.workspace
        return gradients_of(workspace, grads, names, given, engine.together is not None)
    if engine.workspace is None:
        raise ValueError(
            "When passing `grads` without `variables`, the optimizer must already be built on a list of variables. "
            "Call `optimizer.build(trainable_variables)` first."
        )
    if engine.hyper.counts_each:  # in order, or None
        return list(grads)
    if engine.form is not None:
        grads = engine.form.flat(grads)
    flat = as_flat(engine.workspace, grads)
    if flat is not None:
        return flat
    found = gradients(engine.workspace, grads, engine.warns, engine.together is not None)
    if found:
        with suppress(ValueError):  # of the trainable variables alone
            engine.form = form_of(grads, engine.workspace.names) or engine.form
    return found


def gradients(
    built: Workspace, grads: Container, warn: bool = True, may_be_none: bool = False
) -> Sequence[Array | None]:
    """Gradients for all variables, by name or by position; an empty list for none at all.

    Raises
    ------
    ValueError
        If a count or a name differs, or every gradient is None.
    """
    if (flat := as_flat(built, grads)) is not None:
        return flat
    if built.trainable is not None and (found := _of_trainable(built, built.trainable, grads)) is not None:
        return found
    leaves = matched(grads, built.names, "grads", may_be_empty=True)
    if may_be_none and not leaves:
        return [None] * len(built.names)
    return _present(built, range(len(built.names)), leaves, warn, may_be_none) if leaves else []


def _of_trainable(built: Workspace, trainable: Sequence[int], grads: Container) -> list[Array | None] | None:
    """Gradients of the trainable variables alone, with None for the others; None if there are others, or fewer."""
    container = materialized(grads, "grads")
    names, leaves = flatten(container, "grads", absent=True)
    wanted = [built.names[i] for i in trainable]
    if len(names) != len(wanted) or len(wanted) == len(built.names):
        return None
    try:
        where = order(container, names, wanted, "grads")
    except ValueError:  # which the names of all variables explain better
        return None
    result: list[Array | None] = [None] * len(built.names)
    for index, position in zip(trainable, where, strict=True):
        result[index] = leaves[position]
    return _present(built, range(len(built.names)), result, True)  # type: ignore[return-value]


def as_flat(built: Workspace, grads: Container) -> list[Array] | None:
    """Gradients that are a list of arrays, one for each variable; None if they are anything else."""
    if type(grads) is list and len(grads) == len(built.names) and are_arrays(grads):
        return list(grads)  # the caller's may change while we work
    return None


def gradients_of(
    built: Workspace,
    grads: Container,
    targets: list[str],
    variables: Sequence[Array],
    may_be_none: bool = False,
    warn: bool = True,
) -> Sequence[Array | None]:
    """Gradients for some of the variables, None for the others.

    Raises
    ------
    ValueError
        If a count or a name differs, a variable is not known or given twice, or every gradient is None.
    """
    where = indices(built, variables)
    leaves = matched(grads, targets, "grads")
    result: list[Array | None] = [None] * len(built.names)
    for index, leaf in zip(where, _present(built, where, leaves, warn, may_be_none), strict=True):
        result[index] = leaf
    return result


def indices(built: Workspace, variables: Sequence[Array]) -> list[int]:
    """Where these very arrays stand among the variables.

    Raises
    ------
    ValueError
        If one is not among them, or is given twice.
    """
    where = {id(variable): i for i, variable in enumerate(built.given)}
    for k, variable in enumerate(variables):
        if id(variable) not in where:
            raise ValueError(
                f"Unknown variable: number {k} of {len(variables)}, of shape {tuple(np.shape(variable))}. This "
                "optimizer can only be called for the variables it was originally built with. When working with a new "
                "set of variables, you should recreate a new optimizer instance."
            )
    result = [where[id(variable)] for variable in variables]
    if len(set(result)) < len(result):
        raise ValueError("`trainable_variables` holds an array more than once; expected every array once")
    return result


def pairs(engine: Any, grads_and_vars: Any) -> tuple[list[Array | None], list[Array]]:
    """The gradients and the variables of pairs, for a step that other processes may take as well.

    Raises
    ------
    TypeError
        If it cannot be walked.
    ValueError
        If there are none, or one is no pair.
    """
    with deciding(engine.together, "apply"):
        return _pairs(grads_and_vars)


def _pairs(grads_and_vars: Any) -> tuple[list[Array | None], list[Array]]:
    expected = "expected (gradient, variable) pairs, as `zip(grads, variables)` makes them"
    if not isinstance(grads_and_vars, Iterable):
        raise TypeError(
            f"`grads_and_vars` is {brief(grads_and_vars)} of type {type(grads_and_vars).__name__}; {expected}"
        )
    found = list(grads_and_vars)
    if not found:
        raise ValueError(f"`grads_and_vars` is empty; {expected}")
    for k, pair in enumerate(found):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"`grads_and_vars` holds {brief(pair)} of type {type(pair).__name__} at {k}; {expected}")
    return [g for g, _ in found], [v for _, v in found]


def check_same(built: Workspace, variables: Sequence[Array], together: Any = None) -> None:
    """Refuse a second `build` with other variables."""
    if sorted(indices(built, variables)) != list(range(len(built.variables))):
        raise ValueError(
            f"this optimizer was built with {len(built.variables)} variables. Received: {len(variables)} of them; make "
            "a new optimizer for other variables"
        )
    if together is not None:
        raise ValueError("`comm` is given, and the optimizer is built already; expected it at the first `build`")


def _present(
    built: Workspace, where: Sequence[int], leaves: Sequence[Array | None], warn: bool, may_be_none: bool = False
) -> Sequence[Array | None]:
    """The gradients of variables at certain positions, of which those that are not trainable need none.

    All of them may be None where other processes have some.
    """
    pairs = [(built.names[i], leaf) for i, leaf in zip(where, leaves, strict=True) if built.slots[i]]
    missing = [name for name, leaf in pairs if leaf is None]
    if len(missing) == len(pairs):
        if may_be_none:
            return leaves
        raise ValueError("No gradients provided for any variable.")
    if warn:
        warn_of(missing, stacklevel=6)
    return leaves


def warn_of(missing: Sequence[str], stacklevel: int) -> None:
    """Say which variables have no gradient, if any."""
    if missing:
        text = f"Gradients do not exist for variables {brief_names(missing)}: they are not updated."
        warnings.warn(text, stacklevel=stacklevel)
