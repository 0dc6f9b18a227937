"""The time per step of `minimize` on the 10-dimensional Rosenbrock function, next to optax and torch.

    python -m benchmarks.minimize

The compiled loop, optax's `adamw` inside a jitted `jax.lax.scan` (also in float64), and a Python loop around
`torch.optim.AdamW` take turns in one process. `minimize` keeps its history. optax returns only the final point, or also
the loss of every step, which takes XLA several times as long. The exit status says whether the compiled loop takes at
most 0.7 of optax's time for the final point, and at most a hundredth of torch's.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numba
import numpy as np
import optax
import torch

import adamw_numba

SIZE, RATE = 10, 1e-3
STEPS = {"minimize": 200_000, "optax": 200_000, "optax, losses": 200_000, "torch loop": 300}
ROUNDS = 7
START = np.full(SIZE, -1.2)


@numba.njit
def rosenbrock(x, gradient):
    """Return the value and fill the gradient."""
    value = 0.0
    for i in range(x.size - 1):
        a, b = x[i + 1] - x[i] * x[i], 1 - x[i]
        value += 100 * a * a + b * b
        gradient[i] += -400 * a * x[i] - 2 * b
        gradient[i + 1] += 200 * a
    return value


def whole_array(x):
    """The same function as whole-array operations, for automatic differentiation."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def with_minimize(steps: int) -> np.ndarray:
    """The compiled loop, with its history, best point and stopping rules."""
    options = {"learning_rate": RATE, "weight_decay": 0.01, "gtol": None, "maxiter": steps, "return_best": False}
    return adamw_numba.minimize(rosenbrock, START, jac=True, **options).x


def scan_of(steps: int, losses: bool) -> Callable[[], np.ndarray]:
    """optax, compiled for a number of steps; with the loss of every step, or only with the final point."""
    optimizer = optax.adamw(RATE, weight_decay=0.01)
    differentiate = jax.value_and_grad(whole_array)

    def step(carry, _):
        x, state = carry
        value, gradient = differentiate(x)
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), value if losses else None

    @jax.jit
    def run(x):
        (x, _), values = jax.lax.scan(step, (x, optimizer.init(x)), length=steps)
        return x, values

    return lambda: np.asarray(jax.block_until_ready(run(jax.numpy.asarray(START)))[0])


def with_torch(steps: int) -> np.ndarray:
    """A Python loop."""
    x = torch.tensor(START, requires_grad=True)
    optimizer = torch.optim.AdamW([x], lr=RATE, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        whole_array(x).backward()
        optimizer.step()
    return x.detach().numpy()


def main() -> int:
    """Print microseconds per step and the ratios."""
    jax.config.update("jax_enable_x64", True)
    contenders = {
        "minimize": lambda: with_minimize(STEPS["minimize"]),
        "optax": scan_of(STEPS["optax"], losses=False),
        "optax, losses": scan_of(STEPS["optax, losses"], losses=True),
        "torch loop": lambda: with_torch(STEPS["torch loop"]),
    }
    ends = {name: call() for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) / STEPS[name] * 1e6)
    print(f"{platform.machine()}; Python {platform.python_version()}, NumPy {np.__version__}, ", end="")
    print(f"Numba {numba.__version__}, jax {jax.__version__}, optax {optax.__version__}, torch {torch.__version__}")
    for name, each in times.items():
        print(f"{name:18s} {statistics.median(each):9.3f} us per step   (from {min(each):.3f} to {max(each):.3f})")
    distance = np.abs(ends["minimize"] - ends["optax"]).max()
    print(f"minimize and optax end {distance:.1e} apart (their epsilons differ)")
    medians = {name: statistics.median(each) for name, each in times.items()}
    to_optax, to_losses = (medians["minimize"] / medians[name] for name in ("optax", "optax, losses"))
    to_torch = medians["torch loop"] / medians["minimize"]
    print(f"minimize takes {to_optax:.2f} of the time of optax, {to_losses:.2f} if optax keeps the losses;", end=" ")
    print(f"torch takes {to_torch:.0f} times as long as minimize")
    return 0 if to_optax <= 0.7 and to_torch >= 100 and distance < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
