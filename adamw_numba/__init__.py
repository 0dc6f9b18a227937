"""AdamW over plain arrays: NumPy, torch and Array-API arrays, updated in place in one fused pass."""

from . import interop, plot, schedules
from ._version import __version__
from .hyperparameters.groups import Group
from .loss_scale import LossScaleOptimizer
from .minimizer.minimize import minimize
from .minimizer.multistart import multistart
from .optimizer import AdamW
from .saving.checkpoints import Checkpoints
from .saving.saved_variables import saved_variables
from .saving.stores.atomic import CorruptFileError
from .step.record import LastStep

__all__ = [
    "AdamW",
    "Checkpoints",
    "CorruptFileError",
    "Group",
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
