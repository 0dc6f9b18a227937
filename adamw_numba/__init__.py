"""AdamW over plain arrays: NumPy, torch and Array-API arrays, updated in place in one fused pass."""

from . import schedules
from .loss_scale import LossScaleOptimizer
from .optimizer import AdamW, LastStep

__version__ = "0.1.0"

__all__ = ["AdamW", "LastStep", "LossScaleOptimizer", "__version__", "schedules"]
