"""NVIDIA Warp's arrays on the CPU: every kind of them, beside Warp's own Adam; the example, and that of the docs."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import foreign, libraries
from helpers.foreign import look

from adamw_numba import AdamW

pytest.importorskip("warp")
wp = foreign.warp()
ROOT = Path(__file__).parents[2]
f4 = np.float32


def values(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(f4)


# What Warp calls the elements -> the axes that they are in NumPy
ELEMENTS = {
    "float16": (wp.float16, (), np.float16),
    "float32": (wp.float32, (), np.float32),
    "float64": (wp.float64, (), np.float64),
    "vec2": (wp.vec2, (2,), np.float32),
    "vec3": (wp.vec3, (3,), np.float32),
    "vec3h": (wp.vec3h, (3,), np.float16),
    "vec3d": (wp.vec3d, (3,), np.float64),
    "mat33": (wp.mat33, (3, 3), np.float32),
    "mat23d": (wp.types.matrix((2, 3), wp.float64), (2, 3), np.float64),
    "quat": (wp.quat, (4,), np.float32),
    "transform": (wp.transform, (7,), np.float32),
}


@pytest.mark.parametrize("shape", [(4,), (2, 3), (0,), (0, 2)])
@pytest.mark.parametrize("kind", ELEMENTS)
def test_elements_of_every_kind(kind, shape):
    """In place, with the bits of NumPy's, from the gradient that Warp keeps beside the array."""
    element, axes, dtype = ELEMENTS[kind]
    start, g = (values(k, shape + axes).astype(dtype) for k in range(2))
    x = wp.array(start, dtype=element, device="cpu", requires_grad=True) if start.size else (
        wp.zeros(shape, dtype=element, device="cpu", requires_grad=True))  # fmt: skip
    y, where, seen = start.copy(), x.ptr, np.asarray(x)
    if start.size:
        x.grad.assign(g)
    optimizer, other = AdamW(0.1, clipvalue=0.5), AdamW(0.1, clipvalue=0.5)
    optimizer.build({"x": x, "n": np.ones(2)})
    other.build({"x": y, "n": np.ones(2)})
    for _ in range(3):
        optimizer.apply({"x": x.grad, "n": np.ones(2)})
        other.apply({"x": g, "n": np.ones(2)})
    assert x.ptr == where
    np.testing.assert_array_equal(seen, y, strict=True)
    np.testing.assert_array_equal(x.numpy(), y)
    np.testing.assert_array_equal(optimizer.state["momentum/x"], other.state["momentum/x"], strict=True)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
@pytest.mark.parametrize("kind", ["float32", "vec3", "float16"])
def test_the_numbers_of_warps_own_adam(kind, epsilon):
    """Its epsilon is added to the corrected root, as torch's; it has no master copy of float16."""
    from warp.optim import Adam

    element, axes, dtype = ELEMENTS[kind]
    start = values(0, (50, *axes)).astype(dtype)
    ours, theirs = (wp.array(start, dtype=element, device="cpu") for _ in range(2))
    optimizer = AdamW(0.01, weight_decay=0.0, epsilon=epsilon, epsilon_mode="corrected", master_weights=False)
    optimizer.build([ours])
    adam = Adam([theirs], lr=0.01, eps=epsilon)
    for step in range(1, 41):
        g = wp.array(values(step, start.shape).astype(dtype), dtype=element, device="cpu")
        optimizer.apply([g])
        adam.step([g])
        # In float16 a step rounds once here and twice there, where the change is rounded before it is subtracted.
        far = np.abs(look(theirs).astype(np.float64) - start).max()
        limit = 2e-5 * far if dtype is f4 else step * float(np.spacing(np.abs(look(theirs)).max()))
        np.testing.assert_allclose(look(ours).astype(np.float64), look(theirs), rtol=0, atol=limit)
    np.testing.assert_allclose(optimizer.state["momentum/0"], adam.m[0].numpy(), rtol=1e-4, atol=1e-6)


def of_transposed():
    return wp.array(values(0, (3, 4)), dtype=wp.float32, device="cpu").transpose((1, 0))


def of_every_other():
    return wp.array(values(0, (8, 3)), dtype=wp.float32, device="cpu")[::2]


def of_a_column():
    return wp.array(values(0, (4, 6)), dtype=wp.float32, device="cpu")[:, 1]


def of_vectors():
    return wp.array(values(0, (8, 3)), dtype=wp.vec3, device="cpu")[1::3]


@pytest.mark.parametrize("make", [of_transposed, of_every_other, of_a_column, of_vectors])
def test_views_are_trained_where_they_lie(make):
    x, y = make(), make().numpy().copy()
    optimizer, other = AdamW(0.1), AdamW(0.1)
    optimizer.build([x])
    other.build([y])
    for step in range(3):
        optimizer.apply([make()] if step else [values(step, y.shape)])
        other.apply([make().numpy()] if step else [values(step, y.shape)])
    np.testing.assert_array_equal(x.numpy(), y)


def overlapping():
    x = wp.array(values(0, 6), dtype=wp.float32, device="cpu")
    return [x[:4], x[3:]]


@wp.struct
class Pair:
    a: wp.float32
    b: wp.float32


BASE = wp.zeros(4, dtype=wp.float32, device="cpu")

# What is built -> error, words
REFUSED = {
    "by index": (lambda: {"w": BASE[wp.array([0, 2], dtype=int, device="cpu")]}, TypeError, ["'w'", "contiguous()"]),
    "one element many times": (
        lambda: {"w": wp.array(ptr=BASE.ptr, shape=(4,), strides=(0,), dtype=wp.float32, device="cpu")},
        ValueError,
        ["'w'", "one address"],
    ),
    "integers": (lambda: [wp.zeros(3, dtype=int, device="cpu")], TypeError, ["int32", "float32"]),
    "vectors of integers": (lambda: [wp.zeros(3, dtype=wp.vec3i, device="cpu")], TypeError, ["int32"]),
    "structures": (lambda: [wp.zeros(3, dtype=Pair, device="cpu")], TypeError, ["void"]),
    "a vector": (lambda: {"w": wp.vec3(1.0, 2.0, 3.0)}, TypeError, ["'w'", "vec3f", "expected an array"]),
    "overlapping": (overlapping, ValueError, ["share memory"]),
    "the same memory as vectors": (
        lambda: {"a": BASE, "b": wp.array(ptr=BASE.ptr, shape=(2,), dtype=wp.vec2, device="cpu")},
        ValueError,
        ["'a'", "'b'", "share memory"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, error, words = REFUSED[case]
    with pytest.raises(error) as raised:
        AdamW().build(make())
    for word in words:
        assert word in str(raised.value), raised.value


# The gradient of an array of two vectors -> error, words
GRADIENTS = {
    "torch": (lambda x: libraries.torch.ones(2, 3), TypeError, ["torch on cpu", "of warp on cpu"]),
    "JAX": (lambda x: libraries.jnp.ones((2, 3)), TypeError, ["jax", "of warp on cpu"]),
    "shorter": (lambda x: wp.zeros(1, dtype=wp.vec3, device="cpu"), ValueError, ["(1, 3)", "(2, 3)"]),
    "of scalars": (lambda x: wp.zeros(2, dtype=float, device="cpu"), ValueError, ["(2,)", "(2, 3)"]),
    "the array": (lambda x: x, ValueError, ["shares memory"]),
    "missing": (lambda x: x.grad, ValueError, ["No gradients"]),  # None: it was made without `requires_grad`
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_refused_gradients(case):
    make, error, words = GRADIENTS[case]
    x = wp.array(values(0, (2, 3)), dtype=wp.vec3, device="cpu")
    optimizer = AdamW(0.1)
    optimizer.build([x])
    with pytest.raises(error) as raised:
        optimizer.apply([make(x)])
    for word in words:
        assert word in str(raised.value), raised.value
    np.testing.assert_array_equal(x.numpy(), values(0, (2, 3)))


def test_numpy_sees_what_was_trained_and_the_other_way_round():
    memory = np.ones(4, f4)
    x = wp.array(memory, dtype=wp.float32, device="cpu", copy=False)
    optimizer = AdamW(0.1)
    optimizer.build([x])
    optimizer.apply([np.ones(4, f4)])
    assert memory[0] < 1
    memory[:] = 5
    optimizer.apply([np.ones(4, f4)])
    assert 4 < x.numpy()[0] < 5


@pytest.mark.slow
def test_the_example():
    script = ROOT / "examples" / "wind.py"
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drag: 0.2" in done.stdout or "drag: 0.19" in done.stdout
    assert "relative error of the wind: 0.0" in done.stdout


@pytest.mark.slow
def test_the_example_of_the_docs(tmp_path):
    """From a file: Warp reads the source of its kernels."""
    section = re.search(r"^## NVIDIA Warp\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "arrays.md").read_text(), re.S | re.M)
    script = tmp_path / "example.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", section[1], re.S)))
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
