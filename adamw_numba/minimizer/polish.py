"""SciPy's L-BFGS-B after AdamW, from the best point: its evaluations and iterations are those of the run."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import stopping
from .evaluation import Evaluation
from .run import Run
from .scaling import divided

_DEFAULTS = {"ftol": 1e-15, "gtol": 0.0, "maxiter": 15_000, "maxfun": 10**9}


class _SpentError(Exception):
    """No evaluation is left."""


def check_polish(run: Run) -> None:
    """Refuse what L-BFGS-B cannot go on from, before anything is evaluated."""
    if run.objective.batches is not None:
        raise ValueError("`polish` is given with `batches`, which are noisy; expected one of them")
    if not all(isinstance(leaf, np.ndarray) for leaf in run.get("x")):
        raise TypeError("`polish` is given, and x0 is no NumPy array; expected NumPy arrays, which SciPy takes")
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise ImportError("`polish` needs SciPy: pip install 'adamw-numba[scipy]'") from None


def polish(run: Run, options: Mapping[str, Any], after_iteration: Callable[[], None]) -> None:
    """Go on from the best point of a run that has stopped, until the gradient is small or nothing improves.

    Parameters
    ----------
    run : Run
    options : dict
        Of L-BFGS-B.
    after_iteration : callable
        Does what is due after an iteration; it may stop the run.
    """
    before = run.reason
    if before not in (stopping.FUNCTION, stopping.STEP, stopping.NO_PROGRESS, stopping.ITERATIONS):
        return  # converged, at a limit that holds for both, or stopped from outside
    if not math.isfinite(run.values[stopping.BEST]):
        return  # there is no best point
    from scipy.optimize import Bounds, minimize

    flat, adam = _Flat(run), run.nit
    bounds = None if flat.bounds is None else Bounds(*map(_joined, zip(*flat.bounds, strict=True)))

    def accept(intermediate_result: Any) -> None:
        flat.accept(intermediate_result.x)
        after_iteration()
        if run.reason or run.values[stopping.GRADIENT_NORM] <= run.limits[stopping.GTOL]:
            raise StopIteration

    run.stop(stopping.GOING_ON)
    words = ""
    try:
        found = minimize(
            flat,
            flat.start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            callback=accept,
            options=_DEFAULTS | dict(options),
        )
        words = found.message
    except _SpentError:
        run.stop(stopping.EVALUATIONS)
    finally:
        flat.finish()
    if not run.reason:
        # L-BFGS-B counts it as a success, too, where its line search finds nothing lower at all.
        is_flat = run.values[stopping.GRADIENT_NORM] <= run.limits[stopping.GTOL]
        run.stop(stopping.GRADIENT if is_flat else before)
    run.remark = f" AdamW took {adam} iterations, then L-BFGS-B {run.nit - adam}"
    run.remark += "." if run.reason in (stopping.GRADIENT, stopping.EVALUATIONS) or not words else f": {words}"


def _joined(leaves: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)


class _Flat:
    """The objective of a run as a function of one vector: x, in the units that the user gives.

    Those that the run has chosen are left out: L-BFGS-B took up to twice the evaluations with them.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.has_units = run, run.problem.is_scale_given
        if self.has_units:
            run.put("scale", run.problem.scale)  # type: ignore[arg-type]
            run.renew_bounds()
        evaluation = run.go_to_best()
        self.start = _joined(run.get("x") if self.has_units else run.points())
        self.bounds = run.inner_bounds if self.has_units else run.bounds
        self._begin(self.start, evaluation)

    def _begin(self, flat: np.ndarray[Any, Any], evaluation: Evaluation) -> None:
        """Note where an iteration begins."""
        self._here, self._seen = flat.copy(), {flat.tobytes(): evaluation}
        self._gradients = self._calls = 0  # evaluated since then

    def __call__(self, flat: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        evaluation = self._seen.get(flat.tobytes())
        if evaluation is None:
            evaluation = self._seen[flat.tobytes()] = self._evaluate(flat)
        gradients = self.run.in_units(evaluation.gradients) if self.has_units else evaluation.gradients
        return evaluation.value, _joined(gradients)

    def _evaluate(self, flat: np.ndarray[Any, Any]) -> Evaluation:
        run, counts = self.run, self.run.counts
        if counts[stopping.NFEV] + self._calls + counts[stopping.COST] > run.limits[stopping.MAXFEV]:
            raise _SpentError
        run.put("x", self._leaves(flat))
        evaluation = run.objective.evaluate(run.points(), run.nit)
        self._calls += evaluation.calls
        self._gradients += 1
        return evaluation

    def accept(self, flat: np.ndarray[Any, Any]) -> None:
        """Note an iteration that has led here."""
        run, evaluation = self.run, self._seen[flat.tobytes()]
        run.put("x", self._leaves(flat))
        run.measure_step(self._leaves(self._here))
        run.counts[stopping.NIT] += 1
        run.counts[stopping.NJEV] += self._gradients - 1
        run.rate[0] = math.nan
        run.take(evaluation._replace(calls=self._calls))
        run.counts[stopping.COST] = max(1, evaluation.calls)
        self._begin(flat, evaluation)

    def finish(self) -> None:
        """Go back to where the last iteration has led; what was tried after it counts."""
        self.run.put("x", self._leaves(self._here))
        self.run.counts[stopping.NFEV] += self._calls
        self.run.counts[stopping.NJEV] += self._gradients

    def _leaves(self, flat: np.ndarray[Any, Any]) -> list[Any]:
        leaves = self.run.get("x")
        parts = np.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
        found = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        return found if self.has_units or not self.run.is_scaled else divided(found, self.run.get("scale"))
