"""Many starts of one minimization in step: their points are stacked, and evaluated in one call of the function."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from .evaluation import Evaluation, gradient_of, returned
from .run import Run


class Together:
    """The function of many starts at once: (starts, ...) -> (starts,).

    Parameters
    ----------
    runs : list of Run
        Of one objective, each with one array, all of one shape and dtype.

    Raises
    ------
    ValueError
        If they are not, or the gradient comes from differences.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        objective = runs[0].objective
        if objective.jac is not True and not callable(objective.jac) and objective.library is None:
            raise ValueError(
                f"`vectorized` is True and `jac` is {brief(objective.jac)}; expected True, a function, 'torch' or 'jax'"
            )
        kinds = {(len(run.names), run.problem.leaves[0].shape, str(run.problem.leaves[0].dtype)) for run in runs}
        if len(kinds) > 1 or len(runs[0].names) > 1 or not arrays.is_array(runs[0].problem.container):
            raise ValueError(
                "`vectorized` is True and the starts differ in kind; expected arrays of one shape and dtype"
            )
        self.objective = objective
        # Another number of starts would be traced again.
        self.keeps_all = objective.jac == "jax" or arrays.library_name(runs[0].problem.leaves[0]) == "jax"

    def evaluate(self, runs: Sequence[Run]) -> list[Evaluation]:
        """Value and gradient of each run where it is."""
        points = [run.points()[0] for run in runs]
        stacked = _stack(points)
        objective, rest = self.objective, self.objective.rest_at(max(run.nit for run in runs))
        if objective.library is not None:
            values, (gradients,) = objective.library.differentiate(objective.fun, stacked, [stacked], rest)
        elif objective.jac is True:
            pair = objective.fun(stacked, *rest)
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"`fun` returned {returned(pair)}; expected (values, gradients), since jac=True")
            values, gradients = pair
        else:
            values, gradients = objective.fun(_stack(points), *rest), objective.jac(stacked, *rest)
        return self._divided(values, gradients, points)

    def _divided(self, values: Any, gradients: Any, points: Sequence[Array]) -> list[Evaluation]:
        numbers = np.asarray(arrays.to_numpy(values) if arrays.is_array(values) else values)
        if numbers.shape != (len(points),) or numbers.dtype.kind not in "fiub":
            raise ValueError(
                f"`fun` returned {returned(values)} of shape {numbers.shape}; expected real numbers of shape "
                f"({len(points)},), one for each start, since vectorized=True"
            )
        shape = (len(points), *points[0].shape)
        found = tuple(getattr(gradients, "shape", ()))
        if found != shape:
            raise ValueError(f"the gradient is {brief(gradients)} of shape {found}; expected {shape}")
        return [
            Evaluation(float(number), [gradient_of("", gradients[k], x)], 1)
            for k, (number, x) in enumerate(zip(numbers, points, strict=True))
        ]


def _stack(points: Sequence[Array]) -> Array:
    """A new array of all points."""
    if isinstance(points[0], np.ndarray):
        return np.stack(points)
    if "torch" in sys.modules and arrays.library_name(points[0]) == "torch":
        return sys.modules["torch"].stack([point.detach() for point in points])
    return arrays.namespace(points[0]).stack(list(points))
