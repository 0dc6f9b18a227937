"""Gradients and options at the ends of what a float holds."""

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import libraries
from helpers.training import built


def test_numbers_at_the_ends():
    """Norms of numbers whose squares do not fit; an epsilon that float32 lacks."""
    for value in (1.7e308, 1e-200):
        variable = np.ones(4)
        optimizer = built([variable, other := np.ones(1)], global_clipnorm=1e-250, nonfinite="raise")
        optimizer.apply([np.full(4, value), np.full(1, value)])
        assert np.isfinite(variable).all()
        assert np.isfinite(other).all()
        assert optimizer.last_step.gradient_norm >= value
    variable = np.ones(2, np.float32)
    built([variable], epsilon=1e-60).apply([np.zeros(2, np.float32)])
    assert np.isfinite(variable).all()
    strict = array_api_strict.ones(2)
    built([strict, array_api_strict.ones(2)], global_clipnorm=1.0).apply([array_api_strict.ones(2) * 1e200] * 2)
    np.testing.assert_allclose(np.asarray(strict), 0.8996, rtol=1e-4)
    for jit in (jax.jit, lambda f: f):
        optimizer = built([jnp.ones(1), jnp.ones(1)], global_clipnorm=1.0, nonfinite="skip")
        for value, expected in ((3e37, 0.8996), (3e38, 0.9996)):  # the last one is clipped to what XLA takes for 0
            gradients = [jnp.full(1, value), jnp.full(1, value)]
            new, state = jit(optimizer.stateless_apply)(optimizer.variables, gradients, [jnp.ones(1)] * 2)
            assert int(state[0]) == 1
            np.testing.assert_allclose(np.asarray(new[0]), expected, rtol=1e-4)


@pytest.mark.parametrize("make", [libraries.numpy, libraries.strict])
def test_without_momentum_the_first_moment_is_the_gradient(make):
    """A difference from a larger number would lose the last bits of a small gradient."""
    optimizer = built([make(np.ones(3), "float64")], beta_1=0.0)
    for gradient in ([1e3, -1e3, 1e6], [1.1, 1e-9, -0.3]):
        optimizer.apply([make(gradient, "float64")])
        np.testing.assert_array_equal(libraries.look(optimizer.state["momentum/0"]), gradient)
