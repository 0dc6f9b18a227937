"""AdamW over plain arrays: NumPy, torch and Array-API arrays, updated in place in one fused pass."""

from . import interop, plot, schedules
from ._version import __version__
from .loss_scale import LossScaleOptimizer
from .minimizer.minimize import minimize
from .minimizer.multistart import multistart
from .optimizer import AdamW, LastStep
from .saving.checkpoints import Checkpoints
from .saving.restore import saved_variables
from .saving.stores.atomic import CorruptFileError

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
