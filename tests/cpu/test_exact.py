"""Norms of float32 gradients: exact where it matters, and the same however the arrays are cut."""

import math
from fractions import Fraction

import numpy as np
import pytest

from adamw_numba import AdamW
from adamw_numba.cpu import exact


def numbers(count, spread, seed=0):
    """Normal numbers whose magnitudes range over so many powers of ten."""
    generator = np.random.default_rng(seed)
    powers = 10.0 ** generator.uniform(-spread, 0, count)
    return (generator.standard_normal(count) * powers).astype(np.float32)


def stepped(pieces, gradients, **options):
    """The parts of an array, and of its gradient, after a step; with the norm."""
    variables = [piece.copy() for piece in pieces]
    optimizer = AdamW(0.1, **options)
    optimizer.build(variables)
    optimizer.apply([piece.copy() for piece in gradients])
    return np.concatenate(variables), optimizer.last_step.gradient_norm


GRADIENTS = {
    "alike": numbers(70_001, 0),
    "of many sizes": numbers(70_001, 30),
    "one large": np.append(numbers(70_000, 0), np.float32(1e12)),
    "the smallest": np.full(70_001, 2.0**-149, np.float32),
    "the largest": np.full(70_001, np.finfo(np.float32).max),
    "zeros": np.zeros(70_001, np.float32),
}


@pytest.fixture(params=GRADIENTS)
def gradient(request):
    return GRADIENTS[request.param]


@pytest.fixture(params=[False, True], ids=["as a rule", "never certain"])
def always_exact(request, monkeypatch):
    """Whether every norm is taken exactly."""
    if request.param:
        monkeypatch.setattr(exact, "IN_CHUNK", 2**50)


@pytest.mark.parametrize("options", [{"global_clipnorm": 1.0}, {"nonfinite": "skip"}], ids=str)
def test_however_the_arrays_are_cut(gradient, options, always_exact):
    whole, norm = stepped([np.ones_like(gradient)], [gradient], **options)
    for seed in range(5):
        cuts = np.sort(np.random.default_rng(seed).integers(0, gradient.size, 7))
        parts, same = stepped(np.split(np.ones_like(gradient), cuts), np.split(gradient, cuts), **options)
        np.testing.assert_array_equal(parts, whole)
        assert same == pytest.approx(norm, rel=1e-13, abs=0)


def test_the_norm_is_that_of_exact_arithmetic(gradient, always_exact):
    square = sum((Fraction(float(x)) ** 2 for x in gradient), Fraction())
    expected = math.isqrt(int(square * 2**440)) / 2**220
    _, norm = stepped([np.ones_like(gradient)], [gradient], global_clipnorm=1.0)
    assert norm == pytest.approx(expected, rel=1e-13, abs=0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_each_norm_by_itself(dtype):
    """With `clipnorm`, and with an accumulator, the two ways give the same."""
    gradients = [numbers(count, 3, seed=count).astype(dtype) for count in (1, 0, 300, 20_000)]

    def run():
        variables = [np.ones_like(g) for g in gradients]
        optimizer = AdamW(0.1, clipnorm=0.5, gradient_accumulation_steps=2)
        optimizer.build(variables)
        for factor in (1, 3):
            optimizer.apply([g[::-1] * g.dtype.type(factor) for g in gradients])
        return variables

    expected = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "IN_CHUNK", 2**50)
        for one, other in zip(run(), expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_how_often_it_is_not_certain():
    norms = np.random.default_rng(0).uniform(1, 2, 100_000)
    found = norms.copy()
    assert exact.steady_each(found, 300)
    assert 0 < (found < 0).sum() < 30
    np.testing.assert_allclose(found[found > 0], norms[found > 0], rtol=2.0**-31)
    assert not exact.steady_each(np.array([0.0, 1.0, 0.5]), 300)
