"""One step as a function from arrays to arrays: for immutable arrays, and inside `jax.jit`."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from ..arrays import (
    COMPUTE,
    Array,
    check_gradient,
    detached,
    dtype_name,
    is_array,
    is_complex,
    is_mutable,
    like,
    namespace,
    on_all_devices,
)
from ..arrays.brief import brief_names
from ..coefficients import clip_factor, coefficients, correction, log, whole_norm
from ..update import Coefficients
from . import functions as array_api
from . import moments
from .functions import select

Slots = dict[str, Array]


def apply(
    engine: Any,
    built: Any,
    names: Sequence[str],
    state: Sequence[Array],
    gradients: Sequence[Array | None],
    variables: Sequence[Array],
    loss_scale: Any,
    nonfinite: str,
) -> tuple[list[Array], list[Array]]:
    """New variables and a new state.

    Parameters
    ----------
    engine : Engine
        Its hyperparameters are read, and nothing is written.
    built : Workspace
    names : list of str
        What the arrays of the state are called.
    state, gradients, variables : list of arrays
    loss_scale : float, or scalar array under a trace
    nonfinite : {"propagate", "skip", "raise"}
    """
    if len(state) != len(names):
        raise ValueError(
            f"`optimizer_variables` holds {len(state)} arrays; expected {len(names)}: {brief_names(names)}"
        )
    _check(built, gradients, variables)
    named = dict(zip(names, state, strict=True))
    slots = [{key: named[f"{key}/{name}"] for key in own} for name, own in zip(built.names, built.slots, strict=True)]
    for name, given, own in zip(built.names, slots, built.slots, strict=True):
        for key in own:
            _check_like(f"`optimizer_variables`: {key}/{name}", given[key], own[key])
    given_arrays = [*variables, *state]
    gradients = [g if own else None for g, own in zip(gradients, built.slots, strict=True)]
    variables, gradients = [detached(p) for p in variables], [detached(g) for g in gradients]
    slots = [{key: detached(array) for key, array in own.items()} for own in slots]
    xp = lazy_namespace([*state, *gradients, *variables])
    iteration: Any = int(named["iteration"]) if xp is None else xp.asarray(named["iteration"])
    rate = named.get("learning_rate")
    rates = engine.rates_at(iteration, float(rate) if xp is None and rate is not None else rate)
    micro_steps = engine.hyper.gradient_accumulation_steps
    position = iteration // (micro_steps or 1), not micro_steps or (iteration + 1) % micro_steps == 0
    noises = [_noise(engine.hyper, *each, iteration) for each in zip(built.names, variables, slots, strict=True)]
    finite, new_variables, new_slots = step(
        engine.hyper, position, rates, variables, gradients, slots, built.which, loss_scale, nonfinite, noises=noises
    )
    new_iteration = select_number(finite, iteration + 1, iteration)
    if xp is None:
        new_iteration = np.asarray(new_iteration, np.int64)
    named["iteration"] = new_iteration
    for name, own in zip(built.names, new_slots, strict=True):
        named |= {f"{key}/{name}": array for key, array in own.items()}
    new_variables, new_state = ([_fresh(a, given_arrays) for a in made] for made in (new_variables, named.values()))
    return new_variables, new_state


def _noise(hyper: Any, name: str, variable: Array, slots: Slots, iteration: Any) -> Any:
    if not slots or moments.kind(variable, slots) == "float32":
        return None
    return moments.noise_of(hyper.seed, name, iteration)


def _check(built: Any, gradients: Sequence[Array | None], variables: Sequence[Array]) -> None:
    for name, g, p, known in zip(built.names, gradients, variables, built.variables, strict=True):
        _check_like(f"`trainable_variables`: {name!r}", p, known)
        if g is not None and (lazy_namespace([g, p]) is None or not is_array(g)):
            check_gradient(name, g, p)
        elif g is not None:
            _check_like(f"the gradient of {name!r}", g, p, complex_too=True)


def _check_like(what: str, array: Any, known: Array, complex_too: bool = False) -> None:
    if not is_array(array):
        raise TypeError(f"{what} is {array!r} of type {type(array).__name__}; expected an array")
    if tuple(array.shape) != tuple(known.shape):
        raise ValueError(f"{what} has shape {tuple(array.shape)}; expected {tuple(known.shape)}")
    if {dtype_name(array), dtype_name(known)} <= COMPUTE.keys():
        fits = is_complex(array) == is_complex(known) or (complex_too and is_complex(known))
    else:  # moments of fewer bits
        fits = dtype_name(array) == dtype_name(known)
    if not fits:
        raise TypeError(f"{what} has dtype {dtype_name(array)}; expected one like {dtype_name(known)}")


def _fresh(array: Any, given: Sequence[Any]) -> Any:
    """The array, or a copy if it is one of those given and could be written later."""
    if isinstance(array, np.generic):  # what NumPy makes of 0-d arrays
        return np.asarray(array)
    if not (is_array(array) and is_mutable(array)):
        return array
    same = any(array is other or _detached_alias(array, other) for other in given)
    return like(array, array) if same else array


def _detached_alias(array: Any, other: Any) -> bool:
    tensors = array_api_compat.is_torch_array(array) and array_api_compat.is_torch_array(other)
    return tensors and array.data_ptr() == other.data_ptr()


def beside(array: Array, variables: Sequence[Array]) -> Array:
    """A number of the state as a compiled step of JAX gives it back: the step is compiled again for any other.

    It is on all devices of the variables if they are committed to some. All else is left as it is.
    """
    if not isinstance(array, np.ndarray) or not variables or not all(map(array_api_compat.is_jax_array, variables)):
        return array
    return on_all_devices(namespace(variables[0]).asarray(array), variables)


def step(
    hyper: Any,
    position: tuple[Any, Any],
    rates: tuple[Any, Any, Sequence[tuple[Any, Any]]],
    variables: Sequence[Array],
    gradients: Sequence[Array | None],
    slots: Sequence[Slots],
    which: Sequence[int],
    loss_scale: Any,
    nonfinite: str,
    eps_root: Any = None,
    noises: Sequence[Any] | None = None,
) -> tuple[Any, list[Array], list[Slots]]:
    """Whether the step was taken, the next variables and the next slots; no traced value becomes a number.

    Parameters
    ----------
    position : pair
        How many updates there were, and whether this step is one, or accumulates gradients.
    eps_root : float or scalar array, optional
        With it, the step is one of optax's, and changes are returned in the place of variables: see `functions.change`.
    noises : list, optional
        What the moments of each variable are rounded by.
    """
    updates, is_update = position
    xp = math if isinstance(updates, int) else namespace(updates)
    count = updates if xp is math else xp.astype(updates, _real(xp))
    unscale = 1 / loss_scale
    groups = [hyper, *(group.values() for group in hyper.others)]
    started = [0, *(group.started for group in hyper.others)]
    own_rates = [(_precise(xp, rate), _precise(xp, decay)) for rate, decay in (rates[:2], *rates[2])]
    c = [
        coefficients(own, _since(xp, count, first), *pair, unscale, 1.0, xp)
        for own, first, pair in zip(groups, started, own_rates, strict=True)
    ]
    norms = _norms(groups, xp, gradients, slots, c[0], is_update, unscale, nonfinite)
    finite = _finite(xp, norms, nonfinite)
    overwrite = hyper.use_ema and bool(hyper.ema_overwrite_frequency)
    if overwrite:
        overwrite = (updates + 1) % hyper.ema_overwrite_frequency == 0
    clips = _clips(groups, which, xp, norms) if norms else [1.0] * len(variables)
    corrected = None
    if eps_root is not None:
        corrected = array_api.Corrected(correction(count, log(hyper.beta_2, xp), xp), eps_root)
    results = []
    for k, (p, g, own) in enumerate(zip(variables, gradients, slots, strict=True)):
        own_c = c[which[k]]
        own_c = own_c._replace(scale=own_c.scale * clips[k])
        stays = p if corrected is None else array_api.no_change(p)
        noise = None if noises is None else noises[k]
        new = _variable(p, stays, g, own, own_c, groups[which[k]], is_update, overwrite, corrected, noise)
        results.append((select(finite, new[0], stays), {name: select(finite, new[1][name], own[name]) for name in own}))
    return finite, [r[0] for r in results], [r[1] for r in results]


def _precise(xp: Any, rate: Any) -> Any:
    """A rate in the precision of the coefficients: a schedule of integers in JAX may return float32 under x64."""
    return rate if xp is math or isinstance(rate, (int, float)) else xp.astype(xp.asarray(rate), _real(xp))


def _since(xp: Any, count: Any, first: int) -> Any:
    """Updates since the moments of a group were new."""
    if not first:
        return count
    return max(count - first, 0) if xp is math else xp.where(count > first, count - first, count * 0)


def select_number(condition: Any, yes: Any, no: Any) -> Any:
    """As `select`, for numbers as well as arrays."""
    return (yes if condition else no) if isinstance(condition, bool) else namespace(yes).where(condition, yes, no)


def lazy_namespace(leaves: Sequence[Any]) -> Any:
    """The namespace of the first array whose values may not be looked at (JAX, Dask), or None."""
    lazy = [leaf for leaf in leaves if leaf is not None and array_api_compat.is_lazy_array(leaf)]
    return namespace(lazy[0]) if lazy else None


def _variable(
    p: Array,
    stays: Array,
    g: Array | None,
    own: Slots,
    c: Coefficients,
    hyper: Any,
    is_update: Any,
    overwrite: Any,
    corrected: array_api.Corrected | None,
    noise: Any,
) -> tuple[Array, Slots]:
    """The new variable or its change, which is `stays` where nothing is updated, and the new slots."""
    if is_update is False or not own:
        new_p, new = stays, own
    elif g is None:
        new_p, new = array_api.blended(p, own, c, overwrite)
        new_p = new_p if corrected is None else new_p - p
    elif corrected is None:
        new_p, new = array_api.updated(p, g, own, c, hyper.clipvalue, hyper.nesterov, overwrite, noise)
    else:
        new_p, new = array_api.change(p, g, own, c, hyper.clipvalue, hyper.nesterov, overwrite, corrected, noise)
    if is_update is True or not own:
        return new_p, new
    other = own
    if g is not None:
        other = own | {"gradient_accumulator": array_api.accumulated(own["gradient_accumulator"], g, c)}
    return select(is_update, new_p, stays), {name: select(is_update, new[name], other[name]) for name in own}


def _norms(
    groups: Sequence[Any],
    xp: Any,
    gradients: Sequence[Any],
    slots: Sequence[Slots],
    c: Coefficients,
    is_update: Any,
    unscale: Any,
    nonfinite: str,
) -> list[Any] | None:
    """The norm of every mean unscaled gradient; None where no option needs it."""
    micro_steps = groups[0].gradient_accumulation_steps
    limits = [groups[0].global_clipnorm, *(own.clipnorm for own in groups)] if is_update is not False else []
    limits = [limit for limit in limits if limit is not None]
    if nonfinite == "propagate" and not limits:
        return None
    pairs = [(g, own) for g, own in zip(gradients, slots, strict=True) if g is not None]
    if micro_steps:
        whole = [array_api.accumulated(own["gradient_accumulator"], g, c) for g, own in pairs]
    else:
        whole = [g for g, _ in pairs]
    found = array_api.norms(whole, limits) if whole else []
    mean = iter([norm / micro_steps if micro_steps else norm * unscale for norm in found])
    norms = [0.0 if g is None else next(mean) for g in gradients]
    return [float(norm) for norm in norms] if xp is math else norms


def _finite(xp: Any, norms: list[Any] | None, nonfinite: str) -> Any:
    if norms is None or nonfinite == "propagate":
        return True
    finite: Any = all(map(math.isfinite, norms)) if xp is math else xp.isfinite(_whole(xp, norms))
    if nonfinite == "raise":
        if is_traced(finite):
            raise ValueError("nonfinite='raise' cannot look at values under a trace; expected 'skip' or 'propagate'")
        if not bool(finite):
            raise FloatingPointError("a gradient holds a value that is not finite (nonfinite='raise')")
        return True
    return finite


def _clips(groups: Sequence[Any], which: Sequence[int], xp: Any, norms: list[Any]) -> list[Any]:
    hyper, limits = groups[0], [own.clipnorm for own in groups]
    if hyper.global_clipnorm is None:
        pairs = zip(norms, (limits[k] for k in which), strict=True)
        return [1.0 if limit is None else _limited(xp, norm, limit) for norm, limit in pairs]
    if xp is math:
        return [clip_factor(whole_norm(np.array(norms)), hyper.global_clipnorm)] * len(norms)
    total = _whole(xp, norms)
    factor = clip_factor(total, hyper.global_clipnorm, lambda norm, limit: xp.where(norm > limit, norm, limit))
    return [factor] * len(norms)


def _whole(xp: Any, norms: list[Any]) -> Any:
    """The norm of all gradients together, those that do not exist left out."""
    existing = [norm for norm in norms if not isinstance(norm, float)]
    every = xp.stack(existing) if existing else xp.zeros(1)

    def root_of_squares(every: Any) -> Any:
        return array_api.root_of_squares(xp, xp.max(every), lambda unit: xp.sum((every / unit) ** 2))

    if not is_traced(every):
        return root_of_squares(every)
    # A branch, whose result XLA computes once. It makes a chain of scalars of a sum over few of them, and would repeat
    # that in the update of each variable: with 1,000 variables, it would compile for ten minutes.
    return sys.modules["jax"].lax.cond(xp.all(xp.isfinite(every)), root_of_squares, xp.sum, every)


def _limited(xp: Any, norm: Any, limit: float) -> Any:
    if isinstance(norm, float):
        return limit / norm if not norm <= limit else 1.0
    return limit / xp.where(norm <= limit, xp.ones_like(norm) * limit, norm)


def _real(xp: Any) -> Any:
    return xp.__array_namespace_info__().default_dtypes()["real floating"]


def is_traced(value: Any) -> bool:
    """Whether a value stands for others inside `jax.jit` or the like."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)
