"""Steps of the optax front over four devices, which a process has to ask for before it starts.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m helpers.four_devices

Runs every case, and prints as JSON what went wrong in each.
"""

import json
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from adamw_numba.optax import adamw

from .jax_runs import STEPS, assert_same, gradients_at, one_step, trained

OPTIONS = {"amsgrad": True, "use_ema": True, "global_clipnorm": 0.5, "gradient_accumulation_steps": 2}
THEIRS = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.05))


def params_of():
    random = np.random.default_rng(1)
    return {"w": jnp.asarray(random.normal(size=(8, 3)), jnp.float32), "b": jnp.zeros(4)}


def mesh(kind=jax.sharding.AxisType.Auto):
    return jax.make_mesh((4,), ("d",), axis_types=(kind,))


def sharded(kind=jax.sharding.AxisType.Auto):
    """By their first axis, in the words in which JAX itself has it after a step: of an explicit mesh, of every axis."""
    place, is_explicit = mesh(kind), kind == jax.sharding.AxisType.Explicit
    others = [[None] * (p.ndim - 1) * is_explicit for p in params_of().values()]
    places = [NamedSharding(place, P("d", *other)) for other in others]
    return dict(zip(params_of(), jax.device_put([*params_of().values()], places), strict=True))


def lies_as(state, params):
    """Every tree of the state has the places of the parameters."""
    for field in ("mu", "nu", "nu_max", "average", "accumulator"):
        tree = getattr(state, field)
        if tree is not None:
            for one, p in zip(*map(jax.tree.leaves, (tree, params)), strict=True):
                assert one.sharding == p.sharding, (field, one.sharding, p.sharding)
                assert one.committed == p.committed, field


def compiled_once(transformation, params):
    state = transformation.init(params)
    lies_as(state, params)
    step = jax.jit(partial(one_step, transformation), donate_argnums=(0, 1))
    for i in range(STEPS):
        params, state = step(params, state, float(i))
    assert step._cache_size() == 1, step._cache_size()
    return params


def shards_of_named_sharding():
    expected, _ = trained(THEIRS, params_of())
    assert_same(compiled_once(adamw(0.05, global_clipnorm=0.5), sharded()), expected, params_of())


def shards_with_every_option():
    expected, _ = trained(adamw(0.05, **OPTIONS), params_of())
    assert_same(compiled_once(adamw(0.05, **OPTIONS), sharded()), expected, params_of())


def shards_of_an_explicit_mesh():
    # XLA adds up the parts of a norm, so it needs no mesh in a context.
    params = sharded(jax.sharding.AxisType.Explicit)
    expected, _ = trained(optax.adamw(0.05), params_of())
    assert_same(compiled_once(adamw(0.05), params), expected, params_of())


def a_device_of_its_own():
    params = jax.device_put(params_of(), jax.devices()[2])
    assert all(leaf.sharding == SingleDeviceSharding(jax.devices()[2]) for leaf in jax.tree.leaves(params))
    compiled_once(adamw(0.05, **OPTIONS), params)


def parameters_that_were_moved():
    """The state, which nobody moved, does not hold the step where the parameters were."""
    params, transformation = params_of(), adamw(0.05, **OPTIONS)
    state = transformation.init(params)
    lies_as(state, params)
    moved = jax.device_put(params, jax.devices()[1])
    grads = gradients_at(moved, 0.0)
    updates, _ = jax.jit(transformation.update)(grads, state, moved)
    assert {leaf.device for leaf in jax.tree.leaves(updates)} == {jax.devices()[1]}


def inside_shard_map():
    """Each device has a part of the batch, and the gradients are averaged."""
    data = jnp.asarray(np.random.default_rng(2).normal(size=(8, 3)), jnp.float32)

    def run(transformation):
        def step(params, state, x):
            grads = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2))(params)
            updates, state = transformation.update(jax.lax.pmean(grads, "d"), state, params)
            return optax.apply_updates(params, updates), state

        specs = P(), P(), P("d")
        step = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=specs, out_specs=(P(), P()), check_vma=False))
        params = {"w": jnp.ones(3), "b": jnp.zeros(())}
        state = transformation.init(params)
        for _ in range(STEPS):
            params, state = step(params, state, data)
        return params

    start = {"w": jnp.ones(3), "b": jnp.zeros(())}
    assert_same(run(adamw(0.05, global_clipnorm=0.5)), run(THEIRS), start, length=0.05 * STEPS)


def jitted_init_onto_shards():
    """With the shardings of `eval_shape` and `tree.map_params`, as large models are made."""
    params, transformation = sharded(), adamw(0.05)
    shapes = jax.eval_shape(transformation.init, params)
    replicated = NamedSharding(mesh(), P())
    places = optax.tree.map_params(
        transformation,
        lambda _, p: p.sharding,
        shapes,
        params,
        transform_non_params=lambda _: replicated,
    )
    state = jax.jit(transformation.init, out_shardings=places)(params)
    lies_as(state, params)


def large(*places):
    """A matrix of whole blocks, and a vector: as it is, or over devices."""
    params = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(64, 32)), jnp.float32), "b": jnp.zeros(4)}
    return dict(zip(params, jax.device_put([*params.values()], [*places]), strict=True)) if places else params


def fewer_bits(params):
    """Those of one device, and steps compiled once."""
    for moments in ("bfloat16", "8bit"):
        transformation, places = adamw(0.05, moments=moments), [p.sharding for p in jax.tree.leaves(params)]
        found = []
        for own in (large(), params):
            state, update = transformation.init(own), jax.jit(transformation.update, donate_argnums=1)
            lies_as(state, own)
            for k in range(STEPS):
                grads = gradients_at(large(), float(k))
                if own is params:
                    grads = jax.device_put(grads, dict(zip(sorted(grads), places, strict=True)))
                state = update(grads, state, own)[1]
            found.append(jax.tree.leaves(state))
            assert update._cache_size() == len(found), update._cache_size()  # of both together
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def fewer_bits_over_shards():
    fewer_bits(large(NamedSharding(mesh(), P("d")), NamedSharding(mesh(), P("d"))))


def fewer_bits_of_an_explicit_mesh():
    place = mesh(jax.sharding.AxisType.Explicit)
    fewer_bits(large(NamedSharding(place, P("d", None)), NamedSharding(place, P("d"))))


def fewer_bits_on_a_device_of_its_own():
    fewer_bits(jax.device_put(large(), jax.devices()[2]))


def fewer_bits_that_begin_under_jit():
    """With shardings that say nothing of scales, which are not like the parameters."""
    params, transformation = (
        large(NamedSharding(mesh(), P("d")), NamedSharding(mesh(), P("d"))),
        adamw(0.05, moments="8bit"),
    )
    shapes, everywhere = jax.eval_shape(transformation.init, params), NamedSharding(mesh(), P())
    places = optax.tree.map_params(
        transformation, lambda _, p: p.sharding, shapes, params, transform_non_params=lambda _: everywhere
    )
    lies_as(jax.jit(transformation.init, out_shardings=places)(params), params)


CASES = [
    fewer_bits_over_shards,
    fewer_bits_of_an_explicit_mesh,
    fewer_bits_on_a_device_of_its_own,
    fewer_bits_that_begin_under_jit,
    shards_of_named_sharding,
    shards_with_every_option,
    shards_of_an_explicit_mesh,
    a_device_of_its_own,
    parameters_that_were_moved,
    inside_shard_map,
    jitted_init_onto_shards,
]

if __name__ == "__main__":
    found = {}
    for case in CASES:
        try:
            case()
            found[case.__name__] = ""
        except Exception:
            found[case.__name__] = traceback.format_exc()
    print(json.dumps(found))
