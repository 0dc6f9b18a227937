"""optax: the state of `optax.adamw`, alone or inside a chain."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, brief_names
from ..arrays.tree import Container, flatten, rebuild
from ..optimizer import AdamW
from .exact import check_squares, checked_count, exact
from .moments import assembled, exportable, wide

_BESIDE_A_COUNT = ("hyperparams", "hyperparams_states", "inner_state")  # of optax.inject_hyperparams


def from_optax(
    state: Any, variables: Container | None = None, *, eps: float = 1e-8, eps_root: float = 0.0, **options: Any
) -> AdamW:
    """An optimizer with the state of `optax.adamw`, alone or inside a chain.

    Parameters
    ----------
    state : optax state
        With one ``ScaleByAdamState`` in it.
    variables : container, optional
        What to build it on, with the names, or in the order, of optax's parameters.
    eps, eps_root : float
        What `optax.adamw` was given: its state does not hold it.
    **options
        Arguments of `AdamW`, in its words; without them optax's defaults, not ours: ``learning_rate`` must be given.

    Returns
    -------
    AdamW

    Raises
    ------
    ValueError
        Where no exact conversion exists: an ``eps_root``, AMSGrad (whose maximum optax takes after the bias
        correction), a state with none or several of Adam's in it.

    Notes
    -----
    ``eps`` is added after the bias correction, as ``epsilon_mode="corrected"`` does here. optax's state does not tell
    of masks or of `optax.multi_transform`: call `AdamW.override` before the first `build`, without ``variables`` here.
    """
    if "learning_rate" not in options:
        raise ValueError(
            "`learning_rate` is missing; expected what `optax.adamw` was given, which its state does not hold"
        )
    if eps_root:
        raise ValueError(f"`eps_root` is {brief(eps_root)}; expected 0: AdamW has nothing under the square root")
    adam = _adam_of(state)
    names, first = flatten(adam.mu, "mu")
    second = dict(zip(*flatten(adam.nu, "nu"), strict=True))
    if sorted(second) != sorted(names):
        mu, nu = brief_names(sorted(set(names) - set(second))), brief_names(sorted(set(second) - set(names)))
        raise ValueError(f"`state` has mu alone of {mu} and nu alone of {nu}; expected both of each parameter")
    check_squares({f"`state`: nu of {brief(name)}": array for name, array in second.items()})
    _check_window(state)
    updates, options = checked_count(adam.count, "`state`: 'count'"), {"weight_decay": 1e-4} | options
    moments = [{"momentum": m, "velocity": second[name]} for name, m in zip(names, first, strict=True)]
    given = options | {"epsilon": eps, "epsilon_mode": "corrected"}
    positional = names == list(map(str, range(len(names))))
    return assembled(given, moments, [{}] * len(names), updates, variables, "`state`", None if positional else names)


def to_optax(optimizer: AdamW, state: Any, leave_out: Iterable[str] = ()) -> Any:
    """A state of optax, from ``transformation.init(parameters)``, with the moments and counts of an optimizer.

    Parameters
    ----------
    optimizer : AdamW
        Built, on parameters of the same names or order.
    state : optax state
        With one ``ScaleByAdamState`` in it, whose structure and dtypes the result has; it is not changed.
    leave_out : list of str
        Options that a plain `optax.adamw` lacks: see `to_torch`.

    Returns
    -------
    optax state
        For ``optax.adamw(..., eps=optimizer.epsilon)`` if ``epsilon_mode`` is "corrected"; otherwise
        ``eps=optimizer.epsilon / sqrt(1 - beta_2**t)``, t being the next update, which alone is then the same.

    Raises
    ------
    ValueError
        Where no exact conversion exists: see `to_torch`, and AMSGrad, and groups: optax has them in the structure of
        its own transformation.
    """
    built = exportable(optimizer, "optax", leave_out, amsgrad=False)
    groups = [group for group in optimizer.groups[1:] if set(group.own or {}) - {"weight_decay"}]
    if groups and "groups" not in set(leave_out):
        raise ValueError(
            f"the optimizer has {groups[0]!r}, which a plain optax.adamw has not; pass leave_out=['groups'] to have "
            "the state alone, for an `optax.multi_transform` of your own"
        )
    adam = _adam_of(state)
    _check_window(state)
    slots = list(map(wide, built.variables, built.slots))
    by_name = dict(zip(built.names, slots, strict=True))
    names = flatten(adam.mu, "mu")[0]
    if sorted(names) != sorted(built.names):
        positions = list(map(str, range(len(built.names))))
        if len(names) != len(built.names) or positions not in (names, built.names):
            raise ValueError(
                f"`state` has the parameters {brief_names(names)}; expected {brief_names(built.names)}, or a list on "
                "one side, which is matched by position"
            )
        by_name = dict(zip(names, slots, strict=True))

    def filled(tree: Any, slot: str) -> Any:
        leaves = flatten(tree, slot)[1]
        new = [_alike(leaf, by_name[n][slot], f"{slot} of {brief(n)}") for n, leaf in zip(names, leaves, strict=True)]
        return rebuild(tree, new)

    new = adam._replace(
        count=_counted(adam.count, optimizer.iterations),
        mu=filled(adam.mu, "momentum"),
        nu=filled(adam.nu, "velocity"),
    )
    return _replaced(state, adam, new, optimizer.iterations)


def _adam_of(state: Any) -> Any:
    found = list(_adams(state))
    if len(found) != 1:
        raise ValueError(f"`state` holds {len(found)} states of Adam; expected one, of `optax.adamw`")
    if getattr(found[0], "nu_max", None) is not None:
        raise ValueError(
            "`state` is of AMSGrad, whose maximum optax takes after the bias correction; no exact conversion"
        )
    more = [name for name in ("average", "accumulator") if getattr(found[0], name, None) is not None]
    if more:
        raise ValueError(f"`state` has {more}, of adamw_numba.optax; expected `count`, `mu` and `nu` alone")
    return found[0]


def _adams(state: Any) -> Iterable[Any]:
    if {"count", "mu", "nu"} <= set(getattr(state, "_fields", ())):
        yield state
    elif isinstance(state, (tuple, list)):
        for child in state:
            yield from _adams(child)


def _replaced(state: Any, old: Any, new: Any, count: int) -> Any:
    """The same state with another Adam in it; the counts of schedules follow."""
    if state is old:
        return new
    fields: Sequence[str] = getattr(state, "_fields", ())
    counters = [key for key in fields if _is_counter(state, key)]
    if counters:
        others = {k: _replaced(getattr(state, k), old, new, count) for k in fields if k not in (*counters, "mini_step")}
        return state._replace(**{key: _counted(getattr(state, key), count) for key in counters}, **others)
    if isinstance(state, (tuple, list)):
        children = [_replaced(child, old, new, count) for child in state]
        return type(state)(*children) if hasattr(state, "_fields") else type(state)(children)
    if isinstance(state, dict):
        return {key: _replaced(child, old, new, count) for key, child in state.items()}
    return state


def _is_counter(state: Any, key: str) -> bool:
    """Whether a field counts updates; a counter whose meaning is not known, and would stay behind, is refused."""
    value = getattr(state, key)
    if key == "mini_step" or getattr(value, "shape", None) != () or np.asarray(value).dtype.kind not in "iu":
        return False
    if key != "gradient_step" and not (key == "count" and set(state._fields) <= {"count", *_BESIDE_A_COUNT}):
        raise ValueError(
            f"`state` holds a {type(state).__name__} with the counter {key!r}, which AdamW does not have; expected "
            "the state inside it: convert that, and put the result in its place"
        )
    return True


def _check_window(state: Any) -> None:
    """Refuse a state inside a window of optax.MultiSteps, whose gradients have nowhere to go."""
    if getattr(state, "mini_step", None) is not None and int(state.mini_step):
        raise ValueError(
            f"`state` is at mini_step {int(state.mini_step)} of optax.MultiSteps; expected 0: after a whole window"
        )
    if isinstance(state, (tuple, list)):
        for child in state:
            _check_window(child)


def _counted(like: Any, count: int) -> Any:
    return arrays.like(like, np.asarray(count, np.int64)) if not isinstance(like, int) else count


def _alike(leaf: Array, value: Array, what: str) -> Array:
    if tuple(leaf.shape) != tuple(value.shape):
        raise ValueError(f"`state`: {what} has shape {tuple(leaf.shape)}; expected {tuple(value.shape)}")
    return arrays.like(leaf, exact(value, leaf, what))
