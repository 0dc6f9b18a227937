"""The table of hyperparameters: what each may be, checked the same in the constructor and on assignment."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from ..arrays import is_array
from ..arrays.advice import is_model
from ..arrays.brief import brief, brief_names

_BOOLEAN: Any = bool  # which mypy takes for no number
Check = Callable[[str, Any], Any]


class Hyperparameters:
    """The values of an optimizer's hyperparameters, by name.

    Attributes
    ----------
    token : object
        Another one after every change: what was worked out from the values holds as long as the token.
    is_fixed : bool
        Whether the state has been allocated, on which some of them depend.
    counts_each : bool
        Whether a variable counts the steps for which it had a gradient, as in torch; in Keras all count every step.
    learning_rate_function, weight_decay_function : Rate or None
        What is called at each step; None where the rate is a number.
    overrides : list of groups.Override
        As they were asked for.
    groups : list of groups.Group
        Once it is built; the common one first. The rest of them are `others`.
    most_threads : int or None
        What ``threads`` is where it is not set; None for as many as Numba would use.
    """

    def __init__(self) -> None:
        self.token = object()
        self.is_fixed = self.counts_each = False
        self.learning_rate_function: Rate | None = None
        self.weight_decay_function: Rate | None = None
        self.most_threads: int | None = None
        self.overrides: list[Any] = []
        self.groups: list[Any] = []
        self.others: Sequence[Any] = ()

    def set(self, name: str, value: Any, check: Check, fixed: bool = False) -> None:
        """Keep a value, once it was checked; errors leave all as it is."""
        values = vars(self)
        value = check(name, value)
        if fixed and self.is_fixed and value != values[name]:
            raise ValueError(
                f"`{name}` cannot change once the optimizer is built, since its state depends on it. "
                f"Received: {name}={brief(value)}; it is {brief(values[name])}"
            )
        if name in CLIPS and value is not None:
            self._check_clip(name, value)
        changes = {name: value, "token": object()}
        if check is rate:
            changes[f"{name}_function"] = Rate(name, value) if callable(value) else None
        values.update(changes)  # all at once, for an interrupt or another thread

    def _check_clip(self, name: str, value: float) -> None:
        others = {other: vars(self).get(other) for other in CLIPS if other != name}
        if any(other is not None for other in others.values()):
            raise ValueError(
                "Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set. "
                f"Received: {name}={value}, while {others}"
            )
        own = [each.own for each in (self.others if self.groups else self.overrides)]
        if name == "global_clipnorm" and any(each.get(clip) is not None for each in own for clip in CLIPS):
            raise ValueError(
                "`global_clipnorm` clips all gradients together, while a group clips by itself. "
                f"Received: {name}={value}; expected neither `clipnorm` nor `clipvalue` in an `override`"
            )


class Hyperparameter:
    """An attribute of an optimizer that is checked whenever it is set, and kept in its `hyper`.

    Parameters
    ----------
    check : callable
        ``check(name, value)`` returns the value to keep, or raises.
    fixed : bool
        Whether it cannot change once the optimizer is built: the arrays of the state depend on it.
    """

    def __init__(self, check: Check, fixed: bool = False) -> None:
        self.check = check
        self.fixed = fixed

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else instance.hyper.__dict__[self.name]

    def __set__(self, instance: Any, value: Any) -> None:
        instance.hyper.set(self.name, value, self.check, self.fixed)


def patterns(name: str, value: Any) -> list[str]:
    """Check regular expressions for the names of variables."""
    if isinstance(value, str) or not isinstance(value or (), Iterable):
        raise TypeError(f"`{name}` must be a list of strings. Received: {name}={brief(value)}")
    given = list(value or ())
    if not all(isinstance(pattern, str) for pattern in given):
        raise TypeError(f"`{name}` must be a list of strings. Received: {name}={brief(given)}")
    for pattern in given:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            text = f"`{name}` holds {brief(pattern)}, which is no regular expression: {brief(str(error))}"
            raise ValueError(text) from None
    return given


_ARRAYS_GO_TO_BUILD = "Arrays go to `build`; the first argument is the learning rate. "
LEAST_SCALE, MOST_SCALE = 2.0**-126, 2.0**126  # whose inverses float32 holds
CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


class Rate:
    """A learning rate or weight decay that is called at each step: with the step, if it has a parameter for it.

    Attributes
    ----------
    is_schedule : bool
        Whether it follows from the step alone.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self.takes_step = _takes_step(function)
        self.is_schedule = _is_schedule(function)

    def __call__(self, step: Any) -> Any:
        """The rate at a step: a checked float, or whatever comes back for a traced step."""
        value = self.function(step) if self.takes_step else self.function()
        if not isinstance(step, int):
            return value
        number = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
        number = number if is_real(number) else _number_of(value)
        if number is None or not 0 <= number < math.inf:
            raise ValueError(f"`{self.name}` returned {brief(value)} at step {step}; expected a finite float >= 0")
        return float(number)

    def key(self) -> object:
        """Equal as long as it gives the same rates for the same steps; None if nobody knows."""
        return self.function if self.is_schedule else None


class Live(Rate):
    """A rate that is a number elsewhere, in a group of torch's for example, and is read at each step.

    Parameters
    ----------
    name : str
    own : dict
        Where it is, by that name: a number, or an array of one element.
    """

    def __init__(self, name: str, own: Mapping[str, Any]) -> None:
        self.name, self.own = name, own
        self.function, self.is_schedule = self, False

    def __repr__(self) -> str:
        return brief(self.own[self.name])

    def __call__(self, step: Any = None) -> float:
        """The number as it is now, checked."""
        value = self.own[self.name]
        if type(value) is float and 0 <= value < math.inf:
            return value
        is_single = is_array(value) and math.prod(value.shape) == 1
        return fixed_rate(self.name, value.item() if is_single else value)  # type: ignore[no-any-return]

    def key(self) -> object:
        """The number: a rate that is assigned holds until another one is."""
        return self()


def _is_schedule(function: Any) -> bool:
    """Whether a rate follows from the step alone: one of ours does, unless it scales one that may not."""
    ours = type(function).__module__.startswith(f"{__name__.partition('.')[0]}.")
    return ours and (not hasattr(function, "schedule") or _is_schedule(function.schedule))


def _number_of(value: Any) -> Any:
    """A number of a scalar that is no array: of Keras, say."""
    try:
        return None if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        return None


def _takes_step(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    if len(required) > 1:
        raise ValueError(
            f"a callable rate takes the step, or nothing. Received one with the parameters {brief_names(required)}"
        )
    return bool(required)


def is_real(value: Any) -> bool:
    """Whether a value is a real number (of Python or NumPy), NaN and infinity included, booleans not."""
    return isinstance(value, Real) and not isinstance(value, _BOOLEAN)


def rate(name: str, value: Any) -> Any:
    """A number that is finite and not negative, or something to be called at each step."""
    if callable(value) and not isinstance(value, type) and not is_model(value):  # a model can be called as well
        return value
    if getattr(value, "shape", None) == () and not isinstance(value, Real):
        value = value.item() if hasattr(value, "item") else _number_of(value)
    try:
        if is_real(value) and 0 <= float(value) < math.inf:
            return float(value)
    except OverflowError:
        pass
    raise ValueError(
        f"{_ARRAYS_GO_TO_BUILD if name == 'learning_rate' and _may_hold_arrays(value) else ''}"
        f"Argument `{name}` must be a float >= 0, or an instance of LearningRateSchedule, or a callable (that takes "
        f"the current step, or nothing, and returns such a float). Received instead: {name}={brief(value)}"
    )


def _may_hold_arrays(value: Any) -> bool:
    """Whether a value is what users of torch give their optimizer first: parameters, a model, an iterator."""
    return is_array(value) or is_model(value) or (isinstance(value, Iterable) and not isinstance(value, (str, bytes)))


def real(expected: str, test: Callable[[Any], bool], optional: bool = False) -> Check:
    """A check for a real number; errors say what was expected."""

    def check(name: str, value: Any) -> Any:
        if optional and value is None:
            return None
        try:
            if is_real(value) and test(float(value)):
                return float(value)
        except OverflowError:
            pass
        raise ValueError(f"`{name}` must be {expected}. Received: {name}={brief(value)}")

    return check


def integer(least: int, optional: bool = True, most: float = math.inf) -> Check:
    """A check for an integer that is large enough, or None."""
    room = f">= {least}" if most == math.inf else f"from {least} to {most}"

    def check(name: str, value: Any) -> Any:
        if optional and value is None:
            return None
        if isinstance(value, Integral) and not isinstance(value, _BOOLEAN) and least <= int(value) <= most:
            return int(value)
        raise ValueError(f"`{name}` must be an integer {room}{' or None' * optional}. Received: {name}={brief(value)}")

    return check


def flag(name: str, value: Any) -> bool:
    """A check for a boolean."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"`{name}` must be True or False. Received: {name}={brief(value)}")


def choice(*choices: str | bool) -> Check:
    """A check for one of a few words, or of words and flags."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, (str, bool)) and value in choices:
            return value
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}. Received: {name}={brief(value)}")

    return check


def text(name: str, value: Any) -> str:
    """A check for a name that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"`{name}` must be a string that is not empty. Received: {name}={brief(value)}")


masters = choice(True, False, "remainder")
beta = real("a float in [0, 1)", lambda value: 0 <= value < 1)
positive = real("a finite float > 0", lambda value: 0 < value < math.inf)
optional_positive = real("a finite float > 0, or None", lambda value: 0 < value < math.inf, optional=True)
loss_scale = real(
    "a float from 2**-126 to 2**126, or None", lambda value: LEAST_SCALE <= value <= MOST_SCALE, optional=True
)
scale = real("a float from 2**-126 to 2**126", lambda value: LEAST_SCALE <= value <= MOST_SCALE)
fixed_rate = real("a finite float >= 0", lambda value: 0 <= value < math.inf)
fraction = real("in the range [0, 1]", lambda value: 0 <= value <= 1)
