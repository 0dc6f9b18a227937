"""The times of single functions, to be followed from commit to commit (pytest-benchmark).

    python -m pytest benchmarks/test_functions.py --benchmark-autosave
    python -m pytest benchmarks/test_functions.py --benchmark-compare

For whole steps, compared with other optimizers, see `benchmarks.compare`.
"""

import numpy as np
import pytest

from adamw_numba import AdamW, coefficients
from adamw_numba.arrays import COMPUTE

from .costs import VARIANTS

SIZE = 2**14  # elements: in cache, on one thread


def prepared(shapes, dtype="float32", **options):
    """An optimizer after its first steps, and its gradients."""
    optimizer = AdamW(threads=1, **options)
    optimizer.build([np.ones(shape, dtype) for shape in shapes])
    gradients = [np.ones(shape, dtype) for shape in shapes]
    for _ in range(3):
        optimizer.apply(gradients)
    return optimizer, gradients


@pytest.mark.parametrize("name", VARIANTS)
def test_kernel(benchmark, name):
    """The compiled update alone."""
    optimizer, _ = prepared([SIZE], name if name in COMPUTE else "float32", **VARIANTS[name])
    number = 2 * (optimizer.gradient_accumulation_steps or 1) - 1  # of a step that updates
    recipe = coefficients.Recipes(optimizer.hyper).at(number, 1e-3, 0.004)
    _, calls = optimizer.engine.alone.work(recipe, [])
    benchmark(lambda: [function(*arguments) for function, *arguments in calls])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_norms(benchmark, dtype):
    """The norms of the gradients of one array."""
    optimizer, _ = prepared([SIZE], dtype, global_clipnorm=1.0)
    recipe = coefficients.Recipes(optimizer.hyper).at(3, 1e-3, 0.004)
    benchmark(optimizer.engine.alone.norms, recipe, [])


@pytest.mark.parametrize("count", [1, 100, 1000])
def test_reading_addresses(benchmark, count):
    """The addresses of small arrays, their gradients and their state."""
    optimizer, gradients = prepared([(10,)] * count)
    assert benchmark(optimizer.engine.alone.table.reads, gradients) == count


def test_coefficients(benchmark):
    """From hyperparameters and the step number to the numbers of a kernel."""
    optimizer, _ = prepared([1])
    benchmark(coefficients.coefficients, optimizer, 5, 1e-3, 0.004, 1.0, 1.0)


@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 1.0}, {"nonfinite": "skip"}], ids=str)
def test_small_step(benchmark, options):
    """A whole step over ten elements: all of its time is spent on the host."""
    optimizer, gradients = prepared([10], **options)
    benchmark(optimizer.apply, gradients)
