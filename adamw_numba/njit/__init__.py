"""AdamW inside users' own compiled code: functions that can be called in `numba.njit`."""

from ..update import Coefficients
from .stepping import coefficients, step, update

__all__ = ["Coefficients", "coefficients", "step", "update"]
