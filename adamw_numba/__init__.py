"""AdamW over plain arrays: NumPy, torch and Array-API arrays, updated in place in one fused pass."""

from . import interop, schedules
from .checkpoint import saved_variables
from .checkpoints import Checkpoints
from .loss_scale import LossScaleOptimizer
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
    "saved_variables",
    "schedules",
]
