"""An inverse problem: the diffusivity of a plate, from noisy snapshots of heat spreading through it.

The temperature u obeys u_t = div(k grad u) on a grid of 100 x 100 cells, insulated on all sides. From noisy snapshots
of u at eight times, the diffusivity k of every cell is estimated: 10,000 unknowns within bounds. The misfit is the sum
of squared differences; the penalty is the total variation of k, which favours regions of constant value.

The gradient comes from the adjoint equation, which runs backwards in time: one forward and one backward run give all
10,000 derivatives. All of this is one Numba function, so `adamw_numba.minimize` runs in its compiled loop. The learning
rate falls along a cosine; the moving average of the steps (`use_ema`) is reported beside the best point.

    python examples/inverse_problem.py [folder for the picture]

It takes about ten seconds on one core.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numba
import numpy as np

import adamw_numba
from adamw_numba.schedules import CosineDecay

Array = np.ndarray

CELLS = 100  # along each side
TIME_STEP = 0.08  # in units of (cell width)^2 / diffusivity 1; stable up to a diffusivity of 3
PICTURES, STEPS_BETWEEN = 8, 20
NOISE = 0.02  # standard deviation of a pixel; the temperatures at the start are from -1 to 1
PENALTY, SMOOTHING = 15.0, 0.01
LOWEST, HIGHEST = 0.1, 3.0
ITERATIONS, LEARNING_RATE = 150, 0.06
REQUIRED_ERROR = 0.1


# The equation, its adjoint and the objective


@numba.njit
def spread(u, k, new):
    """One explicit step: heat flows between neighbours according to the mean of their diffusivities."""
    rows, columns = u.shape
    for i in range(rows):
        for j in range(columns):
            flow = 0.0
            if i > 0:
                flow += (k[i, j] + k[i - 1, j]) * (u[i - 1, j] - u[i, j])
            if i < rows - 1:
                flow += (k[i, j] + k[i + 1, j]) * (u[i + 1, j] - u[i, j])
            if j > 0:
                flow += (k[i, j] + k[i, j - 1]) * (u[i, j - 1] - u[i, j])
            if j < columns - 1:
                flow += (k[i, j] + k[i, j + 1]) * (u[i, j + 1] - u[i, j])
            new[i, j] = u[i, j] + TIME_STEP / 2 * flow


@numba.njit
def add_sensitivity(u, adjoint, gradient):
    """Add what one step contributes to the derivatives: each pair of neighbours shares a mean diffusivity."""
    rows, columns = u.shape
    for i in range(rows):
        for j in range(columns):
            if i < rows - 1:
                both = TIME_STEP / 2 * (u[i + 1, j] - u[i, j]) * (adjoint[i, j] - adjoint[i + 1, j])
                gradient[i, j] += both
                gradient[i + 1, j] += both
            if j < columns - 1:
                both = TIME_STEP / 2 * (u[i, j + 1] - u[i, j]) * (adjoint[i, j] - adjoint[i, j + 1])
                gradient[i, j] += both
                gradient[i, j + 1] += both


@numba.njit
def add_variation(k, gradient):
    """The total variation (smoothed between nearly equal neighbours); its derivatives are added to `gradient`."""
    rows, columns = k.shape
    total = 0.0
    for i in range(rows - 1):
        for j in range(columns - 1):
            down, right = k[i + 1, j] - k[i, j], k[i, j + 1] - k[i, j]
            length = np.sqrt(down * down + right * right + SMOOTHING**2)
            total += length
            gradient[i + 1, j] += PENALTY * down / length
            gradient[i, j + 1] += PENALTY * right / length
            gradient[i, j] -= PENALTY * (down + right) / length
    return PENALTY * total


@numba.njit
def forward(k, start, steps):
    """The temperatures at all times, from first to last."""
    u = np.empty((steps + 1, *start.shape))
    u[0] = start
    for n in range(steps):
        spread(u[n], k, u[n + 1])
    return u


@numba.njit
def objective(k, start, pictures):
    """Misfit and penalty, and their gradient by the adjoint equation."""
    steps = STEPS_BETWEEN * len(pictures)
    u = forward(k, start, steps)
    gradient = np.zeros_like(k)
    value = add_variation(k, gradient)
    adjoint, new = np.zeros_like(k), np.zeros_like(k)
    for n in range(steps, 0, -1):
        if n % STEPS_BETWEEN == 0:
            misfit = (u[n] - pictures[n // STEPS_BETWEEN - 1]) / NOISE**2
            value += (misfit**2).sum() * NOISE**2 / 2
            adjoint += misfit
        add_sensitivity(u[n - 1], adjoint, gradient)
        spread(adjoint, k, new)
        adjoint, new = new, adjoint
    return value, gradient


# The experiment


class Experiment(NamedTuple):
    """The true diffusivity, the temperature at the start, and the measured snapshots."""

    truth: Array
    start: Array
    pictures: Array


def experiment(seed: int = 0) -> Experiment:
    """A plate with a disc that conducts heat well, and a bar and a corner that do not; heated in a pattern."""
    y, x = np.mgrid[0:CELLS, 0:CELLS] + 0.5
    truth = np.ones((CELLS, CELLS))
    truth[(x - 65) ** 2 + (y - 35) ** 2 < 18**2] = 2.2
    truth[(np.abs(x - 30) < 8) & (np.abs(y - 55) < 28)] = 0.35
    truth[x + y > 165] = 0.6
    start = np.sin(2 * np.pi * x / 17) * np.cos(2 * np.pi * y / 13) / 2 + np.cos(2 * np.pi * (x + 2 * y) / 29) / 2
    u = forward(truth, start, PICTURES * STEPS_BETWEEN)
    noise = np.random.default_rng(seed).normal(scale=NOISE, size=(PICTURES, CELLS, CELLS))
    return Experiment(truth, start, u[STEPS_BETWEEN::STEPS_BETWEEN] + noise)


def estimate(data: Experiment, iterations: int = ITERATIONS):
    """Minimize, starting from a diffusivity of 1 everywhere."""
    return adamw_numba.minimize(
        objective,
        np.ones_like(data.truth),
        (data.start, data.pictures),
        jac=True,
        bounds=[(LOWEST, HIGHEST)] * data.truth.size,
        learning_rate=CosineDecay(LEARNING_RATE, iterations),
        maxiter=iterations,
        use_ema=True,
        ema_momentum=0.95,
    )


def error_of(k: Array, truth: Array) -> float:
    """The relative error of a field (root mean square)."""
    return float(np.linalg.norm(k - truth) / np.linalg.norm(truth))


def gradient_error(data: Experiment) -> float:
    """The relative error of the adjoint gradient against central differences, in three random directions."""
    generator = np.random.default_rng(1)
    k = np.clip(data.truth + generator.normal(scale=0.05, size=data.truth.shape), LOWEST, HIGHEST)
    _, gradient = objective(k, data.start, data.pictures)
    errors = []
    for _ in range(3):
        direction = generator.normal(size=k.shape)
        ahead, behind = (objective(k + s * 1e-6 * direction, data.start, data.pictures)[0] for s in (1, -1))
        expected = (ahead - behind) / 2e-6
        errors.append(abs((gradient * direction).sum() / expected - 1))
    return max(errors)


def picture(data: Experiment, result, path: Path) -> None:
    """Plot truth, estimate and error, one snapshot, and the convergence."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic("ABC;DEE", figsize=(9.6, 5.6), layout="constrained")
    scale = {"vmin": 0, "vmax": 2.4}
    maps = [
        (axes["A"], data.truth, "true diffusivity", scale),
        (axes["B"], result.x_average, "estimate", scale),
        (axes["C"], result.x_average - data.truth, "error of the estimate", {"vmin": -1, "vmax": 1, "cmap": "RdBu_r"}),
        (axes["D"], data.pictures[1], "temperature, 2nd snapshot", {"cmap": "inferno"}),
    ]
    for ax, field, title, options in maps:
        image = ax.imshow(field, origin="lower", **options)
        figure.colorbar(image, ax=ax, shrink=0.9)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("x (cells)")
        ax.set_ylabel("y (cells)")
    adamw_numba.plot.convergence(result, ax=axes["E"]).set_title("convergence", fontsize=10)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(folder: str = ".") -> int:
    """Estimate, report and plot; returns 0 if the estimate is good and the gradient correct."""
    mpl.use("agg")
    data = experiment()
    wrong = gradient_error(data)
    print(f"adjoint gradient compared with central differences: {wrong:.1e} apart (at most 1e-4 expected)")
    result = estimate(data)
    print(f"{result.message} {result.nit} iterations, {result.history['time'][-1]:.1f} s")
    print(f"objective {result.history['fun'][0]:.0f} at the start, {result.fun:.0f} at the end", end="; ")
    print(f"{objective(data.truth, data.start, data.pictures)[0]:.0f} at the truth")
    errors = {"start": np.ones_like(data.truth), "best point": result.x, "moving average": result.x_average}
    errors = {name: error_of(k, data.truth) for name, k in errors.items()}
    for name, error in errors.items():
        print(f"relative error, {name:15s} {error:.3f}")
    inside = bool(((result.x >= LOWEST) & (result.x <= HIGHEST)).all())
    picture(data, result, Path(folder) / "inverse_problem.png")
    return 0 if wrong < 1e-4 and max(errors["best point"], errors["moving average"]) < REQUIRED_ERROR and inside else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
