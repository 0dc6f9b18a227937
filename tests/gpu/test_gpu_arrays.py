"""Arrays on a GPU: which are refused, and what other libraries see of a step.

See helpers/on_gpu.py for where these tests run.
"""

import math
import warnings

import numpy as np
import pytest
from helpers import libraries
from helpers.libraries import torch
from helpers.on_gpu import HAS_TORCH, array, equal, marks, needs_gpu, tensor

from adamw_numba import AdamW

pytestmark = marks


def with_overlap(a):
    large = a(np.zeros(8))
    return [large[:5], large[3:]]


@pytest.mark.parametrize(
    ("build", "gradients", "error", "match"),
    [
        (lambda a: [a(np.ones(3))], lambda a: [np.ones(3, np.float32)], TypeError, "like its variable"),
        (lambda a: [a(np.ones(3))], lambda a: [a(np.ones(4))], ValueError, r"shape \(4,\); expected \(3,\)"),
        (lambda a: [np.ones(3, np.float32)], lambda a: [a(np.ones(3))], TypeError, "like its variable"),
        (lambda a: [a(np.ones(3))], lambda a: [None], ValueError, "No gradients provided"),
        (with_overlap, lambda a: [a(np.ones(5)), a(np.ones(5))], ValueError, "share memory"),
        (lambda a: [a(np.ones(3)), a(np.ones(2))], lambda a: [a(np.ones(3))], ValueError, "one-to-one"),
        (lambda a: [array(np.ones(3), "int32")], lambda a: [a(np.ones(3))], TypeError, "dtype int32"),
    ],
)
def test_bad_input(build, gradients, error, match):
    optimizer = AdamW(0.1)
    with pytest.raises(error, match=match):
        variables = build(array)
        optimizer.build(variables)
        before = [libraries.look(v).copy() for v in variables]
        try:
            optimizer.apply(gradients(array))
        finally:
            assert equal(variables, before)


def test_a_gradient_that_is_a_variable_is_refused():
    x = array(np.ones(4))
    optimizer = AdamW(0.1)
    optimizer.build([x])
    for bad in (x, x[:]):
        with pytest.raises(ValueError, match="shares memory"):
            optimizer.apply([bad])


@needs_gpu
def test_torch_sees_the_writes_and_streams():
    if not HAS_TORCH:
        pytest.skip("torch has no GPU here")
    x = torch.nn.Parameter(torch.ones(1 << 22, device="cuda"))
    optimizer = AdamW(0.1)
    optimizer.build([x])
    optimizer.apply([torch.ones_like(x)])
    version = x._version
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        slow = torch.ones(1 << 22, device="cuda")
        for _ in range(200):
            slow = slow * 1.01 - slow * 0.01  # the gradient is still being made when `apply` is called
        optimizer.apply([slow])
    torch.cuda.current_stream().wait_stream(side)
    assert x._version == version + 1
    y = torch.ones(1 << 22)
    cpu = AdamW(0.1)
    cpu.build([y])
    cpu.apply([torch.ones(1 << 22)])
    cpu.apply([slow.cpu()])
    torch.testing.assert_close(x.detach().cpu(), y)
    loss = (x * x).sum()
    optimizer.apply([torch.ones_like(x)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_gpu
def test_whatever_speaks_an_interface():
    """An object of no known library: by the CUDA array interface, or by DLPack alone."""

    class Interface:
        def __init__(self, inner):
            self.inner, self.shape, self.dtype = inner, inner.shape, inner.dtype

        @property
        def __cuda_array_interface__(self):
            return self.inner.__cuda_array_interface__

    class Capsule:
        def __init__(self, inner):
            self.inner, self.shape, self.dtype = inner, tuple(inner.shape), np.dtype("float32")

        def __dlpack__(self, **kwargs):
            return self.inner.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.inner.__dlpack_device__()

    for kind in (Interface, Capsule) if HAS_TORCH else (Interface,):
        own = array(np.ones(5)) if kind is Interface else tensor(np.ones(5))
        wrapped = kind(own)
        optimizer = AdamW(0.1)
        optimizer.build([wrapped])
        optimizer.apply([kind(array(np.ones(5)) if kind is Interface else tensor(np.ones(5)))])
        found = libraries.look(own)
        np.testing.assert_allclose(found, np.full(5, 0.9 - 0.1 * 0.004, np.float32), rtol=1e-5)


@needs_gpu
@pytest.mark.parametrize("gradient", ["its own", "of the array's kind"])
def test_an_array_that_describes_itself_in_its_own_words(gradient):
    """As Warp does: vectors are no axis of its shape, its dtypes are not NumPy's, its interface is of version 2."""

    class InWords:
        def __init__(self, inner):
            self.inner, self.shape, self.dtype = inner, tuple(inner.shape)[:1], type("vec3f", (), {})

        @property
        def __cuda_array_interface__(self):
            own = self.inner.__cuda_array_interface__
            return {key: own[key] for key in ("shape", "typestr", "data", "strides")} | {"version": 2}

    own = array(np.ones((4, 3)))
    optimizer = AdamW(0.1, use_ema=True)
    optimizer.build([InWords(own)])
    for _ in range(2):
        g = array(np.ones((4, 3)))
        optimizer.apply([g if gradient == "its own" else InWords(g)])
    plain = np.ones((4, 3), np.float32)
    other = AdamW(0.1, use_ema=True)
    other.build([plain])
    for _ in range(2):
        other.apply([np.ones((4, 3), np.float32)])
    np.testing.assert_allclose(libraries.look(own), plain, rtol=1e-6)
    np.testing.assert_allclose(libraries.look(optimizer.averages[0]), other.averages[0], rtol=1e-6)


@needs_gpu
def test_arrays_of_warp():
    wp = pytest.importorskip("warp")
    wp.init()
    if not wp.is_cuda_available():
        pytest.skip("Warp finds no GPU here")
    start, slopes = (np.random.default_rng(k).normal(size=(4, 3)).astype(np.float32) for k in range(2))
    x = wp.array(start, dtype=wp.vec3, device="cuda:0", requires_grad=True)
    x.grad.assign(slopes)
    plain, where = start.copy(), x.ptr
    optimizer, other = AdamW(0.1), AdamW(0.1)
    optimizer.build([x])
    other.build([plain])
    for _ in range(3):
        optimizer.apply([x.grad])
        other.apply([slopes])
    assert x.ptr == where
    np.testing.assert_allclose(x.numpy(), plain, rtol=1e-6)


def test_repr_and_deepcopy_and_averages():
    x = array(np.ones(3))
    optimizer = AdamW(0.1, use_ema=True)
    optimizer.build([x])
    assert "devices='cuda:0'" in repr(optimizer)
    optimizer.apply([array(np.ones(3))])
    assert math.isclose(float(libraries.look(optimizer.averages[0])[0]), 0.9 - 0.1 * 0.004, rel_tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.finalize_variable_values([x])
