"""Evaluations and time on standard test functions, next to SciPy's L-BFGS-B and optax, as a table in Markdown.

    python -m benchmarks.minima

All use the same float64 functions: `minimize` and L-BFGS-B as Numba functions with exact gradients by complex steps,
optax as JAX functions inside a jitted `jax.lax.scan`. `minimize` runs with nothing but `jac=True` ("auto"); with
`maxiter=300, polish=True`; and by the recipe of docs/minimize.md, as optax does. Compilation is not timed. Functions
with several minima are minimized from 32 starts. "-" means that the minimum was not found to 1e-6 (relative to its
value, if that is above 1).
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import scipy.optimize
from scipy.stats import qmc

import adamw_numba
from adamw_numba import schedules

from .problems import PROBLEMS, Problem

STEPS, STARTS = 20_000, 32
FIRST_STAGE = 300  # iterations before L-BFGS-B takes over
Outcome = tuple[bool, int, float]  # found, evaluations, seconds


def with_gradient(make: Callable[[Any], Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """A Numba function that returns the value and the gradient, computed by complex steps."""
    function = numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(make(np))  # which takes half as long

    @numba.njit
    def both(x):
        z, gradient, value = x.astype(np.complex128), np.empty_like(x), 0.0
        for i in range(x.size):
            z[i] = complex(x[i], 1e-30)
            y = function(z)
            value, gradient[i] = y.real, y.imag / 1e-30
            z[i] = x[i]
        return value, gradient

    return both


def recipe(problem: Problem) -> dict[str, Any]:
    """The options of docs/minimize.md."""
    rate = schedules.CosineDecay(0.1 * problem.scale, STEPS)
    return {"learning_rate": rate, "maxiter": STEPS, "beta_2": 0.99, "gtol": 1e-9}


def starts(problem: Problem) -> np.ndarray:
    """One start, or many if there are several minima."""
    if problem.box is None:
        return np.array([problem.x0], float)
    low, high = problem.box
    return low + (high - low) * qmc.Sobol(len(problem.x0), rng=0).random(STARTS)


def is_found(value: float, problem: Problem) -> bool:
    """Whether a value is that of the minimum."""
    return value - problem.minimum <= 1e-6 * max(1.0, abs(problem.minimum))


def ours(problem: Problem, function: Any, options: dict[str, Any]) -> tuple[Outcome, list[int]]:
    """`multistart`, in a compiled loop; and the evaluations of each start."""
    options = {"jac": True, "history": False} | options
    adamw_numba.multistart(function, starts(problem), **options | {"maxiter": 1})
    begin = time.perf_counter()
    best = adamw_numba.multistart(function, starts(problem), **options)
    seconds = time.perf_counter() - begin
    evaluations = [result.nfev for result in best.results]
    return (is_found(best.fun, problem), sum(evaluations), seconds), evaluations


def by_scipy(problem: Problem, function: Any) -> Outcome:
    """L-BFGS-B from every start."""
    begin = time.perf_counter()
    with np.errstate(all="ignore"):
        options = {"maxiter": STEPS, "maxfun": STEPS, "ftol": 1e-15, "gtol": 1e-9}
        results = [
            scipy.optimize.minimize(function, x0, jac=True, method="L-BFGS-B", options=options)
            for x0 in starts(problem)
        ]
    seconds = time.perf_counter() - begin
    return is_found(np.fmin.reduce([r.fun for r in results]), problem), sum(r.nfev for r in results), seconds


def by_optax(problem: Problem) -> Outcome:
    """The same recipe in `lax.scan`, with all starts by `vmap`; optax has no stopping rule."""
    import jax
    import optax

    function = problem.make(jax.numpy)
    rate = optax.cosine_decay_schedule(0.1 * problem.scale, STEPS)
    optimizer = optax.adam(rate, b2=0.99)
    differentiate = jax.value_and_grad(function)

    def step(carry, _):
        x, state, best = carry
        value, gradient = differentiate(x)
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state, jax.numpy.fmin(best, value)), None

    @jax.jit
    @jax.vmap
    def run(x):
        return jax.lax.scan(step, (x, optimizer.init(x), jax.numpy.inf), length=STEPS)[0][2]

    points = jax.numpy.asarray(starts(problem))
    jax.block_until_ready(run(points))
    begin = time.perf_counter()
    best = np.asarray(jax.block_until_ready(run(points)))
    return is_found(np.nanmin(best), problem), STEPS * len(points), time.perf_counter() - begin


def cell(outcome: Outcome) -> str:
    """Evaluations and milliseconds."""
    found, evaluations, seconds = outcome
    return f"{evaluations:,} in {1e3 * seconds:,.1f} ms" if found else f"- ({1e3 * seconds:,.1f} ms)"


def main() -> int:
    """Print a row for each problem, and what they say together; the exit status says whether enough are found."""
    import jax

    jax.config.update("jax_enable_x64", True)
    contenders = ["auto", "`polish`", "recipe", "L-BFGS-B", "optax"]
    print(f"| problem | n | {' | '.join(contenders)} |\n|---|---|{'---|' * len(contenders)}")
    found, beyond = [], {}
    for name, problem in PROBLEMS.items():
        function = with_gradient(problem.make)
        function(np.array(problem.x0, float))
        polished, evaluations = ours(problem, function, {"maxiter": FIRST_STAGE, "polish": True})
        outcomes = [
            ours(problem, function, {})[0],
            polished,
            ours(problem, function, recipe(problem))[0],
            by_scipy(problem, function),
            by_optax(problem),
        ]
        found.append([outcome[0] for outcome in outcomes])
        if polished[0]:
            beyond[name] = sum(max(0, each - FIRST_STAGE - 1) for each in evaluations) / outcomes[3][1]
        label = name + (f" ({STARTS} starts)" if problem.box else "")
        print(f"| {label} | {len(problem.x0)} | {' | '.join(map(cell, outcomes))} |", flush=True)
    counts = dict(zip(contenders, np.sum(found, axis=0), strict=True))
    most = max(beyond, key=lambda name: beyond[name])
    print(f"\nfound, of {len(PROBLEMS)}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"beyond the first stage, `polish` takes at most {beyond[most]:.2f} of L-BFGS-B's evaluations ({most})")
    return 0 if counts["auto"] >= 36 and counts["`polish`"] >= 36 and beyond[most] <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
