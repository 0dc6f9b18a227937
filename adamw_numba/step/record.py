"""What the last step did."""

from typing import Any, NamedTuple


class LastStep(NamedTuple):
    """What the last call of `AdamW.apply` did.

    Attributes
    ----------
    gradient_norm : float or None
        Norm of the mean unscaled gradient of all variables before clipping, where an option needed it.
    applied : bool
        False if the step was skipped because of a gradient that is not finite.
    learning_rate : float
    learning_rates : tuple of float
        Of every group, with its multiplier; the common one first.
    """

    gradient_norm: float | None
    applied: bool
    learning_rate: float
    learning_rates: tuple[float, ...]


class Record:
    """What the last step did, and how many were skipped."""

    def __init__(self) -> None:
        # Gradient norm, whether applied, learning rate, and the rates of all other groups.
        self.last: tuple[float | None, bool, float, Any] | None = None
        self.skipped = 0

    def last_step(self) -> LastStep | None:
        """The same for the user."""
        last = self.last
        return None if last is None else LastStep(*last[:3], (last[2], *(rate for rate, _ in last[3])))
