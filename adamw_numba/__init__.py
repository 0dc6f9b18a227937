"""AdamW over plain arrays: NumPy, torch and Array-API arrays, updated in place in one fused pass."""

from . import interop, plot, schedules
from .checkpoint import saved_variables
from .checkpoints import Checkpoints
from .loss_scale import LossScaleOptimizer
from .minimize import minimize
from .multistart import multistart
from .optimizer import AdamW, LastStep
from .stores.files import CorruptFileError

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Checkpoints",
    "CorruptFileError",
    "LastStep",
    "LossScaleOptimizer",
    "__version__",
    "interop",
    "minimize",
    "multistart",
    "plot",
    "saved_variables",
    "schedules",
]
