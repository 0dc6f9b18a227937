"""Names of variables are paths, as those of Keras, Haiku and Flax are: a "/" inside a key is part of the name."""

import numpy as np
import pytest

from adamw_numba import AdamW, arrays
from adamw_numba.arrays.tree import flatten, paths_of

CONTAINERS = {
    "pairs": ([("enc/kernel", (2, 3)), ("enc/bias", (3,))], ["enc/kernel", "enc/bias"]),
    "Haiku": (
        {"mlp/~/linear_0": {"w": (2, 3), "b": (3,)}, "mlp/~/linear_1": {"w": (3, 1)}},
        ["mlp/~/linear_0/w", "mlp/~/linear_0/b", "mlp/~/linear_1/w"],
    ),
    "flattened": ({"params/Dense_0/kernel": (2,), "params/Dense_0/bias": (1,)}, None),
    "mixed": ({"a": {"b/c": (2,)}, "a/b": {"d": (3,)}}, ["a/b/c", "a/b/d"]),
    "slashes at the ends": ([("/a", (1,)), ("a/", (2,)), ("//", (3,))], ["/a", "a/", "//"]),
    "dots": ([("../a", (1,)), ("./b", (2,)), ("a\\b", (3,))], None),
}


def filled(shapes, value):
    """A container of the same kind of arrays."""
    if isinstance(shapes, dict):
        return {key: filled(child, value) for key, child in shapes.items()}
    if isinstance(shapes, list):
        return [(key, filled(child, value)) for key, child in shapes]
    return np.full(shapes, value)


def backwards(container):
    """The same names in the opposite order."""
    if isinstance(container, dict):
        return {key: backwards(child) for key, child in reversed(container.items())}
    return container[::-1] if isinstance(container, list) else container


@pytest.mark.parametrize("case", CONTAINERS)
@pytest.mark.parametrize("suffix", [None, ".npz", ".zarr", ".h5", ".safetensors"])
def test_steps_and_saving(case, suffix, tmp_path):
    shapes, names = CONTAINERS[case]
    names = names or list(dict(shapes))
    optimizer = AdamW(0.1, weight_decay=0.0)
    optimizer.build(variables := filled(shapes, 1.0))
    assert optimizer.variable_names[2:] == [f"{key}/{name}" for name in names for key in ("momentum", "velocity")]
    optimizer.apply(filled(shapes, 1.0))
    optimizer.apply(backwards(filled(shapes, 1.0)))
    assert all(np.allclose(leaf, 0.8) for leaf in flatten(variables)[1])
    target = {} if suffix is None else tmp_path / f"state{suffix}"
    optimizer.save(target, variables=True)
    other = AdamW.load(target, backwards(filled(shapes, 0.0)))
    for name, array in optimizer.state.items():
        np.testing.assert_array_equal(other.state[name], array)
    other.apply(filled(shapes, 1.0))
    assert all(np.allclose(leaf, 0.7, atol=1e-3) for leaf in other.trainable_variables)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("^w$", ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]), ("linear_0/b", ["mlp/~/linear_0/b"]), ("^~", [])],
)
@pytest.mark.filterwarnings("ignore:exclude_from_weight_decay")
def test_a_pattern_is_searched_for_in_the_path_and_in_its_last_component(pattern, expected):
    variables = filled(CONTAINERS["Haiku"][0], 1.0)
    optimizer = AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=[pattern])
    optimizer.build(variables)
    optimizer.apply(filled(CONTAINERS["Haiku"][0], 0.0))
    names, leaves = flatten(variables)
    assert [name for name, leaf in zip(names, leaves, strict=True) if (leaf == 1).all()] == expected


SAME = {
    "a key and a nesting": {"a/b": np.ones(1), "a": {"b": np.ones(1)}},
    "pairs": [("a/b", np.ones(1)), ("a/b", np.ones(1))],
    "a number and its text": {1: np.ones(1), "1": np.ones(1)},
    "two nestings": {"a/b": [np.ones(1)], "a": {"b/0": np.ones(1)}},
}


@pytest.mark.parametrize("case", SAME)
def test_equal_paths_are_refused(case):
    with pytest.raises(ValueError, match=r"variables holds the name '(a/b|1|a/b/0)' more than once"):
        AdamW().build(SAME[case])


def test_keys_of_a_path():
    tree = {"mlp/~/linear_0": {"w": np.ones(1)}, "list": [np.ones(2), None]}
    paths, leaves = paths_of(tree, "tree", absent=True)
    assert paths == [("mlp/~/linear_0", "w"), ("list", "0"), ("list", "1")]
    assert leaves == [tree["mlp/~/linear_0"]["w"], *tree["list"]]
    assert paths_of(leaf := np.ones(3), "leaf") == ([()], [leaf])
    assert arrays.is_array(leaf)


def test_names_of_keras():
    keras = pytest.importorskip("keras")
    model = keras.Sequential([keras.layers.Dense(3, name="enc"), keras.layers.Dense(1)], name="net")
    model.build((None, 2))
    optimizer = AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build([(v.path, v.value) for v in model.trainable_variables])
    assert optimizer.variable_names[2] == "momentum/net/enc/kernel"
