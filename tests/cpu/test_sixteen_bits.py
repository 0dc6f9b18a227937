"""16-bit variables train: float32 state and a float32 master, which a write by the owner restarts."""

import numpy as np
import pytest
from helpers import libraries
from numba import njit

from adamw_numba import AdamW
from adamw_numba.cpu import intrinsics

MAKERS = [libraries.numpy, libraries.strided, libraries.to_torch]


def trained(make, dtype, steps=500, **options):
    variable = make(np.ones(37), dtype)
    optimizer = AdamW(1e-3, **options)
    optimizer.build([variable])
    for _ in range(steps):
        optimizer.apply([make(np.ones(37), dtype)])
    return libraries.look(variable).astype(np.float64), optimizer


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_close_to_float32(make, dtype):
    expected, _ = trained(libraries.numpy, "float32")
    found, optimizer = trained(make, dtype)
    assert 0.49 < expected[0] < 0.51
    np.testing.assert_allclose(found, expected, rtol=0.01)
    assert all(str(libraries.look(slot).dtype) == "float32" for slot in optimizer.variables[2:])


def test_jax_bfloat16_inside_stateless_apply():
    variables = [libraries.to_jax(np.ones(3), "bfloat16")]
    optimizer = AdamW(1e-3)
    optimizer.build(variables)
    state = optimizer.variables
    for _ in range(200):
        variables, state = optimizer.stateless_apply(state, [libraries.to_jax(np.ones(3), "bfloat16")], variables)
    np.testing.assert_allclose(np.asarray(variables[0], np.float32), 0.8, rtol=0.01)


def test_without_masters_small_steps_are_lost():
    found, optimizer = trained(libraries.numpy, "bfloat16", master_weights=False)
    assert (found == 1).all()
    assert not any(name.startswith("master") for name in optimizer.variable_names)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_write_by_the_owner_counts(make, dtype):
    variable = make(np.ones(4), dtype)
    optimizer = AdamW(1e-3, weight_decay=0.0)
    optimizer.build([variable])
    for _ in range(3):
        optimizer.apply([make(np.ones(4), dtype)])
    variable[1] = 7.0
    optimizer.apply([make(np.ones(4), dtype)])
    master = libraries.look(optimizer.state["master/0"])
    np.testing.assert_allclose(master, [0.996, 6.999, 0.996, 0.996], atol=1e-5)
    assert (np.asarray(libraries.look(variable), np.float32)[1]) in (7.0, np.float32(6.996))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_numpys_own(dtype):
    """Every 16-bit number survives, and what lies between rounds to nearest, ties to even, as NumPy rounds it."""
    kind = np.dtype(libraries.DTYPES.get(dtype, dtype))
    every = np.arange(2**16, dtype=np.uint16).view(kind)
    optimizer = AdamW(0.0, weight_decay=0.0)
    variable = every.copy()
    optimizer.build([variable])
    optimizer.apply([np.zeros(2**16, np.float32)])
    wide = every.astype(np.float32)
    finite = np.isfinite(wide) & (np.abs(wide) >= np.finfo(np.float32).tiny)  # -0 - 0 * -0 is 0, see test_subnormals.py
    np.testing.assert_array_equal(variable[finite].view(np.uint16), every[finite].view(np.uint16))
    assert np.isnan(variable[np.isnan(wide)].astype(np.float32)).all()

    random = np.random.default_rng(1)
    between = (random.normal(size=50_000) * 10.0 ** random.integers(-9, 5, 50_000)).astype(np.float32)
    optimizer = AdamW(0.0, weight_decay=0.0, use_ema=True, ema_momentum=1.0, ema_overwrite_frequency=1)
    target = np.zeros(50_000, kind)
    optimizer.build([target])
    optimizer.set_weights([5, 0.0, between, *([np.zeros(50_000, np.float32)] * 3)])
    optimizer.apply([np.zeros(50_000, np.float32)])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(target.view(np.uint16), between.astype(kind).view(np.uint16))


@pytest.mark.parametrize("gradient_dtype", ["bfloat16", "float16", "float32", "float64"])
def test_gradients_of_any_float(gradient_dtype):
    """One optimizer, gradients of several dtypes at once, changing from step to step."""
    variables = [np.ones(5, libraries.DTYPES["bfloat16"]), np.ones(5, np.float16), np.ones(5, np.float32)]
    optimizer = AdamW(0.01)
    optimizer.build(variables)
    for step in range(4):
        kinds = [gradient_dtype, "float32", gradient_dtype] if step % 2 else ["float32", gradient_dtype, "float64"]
        optimizer.apply([libraries.numpy(np.ones(5), kind) for kind in kinds])
    for variable in variables:
        np.testing.assert_allclose(variable.astype("f4"), 0.96, rtol=0.005)


def test_a_nan_of_any_bits_stays_a_nan():
    variable = np.ones(4, libraries.DTYPES["bfloat16"])
    optimizer = AdamW(0.1)
    optimizer.build([variable])
    optimizer.apply([np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32)])
    assert np.isnan(variable.astype(np.float32)).all()


def compiled_map(function, values, dtype):
    """A function of every value, compiled."""
    function, results = njit(function), np.empty(values.size, dtype)

    @njit
    def fill(values, results):
        for i in range(values.size):
            results[i] = function(values[i])

    fill(values, results)
    return results


def test_float16_by_integers():
    """What runs where the processor has no instruction for it, against NumPy's own; NaN stay what they were, but quiet."""
    every = np.arange(2**16, dtype=np.uint16)
    expected = every.view(np.float16).astype(np.float32)
    expected[np.isnan(expected)] = (expected.view(np.uint32)[np.isnan(expected)] | 0x00400000).view(np.float32)
    found = compiled_map(intrinsics.half_to_float, every.view(np.int16), np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))

    # For every sign, exponent and upper bits of a mantissa: what is exact, what lies in the middle, and what is beside.
    endings = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0xF000, 0xFFFF], np.uint32)
    wide = ((every.astype(np.uint32) << 16)[:, None] | endings).ravel()
    with np.errstate(all="ignore"):
        expected = wide.view(np.float32).astype(np.float16).view(np.uint16)
    is_nan = np.isnan(wide.view(np.float32))
    expected[is_nan] = ((wide >> 16 & 0x8000) | 0x7E00 | (wide >> 13 & 0x1FF))[is_nan]
    found = compiled_map(intrinsics.float_to_half, wide.view(np.float32), np.int16)
    np.testing.assert_array_equal(found.view(np.uint16), expected)
