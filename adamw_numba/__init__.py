"""AdamW over plain arrays: NumPy, torch and Array-API arrays, updated in place in one fused pass."""

from . import plot, schedules
from .loss_scale import LossScaleOptimizer
from .minimize import minimize
from .multistart import multistart
from .optimizer import AdamW, LastStep

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "LastStep",
    "LossScaleOptimizer",
    "__version__",
    "minimize",
    "multistart",
    "plot",
    "schedules",
]
