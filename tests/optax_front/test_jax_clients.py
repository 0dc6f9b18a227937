"""Packages that train with optax: a run that was saved and restored ends as one that was not, and as optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.jax_runs import assert_same

from adamw_numba.optax import adamw

X = jnp.linspace(-1, 1, 64).reshape(32, 2)
Y = jnp.sum(X**2, axis=1, keepdims=True)
OPTIONS = {
    "use_ema": True,
    "global_clipnorm": 0.5,
    "amsgrad": True,
    "gradient_accumulation_steps": 2,
    "nonfinite": "skip",
}
STEPS = 12


def flax_nnx(transformation, folder):
    """With Orbax between the halves, if there is a folder."""
    nnx = pytest.importorskip("flax.nnx")
    ocp = pytest.importorskip("orbax.checkpoint")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.tanh(self.hidden(x)))

    def start():
        model = Model(nnx.Rngs(0))
        return model, nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    model, optimizer = start()
    for i in range(STEPS):
        loss = step(model, optimizer)
        if folder and i == STEPS // 2:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder / "now", nnx.state((model, optimizer)))
                checkpointer.wait_until_finished()
                model, optimizer = start()
                nnx.update((model, optimizer), checkpointer.restore(folder / "now", nnx.state((model, optimizer))))
    return loss, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def flax_linen(transformation, folder):
    """With Flax's own bytes between the halves."""
    linen = pytest.importorskip("flax.linen")
    serialization = pytest.importorskip("flax.serialization")
    train_state = pytest.importorskip("flax.training.train_state")
    model = linen.Sequential([linen.Dense(8), linen.tanh, linen.Dense(1)])

    def start():
        params = model.init(jax.random.key(0), X)
        return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=transformation)

    @jax.jit
    def step(train):
        loss, grads = jax.value_and_grad(lambda params: jnp.mean((model.apply(params, X) - Y) ** 2))(train.params)
        return train.apply_gradients(grads=grads), loss

    train = start()
    for i in range(STEPS):
        train, loss = step(train)
        if folder and i == STEPS // 2:
            train = serialization.from_bytes(start(), serialization.to_bytes(train))
    return loss, train.params


def equinox(transformation, folder):
    """With Equinox's file of leaves between the halves."""
    eqx = pytest.importorskip("equinox")

    def start():
        model = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        return model, transformation.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2))(model)
        updates, state = transformation.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss

    model, state = start()
    for i in range(STEPS):
        model, state, loss = step(model, state)
        if folder and i == STEPS // 2:
            eqx.tree_serialise_leaves(folder / "now.eqx", (model, state))
            model, state = eqx.tree_deserialise_leaves(folder / "now.eqx", start())
    return loss, eqx.filter(model, eqx.is_array)


def numpyro(transformation, folder):
    """Going on from the state of the first half."""
    numpyro = pytest.importorskip("numpyro")
    infer = pytest.importorskip("numpyro.infer")
    autoguide = pytest.importorskip("numpyro.infer.autoguide")
    dist = numpyro.distributions

    def model(data):
        mean = numpyro.sample("mean", dist.Normal(0, 10))
        numpyro.sample("data", dist.Normal(mean, 1), obs=data)

    data = jnp.array([1.0, 2.0, 3.0])
    svi = infer.SVI(model, autoguide.AutoNormal(model), transformation, infer.Trace_ELBO())
    if not folder:
        found = svi.run(jax.random.key(0), STEPS, data, progress_bar=False)
        return found.losses[-1], found.params
    found = svi.run(jax.random.key(0), STEPS // 2, data, progress_bar=False)
    found = svi.run(jax.random.key(0), STEPS // 2, data, progress_bar=False, init_state=found.state)
    return found.losses[-1], found.params


CLIENTS = {"Flax NNX, Orbax": flax_nnx, "Flax Linen": flax_linen, "Equinox": equinox, "NumPyro": numpyro}


@pytest.mark.parametrize("client", CLIENTS)
def test_it_trains_as_with_optax(client):
    run = CLIENTS[client]
    loss, params = run(adamw(0.02, weight_decay=0.1), None)
    expected, theirs = run(optax.adamw(0.02, weight_decay=0.1), None)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert_same(params, theirs, params, length=0.02 * STEPS)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "everything"])
@pytest.mark.parametrize("client", CLIENTS)
def test_it_goes_on_from_what_was_saved(client, options, tmp_path):
    run, transformation = CLIENTS[client], adamw(0.02, **options)
    loss, params = run(transformation, None)
    resumed, after = run(transformation, tmp_path)
    assert float(loss) == float(resumed)
    jax.tree.map(np.testing.assert_array_equal, after, params)
