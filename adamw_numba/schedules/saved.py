"""Schedules as JSON, and a schedule times a number, which is saved with the one in it."""

from collections.abc import Mapping
from typing import Any

from ..arrays.brief import brief, brief_names
from ..hyperparameters.table import Rate
from .kinds import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    PiecewiseConstantDecay,
    PolynomialDecay,
    is_number,
)


class Scaled(LearningRateSchedule):
    """A schedule times a number: see `scaled`.

    Parameters
    ----------
    schedule : callable
        Of the step, or of nothing, or a LearningRateSchedule.
    factor : float
    name : str
    """

    def __init__(self, schedule: Any, factor: float, name: str = "Scaled") -> None:
        if not callable(schedule) or isinstance(schedule, type):
            raise TypeError(
                f"`schedule` is {brief(schedule)}; expected a LearningRateSchedule, or a function of the step"
            )
        if not is_number(factor, False) or factor < 0:
            raise ValueError(f"`factor` is {brief(factor)}; expected a finite number >= 0")
        self.schedule, self.factor, self.name = schedule, float(factor), name
        self._takes_step = Rate("schedule", schedule).takes_step

    def __call__(self, step: Any) -> Any:
        return (self.schedule(step) if self._takes_step else self.schedule()) * self.factor

    def get_config(self) -> dict[str, Any]:
        return {"schedule": serialize(self.schedule), "factor": self.factor, "name": self.name}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> "Scaled":
        """The schedule that a config describes, with the one in it."""
        schedule = config["schedule"]
        schedule = deserialize(schedule, custom_objects) if isinstance(schedule, Mapping) else schedule
        return cls(**{**config, "schedule": schedule})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaled) and (self.schedule, self.factor) == (other.schedule, other.factor)

    def __hash__(self) -> int:
        return hash((self.schedule, self.factor))

    def __repr__(self) -> str:
        return f"Scaled({self.schedule!r}, {self.factor!r})"


def scaled(schedule: Any, factor: float) -> Scaled:
    """A schedule times a number, to have one follow the shape of another.

    With ``decouple_lr=True``, ``weight_decay=scaled(rate, 0.01)`` is a decay that falls as the rate does: the schedule
    multiplier of Loshchilov & Hutter (2019), algorithm 2, is on both.

    Parameters
    ----------
    schedule : LearningRateSchedule or callable
    factor : float

    Returns
    -------
    Scaled

    Examples
    --------
    >>> rate = CosineDecay(0.1, decay_steps=100)
    >>> rate(50), scaled(rate, 0.5)(50)
    (0.05, 0.025)
    """
    return Scaled(schedule, factor)


_SCHEDULES: dict[str, type[LearningRateSchedule]] = {
    cls.__name__: cls
    for cls in (
        ExponentialDecay,
        PiecewiseConstantDecay,
        PolynomialDecay,
        InverseTimeDecay,
        CosineDecay,
        CosineDecayRestarts,
        Scaled,
    )
}


def serialize(learning_rate_schedule: Any) -> dict[str, Any]:
    """The JSON form of a schedule, as `keras.optimizers.schedules.serialize` writes it.

    Parameters
    ----------
    learning_rate_schedule : LearningRateSchedule, a schedule of Keras, or a plain function, stored by its name

    Returns
    -------
    dict
        ``module``, ``class_name``, ``config`` and ``registered_name``.
    """
    if not hasattr(learning_rate_schedule, "get_config"):
        name = getattr(learning_rate_schedule, "__name__", type(learning_rate_schedule).__name__)
        return {"module": "builtins", "class_name": "function", "config": name, "registered_name": "function"}
    name = type(learning_rate_schedule).__name__
    return {
        "module": "keras.optimizers.schedules" if name in _SCHEDULES and name != "Scaled" else None,
        "class_name": name,
        "config": learning_rate_schedule.get_config(),
        "registered_name": None if name in _SCHEDULES else name,
    }


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The schedule described by a dict from `serialize` or from Keras.

    Parameters
    ----------
    config : dict
        With ``class_name`` and ``config``.
    custom_objects : dict, optional
        Your own classes and functions, by name; nothing else is ever looked up.

    Raises
    ------
    ValueError
        If the class is neither one of Keras's six nor in ``custom_objects``, or if a function is not in
        ``custom_objects``.
    """
    name = str(config.get("class_name"))
    if name == "function":
        name = str(config.get("config"))
        if name not in (custom_objects or {}):
            raise ValueError(
                f"Unknown function {brief(name)}; expected one of `custom_objects`: {brief_names(custom_objects or {})}"
            )
        return (custom_objects or {})[name]
    known = _SCHEDULES | dict(custom_objects or {})
    if name not in known:
        raise ValueError(f"Unknown schedule class_name={brief(name)}; expected one of {brief_names(known, most=20)}")
    if not isinstance(config.get("config"), Mapping):
        raise ValueError(
            f"The config of schedule {brief(name)} is {brief(config.get('config'))}; expected a dict of its arguments"
        )
    cls: Any = known[name]
    if cls is Scaled:
        return Scaled.from_config(config["config"], custom_objects)
    return (getattr(cls, "from_config", None) or (lambda c: cls(**c)))(config["config"])
