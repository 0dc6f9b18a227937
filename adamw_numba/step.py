"""One step: prepare everything, with all that can fail; then commit it, whole."""

import math
import operator
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np

from . import arrays
from .arrays import Array
from .coefficients import clip_factor, coefficients, log, step_size, whole_norm
from .kernels import array_api
from .update import Coefficients

Call = tuple[Any, ...]
Write = tuple[Array, Array]
_run = deque[Any](maxlen=0).extend  # takes each result of an iterator, and keeps none


class Built(NamedTuple):
    """What an optimizer has been built on: its variables in order, and their state."""

    names: list[str]
    variables: list[Array]
    slots: list[dict[str, Array]]
    decayed: list[bool]
    plan: Any  # of the variables on the host; None if there are none
    elsewhere: list[int]  # the other variables
    tensors: list[tuple[int, Array]]  # the variables whose versions torch counts


def _check_writable(name: str, array: Array) -> None:
    try:
        array[...] = array[...]
    except (TypeError, ValueError) as error:
        raise ValueError(f"variable {name!r} cannot be written ({error}); expected an array that can") from None


class Prepared(NamedTuple):
    """A step that is ready to be committed."""

    touched: list[Array]  # tensors whose versions torch counts
    writes: list[Write]
    calls: list[Call]
    norm: float | None
    applied: bool


class Repeat(NamedTuple):
    """A step that can be taken again with other gradients, rates and a higher count."""

    settings: object
    loss_scale: float
    log_beta_1: float
    log_beta_2: float
    prepared: Prepared


def build(names: list[str], variables: list[Array], slots: list[dict[str, Array]], excluded: frozenset[str]) -> Built:
    """Check that variables do not overlap, and lay out the work of a step.

    Raises
    ------
    ValueError
        If two variables share memory.
    """
    elsewhere = [i for i, variable in enumerate(variables) if arrays.library(variable) == "array_api"]
    for i in elsewhere:
        if arrays.is_mutable(variables[i]):
            _check_writable(names[i], variables[i])
    for i in elsewhere:
        if any(variables[j] is variables[i] for j in elsewhere if j < i):
            raise ValueError(f"variable {names[i]!r} is given twice; expected every array once")
    decayed = [name not in excluded for name in names]
    plan = None
    if len(elsewhere) < len(names):
        from .plan import Plan  # compiled code, imported at first use

        plan = Plan(names, [None if i in elsewhere else v for i, v in enumerate(variables)], slots)
        plan.set_decayed(decayed)
    tensors = [(i, variable) for i, variable in enumerate(variables) if arrays.has_version(variable)]
    return Built(names, variables, slots, decayed, plan, elsewhere, tensors)


def prepare(
    hyper: Any,
    built: Built,
    gradients: Sequence[Array | None],
    iteration: int,
    rates: tuple[float, float],
    loss_scale: float,
    nonfinite: str,
) -> Prepared:
    """Check the gradients and work out the whole step, without writing anything that the user owns.

    Parameters
    ----------
    hyper : AdamW
        Anything with its hyperparameters as attributes.
    gradients : list of arrays and None, in the order of the variables
    iteration : int
        Calls of `apply` so far.
    rates : pair of float
        Learning rate and weight decay.
    loss_scale : float
        What gradients are divided by.
    nonfinite : {"propagate", "skip", "raise"}
    """
    _refresh(built, gradients, hyper.threads)
    micro_steps = hyper.gradient_accumulation_steps
    is_update = not micro_steps or (iteration + 1) % micro_steps == 0
    updates = iteration // (micro_steps or 1)
    c = coefficients(hyper, updates, *rates, 1 / loss_scale, 1.0)
    norm, clips = None, None
    if nonfinite != "propagate" or (is_update and (hyper.clipnorm or hyper.global_clipnorm)):
        factor = 1 / micro_steps if micro_steps else 1 / loss_scale
        norms, norm = _norms(built, gradients, c, factor, bool(micro_steps))
        if nonfinite != "propagate" and not math.isfinite(norm):
            _refuse(built, norms, nonfinite)
            return Prepared([], [], [], norm, False)
        if hyper.global_clipnorm:
            c = c._replace(scale=c.scale * clip_factor(norm, hyper.global_clipnorm))
        elif hyper.clipnorm:
            clips = hyper.clipnorm / np.maximum(norms, hyper.clipnorm)
    if not is_update:
        return Prepared([], *_accumulations(built, gradients, c), norm, True)
    overwrite = hyper.use_ema and bool(hyper.ema_overwrite_frequency)
    overwrite = overwrite and (updates + 1) % hyper.ema_overwrite_frequency == 0
    touched = [tensor for i, tensor in built.tensors if overwrite or gradients[i] is not None]
    prepared = Prepared(touched, *_updates(hyper, built, gradients, c, clips, overwrite), norm, True)
    if updates and norm is None and not micro_steps:
        _note(hyper, built, gradients, loss_scale, prepared)
    return prepared


def repeated(
    hyper: Any,
    built: Built,
    gradients: Sequence[Array | None],
    iteration: int,
    rates: tuple[float, float],
    loss_scale: float,
    nonfinite: str,
) -> Prepared | None:
    """What `prepare` would return, where nothing but gradients, rates and the count differs from the last step.

    A few microseconds instead of ten: all checks of arrays are one compiled call, and two numbers are new.
    """
    plan = built.plan
    if plan is None or plan.repeat is None:
        return None
    settings, scale, log_beta_1, log_beta_2, prepared = plan.repeat
    if settings is not hyper._settings or scale != loss_scale or nonfinite != "propagate" or not iteration:
        return None
    if plan.reads(gradients) != len(gradients):
        return None
    rate, weight_decay = rates
    plan.set_rates(step_size(iteration, rate, log_beta_1, log_beta_2), rate * weight_decay)
    again: Prepared = prepared
    return again


def _note(hyper: Any, built: Built, gradients: Sequence[Array | None], loss_scale: float, prepared: Prepared) -> None:
    """Keep a step for `repeated`, if every variable has its part in it and one thread is enough."""
    overwrites = hyper.use_ema and hyper.ema_overwrite_frequency
    if built.plan is None or built.elsewhere or overwrites or not built.plan.can_repeat(prepared.calls):
        return
    if all(gradient is not None for gradient in gradients):
        built.plan.repeat = Repeat(hyper._settings, loss_scale, log(hyper.beta_1), log(hyper.beta_2), prepared)


def prepare_one(hyper: Any, built: Built, gradient: Array, i: int, updates: int, learning_rate: float) -> Prepared:
    """Adam alone, for one variable: no clip, decay, average or accumulator."""
    gradients = [gradient if k == i else None for k in range(len(built.names))]
    _refresh(built, gradients, hyper.threads)
    c = coefficients(hyper, updates, learning_rate, 0.0, 1.0, 1.0)
    touched = [tensor for k, tensor in built.tensors if k == i]
    updates_of_one = _updates(hyper, built, gradients, c._replace(scale=1.0), None, False, adam_alone=True)
    return Prepared(touched, *updates_of_one, None, True)


def commit(prepared: Prepared, calls: Iterable[Call]) -> None:
    """Make a prepared step happen, all of it or nothing, together with `calls` on the optimizer's own counters.

    Compiled calls run with no Python bytecode between them, so no interrupt can come in between. Whole-array writes
    come first and can be repeated: an interrupt among them is kept until the step is complete.
    """
    if prepared.touched:
        arrays.note_writes(prepared.touched)
    calls = [*prepared.calls, *calls]
    if not prepared.writes:
        _run(starmap(operator.call, calls))
        return
    begun: list[bool] = []
    calls.insert(0, (begun.append, True))
    try:
        arrays.write_all(prepared.writes)
        _run(starmap(operator.call, calls))
    except BaseException:
        if not begun:
            arrays.write_all(prepared.writes)
            _run(starmap(operator.call, calls))
        raise


def _refresh(built: Built, gradients: Sequence[Array | None], threads: int | None) -> None:
    for i in built.elsewhere:
        arrays.check_variable(built.names[i], built.variables[i])
        if not arrays.is_mutable(built.variables[i]):
            raise TypeError(
                f"variable {built.names[i]!r} is an immutable array of {arrays.library_name(built.variables[i])}; "
                "expected one that can be updated in place: use `stateless_apply`"
            )
        if gradients[i] is not None:
            arrays.check_gradient(built.names[i], gradients[i], built.variables[i])
    if built.plan is not None:
        built.plan.threads = threads
        built.plan.refresh(gradients)


def _norms(
    built: Built, gradients: Sequence[Array | None], c: Coefficients, factor: float, accumulated: bool
) -> tuple[np.ndarray[Any, Any], float]:
    """The norm of each variable's mean unscaled gradient, and of all together."""
    elsewhere = {
        i: float(array_api.norm(gradients[i], built.slots[i].get("gradient_accumulator"), c))
        for i in built.elsewhere
        if gradients[i] is not None
    }
    if built.plan is None:
        norms = np.array([elsewhere.get(i, 0.0) for i in built.elsewhere]) * factor
        return norms, whole_norm(norms)
    built.plan.set_numbers(c, False)
    norms, norm = built.plan.norms(True if accumulated else None, elsewhere)
    return norms * factor, norm * factor


def _refuse(built: Built, norms: np.ndarray[Any, Any], nonfinite: str) -> None:
    if nonfinite == "raise":
        names = [name for name, norm in zip(built.names, norms, strict=True) if not math.isfinite(norm)]
        raise FloatingPointError(f"gradients of {names} hold values that are not finite (nonfinite='raise')")


def _accumulations(built: Built, gradients: Sequence[Array | None], c: Coefficients) -> tuple[list[Write], list[Call]]:
    writes = []
    for i in built.elsewhere:
        if gradients[i] is not None:
            total = built.slots[i]["gradient_accumulator"]
            writes.append((total, array_api.accumulated(total, gradients[i], c)))
    return writes, built.plan.accumulate_calls(c) if built.plan is not None else []


def _updates(
    hyper: Any,
    built: Built,
    gradients: Sequence[Array | None],
    c: Coefficients,
    clips: np.ndarray[Any, Any] | None,
    overwrite: bool,
    adam_alone: bool = False,
) -> tuple[list[Write], list[Call]]:
    unused = ("average", "gradient_accumulator") if adam_alone else ()
    clipvalue = None if adam_alone else hyper.clipvalue
    writes: list[Write] = []
    for i in built.elsewhere:
        p, slots = built.variables[i], {key: slot for key, slot in built.slots[i].items() if key not in unused}
        own = c._replace(decay=c.decay * built.decayed[i], scale=c.scale * (1.0 if clips is None else float(clips[i])))
        g = gradients[i]
        if g is None:
            new, changed = array_api.blended(p, slots, own, overwrite)
        else:
            new, changed = array_api.updated(p, g, slots, own, clipvalue, overwrite)
        writes += [(p, new), *((slots[key], changed[key]) for key in slots)]
    if built.plan is None:
        return writes, []
    built.plan.set_clips(clips)
    flags = [
        True if wanted and not adam_alone else None
        for wanted in (hyper.use_ema, hyper.gradient_accumulation_steps, hyper.clipvalue)
    ]
    return writes, built.plan.update_calls(c, True if hyper.amsgrad else None, *flags, overwrite)
