"""One step: prepare everything, with all that can fail; then commit it, whole."""

import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..array_api import functions as array_api
from ..arrays import Array
from ..arrays.brief import brief, brief_names
from ..coefficients import clip_factor, coefficients, log, step_size, whole_norm
from ..update import Coefficients

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
    devices: list[Any]  # the plans of GPUs
    elsewhere: list[int]  # the variables without compiled kernels
    tensors: list[tuple[int, Array]]  # the variables whose versions torch counts

    @property
    def resident(self) -> Any:
        """The plan of the one GPU that everything lies on, which can then decide by itself; None otherwise."""
        return self.devices[0] if len(self.devices) == 1 and self.plan is None and not self.elsewhere else None


class Numbers(NamedTuple):
    """What a step comes to in numbers: see `numbers_of`."""

    c: Coefficients
    overwrite: bool  # the variables with their averages
    is_update: bool  # not only an accumulation
    factor: float  # what norms of the sums that kernels take are multiplied with


def _check_writable(name: str, array: Array) -> None:
    try:
        array[...] = array[...]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"variable {brief(name)} cannot be written ({brief(error)}); expected an array that can"
        ) from None


class Prepared(NamedTuple):
    """A step that is ready to be committed."""

    touched: list[Array]  # tensors whose versions torch counts
    writes: list[Write]
    calls: list[Call]
    norm: float | None
    applied: bool
    launches: Sequence[Call] = ()  # on GPUs; may be repeated
    counted: bool = True  # by the host; otherwise a GPU counts


class Repeat(NamedTuple):
    """A step that can be taken again with other gradients, rates and a higher count."""

    settings: object
    loss_scale: float
    log_beta_1: float
    log_beta_2: float
    takes_norm: bool
    prepared: Prepared


class Step(NamedTuple):
    """What a step is to be taken with.

    Attributes
    ----------
    iteration : int
        Calls of `apply` so far.
    rates_at : callable
        Learning rate and weight decay at an iteration.
    rates : pair of float
        The same at this one.
    key : object
        Equal for steps whose rates follow from the iteration alone, in the same way; None where they may not.
    loss_scale : float
        What gradients are divided by.
    nonfinite : {"propagate", "skip", "raise"}
    waits : bool
        Whether the host has to know at once if the step was applied.
    settings : object
        The token of the hyperparameters, from before any of them was looked at.
    """

    iteration: int
    rates_at: Callable[[int], tuple[float, float]]
    rates: tuple[float, float]
    key: object
    loss_scale: float
    nonfinite: str
    waits: bool
    settings: object


def build(names: list[str], variables: list[Array], slots: list[dict[str, Array]], excluded: frozenset[str]) -> Built:
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
    once: set[int] = set()
    for i in elsewhere:
        if id(variables[i]) in once:
            raise ValueError(f"variable {brief(names[i])} is given twice; expected every array once")
        once.add(id(variables[i]))
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
    return Built(names, variables, slots, decayed, plan, devices, elsewhere, tensors)


def numbers_of(hyper: Any, iteration: int, rates: tuple[float, float], loss_scale: float) -> Numbers:
    """The coefficients and decisions of the step after `iteration` others, before any clip by norm."""
    micro_steps = hyper.gradient_accumulation_steps
    updates = iteration // (micro_steps or 1)
    c = coefficients(hyper, updates, *rates, 1 / loss_scale, 1.0)
    every = hyper.ema_overwrite_frequency if hyper.use_ema else None
    is_update = not micro_steps or (iteration + 1) % micro_steps == 0
    overwrite = bool(is_update and every and (updates + 1) % every == 0)
    return Numbers(c, overwrite, is_update, 1 / micro_steps if micro_steps else 1 / loss_scale)


def prepare(hyper: Any, built: Built, gradients: Sequence[Array | None], taken: Step) -> Prepared:
    """Check the gradients and work out the whole step, without writing anything that the user owns.

    Parameters
    ----------
    hyper : AdamW
        Anything with its hyperparameters as attributes.
    gradients : list of arrays and None, in the order of the variables
    taken : Step
    """
    _refresh(built, gradients, hyper.threads)
    if built.resident is not None and taken.nonfinite != "raise" and not taken.waits:
        return _prepare_resident(hyper, built, gradients, taken)
    if any(device.is_capturing for device in built.devices):
        raise RuntimeError(
            "a graph is captured of a step for which the host waits (nonfinite='raise', a LossScaleOptimizer, arrays "
            "at several places); expected nonfinite='propagate' or 'skip', and all arrays on one GPU"
        )
    numbers = numbers_of(hyper, taken.iteration, taken.rates, taken.loss_scale)
    c, norm, clips = numbers.c, None, None
    if taken.nonfinite != "propagate" or (numbers.is_update and (hyper.clipnorm or hyper.global_clipnorm)):
        norms, norm = _norms(hyper, built, gradients, numbers, taken.iteration)
        if taken.nonfinite != "propagate" and not math.isfinite(norm):
            _refuse(built, norms, taken.nonfinite)
            return Prepared([], [], [], norm, False)
        if numbers.is_update:
            scale, clips = _clipped(hyper, c.scale, norms, norm)
            c = c._replace(scale=scale)
    numbers = numbers._replace(c=c)
    launches = _launches(hyper, built, numbers, taken.iteration, clips)
    if not numbers.is_update:
        return Prepared([], *_accumulations(built, gradients, c), norm, True, launches)
    touched = [tensor for i, tensor in built.tensors if numbers.overwrite or gradients[i] is not None]
    prepared = Prepared(touched, *_updates(hyper, built, gradients, c, clips, numbers.overwrite), norm, True, launches)
    if taken.iteration and not taken.waits and not hyper.gradient_accumulation_steps:
        _note(hyper, built, gradients, taken, prepared)
    return prepared


def take_again(
    hyper: Any,
    plan: Any,
    grads: Any,
    loss_scale: float,
    rates: tuple[float, float] | None,
    scalars: dict[str, Array],
    last: list[Any],
) -> bool:
    """Take a step at once, if nothing but gradients, rates and the count differs from the last one; False if not.

    A few microseconds instead of ten: all checks of arrays are one compiled call, and two numbers are new. `rates` are
    None where they are numbers; `scalars` holds the counter and the learning rate; the first of `last` is the record of
    the last step.
    """
    noted = plan.repeat
    if noted is None or type(grads) is not list:
        return False
    settings, noted_scale, log_beta_1, log_beta_2, takes_norm, prepared = noted
    iteration, own, weight_decay = scalars["iteration"], scalars.get("learning_rate"), hyper.weight_decay
    if settings is not hyper._settings or noted_scale != loss_scale or not iteration.flags.writeable:
        return False
    gradients = list(grads)  # the caller's may change while we work
    number = iteration.item()
    if not 0 < number < 2**62 or plan.table.reads(gradients) != len(gradients):
        return False
    if rates is not None:
        rate, weight_decay = rates
    elif own is not None:
        rate = own.item()
    else:  # a callable has come since it was looked at
        return False
    norm = scale = None
    if takes_norm:
        norms, norm = plan.norms(None, {})
        norms, norm = norms * (1 / loss_scale), norm * (1 / loss_scale)
        if hyper.nonfinite != "propagate" and not math.isfinite(norm):
            return False
        scale, clips = _clipped(hyper, 1 / loss_scale, norms, norm)
        plan.set_clips(clips)
    if plan.helpers[0]:
        plan.call_helpers()
    plan.set_rates(step_size(number, rate, log_beta_1, log_beta_2), rate * weight_decay, scale)
    if prepared.touched:
        arrays.note_writes(prepared.touched)
    counts = (operator.setitem, last, 0, (norm, True, rate)), (operator.setitem, iteration, (), number + 1)
    _run(starmap(operator.call, (*prepared.calls, *counts)))
    return True


def _clipped(
    hyper: Any, scale: float, norms: np.ndarray[Any, Any], norm: float
) -> tuple[float, np.ndarray[Any, Any] | None]:
    """What clipping by norm makes of the scale of all gradients, and of each one's."""
    if hyper.global_clipnorm:
        return scale * clip_factor(norm, hyper.global_clipnorm), None
    return scale, hyper.clipnorm / np.maximum(norms, hyper.clipnorm) if hyper.clipnorm else None


def _note(hyper: Any, built: Built, gradients: Sequence[Array | None], taken: Step, prepared: Prepared) -> None:
    """Keep a step for `take_again`, if every variable has its part in it."""
    overwrites = hyper.use_ema and hyper.ema_overwrite_frequency
    if built.plan is None or built.devices or built.elsewhere or overwrites:
        return
    if all(gradient is not None for gradient in gradients):
        logs = log(hyper.beta_1), log(hyper.beta_2)
        built.plan.repeat = Repeat(taken.settings, taken.loss_scale, *logs, prepared.norm is not None, prepared)


def _prepare_resident(hyper: Any, built: Built, gradients: Sequence[Array | None], taken: Step) -> Prepared:
    """A step that the GPU decides and counts by itself: nothing waits."""
    device, scale = built.resident, taken.loss_scale

    def row_at(iteration: int) -> list[float]:
        rates = taken.rates if iteration == taken.iteration else taken.rates_at(iteration)
        return row(hyper, numbers_of(hyper, iteration, rates, scale))

    device.expect(taken.iteration)
    device.send_ahead(row_at, taken.key)
    guarded = taken.nonfinite == "skip"
    knows = device.is_certain and not guarded and not device.is_capturing
    numbers = numbers_of(hyper, taken.iteration, taken.rates, scale)
    clips = bool(hyper.clipnorm or hyper.global_clipnorm)
    clipped = clips and (numbers.is_update or not knows)
    launches = device.launches(*_options(hyper), guarded or clipped, clipped, guarded, loads_norm=clips)
    overwrite = numbers.overwrite or not knows
    touched = [t for i, t in built.tensors if overwrite or (numbers.is_update and gradients[i] is not None)]
    call = device.run, launches, True, not knows, guarded or clipped
    return Prepared(touched, [], [], None, True, [call], counted=knows)


def row(hyper: Any, numbers: Numbers, clipnorm: float | None = None) -> list[float]:
    """The numbers of a step in the columns that a GPU's kernels read (kernels/cuda.py)."""
    limits = [hyper.clipnorm or 0.0, hyper.global_clipnorm or 0.0] if clipnorm is None else [clipnorm, 0.0]
    return [*map(float, numbers.c), float(numbers.overwrite), float(numbers.is_update), numbers.factor, *limits]


def _options(hyper: Any) -> tuple[bool | None, ...]:
    wanted = hyper.amsgrad, hyper.use_ema, hyper.gradient_accumulation_steps
    return tuple(True if option else None for option in wanted)


def _launches(hyper: Any, built: Built, numbers: Numbers, iteration: int, clips: Any) -> list[Call]:
    """The launches of a step that the host has decided."""
    result: list[Call] = []
    each = 0.0 if clips is None else hyper.clipnorm
    for device in built.devices:
        device.expect(iteration)
        device.send_rows(iteration, 1, lambda _: row(hyper, numbers, each), None)
        launches = device.launches(*_options(hyper), bool(each), bool(each), False)
        result.append((device.run, launches))
    return result


def prepare_one(hyper: Any, built: Built, gradient: Array, i: int, updates: int, learning_rate: float) -> Prepared:
    """Adam alone, for one variable: no clip, decay, average or accumulator."""
    gradients = [gradient if k == i else None for k in range(len(built.names))]
    _refresh(built, gradients, hyper.threads)
    c = coefficients(hyper, updates, learning_rate, 0.0, 1.0, 1.0)
    touched = [tensor for k, tensor in built.tensors if k == i]
    c = c._replace(scale=1.0, limit=math.inf)
    launches: list[Call] = []
    for device in built.devices:
        if i in device.own:
            if device.has_captures:
                raise RuntimeError(
                    "`update_step` would take the rows of a captured graph; expected no capture before it"
                )
            device.send_rows(0, 1, lambda _: row(hyper, Numbers(c, False, True, 1.0), 0.0), None)
            top = True if hyper.amsgrad else None
            launches.append((device.run, device.launches(top, None, None, False, False, False, still=True), False))
    updates_of_one = _updates(hyper, built, gradients, c, None, False, adam_alone=True)
    return Prepared(touched, *updates_of_one, None, True, launches)


def commit(prepared: Prepared, calls: Iterable[Call]) -> None:
    """Make a prepared step happen, all of it or nothing, together with `calls` on the optimizer's own counters.

    Compiled calls run with no Python bytecode between them, so no interrupt can come in between. Launches and
    whole-array writes come first and can be repeated: an interrupt among them is kept until the step is complete.
    """
    if prepared.touched:
        arrays.note_writes(prepared.touched)
    calls = [*prepared.calls, *calls]
    if not prepared.writes and not prepared.launches:
        _run(starmap(operator.call, calls))
        return
    begun: list[bool] = []
    calls.insert(0, (begun.append, True))
    try:
        _write(prepared)
        _run(starmap(operator.call, calls))
    except BaseException:
        if not begun:
            if prepared.counted:  # otherwise the GPU's plan has seen to it
                _write(prepared)
            _run(starmap(operator.call, calls))
        raise


def _write(prepared: Prepared) -> None:
    for function, *arguments in prepared.launches:
        function(*arguments)
    arrays.write_all(prepared.writes)


def _refresh(built: Built, gradients: Sequence[Array | None], threads: int | None) -> None:
    for i in built.elsewhere:
        arrays.check_variable(built.names[i], built.variables[i])
        if not arrays.is_mutable(built.variables[i]):
            raise TypeError(
                f"variable {brief(built.names[i])} is an immutable array of {arrays.library_name(built.variables[i])}; "
                "expected one that can be updated in place: use `stateless_apply`"
            )
        if gradients[i] is not None:
            arrays.check_gradient(built.names[i], gradients[i], built.variables[i])
    if built.plan is not None:
        built.plan.threads = threads
        built.plan.begin(gradients)
    for device in built.devices:
        device.begin(gradients)


def _norms(
    hyper: Any, built: Built, gradients: Sequence[Array | None], numbers: Numbers, iteration: int
) -> tuple[np.ndarray[Any, Any], float]:
    """The norm of each variable's mean unscaled gradient, and of all together; waits for GPUs."""
    c, factor = numbers.c, numbers.factor
    accumulated = bool(hyper.gradient_accumulation_steps)
    elsewhere = {
        i: float(array_api.norm(gradients[i], built.slots[i].get("gradient_accumulator"), c))
        for i in built.elsewhere
        if gradients[i] is not None
    }
    for device in built.devices:
        device.send_rows(iteration, 1, lambda _: row(hyper, numbers), None)
        elsewhere |= device.norms(True if accumulated else None)
    if built.plan is None:
        norms = np.array([elsewhere.get(i, 0.0) for i in range(len(built.names))]) * factor
        return norms, whole_norm(norms)
    built.plan.set_numbers(c, False)
    norms, norm = built.plan.norms(True if accumulated else None, elsewhere)
    return norms * factor, norm * factor


def _refuse(built: Built, norms: np.ndarray[Any, Any], nonfinite: str) -> None:
    if nonfinite == "raise":
        names = [name for name, norm in zip(built.names, norms, strict=True) if not math.isfinite(norm)]
        raise FloatingPointError(
            f"gradients of {brief_names(names)} hold values that are not finite (nonfinite='raise')"
        )


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
