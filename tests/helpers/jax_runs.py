"""What the tests of the optax front share: parameters, gradients that depend on them, steps, and how results compare."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 6


def params_of(dtype):
    """Two levels, a scalar, and a large parameter beside which a step is small."""
    random = np.random.default_rng(3)
    return {
        "layer": {"w": jnp.asarray(random.normal(size=(3, 4)), dtype), "b": jnp.zeros(4, dtype)},
        "scale": jnp.asarray(100.0, dtype),
    }


def gradients_at(params, step):
    return jax.tree.map(lambda p: (jnp.sin(3 * p + step) + 0.1).astype(p.dtype), params)


def one_step(transformation, params, state, step=0.0):
    updates, state = transformation.update(gradients_at(params, step), state, params)
    return optax.apply_updates(params, updates), state


def trained(transformation, params, steps=STEPS, jit=True):
    """The parameters after some steps, and the state."""
    state = transformation.init(params)

    def take(params, state, step):
        return one_step(transformation, params, state, step)

    step = jax.jit(take) if jit else take
    for i in range(steps):
        params, state = step(params, state, float(i))
    return params, state


def assert_same(ours, theirs, start, length=0.0):
    """Trees of equal structure and dtypes; float64 to 1e-12, float32 to 2e-5 of the way from the start.

    `length` is that of the way where it does not lead straight on. optax computes ``1 - b2**t`` in the precision of its
    arrays, and loses that much.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other, first in zip(*map(jax.tree.leaves, (ours, theirs, start)), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        way = max(length, float(np.abs(np.asarray(other) - np.asarray(first)).max(initial=0)))
        is_double = np.finfo(other.dtype).bits == 64
        allowed = 1e-12 * max(1, way) if is_double else 2e-5 * way
        if not is_double:
            # of two sums that are rounded at each step, differently
            allowed += STEPS * np.spacing(np.abs(np.asarray(other)).max(initial=0))
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=allowed)
