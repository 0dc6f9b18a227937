"""The six learning-rate schedules of Keras 3: in float64 on the host, in the array's namespace under a trace."""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from ..arrays import namespace
from ..arrays.brief import brief
from ..hyperparameters.table import is_real

HOST = SimpleNamespace(
    where=lambda condition, yes, no: yes if condition else no,
    minimum=min,
    maximum=max,
    floor=math.floor,
    ceil=math.ceil,
    cos=math.cos,
    log=math.log,
)


class LearningRateSchedule:
    """A learning rate (or weight decay) that depends on the step: the base class, as in Keras.

    A subclass defines ``__call__(step)`` and, if it is to be saved in a config, ``get_config()``. The step is the
    number of calls of ``apply`` so far (with accumulation, these are micro-steps).
    """

    def __call__(self, step: Any) -> Any:
        """The learning rate at a step: a float for a Python or NumPy integer, else a scalar of the step's library."""
        raise NotImplementedError(f"{type(self).__name__} must define `__call__(step)`")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        raise NotImplementedError(f"{type(self).__name__} must define `get_config()` to be saved")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LearningRateSchedule":
        """The schedule that a config describes."""
        return cls(**config)


@dataclasses.dataclass(frozen=True)
class Schedule(LearningRateSchedule):
    """A schedule that consists of its arguments, checked once, and a formula that works in any namespace."""

    positive: ClassVar[tuple[str, ...]] = ("decay_steps",)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("float", "float | None") and not is_number(value, field.type == "float | None"):
                raise ValueError(
                    f"Argument `{field.name}` must be a finite number. Received: {field.name}={brief(value)}"
                )
        for name in self.positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"Argument `{name}` must be > 0. Received: {name}={getattr(self, name)}")

    def __call__(self, step: Any) -> Any:
        if isinstance(step, np.ndarray) and step.ndim:
            return np.array([self(one) for one in step.ravel()]).reshape(step.shape)
        if isinstance(step, (int, float, np.generic, np.ndarray)):
            return float(self.formula(HOST, float(step)))
        xp = namespace(step)
        default = xp.__array_namespace_info__().default_dtypes()["real floating"]
        return self.formula(xp, xp.astype(step, default))

    def formula(self, xp: Any, step: Any) -> Any:
        """The rate at a step, computed with the functions of a namespace."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def is_number(value: Any, optional: bool) -> bool:
    """Whether a value is a finite real number; or None, where that is fine."""
    if value is None:
        return optional
    return is_real(value) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class ExponentialDecay(Schedule):
    """``initial_learning_rate * decay_rate ** (step / decay_steps)``; with ``staircase``, the power is rounded down.

    Parameters
    ----------
    initial_learning_rate : float
    decay_steps : float
        Must be positive.
    decay_rate : float
    staircase : bool
    name : str

    Raises
    ------
    ValueError
        If ``decay_steps`` is not positive, or a number is not finite.

    Examples
    --------
    >>> ExponentialDecay(0.1, decay_steps=10, decay_rate=0.5)(20)
    0.025
    """

    initial_learning_rate: "float"
    decay_steps: "float"
    decay_rate: "float"
    staircase: bool = False
    name: str = "ExponentialDecay"

    def formula(self, xp: Any, step: Any) -> Any:
        power = step / self.decay_steps
        return self.initial_learning_rate * self.decay_rate ** (xp.floor(power) if self.staircase else power)


@dataclasses.dataclass(frozen=True)
class PiecewiseConstantDecay(Schedule):
    """``values[i]`` for ``boundaries[i-1] < step <= boundaries[i]``.

    Parameters
    ----------
    boundaries : list of float
        Strictly increasing steps.
    values : list of float
        One more value than there are boundaries.
    name : str

    Raises
    ------
    ValueError
        If the lengths do not match, the boundaries do not increase, or a number is not finite.

    Examples
    --------
    >>> PiecewiseConstantDecay([10, 20], [1.0, 0.5, 0.1])(20)
    0.5
    """

    positive: ClassVar[tuple[str, ...]] = ()

    boundaries: Sequence[float]
    values: Sequence[float]
    name: str = "PiecewiseConstant"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        object.__setattr__(self, "values", tuple(self.values))
        if len(self.boundaries) != len(self.values) - 1:
            raise ValueError(
                "The length of boundaries should be 1 less than the length of values. "
                f"Received: boundaries={brief(self.boundaries)} of length {len(self.boundaries)}, "
                f"and values={brief(self.values)} "
                f"of length {len(self.values)}."
            )
        for value in (*self.boundaries, *self.values):
            if not is_number(value, optional=False):
                raise ValueError(f"Boundaries and values must be finite numbers. Received: {brief(value)}")
        if any(after <= before for before, after in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"Boundaries must increase strictly. Received: boundaries={brief(self.boundaries)}")

    def formula(self, xp: Any, step: Any) -> Any:
        rate = step * 0.0 + self.values[0]
        for boundary, value in zip(self.boundaries, self.values[1:], strict=True):
            rate = xp.where(step > boundary, value, rate)
        return rate

    def get_config(self) -> dict[str, Any]:
        return {"boundaries": list(self.boundaries), "values": list(self.values), "name": self.name}


@dataclasses.dataclass(frozen=True)
class PolynomialDecay(Schedule):
    """``(initial - end) * (1 - step / decay_steps) ** power + end``, with the step limited to ``decay_steps``.

    Parameters
    ----------
    initial_learning_rate : float
    decay_steps : float
        Must be positive.
    end_learning_rate : float
    power : float
    cycle : bool
        Stretch the decay to the next multiple of ``decay_steps`` instead of limiting the step.
    name : str

    Raises
    ------
    ValueError
        If ``decay_steps`` is not positive, or a number is not finite.

    Examples
    --------
    >>> PolynomialDecay(0.1, decay_steps=10, end_learning_rate=0.0)(5)
    0.05
    """

    initial_learning_rate: "float"
    decay_steps: "float"
    end_learning_rate: "float" = 0.0001
    power: "float" = 1.0
    cycle: bool = False
    name: str = "PolynomialDecay"

    def formula(self, xp: Any, step: Any) -> Any:
        length: Any = self.decay_steps
        if self.cycle:
            length = length * xp.where(step == 0, 1.0, xp.ceil(step / length))
        else:
            step = xp.where(step < length, step, length)
        start, end = self.initial_learning_rate, self.end_learning_rate
        return (start - end) * (1 - step / length) ** self.power + end


@dataclasses.dataclass(frozen=True)
class InverseTimeDecay(Schedule):
    """``initial_learning_rate / (1 + decay_rate * step / decay_steps)``; ``staircase`` rounds the quotient down.

    Parameters
    ----------
    initial_learning_rate : float
    decay_steps : float
        Must be positive.
    decay_rate : float
    staircase : bool
    name : str

    Raises
    ------
    ValueError
        If ``decay_steps`` is not positive, or a number is not finite.

    Examples
    --------
    >>> InverseTimeDecay(0.1, decay_steps=1, decay_rate=0.5)(2)
    0.05
    """

    initial_learning_rate: "float"
    decay_steps: "float"
    decay_rate: "float"
    staircase: bool = False
    name: str = "InverseTimeDecay"

    def formula(self, xp: Any, step: Any) -> Any:
        time = step / self.decay_steps
        return self.initial_learning_rate / (1 + self.decay_rate * (xp.floor(time) if self.staircase else time))


@dataclasses.dataclass(frozen=True)
class CosineDecay(Schedule):
    """Half a cosine down to ``alpha`` times the peak, after an optional linear warm-up (Loshchilov & Hutter 2017).

    Parameters
    ----------
    initial_learning_rate : float
        The peak; with ``warmup_target``, the rate at which the warm-up starts.
    decay_steps : float
        Steps of the decay, counted after the warm-up; must be positive.
    alpha : float
        The last learning rate as a fraction of the peak.
    name : str
    warmup_target : float or None
        The peak at the end of the warm-up; None for no warm-up.
    warmup_steps : float

    Raises
    ------
    ValueError
        If ``decay_steps`` is not positive, or a number is not finite.

    Examples
    --------
    >>> CosineDecay(0.0, decay_steps=10, warmup_target=0.1, warmup_steps=5)(5)
    0.1
    """

    initial_learning_rate: "float"
    decay_steps: "float"
    alpha: "float" = 0.0
    name: str = "CosineDecay"
    warmup_target: "float | None" = None
    warmup_steps: "float" = 0

    def formula(self, xp: Any, step: Any) -> Any:
        start, peak, warmup = self.initial_learning_rate, self.warmup_target, self.warmup_steps
        if peak is None:
            return start * self._fraction(xp, step)
        rising = start + (peak - start) * step / (warmup or 1)
        return xp.where(step < warmup, rising, peak * self._fraction(xp, step - warmup))

    def _fraction(self, xp: Any, step: Any) -> Any:
        done = xp.where(step < self.decay_steps, step, self.decay_steps) / self.decay_steps
        return (1 - self.alpha) * 0.5 * (1 + xp.cos(math.pi * done)) + self.alpha


@dataclasses.dataclass(frozen=True)
class CosineDecayRestarts(Schedule):
    """Cosine decay that restarts, each time longer and lower: SGDR (Loshchilov & Hutter 2017).

    Parameters
    ----------
    initial_learning_rate : float
    first_decay_steps : float
        Steps of the first decay; must be positive.
    t_mul : float
        Each period is this many times as long as the previous one; must be positive.
    m_mul : float
        Each restart begins at this fraction of the previous one.
    alpha : float
        The last learning rate of a period as a fraction of ``initial_learning_rate``.
    name : str

    Raises
    ------
    ValueError
        If ``first_decay_steps`` or ``t_mul`` is not positive, or a number is not finite.

    Notes
    -----
    If ``t_mul`` is below 1, all periods together have a finite length. After that the rate stays at its lowest value
    (Keras returns NaN).

    Examples
    --------
    >>> CosineDecayRestarts(0.1, first_decay_steps=10)(10)
    0.1
    """

    positive: ClassVar[tuple[str, ...]] = ("first_decay_steps", "t_mul")

    initial_learning_rate: "float"
    first_decay_steps: "float"
    t_mul: "float" = 2.0
    m_mul: "float" = 1.0
    alpha: "float" = 0.0
    name: str = "SGDRDecay"

    def formula(self, xp: Any, step: Any) -> Any:
        time = step / self.first_decay_steps
        restarts = self._restarts(xp, time)
        done = (time - self._start(restarts)) / self.t_mul**restarts
        done = xp.where(done < 1.0, done, 1.0)
        cosine = 0.5 * self.m_mul**restarts * (1 + xp.cos(math.pi * done))
        return self.initial_learning_rate * ((1 - self.alpha) * cosine + self.alpha)

    def _start(self, restarts: Any) -> Any:
        return restarts if self.t_mul == 1 else (1 - self.t_mul**restarts) / (1 - self.t_mul)

    def _restarts(self, xp: Any, time: Any) -> Any:
        # Rounding may put a step that is exactly at a boundary just before it: move it back.
        time = time * (1 + 64 * (xp.finfo(time.dtype).eps if hasattr(time, "dtype") else sys.float_info.epsilon))
        if self.t_mul == 1:
            return xp.floor(time)
        left = 1 - time * (1 - self.t_mul)
        guess = xp.floor(xp.log(xp.where(left > 1e-30, left, 1e-30)) / math.log(self.t_mul))
        guess = xp.where(time >= self._start(guess + 1), guess + 1, guess)
        return xp.where(time < self._start(guess), guess - 1, guess)
