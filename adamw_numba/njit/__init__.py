"""AdamW inside users' own compiled code: functions that can be called in `numba.njit`."""

from ..update import Coefficients
from .elements import update, update_amsgrad
from .minimizing import Result, minimize
from .stepping import coefficients, step

__all__ = ["Coefficients", "Result", "coefficients", "minimize", "step", "update", "update_amsgrad"]
