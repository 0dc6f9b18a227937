"""What a step costs in a user's own compiled loop (adamw_numba.njit), beside the compiled loop of a minimization.

``python -m benchmarks.njit`` takes all in turn, of the same objective, and prints the least time of each. The loop of
`minimize` is called from Python and, as `njit.minimize`, from compiled code, where nothing is around it: the faster one
counts.
"""

import time

import numpy as np
from numba import njit

import adamw_numba
from adamw_numba.njit import minimize, step

SIZES = {10: 20_000, 1_000: 5_000, 100_000: 100}  # and how many iterations
ROUNDS = 15


@njit
def bowl(x, gradient):
    """A quadratic function whose minimum is not reached."""
    total = 0.0
    for i in range(x.size):
        difference = x[i] - 3.0
        total += difference * difference
        gradient[i] = 2.0 * difference
    return total


@njit
def loop(p, steps):
    """A loop of the user's."""
    g, m, v = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for number in range(steps):
        bowl(p, g)
        step(p, g, m, v, number, 1e-3, weight_decay=0)
    return p


@njit
def inside(p, steps):
    """A minimization inside compiled code."""
    return minimize(bowl, p, (), 1e-3, steps, gtol=None)


def compiled_loop(p: np.ndarray, steps: int) -> None:
    """The compiled loop of `adamw_numba.minimize`, with as little else as there can be."""
    options = {"learning_rate": 1e-3, "maxiter": steps, "gtol": None, "history": False, "return_best": False}
    adamw_numba.minimize(bowl, p, jac=True, **options)


def main() -> None:
    """Print microseconds for each iteration."""
    ways = {"minimize": compiled_loop, "step": loop, "njit.minimize": inside}
    print("| n | " + " | ".join(ways) + " | step / loop |\n|" + "---|" * (len(ways) + 2))
    for size, steps in SIZES.items():
        least = dict.fromkeys(ways, np.inf)
        for _ in range(ROUNDS):
            for name, way in ways.items():
                p = np.zeros(size)
                start = time.perf_counter()
                way(p, steps)
                least[name] = min(least[name], (time.perf_counter() - start) / steps * 1e6)
        figures = " | ".join(f"{value:.3f}" for value in least.values())
        print(f"| {size:,} | {figures} | {least['step'] / min(least['minimize'], least['njit.minimize']):.2f} |")


if __name__ == "__main__":
    main()
