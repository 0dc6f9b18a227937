"""The learning rate of a minimization whose caller names none: a length in units of x, and how both go on."""

import math
import sys
from dataclasses import dataclass
from typing import Any

from ..schedules import ExponentialDecay, LearningRateSchedule, Schedule

_LONGEST = 1112  # iterations of the first stage: as many as it has where 10,000 are allowed in all
_FIRST, _LAST = 0.3, 1e-3  # the rate at the start, and what part of it is left at the end of a single decay


@dataclass(frozen=True)
class Stages(Schedule):
    """Stages, each twice as long as all before it; in each, the rate falls from 0.3, and at the end to nearly nothing.

    ``0.3 * 10**-(3 * u + 6 * u**4)``, where u goes from 0 to 1 in a stage. At the start of a stage the unit of each
    element is chosen again, so that the rates mean other lengths.

    Parameters
    ----------
    first_stage : int
        Iterations of the first one.
    name : str
    """

    positive = ("first_stage",)

    first_stage: "float"
    name: str = "Stages"

    def formula(self, xp: Any, step: Any) -> Any:
        # The small number is for logarithms that are rounded down where a stage begins.
        number = xp.floor(xp.log(xp.maximum(step, 1) / self.first_stage) / math.log(3) + 1e-9)
        start = xp.where(step < self.first_stage, 0, self.first_stage * 3.0**number)
        end = xp.where(step < self.first_stage, self.first_stage, self.first_stage * 3.0 ** (number + 1))
        passed = (step - start) / (end - start)
        return _FIRST * 10.0 ** -(3 * passed + 6 * passed**4)

    def left(self, iteration: int) -> int:
        """Iterations until the next stage begins."""
        end = int(self.first_stage)
        while end <= iteration:
            end *= 3
        return end - iteration

    def begins_at(self, iteration: int) -> bool:
        """Whether a stage other than the first begins."""
        return iteration > 0 and self.left(iteration - 1) == 1


def schedule_for(most: float, noisy: bool, has_units: bool) -> LearningRateSchedule:
    """The rates of a run of at most so many iterations: in stages, unless batches make it noisy or it has units."""
    length = 9 * _LONGEST if most == math.inf else max(int(min(most, sys.maxsize)), 1)
    if noisy:
        return ExponentialDecay(0.03, length, 0.01)
    if has_units:
        return ExponentialDecay(_FIRST, length, _LAST)
    first = math.ceil(length / 9)  # so that the third stage, or a later one, ends with the run
    while first > _LONGEST:
        first = math.ceil(first / 3)
    return Stages(first)
