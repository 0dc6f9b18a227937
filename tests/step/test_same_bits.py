"""The same numbers give the same bits, however many threads there are and however they lie in memory."""

import numpy as np
import pytest

from adamw_numba import AdamW
from adamw_numba.cpu import pool as threads

FULL = {"amsgrad": True, "use_ema": True, "ema_overwrite_frequency": 2, "clipvalue": 0.5}
SIZES = [70_001, 3, 16_384, 0, 16_385, 40_000, 1]


def run(arrays, gradients, **options):
    variables = [a.copy() for a in arrays]
    optimizer = AdamW(0.01, **options)
    optimizer.build(variables)
    for step in gradients:
        optimizer.apply([g.copy() for g in step])
    return variables, optimizer


def numbers(dtype, sizes=SIZES, steps=4):
    random = np.random.default_rng(3)
    arrays = [random.normal(size=n).astype(dtype) for n in sizes]
    return arrays, [[random.normal(size=n).astype(dtype) for n in sizes] for _ in range(steps)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        FULL,
        {"clipnorm": 1.0},
        {"global_clipnorm": 1.0},
        {"gradient_accumulation_steps": 2, "global_clipnorm": 1.0},
        {"nonfinite": "skip"},
    ],
    ids=str,
)
@pytest.mark.parametrize("part_from", [0, 2**19])
def test_any_number_of_threads(dtype, options, part_from, monkeypatch):
    """Also where helpers come late, or not at all: `call_helpers` has them come at some steps only."""
    monkeypatch.setattr(threads, "MOST_THREADS", 5)
    monkeypatch.setattr(threads, "WOKEN_FROM", part_from)
    for name in ("HELPED_FROM", "LEAST", "PART"):
        monkeypatch.setattr(threads, name, 5_000)
    shared = []
    monkeypatch.setattr("adamw_numba.cpu.plan.helpers_of", lambda c: shared.append(threads.helpers_of(c)) or shared[-1])
    arrays, gradients = numbers(dtype)
    expected, reference = run(arrays, gradients, threads=1, **options)
    for count in (2, 3, 5, None):
        found, optimizer = run(arrays, gradients, threads=count, **options)
        for one, other in zip([*found, *optimizer.variables], [*expected, *reference.variables], strict=True):
            np.testing.assert_array_equal(one, other)
        assert optimizer.last_step == reference.last_step
    assert {0, 1, 2, 4} <= set(shared)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("options", [{}, FULL, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("cuts", [[1, 2, 3, 5, 8, 13, 21, 34, 55, 89], [16_383], [16_384, 32_768], range(64)], ids=str)
def test_any_split_into_arrays(dtype, options, cuts):
    """Also of the ends of loops: an element in the tail of a vector loop is the same as one in its body."""
    (whole,), gradients = numbers(dtype, [50_001])
    (expected,), reference = run([whole], gradients, **options)
    pieces = [np.split(step[0], cuts) for step in gradients]
    found, optimizer = run(np.split(whole, cuts), pieces, **options)
    np.testing.assert_array_equal(np.concatenate(found), expected)
    state = optimizer.state
    velocity = np.concatenate([state[f"velocity/{k}"] for k in range(len(found))])
    np.testing.assert_array_equal(velocity, reference.state["velocity/0"])


@pytest.mark.parametrize("offset", range(17))
def test_any_alignment(offset):
    (whole,), ((gradient,),) = numbers("float32", [1000], steps=1)
    expected, _ = run([whole], [[gradient]])
    memory, other = np.zeros(1100, np.float32), np.zeros(1100, np.float32)
    variable, shifted = memory[offset : offset + 1000], other[16 - offset : 1016 - offset]
    variable[:], shifted[:] = whole, gradient
    optimizer = AdamW(0.01)
    optimizer.build([variable])
    optimizer.apply([shifted])
    np.testing.assert_array_equal(variable, expected[0])
    assert not memory[:offset].any()
    assert not memory[offset + 1000 :].any()


def test_norm_is_that_of_the_exact_sum():
    """float64 sums of float32 squares; and where a float64 square overflows, the norm still does not."""
    random = np.random.default_rng(0)
    for dtype, scale in (("float32", 1.0), ("float32", 1e30), ("float64", 1.0), ("float64", 1e200)):
        gradient = (random.normal(size=100_003) * scale).astype(dtype)
        optimizer = AdamW(global_clipnorm=1.0, nonfinite="raise")
        optimizer.build([np.zeros(100_003, dtype)])
        optimizer.apply([gradient])
        expected = scale * np.sqrt(np.sum((gradient.astype(np.longdouble) / scale) ** 2))
        assert abs(optimizer.last_step.gradient_norm / float(expected) - 1) < 1e-14


@pytest.mark.parametrize(("value", "small"), [(1e200, 1e-30), (1e200, 1e30), (1e-200, 0.0)])
def test_norm_of_both_precisions(value, small):
    """Where the float64 squares need another scale, those of float32 take part in it."""
    gradients = [np.full(300, small, np.float32), np.full(300, value), np.full(3, 0.5 * bool(small), np.float16)]
    optimizer = AdamW(global_clipnorm=1.0, nonfinite="raise")
    optimizer.build([np.zeros_like(g) for g in gradients])
    optimizer.apply(gradients)
    exact = np.sqrt(sum((g.astype(np.longdouble) ** 2).sum() for g in gradients))
    assert abs(optimizer.last_step.gradient_norm / float(exact) - 1) < 1e-14
