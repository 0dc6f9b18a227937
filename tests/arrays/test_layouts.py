"""Arrays of every layout, library and dtype: strided, broadcast, mapped from a file, complex."""

import array_api_strict
import numpy as np
import pytest
import torch
from helpers import libraries
from helpers.oracle import Oracle
from helpers.training import built, train
from hypothesis import given
from hypothesis import strategies as st

from adamw_numba import AdamW


def relaid(array, order, step, sign):
    """The same numbers in another memory layout: axes in any order, with gaps, backwards."""
    shape = [array.shape[axis] for axis in order]
    large = np.zeros([size * step for size in shape], array.dtype)
    view = large[tuple(slice(None, None, step) for _ in shape)][tuple(slice(None, None, sign) for _ in shape)]
    view = view.transpose(np.argsort(order)) if shape else view
    view[...] = array
    return view


LAYOUTS = st.tuples(st.permutations(range(3)), st.integers(1, 3), st.sampled_from([1, -1]))


@given(
    shape=st.tuples(*[st.sampled_from([1, 2, 3, 17, 130])] * 3),
    layouts=st.lists(LAYOUTS, min_size=4, max_size=4),
    dtype=st.sampled_from(["float32", "float64", "complex64", "float16"]),
)
def test_any_layout_gives_the_same_bits(shape, layouts, dtype):
    """Of the variable and of each gradient, which may change from step to step."""
    random = np.random.default_rng(0)
    plain = [random.normal(size=shape).astype(dtype) for _ in range(4)]
    if dtype == "complex64":
        plain = [a + 1j * random.normal(size=shape).astype(np.float32) for a in plain]
    expected, given_ = plain[0].copy(), plain[1:]
    train([expected], [[g] for g in given_])
    laid = [relaid(a, *layout) for a, layout in zip(plain, layouts, strict=True)]
    train([laid[0]], [[g] for g in laid[1:]])
    np.testing.assert_array_equal(laid[0], expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128", "bfloat16"])
def test_gradients_that_are_read_only_broadcast_or_scalars(dtype):
    variables = [
        libraries.numpy(np.ones((3, 4)), dtype),
        libraries.numpy(np.ones(()), dtype),
        libraries.numpy([1.0], dtype),
    ]
    expected = [v.copy() for v in variables]
    ones = libraries.numpy(1.0, dtype)
    broadcast = np.broadcast_to(ones, (3, 4))
    assert not broadcast.flags.writeable
    train(variables, [[broadcast, ones[()], broadcast[0, :1]]] * 3)
    train(expected, [[np.ones_like(v) for v in expected]] * 3)
    for one, other in zip(variables, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_map(tmp_path):
    mapped = np.memmap(tmp_path / "weights", np.float32, "w+", shape=(100,))
    mapped[:] = 1
    train([mapped], [[np.ones(100, np.float32)]] * 2)
    mapped.flush()
    np.testing.assert_allclose(np.fromfile(tmp_path / "weights", np.float32), 0.9, rtol=1e-3)


def test_complex_is_a_pair_of_reals_as_in_torch():
    random = np.random.default_rng(0)
    value, gradient = (random.normal(size=(4, 6)) + 1j * random.normal(size=(4, 6)) for _ in range(2))
    variable, tensor = value.copy(), torch.tensor(value)
    train([variable], [[gradient]], weight_decay=0.01)
    tensor.grad = torch.tensor(gradient)
    torch.optim.AdamW([tensor], 0.05, eps=1e-7 / np.sqrt(1 - 0.999), weight_decay=0.01).step()
    np.testing.assert_allclose(variable, tensor.numpy(), rtol=1e-12)


def test_several_libraries_and_dtypes_in_one_optimizer():
    """Each variable is what it would be alone, but for the norm, which is of all of them."""
    kinds = [(libraries.numpy, "float32"), (libraries.to_torch, "float64"), (libraries.strict, "float64"),
             (libraries.numpy, "complex128"), (libraries.parameter, "bfloat16"), (libraries.fortran, "float64")]  # fmt: skip
    values = [np.full((3, 2), k + 1.0) for k in range(len(kinds))]
    variables = [make(v, kind) for (make, kind), v in zip(kinds, values, strict=True)]
    optimizer = train(
        variables, [[make(v, kind) for (make, kind), v in zip(kinds, values, strict=True)]] * 3, global_clipnorm=2.0
    )
    oracle = Oracle(0.05, global_clipnorm=2.0)
    oracle.build(values)
    for _ in range(3):
        oracle.step(values)
    for variable, expected, (_, kind) in zip(variables, oracle.variables, kinds, strict=True):
        tolerance = {"float32": 1e-6, "bfloat16": 5e-3}.get(kind, 1e-12)
        np.testing.assert_allclose(libraries.look(variable), expected, rtol=tolerance)
    assert optimizer.last_step.gradient_norm == pytest.approx(np.linalg.norm(values), rel=1e-12)


def test_overflow_in_a_cast_is_an_infinity_not_a_warning():
    variable = np.ones(3, np.float32)
    optimizer = AdamW(nonfinite="skip")
    optimizer.build([variable])
    optimizer.apply([np.array([1e300, 1.0, 1.0])])
    assert optimizer.skipped_steps == 1


def test_an_array_elsewhere_that_cannot_be_written():
    frozen = np.ones(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="'1' cannot be written"):
        built([array_api_strict.ones(3), array_api_strict.asarray(frozen, copy=False)])
