"""Containers keep their type: what goes into `stateless_apply` and `minimize` as a named tuple comes out as one."""

from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from adamw_numba import AdamW, minimize
from adamw_numba.arrays.tree import flatten, node_of, rebuild


class Layer(NamedTuple):
    kernel: Any
    bias: Any = None


class Sorted(dict):
    """A dict that says something of itself."""

    note = "mine"


def kernel():
    return np.ones((2, 3))


def bias():
    return np.zeros(3)


# A container and the names of its arrays
CONTAINERS = {
    "an array": (kernel(), ["0"]),
    "list": ([kernel(), bias()], ["0", "1"]),
    "tuple": ((kernel(), bias()), ["0", "1"]),
    "dict": ({"w": kernel(), "b": bias()}, ["w", "b"]),
    "keys that are no text": ({1: kernel(), (2, 3): bias()}, ["1", "(2, 3)"]),
    "named tuple": (Layer(kernel(), bias()), ["kernel", "bias"]),
    "OrderedDict": (OrderedDict(w=kernel(), b=bias()), ["w", "b"]),
    "defaultdict": (defaultdict(list, w=kernel(), b=bias()), ["w", "b"]),
    "subclass of dict": (Sorted(w=kernel(), b=bias()), ["w", "b"]),
    "pairs": ([("enc/w", kernel()), ("enc/b", bias())], ["enc/w", "enc/b"]),
    "a tuple of pairs": ((("w", kernel()), ("b", bias())), ["w", "b"]),
    "None in a list": ([kernel(), None, bias()], ["0", "2"]),
    "None in a named tuple": ([Layer(kernel()), Layer(kernel(), bias())], ["0/kernel", "1/kernel", "1/bias"]),
    "nested": (
        {"layers": (Layer(kernel(), bias()), OrderedDict(w=kernel())), "scale": np.ones(())},
        ["layers/0/kernel", "layers/0/bias", "layers/1/w", "scale"],
    ),
}


def assert_alike(found, expected):
    """The same types, the same keys, and None where it was."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)


def moved(value, by):
    """The same container with other arrays, made without the library."""
    if isinstance(value, np.ndarray):
        return np.asarray(value + by)
    if isinstance(value, dict):
        new = value.copy() if type(value) in (OrderedDict, defaultdict) else type(value)()
        new.update((key, moved(child, by)) for key, child in value.items())
        return new
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(child, by) for child in value))
    return type(value)(moved(child, by) for child in value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", CONTAINERS)
def test_stateless_apply_keeps_the_type(name):
    container, names = CONTAINERS[name]
    optimizer = AdamW(0.1, weight_decay=0.0)
    optimizer.build(container)
    assert [n.removeprefix("momentum/") for n in optimizer.variable_names if n.startswith("momentum/")] == names
    new, state = optimizer.stateless_apply(optimizer.variables, moved(container, 5.0), container)
    assert_alike(new, container)
    for found, old in zip(flatten(new)[1], flatten(container)[1], strict=True):
        np.testing.assert_allclose(found, old - 0.1, rtol=1e-6)
    again, _ = optimizer.stateless_apply(state, moved(new, 5.0), new)
    assert_alike(again, container)


@pytest.mark.parametrize("name", CONTAINERS)
def test_minimize_keeps_the_type(name):
    start, names = CONTAINERS[name]
    seen = []

    def fun(x):
        seen.append(x)
        return sum(float(((leaf - 2) ** 2).sum()) for leaf in flatten(x)[1]), moved_twice(x)

    def moved_twice(x):
        return rebuild(x, [2 * (leaf - 2) for leaf in flatten(x)[1]])

    result = minimize(fun, start, jac=True, learning_rate=0.1, maxiter=3)
    for each in (result.x, result.jac, seen[0]):
        assert_alike(each, start)
    assert len(flatten(result.x)[1]) == len(names)


@pytest.mark.parametrize("name", CONTAINERS)
def test_apply_takes_gradients_in_the_same_container(name):
    container = moved(CONTAINERS[name][0], 0.0)
    optimizer = AdamW(0.1, weight_decay=0.0)
    optimizer.build(container)
    before = [leaf.copy() for leaf in flatten(container)[1]]
    for _ in range(3):  # the form of the first is remembered
        optimizer.apply(moved(CONTAINERS[name][0], 5.0))
    for leaf, old in zip(flatten(container)[1], before, strict=True):
        np.testing.assert_allclose(leaf, old - 0.3, rtol=1e-5)


def test_gradients_by_position_for_a_named_tuple():
    layer = Layer(kernel(), bias())
    optimizer = AdamW(0.1)
    optimizer.build(layer)
    optimizer.apply([np.ones((2, 3)), np.ones(3)])
    optimizer.apply((np.ones((2, 3)), np.ones(3)))
    optimizer.apply(Layer(np.ones((2, 3)), np.ones(3)))
    assert optimizer.iterations == 3
    listed = AdamW(0.1)
    listed.build([kernel(), bias()])
    listed.apply(Layer(np.ones((2, 3)), np.ones(3)))
    with pytest.raises(ValueError, match="'kernel', 'bias'"):
        optimizer.apply({"kernel": np.ones((2, 3)), "biases": np.ones(3)})


def test_a_gradient_that_is_none():
    layer = {"w": kernel(), "b": bias(), "rate": None}
    optimizer = AdamW(0.1)
    optimizer.build(layer)
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['b'\]"):
        optimizer.apply({"w": np.ones((2, 3)), "b": None, "rate": None})
    assert (layer["b"] == 0).all()
    with pytest.raises(ValueError, match="'rate'"):
        optimizer.apply({"w": np.ones((2, 3)), "b": np.ones(3), "rate": np.ones(1)})


def test_bounds_and_units_of_a_named_tuple():
    start = Layer(kernel(), bias())

    def fun(x):
        return float(x.kernel.sum() + x.bias.sum()), Layer(np.ones((2, 3)), np.ones(3))

    for bounds in ({"bias": (-0.2, 1)}, Layer(None, (-0.2, 1)), (None, (-0.2, 1)), [None, (-0.2, 1)]):
        found = minimize(fun, start, jac=True, bounds=bounds, x_scale=Layer(1.0, 2.0), learning_rate=0.2, maxiter=9).x
        assert found.bias.min() == -0.2
        assert found.kernel.min() < -0.2


@pytest.mark.parametrize("kind", [MappingProxyType, UserDict])
def test_a_mapping_that_cannot_be_rebuilt_becomes_a_dict(kind):
    container = kind({"w": kernel()})
    assert node_of(container).keys == ["w"]
    assert rebuild(container, [1]) == {"w": 1}
    assert rebuild({"a": container, "b": None}, [1]) == {"a": {"w": 1}, "b": None}


def test_what_is_walked_once_becomes_a_list():
    optimizer = AdamW(0.1)
    optimizer.build(array for array in [kernel(), bias()])
    new, _ = optimizer.stateless_apply(optimizer.variables, [kernel(), bias()], iter([kernel(), bias()]))
    assert type(new) is list
    assert len(new) == 2


def test_nothing_but_none():
    with pytest.raises(ValueError, match="empty"):
        AdamW().build({"w": None, "layers": [None]})
    with pytest.raises(ValueError, match="`x0` is empty"):
        minimize(lambda x: 0.0, {"w": None})
    with pytest.raises(TypeError, match="`x0` is None"):
        minimize(lambda x: 0.0, None)
