"""Moments in 16 and 8 bits as variables of Keras: the bits of the optimizer of arrays, trained, saved and gone on with."""

import copy
import json
import pickle
import warnings

import keras
import numpy as np
import pytest
from helpers.keras_runs import IS_TORCH, fit, gradients_of, look, looked, model_of, only_jax, same, under, variables_of

import adamw_numba
from adamw_numba.keras import AdamW

MOMENTS = ("bfloat16", "8bit")
SHAPES = [(12, 64), (5,), (), (1000,)]
OPTIONS = {
    "plain": {},
    "many": {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2},
    "remainders": {"master_weights": "remainder"},
}
both_moments = pytest.mark.parametrize("moments", MOMENTS)


def stepped(optimizer, variables, first=0, last=4, dtype="float32"):
    for step in range(first, last):
        optimizer.apply(gradients_of(step, dtype, SHAPES), variables)
    return optimizer


def made(moments, dtype="float32", last=4, **options):
    variables = variables_of(dtype, SHAPES)
    optimizer = AdamW(0.01, moments=moments, seed=5, **options)
    optimizer.build(variables)
    return variables, stepped(optimizer, variables, 0, last, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
@both_moments
def test_bits_of_the_optimizer_of_arrays(moments, options, dtype):
    """On tensors of a list, in place; on JAX as a function of such arrays."""
    variables, optimizer = made(moments, dtype, **OPTIONS[options])
    arrays = [v.value.detach() if IS_TORCH else v.value for v in variables_of(dtype, SHAPES)]
    other = adamw_numba.AdamW(0.01, moments=moments, seed=5, **OPTIONS[options])
    other.build(arrays)
    state = other.variables
    for step in range(4):
        gradients = gradients_of(step, dtype, SHAPES)
        if IS_TORCH:
            other.apply(gradients)
        else:
            state, arrays = other.stateless_apply(state, gradients, arrays)[::-1]
    if not IS_TORCH:
        other.set_weights(state)
    same(variables, arrays)
    # Scales follow the rest, as masters do; everything else has Keras's order.
    found = dict(zip((v.path.rpartition("/")[2] for v in optimizer.variables), optimizer.variables, strict=True))
    for name, array in other.state.items():
        slot, _, position = name.partition("/")
        if position:
            np.testing.assert_array_equal(look(found[f"v{position}_{slot}"]), look(array))


def test_what_is_kept():
    for moments, kinds in (("bfloat16", ["bfloat16"] * 4), ("8bit", ["uint8", "float32", "float32", "uint8"])):
        _, optimizer = made(moments, last=0, amsgrad=True)
        own = [str(variable.dtype) for variable in optimizer.variables[2:]]
        assert own[:8] == [kind for kind in kinds for _ in range(2)]
        assert set(own[8:]) == {"float32"}
        shapes = [tuple(variable.shape) for variable in optimizer.variables[14:]]
        assert shapes == ([(3,), (3,), (4,), (4,)] if moments == "8bit" else [])


def test_constructor_and_config():
    optimizer = AdamW(moments="8bit", seed=7)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert (config["moments"], config["seed"]) == ("8bit", 7)
    other = AdamW.from_config(config)
    assert (other.moments, other.seed) == ("8bit", 7)
    assert not {"moments", "seed"} & AdamW().get_config().keys()  # where they are as Keras has them
    other.moments = "bfloat16"
    other.build(variables_of())
    with pytest.raises(ValueError, match="`moments` cannot change once the optimizer is built"):
        other.moments = "8bit"


@pytest.mark.parametrize(
    ("dtype", "master_weights"), [("float32", True), ("bfloat16", True), ("bfloat16", "remainder")]
)
@pytest.mark.parametrize("way", ["weights", "before build", "after build", "copy", "pickle"])
@both_moments
def test_gone_on_with(moments, way, dtype, master_weights):
    expected, whole = made(moments, dtype, master_weights=master_weights)
    variables, optimizer = made(moments, dtype, last=2, master_weights=master_weights)
    if way in ("copy", "pickle"):
        if way == "pickle" and not IS_TORCH:
            pytest.skip("variables of JAX are not pickled by Keras")
        go = copy.deepcopy if way == "copy" else lambda both: pickle.loads(pickle.dumps(both))
        variables, other = go((variables, optimizer))
    else:
        other, store = AdamW.from_config(optimizer.get_config()), {}
        optimizer.save_own_variables(store)
        if way == "before build":
            other.load_own_variables(store)
        other.build(variables)
        if way == "after build":
            other.load_own_variables(store)
        if way == "weights":
            other.set_weights([store[str(k)] for k in range(len(store))])
    stepped(other, variables, 2, 4, dtype)
    same(variables, expected)
    same(other.variables, whole.variables)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@both_moments
def test_files(moments, policy, tmp_path):
    """Also of a model that is compiled and trained by Keras, as a function on the JAX backend."""
    model = model_of(AdamW(0.01, moments=moments, seed=1), policy)
    losses = fit(model, 1)
    assert losses[-1] < 2
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "a.weights.h5")
    with under(policy):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    other = model_of(AdamW(0.01, moments=moments, seed=1), policy)
    other.load_weights(tmp_path / "a.weights.h5")
    assert (loaded.optimizer.moments, loaded.optimizer.seed) == (moments, 1)
    same(loaded.optimizer.variables, model.optimizer.variables)
    expected = fit(model, 1)
    for each in (loaded, other):
        assert fit(each, 1) == expected
        same(each.optimizer.variables, model.optimizer.variables)


@only_jax
@both_moments
def test_compiled_as_a_function(moments):
    import jax

    variables, optimizer = made(moments, last=0)
    state, values = [v.value for v in optimizer.variables], [v.value for v in variables]
    step = jax.jit(optimizer.stateless_apply, donate_argnums=0)
    for k in range(4):
        values, state = step(state, gradients_of(k, "float32", SHAPES), values)
    expected, whole = made(moments)
    for one, other in zip(looked(values), looked(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert [v.dtype for v in state] == [v.value.dtype for v in whole.variables]
    assert step._cache_size() == 1


@pytest.mark.parametrize(("first", "then"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_states_of_other_moments(first, then):
    """Numbers are taken, to the nearest; what has codes differs in the number of variables, which Keras skips."""
    _, optimizer = made(first)
    store = {}
    optimizer.save_own_variables(store)
    variables, other = made(then, last=0)
    other.load_own_variables(store)
    for one, two in zip(looked(optimizer.variables), looked(other.variables), strict=True):
        np.testing.assert_allclose(two, one, rtol=2**-8)
    stepped(other, variables, 4, 5)
    _, third = made("8bit", last=0)
    before = looked(third.variables)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        third.load_own_variables(store)
    assert any("Skipping variable loading" in str(each.message) for each in caught)
    for one, two in zip(before, looked(third.variables), strict=True):
        np.testing.assert_array_equal(one, two)


def weights(change):
    def act():
        _, optimizer = made("8bit", last=1)
        given = [keras.ops.convert_to_numpy(v.value) for v in optimizer.variables]
        optimizer.set_weights(change(given))

    return act


def built(dtype):
    def act():
        variables = [keras.Variable(np.ones(300, dtype), dtype=dtype, name="w")]
        optimizer = AdamW(moments="bfloat16")
        try:
            optimizer.build(variables)
        finally:
            assert not optimizer.built
            assert len(optimizer.variables) == 2

    return act


MISTAKES = {
    "moments": (lambda: AdamW(moments="4bit"), ValueError, ["`moments`", "'8bit'", "'4bit'"]),
    "moments of a wrong type": (lambda: AdamW(moments=8), ValueError, ["`moments`", "'8bit'", "=8"]),
    "seed": (lambda: AdamW(seed=2**32), ValueError, ["`seed`", "from 0 to 4294967295", "4294967296"]),
    "seed of a wrong type": (lambda: AdamW(seed="a"), ValueError, ["`seed`", "'a'"]),
    "numbers for codes": (weights(lambda given: [np.asarray(w, "float32") if w.ndim else w for w in given]), ValueError, ["`weights`", "_momentum", "float32", "expected codes", "uint8"]),
    "scales of another shape": (weights(lambda given: [*given[:-1], np.ones(5, "float32")]), ValueError, ["`weights`", "_velocity_scale", "(5,)", "(4,)"]),
    "given to an optimizer of arrays": (lambda: adamw_numba.interop.from_keras(made("8bit")[1]), ValueError, ["moments='8bit'", "expected 'float32'"]),
    "given numbers that it would round": (
        lambda: adamw_numba.interop.to_keras(plain(), made("bfloat16")[1]),
        ValueError,
        ["_momentum", "rounded to bfloat16"],
    ),
}  # fmt: skip
if IS_TORCH:  # where there are 64 bits without asking JAX for them
    MISTAKES["64 bits"] = built("float64"), ValueError, ["moments='bfloat16'", "'w'", "float64", "16 or 32"]


def plain():
    optimizer = adamw_numba.AdamW()
    optimizer.build(looked(variables_of(shapes=SHAPES)))
    optimizer.apply(looked(gradients_of(0, shapes=SHAPES)))
    return optimizer


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case):
    act, kind, expected = MISTAKES[case]
    with pytest.raises(kind) as caught:
        act()
    for part in expected:
        assert part in str(caught.value)
