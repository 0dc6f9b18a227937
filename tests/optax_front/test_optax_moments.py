"""Moments in 16 and 8 bits as leaves of trees: the bits of the optimizer of arrays, wherever a step can be taken."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adamw_numba import AdamW
from adamw_numba.optax import adamw

MOMENTS = ("bfloat16", "8bit")
SHAPES = {"a": (12, 64), "b": (5,), "c": (), "d": {"e": (1000,)}}
STEPS = 5
FIELDS = {"mu": "momentum", "nu": "velocity", "mu_scale": "momentum_scale", "nu_scale": "velocity_scale"}
OPTIONS = {
    "defaults": {},
    "norm": {"amsgrad": True, "use_ema": True, "global_clipnorm": 0.5},
    "window": {"gradient_accumulation_steps": 2},
    "value": {"nesterov": True, "clipvalue": 0.3, "nonfinite": "skip"},
}
both_moments = pytest.mark.parametrize("moments", MOMENTS)


def values(seed, dtype="float32", shapes=SHAPES):
    random = np.random.default_rng(seed)

    def drawn(shape):
        parts = random.standard_normal((2, *shape))
        return jnp.asarray(parts[0] + 1j * parts[1] if dtype == "complex64" else parts[0], dtype)

    return jax.tree.map(drawn, shapes, is_leaf=lambda shape: isinstance(shape, tuple))


def stepped(transformation, params, start=0, stop=STEPS, state=None, update=None):
    state, update = state or transformation.init(params), update or jax.jit(transformation.update)
    for step in range(start, stop):
        updates, state = update(values(1 + step, params["b"].dtype.name), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def image(tree):
    return [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def moments_of(state):
    """The bits of the moments by the names that the optimizer of arrays has for them."""
    found = {}
    for field, ours in FIELDS.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(state, field))[0]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found[f"{ours}/{name}"] = np.asarray(leaf).tobytes()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("options", OPTIONS)
@both_moments
def test_bits_of_the_optimizer_of_arrays(moments, options, dtype):
    """As a function of JAX; and by compiled kernels, where no norm, which adds in another order, comes into it."""
    options, start = OPTIONS[options], values(0, dtype)
    words = {"moments": moments, "seed": 3, **options}
    theirs = {"epsilon": 1e-8, "epsilon_mode": "corrected", "weight_decay": 1e-4, "master_weights": False} | words
    _, state = stepped(adamw(0.01, **words), start)
    optimizer, params = AdamW(0.01, **{key: value for key, value in theirs.items() if key != "nonfinite"}), start
    optimizer.build(params)
    arrays, step = optimizer.variables, jax.jit(optimizer.stateless_apply)
    compiled, live = AdamW(0.01, **theirs), jax.tree.map(np.array, start)
    compiled.build(live)
    for k in range(STEPS):
        params, arrays = step(arrays, values(1 + k, dtype), params)
        compiled.apply(jax.tree.map(np.array, values(1 + k, dtype)))
    found, named = moments_of(state), dict(zip(optimizer.variable_names, arrays, strict=True))
    assert {name: np.asarray(named[name]).tobytes() for name in found} == found
    assert named["momentum/a"].dtype.itemsize < (8 if dtype == "complex64" else 4)
    if dtype == "float32" and "global_clipnorm" not in options:
        for name, bits in found.items():
            word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[compiled.state[name].itemsize]
            apart = np.abs(
                compiled.state[name].reshape(-1).view(word).astype(int) - np.frombuffer(bits, word).astype(int)
            )
            # Of the sum of two products XLA rounds one or the other together with the sum, in one loop like this and
            # in the next like that.
            assert apart.max() <= (4 if word is np.uint32 else 1), name
            assert np.count_nonzero(apart) <= (apart.size if word is np.uint32 else 0.01 * apart.size), name


@both_moments
def test_what_is_kept(moments):
    """Variables of less than a block stay as they are in 8 bits; what is not trained always does."""
    params = values(0) | {"count": jnp.arange(3), "of 16 bits": jnp.ones(512, "bfloat16")}
    state = adamw(0.1, moments=moments, amsgrad=True).init(params)
    kept = jax.tree.map(lambda leaf: leaf.dtype.name, state.mu)
    small, large = ("float32", "uint8") if moments == "8bit" else ("bfloat16", "bfloat16")
    assert kept == {"a": large, "b": small, "c": small, "d": {"e": large}, "count": "int32", "of 16 bits": large}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.nu_max)} == {"float32", "int32"}
    scales = {"a": (3,), "b": None, "c": None, "d": {"e": (4,)}, "count": None, "of 16 bits": (2,)}
    for tree in (state.mu_scale, state.nu_scale):
        found = tree and jax.tree.map(lambda x: x if x is None else x.shape, tree, is_leaf=lambda x: x is None)
        assert found == (scales if moments == "8bit" else None)


@both_moments
def test_where_steps_are_taken(moments):
    """Compiled one by one is the measure: in a loop, with donated buffers, and gone on with from a checkpoint."""
    start, transformation = values(0), adamw(0.01, moments=moments, seed=1)
    params, state = stepped(transformation, start)
    expected = image((params, state))

    gradients = jax.tree.map(lambda *each: jnp.stack(each), *(values(1 + step) for step in range(STEPS)))

    def body(carry, grads):
        updates, state = transformation.update(grads, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    looped, _ = jax.jit(lambda: jax.lax.scan(body, (start, transformation.init(start)), gradients))()
    assert moments_of(looped[1]) == moments_of(state)

    donated, own = jax.jit(transformation.update, donate_argnums=1), jax.jit(transformation.init)(start)
    assert image(stepped(transformation, start, state=own, update=donated)) == expected

    params, state = stepped(transformation, start, stop=2)
    leaves, form = jax.tree.flatten(state)
    leaves = pickle.loads(pickle.dumps([np.asarray(leaf) for leaf in leaves]))
    again = form.unflatten(map(jnp.asarray, leaves))
    assert image(stepped(transformation, params, 2, state=again)) == expected


@both_moments
def test_orbax(moments, tmp_path):
    """Restored into what `eval_shape` says of a state, also of leaves without scales."""
    ocp = pytest.importorskip("orbax.checkpoint")
    start, transformation = values(0), adamw(0.01, moments=moments)
    params, state = stepped(transformation, start, stop=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "2", (params, state))
        checkpointer.wait_until_finished()
        params, again = checkpointer.restore(
            tmp_path / "2", jax.eval_shape(lambda: (start, transformation.init(start)))
        )
    assert image(again) == image(state)
    assert image(stepped(transformation, params, 2, state=again)) == image(stepped(transformation, start))


@both_moments
def test_many_at_once(moments):
    """Each of a batch as if alone, with a seed of its own."""
    seeds, starts = jnp.arange(3), [values(10 * k) for k in range(3)]

    def run(seed, params):
        transformation = adamw(0.01, moments=moments, seed=seed)
        state = transformation.init(params)
        for step in range(3):
            _, state = transformation.update(values(1 + step), state, params)
        return state

    found = jax.jit(jax.vmap(run))(seeds, jax.tree.map(lambda *each: jnp.stack(each), *starts))
    each = [moments_of(jax.tree.map(lambda leaf, k=k: leaf[k], found)) for k in range(3)]
    assert each == [moments_of(jax.jit(run, static_argnums=0)(k, start)) for k, start in enumerate(starts)]
    assert each[0] != each[1]


@both_moments
def test_with_what_optax_wraps_around(moments):
    expected = moments_of(stepped(adamw(0.01, moments=moments, seed=7), values(0))[1])
    injected = optax.inject_hyperparams(adamw, static_args=("b1", "b2"))(0.01, moments=moments, seed=7)  # else rounded
    assert moments_of(stepped(injected, values(0))[1].inner_state) == expected
    chained = optax.chain(optax.identity(), adamw(0.01, moments=moments, seed=7))
    state = stepped(chained, values(0))[1]
    assert moments_of(state[1]) == expected
    labels = {"a": "x", "b": "y", "c": "x", "d": "y"}
    parted = optax.multi_transform({key: adamw(0.01, moments=moments, seed=7) for key in "xy"}, labels)
    inner = stepped(parted, values(0))[1].inner_states
    assert moments_of(inner["x"].inner_state) | moments_of(inner["y"].inner_state) == expected
    nobody = optax.multi_transform({key: adamw(0.01, moments=moments, seed=7) for key in "xy"}, "x")
    before, after = (stepped(nobody, values(0), stop=stop)[1].inner_states for stop in (0, STEPS))
    assert moments_of(after["x"].inner_state) == expected
    assert jax.tree.structure(after) == jax.tree.structure(before)
    looked = optax.tree.map_params(chained, lambda leaf, p: leaf.shape == p.shape, state, values(0))[1]
    assert all(jax.tree.leaves((looked.mu, looked.nu)))
    assert image((looked.count, looked.mu_scale)) == image((state[1].count, state[1].mu_scale))


def test_a_step_that_is_skipped():
    """Leaves the state as it is, and the noise of the next step as if it had not been."""
    start, transformation = values(0), adamw(0.01, moments="8bit", nonfinite="skip")
    _, state = stepped(transformation, start, stop=2)
    bad = jax.tree.map(lambda g: g * jnp.nan, values(3))
    _, skipped = jax.jit(transformation.update)(bad, state, start)
    assert int(skipped.skipped) == 1
    assert moments_of(skipped) == moments_of(state)
    again = stepped(transformation, start, 2, 3, skipped)[1]
    assert moments_of(again) == moments_of(stepped(transformation, start, 2, 3, state)[1])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, ("float32", "float32")),
        ({"mu_dtype": "float32", "nu_dtype": jnp.float32}, ("float32", "float32")),
        ({"mu_dtype": "bfloat16"}, ("bfloat16", "float32")),
        ({"mu_dtype": jnp.bfloat16, "nu_dtype": "float32"}, ("bfloat16", "float32")),
        ({"mu_dtype": jnp.bfloat16, "nu_dtype": "bfloat16"}, ("bfloat16", "bfloat16")),
        ({"mu_dtype": "bfloat16", "nu_dtype": "bfloat16", "moments": "bfloat16"}, ("bfloat16", "bfloat16")),
    ],
)
def test_dtypes(given, kept):
    state = stepped(adamw(0.01, **given), values(0))[1]
    assert (state.mu["a"].dtype.name, state.nu["a"].dtype.name) == kept
    if kept[1] == "bfloat16":
        assert moments_of(state) == moments_of(stepped(adamw(0.01, moments="bfloat16"), values(0))[1])


def replaced(moments, **trees):
    def act():
        params, transformation = values(0), adamw(0.1, moments=moments)
        state = transformation.init(params)
        state = state._replace(**{field: change(getattr(state, field)) for field, change in trees.items()})
        transformation.update(params, state, params)

    return act


def wide(tree):
    return jax.tree.map(lambda leaf: leaf.astype("float32"), tree)


MISTAKES = {
    "nu_dtype alone": (lambda: adamw(0.1, nu_dtype="bfloat16"), ValueError, ["`mu_dtype` is None", "`nu_dtype` is 'bfloat16'", "for both"]),
    "nu_dtype and another": (lambda: adamw(0.1, mu_dtype="float16", nu_dtype="bfloat16"), ValueError, ["'float16'", "'bfloat16'", "for both"]),
    "nu_dtype of 16 bits": (lambda: adamw(0.1, nu_dtype="float16"), ValueError, ["`nu_dtype` is 'float16'", "None or float32"]),
    "nu_dtype of integers": (lambda: adamw(0.1, nu_dtype="uint8"), ValueError, ["`nu_dtype` is 'uint8'", "real numbers"]),
    "nu_dtype that is none": (lambda: adamw(0.1, nu_dtype="8bit"), TypeError, ["`nu_dtype` is '8bit'", "expected a dtype"]),
    "both ways": (lambda: adamw(0.1, mu_dtype="float32", moments="8bit"), ValueError, ["`mu_dtype` is 'float32'", "moments='8bit'", "None for both"]),
    "moments": (lambda: adamw(0.1, moments="4bit"), ValueError, ["`moments`", "'8bit'", "'4bit'"]),
    "moments of a wrong type": (lambda: adamw(0.1, moments=8), ValueError, ["`moments`", "'8bit'", "8"]),
    "seed": (lambda: adamw(0.1, seed=-1), ValueError, ["`seed`", "from 0 to 4294967295", "-1"]),
    "seeds": (lambda: adamw(0.1, seed=jnp.arange(2)), ValueError, ["`seed`", "(2,)"]),
    "seed of a wrong type": (lambda: adamw(0.1, seed=0.5), ValueError, ["`seed`", "integer", "0.5"]),
    "state of float32": (replaced("bfloat16", mu=wide), ValueError, ["mu at 'a'", "float32", "expected bfloat16", "moments='bfloat16'"]),
    "state of 16 bits": (replaced("8bit", nu=lambda tree: tree | {"a": jnp.zeros((12, 64), "bfloat16")}), ValueError, ["nu at 'a'", "bfloat16", "expected uint8"]),
    "scales of another shape": (replaced("8bit", nu_scale=lambda tree: tree | {"a": jnp.ones(4)}), ValueError, ["nu_scale at 'a'", "(4,)", "(3,)"]),
    "no scales of one": (replaced("8bit", mu_scale=lambda tree: tree | {"a": None}), ValueError, ["mu_scale at 'a'", "None", "(3,)"]),
    "no scales": (replaced("8bit", mu_scale=lambda _: None), ValueError, ["`state` lacks 'mu_scale'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case):
    act, kind, expected = MISTAKES[case]
    with pytest.raises(kind) as caught:
        act()
    for part in expected:
        assert part in str(caught.value)


@both_moments
def test_64_bits_are_refused(moments):
    with jax.enable_x64(True), pytest.raises(ValueError, match=f"{moments}.*'w' has dtype float64"):
        adamw(0.1, moments=moments).init({"w": jnp.ones(300, "float64")})
