"""Standard test functions: Moré, Garbow & Hillstrom (1981, ACM TOMS 7, 17-41) and the usual global ones.

Each is a function of an array namespace that returns the function to minimize, so NumPy, Numba and JAX run the same
code. All are analytic, which gives exact gradients by complex steps. To keep these exact, powers are written as squares
and products (a complex power goes through a logarithm).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """A function, a start, its minimum, and what is known beforehand: the scale of x, and a box for starts."""

    make: Callable[[Any], Callable[[Any], Any]]
    x0: list[float]
    minimum: float
    scale: float = 1.0
    box: tuple[float, float] | None = None  # if it has several minima: starts are drawn from here


def rosenbrock(xp):
    return lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def freudenstein_roth(xp):
    def f(x):
        a = -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1]
        b = -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]
        return a**2 + b**2

    return f


def powell_badly_scaled(xp):
    return lambda x: (1e4 * x[0] * x[1] - 1) ** 2 + (xp.exp(-x[0]) + xp.exp(-x[1]) - 1.0001) ** 2


def brown_badly_scaled(xp):
    return lambda x: (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2


def beale(xp):
    def f(x):
        return (
            (1.5 - x[0] * (1 - x[1])) ** 2
            + (2.25 - x[0] * (1 - x[1] ** 2)) ** 2
            + (2.625 - x[0] * (1 - x[1] * x[1] * x[1])) ** 2
        )

    return f


def jennrich_sampson(xp):
    i = np.arange(1.0, 11.0)
    return lambda x: ((2 + 2 * i - (xp.exp(i * x[0]) + xp.exp(i * x[1]))) ** 2).sum()


def bard(xp):
    y = np.array([0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39])
    u = np.arange(1.0, 16.0)
    v = 16 - u
    w = np.minimum(u, v)
    return lambda x: ((y - (x[0] + u / (v * x[1] + w * x[2]))) ** 2).sum()


def gaussian(xp):
    half = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521]
    y = np.array([*half, 0.3989, *half[::-1]])
    t = (8 - np.arange(1.0, 16.0)) / 2
    return lambda x: ((x[0] * xp.exp(-x[1] * (t - x[2]) ** 2 / 2) - y) ** 2).sum()


def meyer(xp):
    y = np.array(
        [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872.0]
    )
    t = 45 + 5 * np.arange(1.0, 17.0)
    return lambda x: ((x[0] * xp.exp(x[1] / (t + x[2])) - y) ** 2).sum()


def box_three_dimensional(xp):
    t = 0.1 * np.arange(1.0, 11.0)
    d = np.exp(-t) - np.exp(-10 * t)
    return lambda x: ((xp.exp(-t * x[0]) - xp.exp(-t * x[1]) - x[2] * d) ** 2).sum()


def powell_singular(xp):
    def f(x):
        return (
            (x[0] + 10 * x[1]) ** 2
            + 5 * (x[2] - x[3]) ** 2
            + ((x[1] - 2 * x[2]) ** 2) ** 2
            + 10 * ((x[0] - x[3]) ** 2) ** 2
        )

    return f


def wood(xp):
    def f(x):
        return (
            100 * (x[1] - x[0] ** 2) ** 2
            + (1 - x[0]) ** 2
            + 90 * (x[3] - x[2] ** 2) ** 2
            + (1 - x[2]) ** 2
            + 10 * (x[1] + x[3] - 2) ** 2
            + 0.1 * (x[1] - x[3]) ** 2
        )

    return f


def kowalik_osborne(xp):
    y = np.array([0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246])
    u = np.array([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])
    return lambda x: ((y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])) ** 2).sum()


def brown_dennis(xp):
    t = np.arange(1.0, 21.0) / 5
    e, s, c = np.exp(t), np.sin(t), np.cos(t)
    return lambda x: (((x[0] + t * x[1] - e) ** 2 + (x[2] + x[3] * s - c) ** 2) ** 2).sum()


def biggs_exp6(xp):
    t = 0.1 * np.arange(1.0, 14.0)
    y = np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t)
    return lambda x: ((x[2] * xp.exp(-t * x[0]) - x[3] * xp.exp(-t * x[1]) + x[5] * xp.exp(-t * x[4]) - y) ** 2).sum()


def penalty_1(xp):
    return lambda x: 1e-5 * ((x - 1) ** 2).sum() + ((x**2).sum() - 0.25) ** 2


def variably_dimensioned(xp):
    def f(x):
        s = (np.arange(1.0, x.size + 1) * (x - 1)).sum()
        return ((x - 1) ** 2).sum() + s**2 + (s**2) ** 2

    return f


def trigonometric(xp):
    def f(x):
        i = np.arange(1.0, x.size + 1)
        return ((x.size - xp.cos(x).sum() + i * (1 - xp.cos(x)) - xp.sin(x)) ** 2).sum()

    return f


def discrete_boundary_value(xp):
    def f(x):
        h = 1 / (x.size + 1)
        t = np.arange(2.0, x.size) * h
        inside = 2 * x[1:-1] - x[:-2] - x[2:] + h**2 * (x[1:-1] + t + 1) ** 2 * (x[1:-1] + t + 1) / 2
        first = 2 * x[0] - x[1] + h**2 * (x[0] + h + 1) ** 2 * (x[0] + h + 1) / 2
        last = 2 * x[-1] - x[-2] + h**2 * (x[-1] + 1 - h + 1) ** 2 * (x[-1] + 1 - h + 1) / 2
        return (inside**2).sum() + first**2 + last**2

    return f


def broyden_tridiagonal(xp):
    def f(x):
        inside = (3 - 2 * x[1:-1]) * x[1:-1] - x[:-2] - 2 * x[2:] + 1
        first = (3 - 2 * x[0]) * x[0] - 2 * x[1] + 1
        last = (3 - 2 * x[-1]) * x[-1] - x[-2] + 1
        return (inside**2).sum() + first**2 + last**2

    return f


def linear_full_rank(xp):
    return lambda x: ((x - 2 * x.sum() / 20 - 1) ** 2).sum() + 10 * (2 * x.sum() / 20 + 1) ** 2


def sphere(xp):
    return lambda x: (x**2).sum()


def ellipsoid(xp):
    return lambda x: (10 ** (6 * np.arange(x.size) / (x.size - 1)) * x**2).sum()


def booth(xp):
    return lambda x: (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2


def matyas(xp):
    return lambda x: 0.26 * (x[0] ** 2 + x[1] ** 2) - 0.48 * x[0] * x[1]


def himmelblau(xp):
    return lambda x: (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def mccormick(xp):
    return lambda x: xp.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1


def six_hump_camel(xp):
    return lambda x: (
        (4 - 2.1 * x[0] ** 2 + (x[0] ** 2) ** 2 / 3) * x[0] ** 2 + x[0] * x[1] + (4 * x[1] ** 2 - 4) * x[1] ** 2
    )


def three_hump_camel(xp):
    return lambda x: (
        2 * x[0] ** 2 - 1.05 * (x[0] ** 2) ** 2 + x[0] ** 2 * (x[0] ** 2) ** 2 / 6 + x[0] * x[1] + x[1] ** 2
    )


def goldstein_price(xp):
    def f(x):
        a, b = x[0], x[1]
        one = 1 + (a + b + 1) ** 2 * (19 - 14 * a + 3 * a**2 - 14 * b + 6 * a * b + 3 * b**2)
        return one * (30 + (2 * a - 3 * b) ** 2 * (18 - 32 * a + 12 * a**2 + 48 * b - 36 * a * b + 27 * b**2))

    return f


def branin(xp):
    def f(x):
        parabola = x[1] - 5.1 / (4 * np.pi**2) * x[0] ** 2 + 5 / np.pi * x[0] - 6
        return parabola**2 + 10 * (1 - 1 / (8 * np.pi)) * xp.cos(x[0]) + 10

    return f


def zakharov(xp):
    def f(x):
        s = (0.5 * np.arange(1.0, x.size + 1) * x).sum()
        return (x**2).sum() + s**2 + (s**2) ** 2

    return f


def dixon_price(xp):
    return lambda x: (x[0] - 1) ** 2 + (np.arange(2.0, x.size + 1) * (2 * x[1:] ** 2 - x[:-1]) ** 2).sum()


def trid(xp):
    return lambda x: ((x - 1) ** 2).sum() - (x[1:] * x[:-1]).sum()


def styblinski_tang(xp):
    return lambda x: ((x**2) ** 2 - 16 * x**2 + 5 * x).sum() / 2


def rastrigin(xp):
    return lambda x: 10 * x.size + (x**2 - 10 * xp.cos(2 * np.pi * x)).sum()


def griewank(xp):
    def f(x):
        return 1 + (x**2).sum() / 4000 - xp.prod(xp.cos(x / np.sqrt(np.arange(1.0, x.size + 1))))

    return f


def levy(xp):
    def f(x):
        w = 1 + (x - 1) / 4
        middle = ((w[:-1] - 1) ** 2 * (1 + 10 * xp.sin(np.pi * w[:-1] + 1) ** 2)).sum()
        return xp.sin(np.pi * w[0]) ** 2 + middle + (w[-1] - 1) ** 2 * (1 + xp.sin(2 * np.pi * w[-1]) ** 2)

    return f


PROBLEMS = {
    "Rosenbrock": Problem(rosenbrock, [-1.2, 1], 0),
    "Rosenbrock, 10 dimensions": Problem(rosenbrock, [-1.2, 1] * 5, 0),
    "Freudenstein and Roth": Problem(freudenstein_roth, [0.5, -2], 0, 10, (-10, 10)),
    "Powell badly scaled": Problem(powell_badly_scaled, [0, 1], 0),
    "Brown badly scaled": Problem(brown_badly_scaled, [1, 1], 0),
    "Beale": Problem(beale, [1, 1], 0),
    "Jennrich and Sampson": Problem(jennrich_sampson, [0.3, 0.4], 124.36218235561),
    "Bard": Problem(bard, [1, 1, 1], 8.2148773e-3),
    "Gaussian": Problem(gaussian, [0.4, 1, 0], 1.1279327696e-8),
    "Meyer": Problem(meyer, [0.02, 4000, 250], 87.945855170),
    "Box three-dimensional": Problem(box_three_dimensional, [0, 10, 20], 0, 10),
    "Powell singular": Problem(powell_singular, [3, -1, 0, 1], 0),
    "Wood": Problem(wood, [-3, -1, -3, -1], 0),
    "Kowalik and Osborne": Problem(kowalik_osborne, [0.25, 0.39, 0.415, 0.39], 3.0750560e-4),
    "Brown and Dennis": Problem(brown_dennis, [25, 5, -5, -1], 85822.2016263, 10),
    "Biggs EXP6": Problem(biggs_exp6, [1, 2, 1, 1, 1, 1], 0, 1, (0, 10)),
    "Penalty I": Problem(penalty_1, [1, 2, 3, 4], 2.2499775e-5),
    "Variably dimensioned": Problem(variably_dimensioned, [1 - k / 10 for k in range(1, 11)], 0),
    "Trigonometric": Problem(trigonometric, [0.1] * 10, 0, 1, (-1, 1)),
    "Discrete boundary value": Problem(discrete_boundary_value, [k / 11 * (k / 11 - 1) for k in range(1, 11)], 0),
    "Broyden tridiagonal": Problem(broyden_tridiagonal, [-1] * 10, 0),
    "Linear, full rank": Problem(linear_full_rank, [1] * 10, 10),
    "Sphere": Problem(sphere, [5, -3, 2, 1, -4], 0),
    "Ellipsoid, condition 1e6": Problem(ellipsoid, [1] * 10, 0),
    "Booth": Problem(booth, [-5, 5], 0),
    "Matyas": Problem(matyas, [5, -7], 0),
    "Himmelblau": Problem(himmelblau, [0, 0], 0),
    "McCormick": Problem(mccormick, [0, 0], -1.9132229549810367),
    "Six-hump camel": Problem(six_hump_camel, [1, 1], -1.0316284534898774, 1, (-2, 2)),
    "Three-hump camel": Problem(three_hump_camel, [2, 2], 0, 1, (-4, 4)),
    "Goldstein and Price": Problem(goldstein_price, [1, 1], 3, 1, (-2, 2)),
    "Branin": Problem(branin, [2.5, 7.5], 0.39788735772973816),
    "Zakharov": Problem(zakharov, [1] * 5, 0),
    "Dixon and Price": Problem(dixon_price, [1] * 4, 0),
    "Trid": Problem(trid, [0] * 6, -50, 10),
    "Styblinski and Tang": Problem(styblinski_tang, [0] * 3, -39.16616570377142 * 3, 1, (-5, 5)),
    "Rastrigin": Problem(rastrigin, [2, 3], 0, 1, (-5.12, 5.12)),
    "Griewank": Problem(griewank, [3, 4], 0, 10, (-10, 10)),
}
