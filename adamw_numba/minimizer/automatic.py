"""The learning rate of a minimization whose caller names none: a length in units of x, and how both go on."""

import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from ..schedules import InverseTimeDecay, LearningRateSchedule, PolynomialDecay, Schedule

FIRST_RATE, _GENTLE = 0.3, 0.03  # and that of noisy functions
_FEW = 3000  # iterations up to which one stage finds as much as several
_LONGEST = 1112  # iterations of the first of several stages: as many as it has where 10,000 are allowed in all


@dataclass(frozen=True)
class Decay(PolynomialDecay):
    """A `PolynomialDecay` that begins at the step `start`: of a run that goes on from an earlier one."""

    start: "float" = 0.0

    def formula(self, xp: Any, step: Any) -> Any:
        return super().formula(xp, step - self.start)


@dataclass(frozen=True)
class Stages(Schedule):
    """Stages, each twice as long as all before it; in each, the rate falls from 0.3, and at the end to nearly nothing.

    ``0.3 * 10**-(3 * u + 6 * u**4)``, where u goes from 0 to 1 in a stage. At the start of a stage the unit of each
    element is chosen again, so that the rates mean other lengths.

    Parameters
    ----------
    first_stage : float
        Iterations of the first one.
    start : float
        The step at which it begins.
    name : str
    """

    positive = ("first_stage",)
    base: ClassVar[float] = 10.0

    first_stage: "float"
    start: "float" = 0.0
    name: str = "Stages"

    def formula(self, xp: Any, step: Any) -> Any:
        step, first = step - self.start, self.first_stage
        # The small number is for logarithms that are rounded down where a stage begins.
        number = xp.floor(xp.log(xp.maximum(step, 1.0) / first) / math.log(3) + 1e-9)
        begin = xp.where(step < first, 0.0, first * 3.0**number)
        end = xp.where(step < first, first, first * 3.0 ** (number + 1))
        passed = (step - begin) / (end - begin)
        return FIRST_RATE * self.base ** -(3 * passed + 6 * passed**4)

    def left(self, iteration: int) -> int:
        """Iterations until the next stage begins."""
        end = int(self.first_stage)
        while end <= iteration - self.start:
            end *= 3
        return end - iteration + int(self.start)

    def begins_at(self, iteration: int) -> bool:
        """Whether a stage other than the first begins."""
        return iteration > self.start and self.left(iteration - 1) == 1


def schedule_for(most: float, start: int, noisy: bool) -> LearningRateSchedule:
    """The rates of a run of at most so many iterations from `start` on: in stages, where there are many.

    Not where batches make the function noisy, so that no point is known to be the best.
    """
    first_rate = _GENTLE if noisy else FIRST_RATE
    first_stage = 0 if noisy else first_stage_of(most)
    if first_stage:
        return Stages(first_stage, start)
    if most == math.inf:
        return InverseTimeDecay(first_rate, 1000, 1.0)
    return Decay(first_rate, max(int(min(most, sys.maxsize)), 1), end_learning_rate=0.0, power=2.0, start=start)


def first_stage_of(most: float) -> int:
    """Iterations of the first of several stages of a run of at most so many; 0 where there is only one stage."""
    if most <= _FEW:
        return 0
    first = _LONGEST if most == math.inf else -(-min(most, sys.maxsize) // 9)
    while first > _LONGEST:  # so that a later stage ends with the run
        first = -(-first // 3)
    return int(first)
