"""The six learning-rate schedules of Keras 3, a schedule times a number, and how both are saved."""

from .kinds import (
    HOST,
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    PiecewiseConstantDecay,
    PolynomialDecay,
    Schedule,
)
from .saved import Scaled, deserialize, scaled, serialize

__all__ = [
    "HOST",
    "CosineDecay",
    "CosineDecayRestarts",
    "ExponentialDecay",
    "InverseTimeDecay",
    "LearningRateSchedule",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
    "Scaled",
    "Schedule",
    "deserialize",
    "scaled",
    "serialize",
]
