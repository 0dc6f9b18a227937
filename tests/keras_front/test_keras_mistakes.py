"""Every mistake has an error that says what was expected, and nothing is changed by it."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers.keras_runs import gradients_of, looked, model_of, only_jax, only_torch, same, variables_of
from keras import ops

import adamw_numba
from adamw_numba.keras import AdamW

CONSTRUCTION = {
    "unknown": (lambda: AdamW(lr=0.1), ValueError, "`lr` is `learning_rate` here"),
    "negative rate": (lambda: AdamW(-0.1), ValueError, "`learning_rate` must be a float >= 0"),
    "no decay": (lambda: AdamW(weight_decay=None), ValueError, "`weight_decay` must be a float >= 0"),
    "beta": (lambda: AdamW(beta_1=1.0), ValueError, "`beta_1` must be a float in"),
    "two clips": (lambda: AdamW(clipnorm=1.0, clipvalue=1.0), ValueError, "Only one of"),
    "clip of 0": (lambda: AdamW(clipnorm=0.0), ValueError, "`clipnorm` must be a finite float > 0, or None"),
    "accumulation": (lambda: AdamW(gradient_accumulation_steps=1), ValueError, "must be an integer >= 2"),
    "nonfinite": (lambda: AdamW(nonfinite="ignore"), ValueError, "must be one of 'propagate', 'skip', 'raise'"),
    "variables first": (lambda: AdamW(variables_of()), ValueError, "Arrays go to `build`"),
    "a rate of the step": (lambda: AdamW(lambda step: 0.1), ValueError, "which takes the step; expected a keras"),
    "a schedule of ours": (
        lambda: AdamW(adamw_numba.schedules.CosineDecay(0.1, 9)), ValueError, "expected a keras.optimizers.schedules"
    ),
    "overrides": (
        lambda: AdamW.from_config({"overrides": [{"names": ["a"]}]}), ValueError, "expected the names of variables"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_constructing(case):
    make, error, match = CONSTRUCTION[case]
    with pytest.raises(error, match=match):
        make()


def test_decay_is_ignored_as_in_keras():
    with pytest.warns(UserWarning, match="`decay` is no longer supported"):
        AdamW(decay=0.1)


@only_torch
def test_a_rate_that_is_a_variable_of_keras():
    rate = keras.Variable(0.25, trainable=False)
    optimizer, variables = AdamW(lambda: rate, weight_decay=0.0), variables_of()
    before = looked(variables)
    optimizer.apply(gradients_of(0), variables)
    for new, old in zip(looked(variables), before, strict=True):
        np.testing.assert_allclose(np.abs(new - old), 0.25, rtol=1e-3)


@only_torch
def test_a_floatx_that_numpy_lacks():
    keras.config.set_floatx("bfloat16")
    try:
        with pytest.raises(TypeError, match=r"learning_rate is in bfloat16, as Keras's floatx is; expected another"):
            AdamW().build(variables_of())
    finally:
        keras.config.set_floatx("float32")


BUILDING = {
    "nothing": (list, ValueError, "`variables` is empty"),
    "one variable": (lambda: variables_of()[0], TypeError, "expected a list of keras.Variable"),
    "arrays": (lambda: [np.ones(2)], TypeError, "of type ndarray at 0; expected a keras.Variable"),
    "tensors": (lambda: [variables_of()[0].value], TypeError, "are trained by adamw_numba.AdamW"),
    "twice": (lambda: 2 * variables_of()[:1], ValueError, "more than once"),
}


@pytest.mark.parametrize("case", BUILDING)
def test_building(case):
    make, error, match = BUILDING[case]
    optimizer, good = AdamW(0.1), variables_of()
    with pytest.raises(error, match=match):
        optimizer.build(make())
    assert not optimizer.built
    assert len(optimizer.variables) == 2
    optimizer.apply(gradients_of(0), good)


def test_integers():
    optimizer = AdamW()
    with pytest.raises(TypeError, match="'count' has dtype int32"):
        optimizer.build([keras.Variable(np.arange(3), dtype="int32", trainable=False, name="count")])
    assert not optimizer.built


@only_torch
def test_variables_that_share_memory():
    """Found when all of the state is there already, which is taken back."""
    first, second = (keras.Variable(np.ones(4, "float32"), name=name) for name in "ab")
    second.value.data = first.value.data[:4]
    optimizer = AdamW()
    with pytest.raises(ValueError, match="'a' and variable 'b' share memory"):
        optimizer.build([first, second])
    assert not optimizer.built
    assert len(optimizer.variables) == 2
    optimizer.amsgrad = True  # is not fixed yet
    optimizer.build([first])
    assert len(optimizer.variables) == 5


def test_patterns_that_match_nothing():
    optimizer = AdamW()
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    with pytest.warns(UserWarning, match=r"\['bias'\] matches none of the variables"):
        optimizer.build(variables_of())


def changed(gradients, k, value):
    return [value if i == k else g for i, g in enumerate(gradients)]


STEPS = {
    "shape": (lambda g, v: (changed(g, 1, ops.ones((3,))), v), ValueError, r"gradient of 'v1' has shape \(3,\)"),
    "array": (lambda g, v: (changed(g, 1, "no"), v), TypeError, "is 'no' of type str; expected an array"),
    "count": (lambda g, v: (g[:2], v), ValueError, "`grads` holds 2 gradients; expected 3"),
    "count alone": (lambda g, v: (g[:2], None), ValueError, "`grads` holds 2 gradients; expected 3"),
    "none": (lambda g, v: ([None] * 3, v), ValueError, "No gradients provided for any variable"),
    "unknown": (lambda g, v: (g, [*v[:2], keras.Variable(1.0, name="new")]), ValueError, "unknown variable 'new'"),
    "twice": (lambda g, v: (g, [v[0], v[1], v[1]]), ValueError, "more than once"),
}


@pytest.mark.parametrize("case", STEPS)
def test_stepping(case):
    make, error, match = STEPS[case]
    variables, optimizer = variables_of(), AdamW(0.1)
    optimizer.apply(gradients_of(0), variables)
    everything = [*variables, *optimizer.variables]
    before = looked(everything)
    with pytest.raises(error, match=match):
        optimizer.apply(*make(gradients_of(1), variables))
    same(everything, before)
    optimizer.apply(gradients_of(1), variables)
    assert int(optimizer.iterations) == 2


@only_torch
def test_gradients_of_another_kind():
    import torch

    variables, optimizer = variables_of(), AdamW(0.1)
    optimizer.build(variables)
    for gradient in (np.ones(4, "float32"), torch.ones(4).to_sparse(), torch.ones(4, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="the gradient of 'v1'"):
            optimizer.apply(changed(gradients_of(0), 1, gradient))


LATER = {
    "fixed": (lambda o: setattr(o, "amsgrad", True), ValueError, "`amsgrad` cannot change"),
    "range": (lambda o: setattr(o, "beta_2", 2.0), ValueError, "`beta_2` must be"),
    "rate": (lambda o: setattr(o, "learning_rate", -1.0), ValueError, "`learning_rate` must be"),
    "no rate": (lambda o: setattr(o, "learning_rate", float("nan")), ValueError, "`learning_rate` must be"),
    "exclusion": (lambda o: o.exclude_from_weight_decay(var_names=["b"]), ValueError, "before the optimizer is built"),
    "override": (lambda o: o.override(var_names=["b"], beta_1=0.5), ValueError, "before the optimizer is built"),
    "text among weights": (
        lambda o: o.set_weights([*looked(o.variables)[:-1], np.array("a")]), (TypeError, ValueError), "Invalid dtype|conver"
    ),
    "weights": (lambda o: o.set_weights(looked(o.variables)[:-1]), ValueError, "`weights` holds 7 arrays; expected 8"),
    "a weight": (
        lambda o: o.set_weights([*looked(o.variables)[:-1], np.ones(9)]), ValueError, r"v2_velocity has shape \(9,\)"
    ),
    "unknown": (lambda o: o.finalize_variable_values([keras.Variable(1.0, name="new")]), ValueError, "'new'"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_after_building(case):
    act, error, match = LATER[case]
    optimizer = AdamW(0.1, use_ema=False) if case != "unknown" else AdamW(0.1, use_ema=True)
    optimizer.apply(gradients_of(0), variables_of())
    before = looked(optimizer.variables)
    with pytest.raises(error, match=match):
        act(optimizer)
    same(optimizer.variables, before)


BEFORE = {
    "step": (lambda o: o.apply(gradients_of(0)), ValueError, r"Call `optimizer.build\(trainable_variables\)` first"),
    "weights": (lambda o: o.set_weights([]), ValueError, "not yet been built"),
    "no override": (lambda o: o.override(var_names=["a"]), TypeError, "expected some of"),
    "trainable": (lambda o: o.override(var_names=["a"], trainable=False), TypeError, "'trainable'"),
    "for nobody": (lambda o: o.override(beta_1=0.5), ValueError, "is for no variables"),
    "pattern": (lambda o: o.exclude_from_weight_decay(var_names=["("]), ValueError, "is no regular expression"),
    "names": (lambda o: o.exclude_from_weight_decay(["bias"]), TypeError, "expected a keras.Variable"),
    "no step": (lambda o: o.stateless_apply([], [], []), ValueError, "must be built"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_before_building(case):
    act, error, match = BEFORE[case]
    optimizer = AdamW(0.1)
    with pytest.raises(error, match=match):
        act(optimizer)
    assert not optimizer.built


def test_a_number_in_the_place_of_a_schedule():
    optimizer = AdamW(keras.optimizers.schedules.CosineDecay(0.1, 10))
    with pytest.raises(TypeError, match="in whose place Keras keeps no number"):
        optimizer.learning_rate = 0.1
    number = AdamW(0.1)
    number.learning_rate = keras.optimizers.schedules.CosineDecay(0.5, 10)
    variables = variables_of()
    before = looked(variables)
    number.apply(gradients_of(0), variables)
    np.testing.assert_allclose(np.abs(looked(variables)[1] - before[1]), 0.5, rtol=0.02)
    assert len(number.variables) == 7


def test_a_plain_adamw():
    """Is refused by Keras itself: see docs/keras.md."""
    with pytest.raises(ValueError, match="Could not interpret optimizer identifier"):
        model_of(adamw_numba.AdamW())


@only_jax
def test_under_a_trace():
    import jax

    optimizer = AdamW(0.1, nonfinite="raise")
    variables = variables_of()
    optimizer.build(variables)
    state, values = [v.value for v in optimizer.variables], [v.value for v in variables]
    with pytest.raises(ValueError, match="nonfinite='raise' cannot look at values under a trace"):
        jax.jit(optimizer.stateless_apply)(state, gradients_of(0), values)
    with pytest.raises(NotImplementedError, match="needs Keras's torch backend"):
        optimizer.update_step(gradients_of(0)[0], variables[0], 0.1)


@pytest.mark.slow
def test_another_backend():
    code = "import keras\nfrom adamw_numba.keras import AdamW\nAdamW()"
    environment = os.environ | {"KERAS_BACKEND": "numpy"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "RuntimeError: Keras's backend is 'numpy'; expected one of ['torch', 'jax']" in ran.stderr


@pytest.mark.slow
def test_without_keras():
    code = "import sys\nsys.modules['keras'] = None\nimport adamw_numba.keras"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: adamw_numba.keras needs Keras: pip install 'adamw-numba[keras]'" in ran.stderr
