"""A prepared step is made to happen: all of it or nothing, whatever interrupts."""

import operator
from collections import deque
from collections.abc import Sequence
from itertools import starmap
from typing import Any

Call = tuple[Any, ...]

# Takes each result of an iterator and keeps none. It is C, and so is what it walks: calls made through it have no
# bytecode between them, where Python would look for signals. An interrupt comes before the first or after the last.
exhaust = deque[Any](maxlen=0).extend


def commit(repeatable: Sequence[Call], calls: Sequence[Call]) -> None:
    """Make the calls of a step.

    Parameters
    ----------
    repeatable : sequence of calls
        Whole-array writes: made first. An interrupt among them is kept until the step is complete, and they are made
        once more, from the first.
    calls : sequence of calls
        Compiled calls, launches among them, and counters, between which no interrupt can come.
    """
    if not repeatable:
        exhaust(starmap(operator.call, calls))
        return
    begun: list[bool] = []
    calls = (begun.append, True), *calls
    try:
        _make(repeatable)
        exhaust(starmap(operator.call, calls))
    except BaseException:
        if not begun:
            _make(repeatable)
            exhaust(starmap(operator.call, calls))
        raise


def _make(calls: Sequence[Call]) -> None:
    for function, *arguments in calls:
        function(*arguments)
