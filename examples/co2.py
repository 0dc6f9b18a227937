"""Carbon dioxide at Mauna Loa: trend and seasonal cycle of 44 years of weekly measurements.

The model is a cubic trend plus a yearly cycle of four harmonics whose amplitude grows linearly; 13 coefficients in all.
The mean squared difference from the measurements is minimized by `adamw_numba.minimize`, called directly and through
`scipy.optimize.minimize`, with the same result. Both are checked against SciPy's Levenberg-Marquardt method.

The data are described in data/README.md. Run the example with

    python examples/co2.py [folder for the picture]

It takes a few seconds.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import scipy.optimize

import adamw_numba
from adamw_numba.schedules import CosineDecay

Array = np.ndarray

HARMONICS = np.arange(1, 5)
UNKNOWNS = 4 + 1 + 2 * len(HARMONICS)  # trend, growth of the amplitude, sines and cosines
ITERATIONS = 6000
OPTIONS = {"learning_rate": CosineDecay(0.5, ITERATIONS), "maxiter": ITERATIONS, "gtol": 1e-7}
EXPECTED_UNDER = 0.65  # ppm: the root mean square of the residuals


class Record(NamedTuple):
    """Measurements: the time in years, and the mole fraction of CO2 in dry air in parts per million (ppm)."""

    year: Array
    ppm: Array


def load_record() -> Record:
    """The weeks that have a measurement."""
    table = np.genfromtxt(Path(__file__).parent / "data" / "co2.csv", delimiter=",", skip_header=1)
    table = table[~np.isnan(table[:, 1])]
    days = [np.datetime64(f"{int(d) // 10000:04d}-{int(d) // 100 % 100:02d}-{int(d) % 100:02d}") for d in table[:, 0]]
    years = 1970 + np.array(days).astype("datetime64[D]").astype(float) / 365.2425
    return Record(years, table[:, 1])


class Features(NamedTuple):
    """The terms of the model at given times: powers of the scaled time, and the harmonics of a year."""

    scaled: Array
    powers: Array
    waves: Array


def features(year: Array) -> Features:
    """Time is scaled to [-1, 1], so that all coefficients have the same unit, ppm, and a similar size."""
    scaled = (year - 1980) / 22
    angles = 2 * np.pi * np.outer(year, HARMONICS)
    return Features(scaled, scaled[:, None] ** np.arange(4), np.hstack([np.sin(angles), np.cos(angles)]))


def model(x: Array, f: Features) -> Array:
    """Mole fractions in ppm: trend + (1 + growth * time) * yearly cycle."""
    return f.powers @ x[:4] + (1 + x[4] * f.scaled) * (f.waves @ x[5:])


def jacobian(x: Array, f: Features) -> Array:
    """The derivatives of the model with respect to every coefficient."""
    return np.hstack([f.powers, (f.scaled * (f.waves @ x[5:]))[:, None], (1 + x[4] * f.scaled)[:, None] * f.waves])


def loss(x: Array, f: Features, ppm: Array) -> tuple[float, Array]:
    """The mean squared difference in ppm^2, and its gradient."""
    left = model(x, f) - ppm
    return float(left @ left / len(left)), 2 / len(left) * (left @ jacobian(x, f))


def picture(record: Record, result, path: Path) -> None:
    """Plot the data and the fit, a close-up of three years, and the convergence."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(7.2, 9.0), layout="constrained")
    year = np.linspace(record.year[0], record.year[-1], 4000)
    fit = model(result.x, features(year))
    for ax, (first, last) in zip(axes, ((1958, 2002.3), (1990, 1993)), strict=False):
        seen, drawn = (record.year >= first) & (record.year <= last), (year >= first) & (year <= last)
        ax.plot(record.year[seen], record.ppm[seen], ".", markersize=3, color="0.45", label="weekly measurement")
        ax.plot(year[drawn], fit[drawn], linewidth=1, color="C3", label="fit: trend and seasons")
        ax.set_xlabel("year")
        ax.set_ylabel("CO$_2$ in dry air (ppm)")
        ax.grid(alpha=0.3)
        ax.legend(loc="upper left")
    axes[0].set_title("Mauna Loa, 1958 to 2001")
    adamw_numba.plot.convergence(result, ax=axes[2])
    axes[2].set_ylabel("loss (ppm$^2$), gradient norm (ppm)")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(folder: str = ".") -> int:
    """Fit, compare, report and plot; returns 0 if everything agrees."""
    mpl.use("agg")
    record = load_record()
    f = features(record.year)
    x0 = np.zeros(UNKNOWNS)
    x0[0], x0[5] = record.ppm.mean(), 1.0
    alone = adamw_numba.minimize(loss, x0, (f, record.ppm), jac=True, **OPTIONS)
    method = scipy.optimize.minimize(loss, x0, (f, record.ppm), jac=True, method=adamw_numba.minimize, options=OPTIONS)
    judge = scipy.optimize.least_squares(lambda x: model(x, f) - record.ppm, x0, lambda x: jacobian(x, f), method="lm")
    left = np.sqrt(alone.fun)
    print(f"{len(record.ppm)} weeks; {alone.message} {alone.nit} iterations, {alone.nfev} evaluations")
    print(f"root mean square of the residuals: {left:.4f} ppm; with Levenberg-Marquardt {rms(judge.fun):.4f} ppm")
    print(
        f"growth in 1980: {alone.x[1] / 22:.3f} ppm per year; seasonal cycle {season(alone.x):.2f} ppm from low to high"
    )
    distance = np.abs(alone.x - judge.x).max()
    print(f"largest difference from Levenberg-Marquardt: {distance:.1e} ppm")
    same = bool((alone.x == method.x).all()) and alone.nfev == method.nfev
    print(f"called directly and through SciPy, the same numbers: {same}")
    picture(record, alone, Path(folder) / "co2.png")
    return 0 if same and distance < 1e-3 and left < EXPECTED_UNDER else 1


def rms(values: Array) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(values**2)))


def season(x: Array) -> float:
    """The peak-to-peak height of the yearly cycle in 1980, in ppm."""
    cycle = features(np.linspace(1980, 1981, 1000)).waves @ x[5:]
    return float(np.ptp(cycle))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
