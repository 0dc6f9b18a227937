"""Every wrong input: an error that names it, says what was expected, and leaves everything bit for bit as it was."""

import copy

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import libraries

from adamw_numba import AdamW, LossScaleOptimizer, schedules


def f4(*shape):
    return np.ones(shape, np.float32)


def readonly(array):
    array.flags.writeable = False
    return array


def unaligned(count):
    return np.zeros(4 * count + 1, np.uint8)[1:].view(np.float32)


def overlapping(count):
    memory = f4(count + 2)
    return [memory[:count], memory[2:]]


SHARED = f4(3)

HOLDS_ITSELF: list = []
HOLDS_ITSELF.append(HOLDS_ITSELF)

# what is built -> error, words that its message holds
VARIABLES = {
    "no array": ({"a": "text"}, TypeError, ["a", "text", "expected"]),
    "a number": ([1.5], TypeError, ["1.5", "expected"]),
    "none": ([None], ValueError, ["empty"]),
    "nothing": ([], ValueError, ["empty"]),
    "integers": ({"w": np.ones(3, int)}, TypeError, ["'w'", "int64", "float32"]),
    "booleans": ([np.ones(3, bool)], TypeError, ["bool"]),
    "objects": ([np.ones(3, object)], TypeError, ["object"]),
    "strings": ([np.array(["a"])], TypeError, ["str"]),
    "long double": (
        [np.ones(3, np.longdouble)],
        TypeError,
        ["float128", "expected"],
    ),
    "structured": ([np.ones(3, "f4,f4")], TypeError, ["void"]),
    "masked": ([np.ma.ones(3)], TypeError, ["MaskedArray", "numpy.asarray"]),
    "matrix": ([np.ones((1, 1)).view(np.matrix)], TypeError, ["matrix", "numpy.asarray"]),
    "big-endian": ([np.ones(3, ">f4")], TypeError, ["byte order", ">f4"]),
    "read-only": ([readonly(f4(3))], ValueError, ["read-only", "writeable"]),
    "broadcast": ([np.lib.stride_tricks.as_strided(f4(1), (5,), (0,))], ValueError, ["one address", "copy"]),
    "sliding window": ([np.lib.stride_tricks.as_strided(f4(6), (4, 3), (4, 4))], ValueError, ["one address"]),
    "not aligned": ([unaligned(3)], ValueError, ["aligned"]),
    "NumPy scalar": ([np.float32(1)], TypeError, ["scalar"]),
    "twice": ({"a": SHARED, "b": SHARED}, ValueError, ["'a'", "'b'", "share memory"]),
    "overlapping": (overlapping(5), ValueError, ["share memory"]),
    "a tensor and its array": ([t := torch.ones(3), t.numpy()], ValueError, ["share memory"]),
    "twice, elsewhere": ([s := array_api_strict.ones(3), s], ValueError, ["twice"]),
    "one name": ([("a", f4(1)), ("a", f4(1))], ValueError, ["'a'", "more than once"]),
    "one path": ({"a/b": f4(1), "a": {"b": f4(1)}}, ValueError, ["'a/b'", "more than once"]),
    "no key": ({"": f4(1), "0": f4(1)}, ValueError, ["empty key"]),
    "a set": ({torch.ones(1), torch.ones(1)}, TypeError, ["set", "no order"]),
    "itself": (HOLDS_ITSELF, ValueError, ["variables", "itself"]),
    "memory": ([memoryview(f4(2, 2))], TypeError, ["memoryview", "expected an array"]),
    "a module": (torch.nn.ParameterDict({"w": torch.ones(2)}), TypeError, ["ParameterDict", "named_parameters"]),
    "integer tensor": ([torch.ones(3, dtype=torch.int32)], TypeError, ["dtype int32", "expected one of"]),
    "boolean tensor": ([torch.ones(3, dtype=torch.bool)], TypeError, ["dtype bool", "expected one of"]),
    "float8 tensor": ([torch.ones(3).to(torch.float8_e5m2)], TypeError, ["dtype float8_e5m2", "expected one of"]),
    "sparse tensor": ([torch.eye(3).to_sparse()], TypeError, ["sparse", "to_dense"]),
    "meta tensor": ([torch.ones(3, device="meta")], TypeError, ["meta"]),
    "expanded tensor": ([torch.ones(1).expand(3)], ValueError, ["one address"]),
    "lazy conjugate": ([torch.ones(3, dtype=torch.complex64).conj()], ValueError, ["conjugate", "resolve"]),
    "result of a graph": ([torch.ones(3, requires_grad=True) * 2], ValueError, ["leaf"]),
    "integers elsewhere": ([array_api_strict.ones(3, dtype=array_api_strict.int32)], TypeError, ["int32"]),
    "integers of JAX": ([jnp.ones(3, int)], TypeError, ["int32"]),
}


@pytest.mark.parametrize("case", VARIABLES)
def test_variables(case):
    variables, error, words = VARIABLES[case]
    optimizer = AdamW()
    with pytest.raises(error) as raised:
        optimizer.build(variables)
    assert_says(raised, words)
    assert not optimizer.built
    assert optimizer.variable_names == ["iteration", "learning_rate"]
    optimizer.build([good := f4(2)])
    optimizer.apply([f4(2)])
    assert good[0] < 1


def built(**options):
    """Variables of several libraries in one optimizer that has made a step."""
    variables = {
        "w": f4(2, 3),
        "b": np.ones(3, np.float64),
        "c": np.ones(2, np.complex64),
        "h": np.ones(2, np.float16),
        "t": torch.nn.Parameter(torch.ones(2, 3)),
        "s": array_api_strict.ones((3,)),
    }
    optimizer = AdamW(0.1, use_ema=True, gradient_accumulation_steps=2, **options)
    optimizer.build(variables)
    for _ in range(3):
        optimizer.apply(gradients(optimizer))
    return variables, optimizer


def gradients(optimizer):
    return {
        "w": f4(2, 3),
        "b": np.ones(3),
        "c": np.ones(2, np.complex64),
        "h": np.ones(2, np.float16),
        "t": torch.ones(2, 3),
        "s": array_api_strict.ones((3,)),
    }


def snapshot(variables, optimizer):
    arrays = [libraries.look(a).tobytes() for a in [*variables.values(), *optimizer.variables]]
    return arrays, optimizer.last_step, optimizer.skipped_steps, optimizer.iterations


def assert_says(raised, words):
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in: {raised.value}"


# what replaces which gradient (or the whole of them) -> error, words
GRADIENTS = {
    "shape": ({"w": f4(3, 2)}, ValueError, ["'w'", "(3, 2)", "(2, 3)"]),
    "broadcastable": ({"w": f4(1, 3)}, ValueError, ["'w'", "(1, 3)"]),
    "a number": ({"b": 1.0}, TypeError, ["b", "1.0"]),
    "a list": ({"b": [1.0, 2.0, 3.0]}, TypeError, ["b", "expected"]),
    "integers": ({"w": np.ones((2, 3), int)}, TypeError, ["'w'", "int64"]),
    "booleans": ({"w": np.ones((2, 3), bool)}, TypeError, ["bool"]),
    "objects": ({"w": np.ones((2, 3), object)}, TypeError, ["object"]),
    "masked": ({"w": np.ma.ones((2, 3))}, TypeError, ["MaskedArray"]),
    "matrix": ({"w": f4(2, 3).view(np.matrix)}, TypeError, ["matrix"]),
    "big-endian": ({"w": np.ones((2, 3), ">f4")}, TypeError, [">f4"]),
    "complex": ({"w": np.ones((2, 3), np.complex64)}, TypeError, ["complex64", "real"]),
    "of torch": ({"w": torch.ones(2, 3)}, TypeError, ["'w'", "torch", "numpy"]),
    "of NumPy": ({"t": f4(2, 3)}, TypeError, ["'t'", "numpy", "torch"]),
    "of JAX": ({"w": jnp.ones((2, 3))}, TypeError, ["jax", "numpy"]),
    "of NumPy, elsewhere": ({"s": np.ones(3)}, TypeError, ["'s'", "numpy", "array_api_strict"]),
    "another device": (
        {"s": array_api_strict.ones((3,), device=array_api_strict.Device("device1"))}, TypeError, ["device1", "'s'"]
    ),
    "meta device": ({"t": torch.ones(2, 3, device="meta")}, TypeError, ["meta"]),
    "sparse": ({"t": torch.ones(2, 3).to_sparse()}, TypeError, ["sparse"]),
    "shape elsewhere": ({"s": array_api_strict.ones((2,))}, ValueError, ["'s'", "(2,)", "(3,)"]),
    "too few": ([f4(2, 3)], ValueError, ["1 arrays", "6"]),
    "too many": ([f4(2, 3)] * 7, ValueError, ["7 arrays", "6"]),
    "unknown name": ({"w2": f4(2, 3), "w": ...}, ValueError, ["w2"]),
    "no gradient at all": (dict.fromkeys("wbchts"), ValueError, ["No gradients provided"]),
    "text": ("gradients", TypeError, ["gradients"]),
    "a set": ({torch.ones(1), torch.ones(2)}, TypeError, ["grads", "set", "no order"]),
    "numbered": ({str(i): f4(2, 3) for i in range(6)}, ValueError, ["unknown", "'5'"]),
    "itself": (HOLDS_ITSELF, ValueError, ["grads", "itself"]),
    "memory": (memoryview(f4(2, 3)), TypeError, ["grads", "memoryview"]),
    "integer tensor": ({"t": torch.ones(2, 3, dtype=torch.int32)}, TypeError, ["'t'", "dtype int32"]),
    "none": (None, ValueError, ["1 arrays", "6"]),
}  # fmt: skip


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(case):
    change, error, words = GRADIENTS[case]
    variables, optimizer = built()
    given = gradients(optimizer)
    if isinstance(change, dict):
        given |= change
        given = {name: value for name, value in given.items() if value is not ...}
    else:
        given = change
    before = snapshot(variables, optimizer)
    with pytest.raises(error) as raised:
        optimizer.apply(given)
    assert_says(raised, words)
    assert snapshot(variables, optimizer) == before
    optimizer.apply(gradients(optimizer))
    assert optimizer.iterations == 2


@pytest.mark.parametrize(
    "alias",
    ["w", "momentum/w", "velocity/w", "average/w", "gradient_accumulator/w"],
)
@pytest.mark.parametrize("part", [slice(None), slice(1, None)])
def test_gradient_that_shares_memory(alias, part):
    variables, optimizer = built()
    owner = variables["w"] if alias == "w" else optimizer.state[alias]
    view = owner if part == slice(None) else np.lib.stride_tricks.as_strided(owner[part], (2, 3), (0, 4))
    before = snapshot(variables, optimizer)
    with pytest.raises(ValueError, match=r"'w'.* shares memory with"):
        optimizer.apply(gradients(optimizer) | {"w": view})
    assert snapshot(variables, optimizer) == before


def test_gradient_that_lies_between_the_elements_of_a_variable_is_fine():
    memory = np.ones(10)
    optimizer = AdamW(0.1, weight_decay=0.0)
    optimizer.build([memory[::2]])
    for _ in range(3):
        optimizer.apply([memory[1::2]])
    np.testing.assert_allclose(memory[::2], 0.7, rtol=1e-4)
    assert (memory[1::2] == 1).all()


CHANGES = {
    "read-only": (lambda v: readonly(v["w"]), ValueError, ["'w'", "read-only"]),
    "another shape": (lambda v: v["w"].resize((3, 2), refcheck=False), ValueError, ["'w'", "(3, 2)"]),
    "another dtype": (lambda v: setattr(v["t"], "data", torch.ones(2, 3).double()), ValueError, ["'t'", "float64"]),
    "onto another": (lambda v: setattr(v["t"], "data", torch.from_numpy(v["w"])), ValueError, ["share memory"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_variables_that_change_after_build(case):
    change, error, words = CHANGES[case]
    variables, optimizer = built()
    change(variables)
    before = snapshot(variables, optimizer)
    for _ in range(2):
        with pytest.raises(error) as raised:
            optimizer.apply(gradients(optimizer))
        assert_says(raised, words)
    assert snapshot(variables, optimizer) == before


HYPERPARAMETERS = {
    "learning_rate": [-1.0, np.nan, np.inf, "0.1", None, True, 1j, [0.1], AdamW],
    "weight_decay": [-0.1, np.nan, np.inf, "0.1", None, False],
    "beta_1": [-0.1, 1.0, 1.5, np.nan, None, "0.9", True],
    "beta_2": [-0.1, 1.0, np.nan, None],
    "epsilon": [0.0, -1e-7, np.nan, np.inf, None],
    "amsgrad": [None, 1, "yes"],
    "clipnorm": [0.0, -1.0, np.nan, np.inf, "1", True],
    "clipvalue": [0.0, -1.0, np.nan, np.inf],
    "global_clipnorm": [0.0, -1.0, np.nan, np.inf],
    "use_ema": [None, 1],
    "ema_momentum": [-0.1, 1.1, np.nan, None],
    "ema_overwrite_frequency": [0, -1, 1.5, "2", True],
    "loss_scale_factor": [0.0, -1.0, np.nan, np.inf],
    "gradient_accumulation_steps": [0, 1, -2, 2.5, True],
    "name": [None, "", 3],
    "nonfinite": ["ignore", None, True],
    "threads": [0, -1, 1.5],
    "master_weights": [None, 0, 1, "float32", "Remainder"],
    "moments": [None, "float16", 8, "8 bit"],
    "seed": [None, -1, 2**32, 0.5, True],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in HYPERPARAMETERS.items() for v in values], ids=str)
def test_hyperparameters(name, value):
    """In the constructor and on assignment, where the old value stays."""
    with pytest.raises(ValueError, match=f"`{name}`") as raised:
        AdamW(**{name: value})
    assert_says(raised, [repr(value)])
    optimizer = AdamW()
    before = getattr(optimizer, name)
    with pytest.raises(ValueError, match=f"`{name}`"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before


CONFLICTS = {
    "unknown": (lambda: AdamW(lr=0.1), ["not recognized", "lr"]),
    "two clips": (lambda: AdamW(clipnorm=1.0, clipvalue=1.0), ["Only one of", "clipnorm"]),
    "two other clips": (lambda: AdamW(global_clipnorm=1.0, clipvalue=1.0), ["Only one of"]),
    "a second clip": (lambda: setattr(AdamW(clipnorm=1.0), "clipvalue", 1.0), ["Only one of"]),
    "amsgrad later": (lambda: setattr(built()[1], "amsgrad", True), ["amsgrad", "built"]),
    "ema later": (lambda: setattr(built()[1], "use_ema", False), ["use_ema", "built"]),
    "accumulation later": (lambda: setattr(built()[1], "gradient_accumulation_steps", 3), ["built"]),
    "exclusion later": (lambda: built()[1].exclude_from_weight_decay(var_names=["b"]), ["before"]),
    "no regex": (lambda: AdamW().exclude_from_weight_decay(var_names=["("]), ["'('", "regular expression"]),
    "not built": (lambda: AdamW().apply([f4(2)]), ["must already be built"]),
    "stateless, not built": (lambda: AdamW().stateless_apply([], [f4(2)], [f4(2)]), ["built"]),
    "weights, not built": (lambda: AdamW().set_weights([]), ["built"]),
    "load, not built": (lambda: AdamW().load_own_variables({}), ["built"]),
    "other variables": (lambda: built()[1].build([f4(3)]), ["Unknown variable"]),
    "fewer variables": (lambda: (o := AdamW(), o.build(v := [f4(3), f4(2)]), o.build(v[:1])), ["1 of them"]),
    "unknown variable": (lambda: built()[1].apply([f4(3)], [f4(3)]), ["Unknown variable"]),
    "no pairs": (lambda: AdamW().apply_gradients([]), ["empty"]),
    "no averages": (lambda: (o := AdamW(), o.build([f4(2)]), o.averaged().__enter__()), ["use_ema"]),
    "too few weights": (lambda: built()[1].set_weights([0]), ["holds 1 arrays", "iteration"]),
    "unknown schedule": (lambda: schedules.deserialize({"class_name": "os.system", "config": {}}), ["os.system"]),
    "function in a config": (
        lambda: AdamW.from_config({"learning_rate": {"class_name": "function", "config": "f"}}), ["function"],
    ),
    "an initializer": (lambda: AdamW().add_variable((2,), "glorot"), ["glorot"]),
    "loss scale of what": (lambda: LossScaleOptimizer(AdamW(), initial_scale=-1.0), ["initial_scale", "-1.0"]),
    "loss scale, growth": (lambda: LossScaleOptimizer(AdamW(), dynamic_growth_steps=None), ["dynamic_growth_steps"]),
    "loss scale, not dynamic": (lambda: LossScaleOptimizer(AdamW(), dynamic=False), ["dynamic=False"]),
    "loss scale, inner option": (lambda: LossScaleOptimizer(AdamW(), clipnorm=1.0), ["clipnorm", "inner_optimizer"]),
    "loss scale, unknown": (lambda: LossScaleOptimizer(AdamW(), what=1.0), ["what"]),
    "loss scale, bounds": (lambda: LossScaleOptimizer(AdamW(), minimum_scale=2.0, maximum_scale=1.0), ["minimum_scale"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFLICTS)
def test_conflicts(case):
    act, words = CONFLICTS[case]
    with pytest.raises(ValueError, match=r".") as raised:
        act()
    assert_says(raised, words)


@pytest.mark.parametrize("make", [AdamW, lambda: LossScaleOptimizer(AdamW())])
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (None, TypeError, ["None"]),
        (3, TypeError, ["3", "int"]),
        ([], ValueError, ["empty"]),
        ([1], ValueError, ["1", "at 0"]),
        ([(f4(1),)], ValueError, ["at 0"]),
        ([(f4(1), f4(1)), (f4(1), f4(1), 1)], ValueError, ["at 1"]),
        ([f4(2)], ValueError, ["ndarray", "at 0"]),
    ],
)
def test_pairs(make, given, error, words):
    with pytest.raises(error) as raised:
        make().apply_gradients(given)
    assert_says(raised, ["`grads_and_vars`", "(gradient, variable) pairs", *words])


def test_immutable_arrays_are_sent_to_stateless_apply():
    optimizer = AdamW()
    optimizer.build([jnp.ones(3)])
    with pytest.raises(TypeError, match="stateless_apply"):
        optimizer.apply([jnp.ones(3)])


@pytest.mark.parametrize("wrong", [np.nan, -0.1, "fast", None, 1j])
def test_a_rate_that_returns_nonsense(wrong):
    variable = f4(3)
    optimizer = AdamW(lambda: wrong)
    optimizer.build([variable])
    with pytest.raises((ValueError, TypeError)):
        optimizer.apply([f4(3)])
    assert (variable == 1).all()
    assert optimizer.iterations == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", list("wbchts"))
@pytest.mark.parametrize("clip", [{}, {"clipvalue": 1.0}, {"global_clipnorm": 1.0}, {"clipnorm": 1.0}], ids=str)
def test_nonfinite_gradients(value, where, clip):
    variables, optimizer = built(**clip)
    bad = gradients(optimizer)
    bad[where] = copy.deepcopy(bad[where])
    bad[where][(0,) * bad[where].ndim] = value
    before = snapshot(variables, optimizer)

    optimizer.nonfinite = "raise"
    with pytest.raises(FloatingPointError, match=f"'{where}'"):
        optimizer.apply(bad)
    assert snapshot(variables, optimizer) == before

    optimizer.nonfinite = "skip"
    optimizer.apply(bad)
    assert snapshot(variables, optimizer)[0] == before[0]
    assert not optimizer.last_step.applied
    assert optimizer.skipped_steps == 1
    assert not np.isfinite(optimizer.last_step.gradient_norm)

    optimizer.nonfinite = "propagate"
    optimizer.apply(bad)
    assert optimizer.iterations == 2
    kind = libraries.look(variables[where])
    clipped_away = clip == {"clipvalue": 1.0} and np.isinf(value)
    assert np.isfinite(kind).all() == clipped_away
    # A NaN does not stay in the accumulator.
    assert np.isfinite(libraries.look(optimizer.state[f"gradient_accumulator/{where}"])).all()
