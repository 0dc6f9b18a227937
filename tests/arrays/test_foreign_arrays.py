"""Arrays of no known library are trained where they lie, as NumPy's are; and refused where that cannot be."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
from helpers import foreign, libraries
from helpers.foreign import ByDLPack, ByInterface, OldDLPack, by_dlpack, by_interface, look

from adamw_numba import AdamW, minimize, multistart

SHAPES = [(), (1,), (7,), (3, 5), (2, 0)]
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
OPTIONS = [
    {},
    {"amsgrad": True, "use_ema": True, "global_clipnorm": 0.5},
    {"gradient_accumulation_steps": 2, "clipvalue": 0.3, "nonfinite": "skip"},
    {"epsilon_mode": "corrected", "nesterov": True, "clipnorm": 0.5, "use_ema": True, "ema_overwrite_frequency": 2},
    {"master_weights": False},
]
f4 = np.float32


def values(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def trained(make, dtype, options, gradient=None, steps=5):
    """The arrays and the state after some steps; gradients are made by `gradient`, or as the variables are."""
    variables = {"w": make(values(0, (3, 5)), dtype), "b": make(values(1, (4,)), dtype)}
    optimizer = AdamW(0.1, **options)
    optimizer.build(variables)
    for step in range(steps):
        found = {name: values(10 * step + k, look(v).shape) for k, (name, v) in enumerate(variables.items(), 1)}
        optimizer.apply({name: (gradient or make)(g, dtype) for name, g in found.items()})
    return [look(v) for v in variables.values()], [look(a) for a in optimizer.variables]


def assert_same(one, other):
    for pair in zip(one, other, strict=True):
        for a, b in zip(*pair, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize(
    "case", [*[(dtype, 1) for dtype in DTYPES], *[("float32", k) for k in (0, 2, 3)], ("float16", 4)]
)
@pytest.mark.parametrize("kind", foreign.KINDS)
def test_the_same_bits_as_numpy(kind, case):
    dtype, options = case[0], OPTIONS[case[1]]
    assert_same(trained(kind, dtype, options), trained(libraries.numpy, dtype, options))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", foreign.KINDS)
def test_every_shape(kind, shape):
    one, other = kind(values(0, shape), "float32"), libraries.numpy(values(0, shape), "float32")
    for x in (one, other):
        optimizer = AdamW(0.1)
        optimizer.build([x, np.ones(2)])
        for _ in range(3):
            optimizer.apply([libraries.numpy(values(1, shape), "float32"), np.ones(2)])
    np.testing.assert_array_equal(look(one), look(other))


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_gradients_may_be_numpys(kind):
    assert_same(trained(kind, "float32", {}, libraries.numpy), trained(libraries.numpy, "float32", {}))


@pytest.mark.parametrize("one", [by_interface, by_dlpack])
@pytest.mark.parametrize("other", [by_interface, by_dlpack])
def test_or_of_any_foreign_kind_and_another_dtype(one, other):
    def wider(array, dtype):
        return other(array, "float64")

    def of_numpy(array, dtype):
        return np.asarray(array, "float64")

    assert_same(trained(one, "float32", {}, wider), trained(libraries.numpy, "float32", {}, of_numpy))


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_a_tree_of_several_libraries(kind):
    start = {"a": {"own": values(0, (3,)), "numpy": values(1, (2, 2))}, "b": [values(2, (5,)), values(3, (1,))]}
    variables = {
        "a": {"own": kind(start["a"]["own"], "float32"), "numpy": start["a"]["numpy"].copy()},
        "b": [libraries.to_torch(start["b"][0], "float32"), kind(start["b"][1], "float64")],
    }
    plain = {
        "a": {"own": start["a"]["own"].astype(f4), "numpy": start["a"]["numpy"].copy()},
        "b": [start["b"][0].astype(f4), start["b"][1].copy()],
    }
    optimizers = AdamW(0.1, global_clipnorm=1.0), AdamW(0.1, global_clipnorm=1.0)
    for optimizer, tree in zip(optimizers, (variables, plain), strict=True):
        optimizer.exclude_from_weight_decay(var_list=[tree["b"][1]])
        optimizer.build(tree)
        for step in range(4):
            g = {"a": {"own": values(step, (3,)).astype(f4), "numpy": values(step, (2, 2))},
                 "b": [values(step, (5,)).astype(f4), values(step, (1,))]}  # fmt: skip
            if tree is variables:
                g["a"]["own"] = kind(g["a"]["own"], "float32")
                g["b"][0] = libraries.torch.tensor(g["b"][0])
            optimizer.apply(g)
    assert optimizers[0].variable_names == optimizers[1].variable_names
    assert optimizers[0].trainable_variables[0] is variables["a"]["own"]
    assert optimizers[0].groups[1].variables[0] is variables["b"][1]
    for one, other in zip(optimizers[0].trainable_variables, optimizers[1].trainable_variables, strict=True):
        np.testing.assert_array_equal(look(one), other)


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_the_other_ways_to_step(kind):
    x, y = kind(np.ones(3), "float32"), np.ones(3, f4)
    g, h = kind(values(0, 3), "float32"), values(0, 3).astype(f4)
    ones = []
    for variable, gradient in ((x, g), (y, h)):
        optimizer = AdamW(0.1, use_ema=True)
        optimizer.apply([gradient], [variable])
        optimizer.apply_gradients([(gradient, variable)])
        optimizer.update_step(gradient, variable, 0.01)
        optimizer.assign(variable, 2 * look(variable))
        with optimizer.averaged():
            ones.append(look(variable))
        new, state = optimizer.stateless_apply(optimizer.variables, [gradient], [variable])
        assert type(new[0]) is np.ndarray
        assert new[0] is not variable
        ones += [look(variable), new[0], *map(look, state)]
        optimizer.finalize_variable_values([variable])
        ones.append(look(variable))
        like = optimizer.add_variable_from_reference(variable, "other")
        assert type(like) is np.ndarray
        ones.append(like)
    half = len(ones) // 2
    for one, other in zip(ones[:half], ones[half:], strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_freezing_and_groups():
    x, y = ByInterface(np.ones(3)), ByInterface(np.ones(3))
    optimizer = AdamW(0.1)
    optimizer.override(var_list=[y], learning_rate_multiplier=0.1)
    optimizer.build({"x": x, "y": y})
    optimizer.apply([np.ones(3), ByInterface(np.ones(3))])
    assert optimizer.group_of("y").variables == [y]
    optimizer.group_of("y").trainable = False
    before = look(y)
    optimizer.apply([ByInterface(np.ones(3)), None])
    np.testing.assert_array_equal(look(y), before)
    optimizer.group_of("y").trainable = True
    optimizer.apply({"x": np.ones(3), "y": ByInterface(np.ones(3))})
    assert look(y)[0] < before[0]
    assert optimizer.group_of("y").variables == [y]


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_a_saved_run_continues(kind, tmp_path):
    def made():
        optimizer = AdamW(0.1, amsgrad=True)
        model = {"w": kind(values(0, 6), "float32"), "n": np.ones(2)}
        optimizer.build(model)
        return optimizer, model

    optimizer, model = made()
    gradients = {"w": kind(values(1, 6), "float32"), "n": np.ones(2)}
    optimizer.apply(gradients)
    optimizer.save(tmp_path / "run.npz", variables=True)
    optimizer.apply(gradients)
    other, resumed = made()
    other.restore(tmp_path / "run.npz")
    other.apply(gradients)
    np.testing.assert_array_equal(look(resumed["w"]), look(model["w"]))
    loaded = AdamW.load(tmp_path / "run.npz", again := {"w": kind(np.zeros(6), "float32"), "n": np.zeros(2)})
    loaded.apply(gradients)
    np.testing.assert_array_equal(look(again["w"]), look(model["w"]))
    assert_same([[look(a) for a in loaded.variables]], [[look(a) for a in optimizer.variables]])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@pytest.mark.parametrize("kind", foreign.KINDS)
def test_a_copy_trains_numpy_arrays(kind, copier):
    x = kind(np.ones(3), "float32")
    optimizer = AdamW(0.1)
    optimizer.build([x])
    optimizer.apply([np.ones(3, f4)])
    twin = copier(optimizer)
    (y,) = twin.trainable_variables
    assert type(y) is np.ndarray
    twin.apply([np.ones(3, f4)])
    assert y[0] < look(x)[0]
    optimizer.apply([np.ones(3, f4)])
    np.testing.assert_array_equal(look(x), y)


class Growing(ByInterface):
    """What keeps its elements elsewhere once it has grown."""

    def move(self, inner):
        old, self.inner = self.inner, inner
        old[...] = np.nan


class GrowingDLPack(ByDLPack):
    move = Growing.move


class Buffer(Growing):
    """An array interface without an address: the object itself is a buffer."""

    @property
    def __array_interface__(self):
        return {"shape": self.inner.shape, "typestr": self.inner.dtype.str, "data": self.inner.data, "version": 3}


@pytest.mark.parametrize("kind", [Growing, GrowingDLPack, Buffer])
def test_memory_that_moves_between_steps(kind):
    x, y = kind(np.ones(4)), np.ones(4)
    optimizer, other = AdamW(0.1, use_ema=True), AdamW(0.1, use_ema=True)
    optimizer.build([x])
    other.build([y])
    for step in range(6):
        optimizer.apply([values(step, 4)])
        other.apply([values(step, 4)])
        x.move(x.inner.copy())
        if step == 3:
            with optimizer.averaged(), other.averaged():
                x.move(x.inner.copy())
                np.testing.assert_array_equal(x.inner, y)
        np.testing.assert_array_equal(x.inner, y)
    assert optimizer.iterations == 6


# What becomes of a variable between two steps -> error, words
CHANGES = {
    "longer": (lambda x: x.move(np.ones(5)), ValueError, ["'x'", "(5,)", "(4,)", "as built"]),
    "of another dtype": (lambda x: x.move(np.ones(4, f4)), ValueError, ["'x'", "float32", "float64", "as built"]),
    "of no dtype to train": (lambda x: x.move(np.ones(4, int)), TypeError, ["'x'", "int64"]),
    "read-only": (lambda x: x.inner.setflags(write=False), ValueError, ["'x'", "read-only"]),
    "onto another": (lambda x: setattr(x, "inner", x.other), ValueError, ["'x'", "'y'", "share memory"]),
    "freed": (lambda x: delattr(x, "inner"), TypeError, ["'x'", "memory"]),
}


@pytest.mark.parametrize("kind", [Growing, GrowingDLPack, Buffer])
@pytest.mark.parametrize("change", CHANGES)
def test_a_variable_that_cannot_be_trained_any_more(kind, change):
    function, error, words = CHANGES[change]
    x, y = kind(np.ones(4)), np.ones(4)
    x.other = y
    optimizer = AdamW(0.1)
    optimizer.build({"x": x, "y": y})
    optimizer.apply([np.ones(4), np.ones(4)])
    before, state = y.copy(), [np.array(a) for a in optimizer.variables]
    function(x)
    for call in (
        lambda: optimizer.apply([np.ones(4), np.ones(4)]),
        lambda: optimizer.save(b"never", variables=True),
        lambda: optimizer.update_step(np.ones(4), y, 0.1),
    ):
        with pytest.raises(error) as raised:
            call()
        assert_says(raised, words)
    np.testing.assert_array_equal(y, before)
    assert_same([[np.array(a) for a in optimizer.variables]], [state])


def assert_says(raised, words):
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"


def read_only(array):
    array.flags.writeable = False
    return array


class Nowhere:
    __array_interface__ = {"shape": (3,), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


class Broken:
    @property
    def __array_interface__(self):
        raise RuntimeError("gone")


class Odd:
    __array_interface__ = {"shape": "three", "typestr": "<f4", "version": 3}  # noqa: RUF012


LARGE = np.ones(6, f4)

# What is built -> error, words
REFUSED = {
    "read-only": ([("w", ByInterface(read_only(np.ones(3))))], ValueError, ["'w'", "read-only", "can be written"]),
    "read-only by DLPack": ([("w", ByDLPack(read_only(np.ones(3))))], ValueError, ["'w'", "read-only", "1.0"]),
    "an old DLPack": ([("w", OldDLPack(np.ones(3)))], ValueError, ["'w'", "read-only", "1.0"]),
    "integers": ([("w", ByInterface(np.ones(3, int)))], TypeError, ["'w'", "int64", "float32"]),
    "structured": ([ByInterface(np.ones(3, "f4,f4"))], TypeError, ["void"]),
    "big-endian": ([ByInterface(np.ones(3, ">f4"))], TypeError, ["byte order"]),
    "broadcast": ([ByInterface(np.lib.stride_tricks.as_strided(np.ones(1), (5,), (0,)))], ValueError, ["one address"]),
    "not aligned": ([ByInterface(np.zeros(13, np.uint8)[1:].view(f4))], ValueError, ["aligned"]),
    "nowhere": ([("w", Nowhere())], TypeError, ["'w'", "Nowhere", "nowhere"]),
    "an interface that raises": ([("w", Broken())], RuntimeError, ["gone"]),
    "an interface that is none": ([("w", Odd())], TypeError, ["'w'", "Odd", "cannot see"]),
    "twice": ({"a": (twice := ByInterface(np.ones(3))), "b": twice}, ValueError, ["'a'", "'b'", "share memory"]),
    "overlapping": ({"a": ByInterface(LARGE[:4]), "b": ByInterface(LARGE[3:])}, ValueError, ["'a'", "'b'", "share"]),
    "its own array": ({"a": ByInterface(LARGE), "b": LARGE}, ValueError, ["'a'", "'b'", "share memory"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_variables(case):
    variables, error, words = REFUSED[case]
    optimizer = AdamW()
    with pytest.raises(error) as raised:
        optimizer.build(variables)
    assert_says(raised, words)
    assert not optimizer.built


# The gradient of a foreign variable of four float64 -> error, words
GRADIENTS = {
    "torch": (lambda x: libraries.torch.ones(4, dtype=libraries.torch.float64), TypeError, ["torch", "of helpers"]),
    "JAX": (lambda x: libraries.jnp.ones(4), TypeError, ["jax", "of helpers"]),
    "shape": (lambda x: ByInterface(np.ones(5)), ValueError, ["(5,)", "(4,)"]),
    "integers": (lambda x: ByDLPack(np.ones(4, int)), TypeError, ["int64"]),
    "complex": (lambda x: ByInterface(np.ones(4, complex)), TypeError, ["complex128", "real"]),
    "itself": (lambda x: x, ValueError, ["shares memory"]),
    "its memory": (lambda x: ByInterface(x.inner), ValueError, ["shares memory"]),
    "a number": (lambda x: 1.0, TypeError, ["1.0"]),
    "nowhere": (lambda x: Nowhere(), TypeError, ["nowhere"]),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_refused_gradients(case):
    make, error, words = GRADIENTS[case]
    x, y = ByInterface(np.ones(4)), np.ones(2)
    optimizer = AdamW(0.1)
    optimizer.build({"x": x, "y": y})
    optimizer.apply([np.ones(4), np.ones(2)])
    before, state = [look(x), y.copy()], [np.array(a) for a in optimizer.variables]
    with pytest.raises(error) as raised:
        optimizer.apply([make(x), np.ones(2)])
    assert_says(raised, ["x", *words])
    assert_same([before, [np.array(a) for a in optimizer.variables]], [[look(x), y], state])


@pytest.mark.parametrize("others", [[], [ByInterface(np.ones(2))]])
def test_numpy_variables_take_numpy_gradients(others):
    """Also beside foreign variables."""
    optimizer = AdamW()
    optimizer.build([np.ones(4), *others])
    with pytest.raises(TypeError, match=r"the gradient of '0' is an array of helpers on cpu; expected one of numpy"):
        optimizer.apply([ByInterface(np.ones(4)), *[np.ones(2) for _ in others]])


@pytest.mark.parametrize("kind", [by_interface, by_dlpack])
def test_an_array_lives_as_long_as_its_optimizer_and_a_gradient_as_its_step(kind):
    x, g = kind(np.ones(3), "float64"), kind(np.ones(3), "float64")
    lives, died = weakref.ref(x.inner), weakref.ref(g.inner)
    optimizer = AdamW(0.1)
    optimizer.build([x])
    optimizer.apply([g])
    del x, g
    gc.collect()
    assert lives() is not None
    assert died() is None
    optimizer.apply([np.ones(3)])
    assert lives()[0] < 0.9
    del optimizer
    gc.collect()
    assert lives() is None


def test_without_the_compiler():
    code = (
        "import numpy as np; from adamw_numba import AdamW\n"
        "class A:\n    def __init__(self, a): self.a = a\n"
        "    __array_interface__ = property(lambda self: self.a.__array_interface__)\n"
        "x, y = A(np.ones(3)), np.ones(3)\n"
        "for v, g in ((x, A(np.ones(3))), (y, np.ones(3))):\n"
        "    o = AdamW(0.1); o.build([v]); o.apply([g])\n"
        "assert (x.a == y).all() and y[0] < 1"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def bowl(x):
    return by_interface(np.sum((x - 3) ** 2)[None], "float64"), ByInterface(2 * (x - 3))


@pytest.mark.parametrize("kind", foreign.KINDS)
def test_minimize_takes_them_as_numpy_arrays(kind):
    start = values(0, 3)
    found = minimize(bowl, kind(start, "float64"), jac=True, maxiter=50, learning_rate=0.1)
    wanted = minimize(lambda x: (np.sum((x - 3) ** 2), 2 * (x - 3)), start, jac=True, maxiter=50, learning_rate=0.1)
    assert type(found.x) is np.ndarray
    np.testing.assert_array_equal(found.x, wanted.x)
    starts = multistart(bowl, kind(np.stack([start, start + 1]), "float64"), jac=True, maxiter=50, learning_rate=0.1)
    assert len(starts.results) == 2
