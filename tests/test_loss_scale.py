"""Dynamic loss scaling, side by side with Keras's."""

import copy
import pickle

import array_api_strict
import numpy as np
import pytest
from helpers.libraries import jax, jnp, keras, torch

from adamw_numba import AdamW, LossScaleOptimizer


def gradient(k, scale):
    """One that overflows now and then, scaled as the loss was."""
    return np.array([np.inf if k % 5 == 3 else 0.3, -0.1 * k, 0.5], np.float32) * np.float32(scale)


@pytest.mark.parametrize(
    "options", [{}, {"global_clipnorm": 0.3, "amsgrad": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_trace_of_keras(options):
    ours, theirs = np.ones(3, np.float32), keras.Variable(np.ones(3, np.float32))
    optimizer = LossScaleOptimizer(AdamW(0.1, **options), initial_scale=8.0, dynamic_growth_steps=3)
    reference = keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(0.1, **options), 8.0, 3)
    optimizer.build([ours])
    reference.build([theirs])
    for k in range(25):
        scale = optimizer.scale_loss(1.0)
        assert scale == float(reference.scale_loss(1.0))
        optimizer.apply([gradient(k, scale)])
        reference.apply([torch.tensor(gradient(k, scale))], [theirs])
        np.testing.assert_allclose(ours, theirs.value.detach().numpy(), rtol=0, atol=(k + 1) * (2e-5 * 0.1 + 2**-22))
        assert optimizer.iterations == int(reference.iterations)
    assert optimizer.skipped_steps == 5
    assert [tuple(v.shape) for v in optimizer.variables] == [tuple(v.shape) for v in reference.variables]
    config = reference.get_config()
    config["inner_optimizer"] = optimizer.get_config()["inner_optimizer"]
    config["name"] = optimizer.name
    assert optimizer.get_config() == config


def test_bounds():
    optimizer = LossScaleOptimizer(AdamW(), 4.0, 1, minimum_scale=2.0, maximum_scale=16.0)
    optimizer.build([np.ones(1)])
    scales = []
    for k in range(9):
        optimizer.apply([np.array([np.nan if k < 4 else 1.0])])
        scales.append(optimizer.dynamic_scale)
    assert scales == [2, 2, 2, 2, 4, 8, 16, 16, 16]


@pytest.mark.parametrize("jit", [False, True])
def test_stateless(jit):
    eager = np.ones(3, np.float32)
    reference = LossScaleOptimizer(AdamW(0.1), 8.0, 3)
    reference.build([eager])
    optimizer = LossScaleOptimizer(AdamW(0.1), 8.0, 3)
    variables = [jnp.ones(3)] if jit else [np.ones(3, np.float32)]
    optimizer.build(variables)
    state = optimizer.variables
    step = jax.jit(optimizer.stateless_apply) if jit else optimizer.stateless_apply
    for k in range(25):
        g = gradient(k, reference.dynamic_scale)
        reference.apply([g])
        variables, state = step(state, [jnp.asarray(g) if jit else g], variables)
        assert float(state[3]) == reference.dynamic_scale
        assert int(state[2]) == int(reference.variables[2])
    np.testing.assert_allclose(np.asarray(variables[0]), eager, rtol=1e-5)
    assert optimizer.dynamic_scale == 8.0


def test_saving_and_copies():
    variable = np.ones(3, np.float32)
    optimizer = LossScaleOptimizer(AdamW(0.1), 8.0, 3)
    optimizer.build([variable])
    for k in range(5):
        optimizer.apply([gradient(k, optimizer.dynamic_scale)])
    store = {}
    optimizer.save_own_variables(store)
    loaded_variable = variable.copy()
    loaded = LossScaleOptimizer.from_config(optimizer.get_config())
    loaded.build([loaded_variable])
    loaded.load_own_variables(store)
    copied_variable, copied = copy.deepcopy((variable, optimizer))
    pickled_variable, pickled = pickle.loads(pickle.dumps((variable, optimizer)))
    for k in range(5, 12):
        for each in (optimizer, loaded, copied, pickled):
            each.apply([gradient(k, each.dynamic_scale)])
    for other in (loaded_variable, copied_variable, pickled_variable):
        np.testing.assert_array_equal(other, variable)
    assert "dynamic_scale" in repr(optimizer)


def test_scale_loss_under_a_trace():
    optimizer = LossScaleOptimizer(AdamW(0.1), initial_scale=4.0, dynamic_growth_steps=2)
    optimizer.build([jnp.ones(3)])
    with pytest.raises(ValueError, match="optimizer_variables"):
        jax.jit(optimizer.scale_loss)(1.0)

    @jax.jit
    def step(p, state):
        g = jax.grad(lambda p: optimizer.scale_loss(p.sum(), state))(p)
        return optimizer.stateless_apply(state, [g], [p])

    p, state = jnp.ones(3), optimizer.variables
    for _ in range(6):
        (p,), state = step(p, state)
    assert float(state[3]) == 32
    np.testing.assert_allclose(np.asarray(state[6]), 1 - 0.9**6, rtol=1e-5)


def test_no_gradients_leave_the_scale_alone():
    optimizer = LossScaleOptimizer(AdamW(), initial_scale=8.0)
    optimizer.build([np.ones(2)])
    _, state = optimizer.stateless_apply(optimizer.variables, [], [np.ones(2)])
    assert float(state[3]) == 8


@pytest.mark.parametrize("index", [2, 3])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_loss_scale_that_cannot_be_written(index, elsewhere):
    variables = [np.ones(2), array_api_strict.ones(2)][: 1 + elsewhere]
    optimizer = LossScaleOptimizer(AdamW(0.1))
    optimizer.build(variables)
    optimizer.variables[index].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        optimizer.apply([np.ones(2), array_api_strict.ones(2)][: 1 + elsewhere])
    assert variables[0].tolist() == [1, 1]
    assert optimizer.iterations == 0


def test_a_loss_scale_of_zero():
    optimizer = LossScaleOptimizer(AdamW())
    optimizer.build([np.ones(2)])
    weights = [np.array(a) for a in optimizer.variables]
    weights[3][...] = 0
    for act in (
        lambda: optimizer.set_weights(weights),
        lambda: optimizer.stateless_apply(weights, [np.ones(2)], [np.ones(2)]),
        lambda: (optimizer.inner_optimizer.assign(optimizer.variables[3], 0.0), optimizer.apply([np.ones(2)])),
    ):
        with pytest.raises(ValueError, match="dynamic_scale"):
            act()
