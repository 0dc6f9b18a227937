"""What maps the starts of `multistart`, or the points of a difference: anything with a `map`."""

from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
from scipy.optimize import rosen

from adamw_numba import minimize, multistart

STARTS = np.array([[0.0, 1.0], [2.0, -1.0], [3.0, 3.0]])


def bowl(x):
    return ((x - 1) ** 2).sum(), 2 * (x - 1)


class Client:
    """Like Dask's: its map gives futures."""

    def __init__(self, pool):
        self.pool = pool

    def map(self, function, *items):
        return [self.pool.submit(function, *item) for item in zip(*items, strict=True)]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as made:
        yield made


WORKERS = {
    "map": lambda pool: map,
    "an executor": lambda pool: pool,
    "its map": lambda pool: pool.map,
    "a client": Client,
    "a function that gives futures": lambda pool: Client(pool).map,
}


@pytest.mark.parametrize("case", WORKERS)
def test_many_starts(case, pool):
    best = multistart(bowl, STARTS, jac=True, maxiter=30, workers=WORKERS[case](pool))
    plain = multistart(bowl, STARTS, jac=True, maxiter=30)
    for one, other in zip(best.results, plain.results, strict=True):
        np.testing.assert_array_equal(one.x, other.x)
    assert pool.submit(int).result() == 0  # what was given is not closed


@pytest.mark.parametrize("case", WORKERS)
def test_differences(case, pool):
    found = minimize(rosen, STARTS[0], workers=WORKERS[case](pool), maxiter=5)
    np.testing.assert_array_equal(found.x, minimize(rosen, STARTS[0], maxiter=5).x)


def test_a_pool_of_multiprocessing():
    with ThreadPool(2) as pool:
        best = multistart(bowl, STARTS, jac=True, maxiter=30, workers=pool)
    assert len(best.results) == 3
