"""The optax front has the numbers of optax: every argument, every wrapper, every place where a step can be taken."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.jax_runs import STEPS, assert_same, gradients_at, one_step, params_of, trained

from adamw_numba import interop, schedules
from adamw_numba.optax import AdamWState, adamw

DTYPES = ["float64", pytest.param("float32", marks=[pytest.mark.slow, pytest.mark.thorough])]
ONE_DTYPE = DTYPES[:1]  # of what only says when the same step is taken
BIASES = {"layer": {"w": True, "b": False}, "scale": False}


@pytest.fixture(autouse=True)
def x64(request):
    """float64 where a test asks for it."""
    dtype = getattr(getattr(request.node, "callspec", None), "params", {}).get("dtype", "float32")
    with jax.enable_x64(dtype == "float64"):
        yield


def falling(step):
    return 0.1 / (1 + step)


def chained(adam, **options):
    """What optax has no alias for: another Adam, with decay."""
    rate, decay = options.pop("learning_rate"), options.pop("weight_decay", 1e-4)
    return optax.chain(adam(**options), optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate))


def clipped(*clips):
    return lambda **options: optax.chain(*clips, optax.adamw(**options))


def clip_each(limit):
    """Each gradient by its own norm, which optax does not have."""

    def clip(g):
        return g * jnp.minimum(1, limit / jnp.linalg.norm(g.ravel()))

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def accumulated(every):
    def make(**options):
        dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        return optax.MultiSteps(optax.adamw(**options), every, accumulator_dtype=dtype)

    return make


# Arguments of both, arguments of ours alone, and what makes theirs
CASES = {
    "defaults": ({}, {}, optax.adamw),
    "betas": ({"b1": 0.5, "b2": 0.9}, {}, optax.adamw),
    "betas of 0": ({"b1": 0.0, "b2": 0.0}, {}, optax.adamw),
    "eps": ({"eps": 1e-2}, {}, optax.adamw),
    "eps of 0": ({"eps": 0.0}, {}, optax.adamw),
    "eps_root": ({"eps_root": 1e-3}, {}, optax.adamw),
    "nesterov": ({"nesterov": True}, {}, optax.adamw),
    "nesterov, eps_root": ({"nesterov": True, "eps_root": 1e-3, "b1": 0.7}, {}, optax.adamw),
    "no decay": ({"weight_decay": 0.0}, {}, optax.adamw),
    "decay": ({"weight_decay": 0.5}, {}, optax.adamw),
    "mask": ({"weight_decay": 0.5, "mask": BIASES}, {}, optax.adamw),
    "prefix mask": ({"weight_decay": 0.5, "mask": {"layer": True, "scale": False}}, {}, optax.adamw),
    "mask of all": ({"weight_decay": 0.5, "mask": True}, {}, optax.adamw),
    "mask of none": ({"weight_decay": 0.5, "mask": False}, {}, optax.adamw),
    "callable mask": (
        {"weight_decay": 0.5, "mask": lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)},
        {},
        optax.adamw,
    ),
    "schedule": ({"learning_rate": optax.exponential_decay(0.1, 2, 0.7)}, {}, optax.adamw),
    "schedules": ({"learning_rate": falling, "weight_decay": lambda step: 0.5 / (1 + step)}, {}, optax.adamw),
    "our schedule": ({"learning_rate": schedules.ExponentialDecay(0.1, 2, 0.7)}, {}, optax.adamw),
    "array as rate": ({"learning_rate": np.float32(0.1)}, {}, optax.adamw),
    "amsgrad": ({}, {"amsgrad": True}, partial(chained, optax.scale_by_amsgrad)),
    "amsgrad, small b2": ({"b2": 0.3}, {"amsgrad": True}, partial(chained, optax.scale_by_amsgrad)),
    "amsgrad, eps_root": (
        {"eps_root": 1e-2, "b2": 0.3},
        {"amsgrad": True},
        partial(chained, optax.scale_by_amsgrad),
    ),
    "amsgrad, clipvalue": (
        {"b2": 0.3},
        {"amsgrad": True, "clipvalue": 0.3},
        lambda **options: optax.chain(optax.clip(0.3), chained(optax.scale_by_amsgrad, **options)),
    ),
    "global_clipnorm": ({}, {"global_clipnorm": 0.5}, clipped(optax.clip_by_global_norm(0.5))),
    "large global_clipnorm": ({}, {"global_clipnorm": 1e3}, clipped(optax.clip_by_global_norm(1e3))),
    "clipnorm": ({}, {"clipnorm": 0.7}, clipped(clip_each(0.7))),
    "clipvalue": ({}, {"clipvalue": 0.4}, clipped(optax.clip(0.4))),
    "accumulation": ({}, {"gradient_accumulation_steps": 3}, accumulated(3)),
    "accumulation, schedule": ({"learning_rate": falling}, {"gradient_accumulation_steps": 2}, accumulated(2)),
    "nonfinite": ({}, {"nonfinite": "skip"}, optax.adamw),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_arguments(case, dtype):
    common, own, theirs = CASES[case]
    common, params = {"learning_rate": 0.05} | common, params_of(dtype)
    ours, _ = trained(adamw(**common, **own), params)
    assert_same(ours, trained(theirs(**common), params)[0], params)


def by_label(make):
    labels = {"layer": {"w": "fast", "b": "slow"}, "scale": "frozen"}
    return optax.partition({"fast": make(0.1), "slow": make(0.01), "frozen": optax.set_to_zero()}, labels)


WRAPPERS = {
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(0.5), make(0.1), optax.scale(0.5)),
    "MultiSteps": lambda make: optax.MultiSteps(make(0.1), 2),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(falling, weight_decay=0.1, eps_root=1e-4),
    "inject_hyperparams, static mask": lambda make: optax.inject_hyperparams(make, static_args=("mask", "b1"))(
        0.1, b1=0.8, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)
    ),
    "inject_hyperparams, nesterov": lambda make: optax.inject_hyperparams(make)(0.1, nesterov=True, b1=falling),
    "multi_transform": by_label,
    "apply_if_finite": lambda make: optax.apply_if_finite(make(0.1), 2),
    "masked": lambda make: optax.masked(make(0.1), BIASES),
    "named_chain": lambda make: optax.named_chain(("clip", optax.clip(0.4)), ("adam", make(0.1))),
    "before ema": lambda make: optax.chain(make(0.1), optax.ema(0.9)),
    "flatten": lambda make: optax.flatten(make(0.1)),
    "conditionally_transform": lambda make: optax.conditionally_transform(make(0.1), lambda step: step % 2 == 0),
    "keep_params_nonnegative": lambda make: optax.chain(make(0.1), optax.keep_params_nonnegative()),
}


@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper, dtype):
    wrap, params = WRAPPERS[wrapper], params_of(dtype)
    ours, theirs = (trained(wrap(make), params)[0] for make in (adamw, optax.adamw))
    assert_same(ours, theirs, params)


def scanned(transformation, params):
    def body(carry, step):
        return one_step(transformation, *carry, step), None

    (params, _), _ = jax.jit(lambda *carry: jax.lax.scan(body, carry, jnp.arange(float(STEPS))))(
        params, transformation.init(params)
    )
    return params


def vectorized(transformation, params):
    """Several models at once, each from its own start."""
    many = jax.tree.map(lambda p: jnp.stack([p, p + 1, p * 2]), params)
    state = jax.vmap(transformation.init)(many)
    for i in range(STEPS):
        many, state = jax.vmap(partial(one_step, transformation), in_axes=(0, 0, None))(many, state, float(i))
    return jax.tree.map(lambda p: p[1], many)


def differentiated(transformation, params):
    """The derivative of what comes out by what goes in."""

    def last(params):
        state = transformation.init(params)
        for i in range(3):
            params, state = one_step(transformation, params, state, float(i))
        return sum(jnp.sum(p * p) for p in jax.tree.leaves(params)) / 100

    return jax.grad(last)(params)


def eager(transformation, params):
    return trained(transformation, params, jit=False)[0]


def checkpointed(transformation, params):
    """Under `jax.checkpoint`, and in a loop that has no fixed length."""

    def body(carry):
        params, state, step = carry
        return *jax.checkpoint(partial(one_step, transformation))(params, state, step), step + 1

    return jax.lax.while_loop(lambda carry: carry[2] < STEPS, body, (params, transformation.init(params), 0.0))[0]


PLACES = {"eager": eager, "scan": scanned, "vmap": vectorized, "grad": differentiated, "while": checkpointed}
OPTIONS = {
    "plain": ({}, optax.adamw),
    "eps_root": ({"eps_root": 1e-3}, optax.adamw),
    "global_clipnorm": (
        {"global_clipnorm": 0.5},
        lambda rate, global_clipnorm: optax.chain(optax.clip_by_global_norm(global_clipnorm), optax.adamw(rate)),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_places(place, options, dtype):
    given, theirs = OPTIONS[options]
    run, params = PLACES[place], params_of(dtype)
    start = jax.tree.map(jnp.zeros_like, params) if place == "grad" else params
    assert_same(run(adamw(0.05, **given), params), run(theirs(0.05, **given), params), start)


@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize(
    "option", ["global_clipnorm", "clipnorm", "clipvalue", "ema_momentum", "eps_root", "weight_decay"]
)
def test_injected_options(option, dtype):
    """Numbers of ours that are traced are those that are not."""
    params, given = params_of(dtype), {option: 0.3, "use_ema": True}
    ours, state = trained(adamw(0.1, **given), params)
    injected, inside = trained(optax.inject_hyperparams(adamw)(0.1, **given), params)
    assert_same(injected, ours, params)
    assert_same(inside.inner_state.average, state.average, params)


@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("every", [None, 3])
def test_averages(every, dtype):
    """They begin with the parameters after the first update, and replace them where that is asked for."""
    params, momentum = params_of(dtype), 0.6
    ours, state = trained(adamw(0.1, use_ema=True, ema_momentum=momentum, ema_overwrite_frequency=every), params)
    theirs, average, inner = params, params, optax.adamw(0.1)
    moments = inner.init(params)
    for i in range(STEPS):
        theirs, moments = one_step(inner, theirs, moments, float(i))
        average = optax.incremental_update(theirs, average, 1 - momentum) if i else theirs
        theirs = average if every and (i + 1) % every == 0 else theirs
    assert_same(ours, theirs, params)
    assert_same(state.average, average, params)


def test_mu_dtype():
    """optax multiplies the first moment in the dtype in which it is kept: to half a unit of that, they are the same."""
    params = params_of("float32")
    ours, state = trained(adamw(0.1, mu_dtype="bfloat16"), params)
    theirs, (adam, *_) = trained(optax.adamw(0.1, mu_dtype="bfloat16"), params)
    dtypes = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state.mu, adam.mu)]
    assert dtypes[0] == dtypes[1]
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=STEPS * 0.1 * 2.0**-8)


@pytest.mark.parametrize("kept", [jnp.float32, jnp.bfloat16, None])
def test_mu_dtype_is_that_of_a_rounded_moment(kept):
    """One step: the update takes the moment before it is rounded, as in optax."""
    params = params_of("float32")
    ours = adamw(0.1, mu_dtype=kept)
    updates, state = ours.update(gradients_at(params, 1.0), ours.init(params), params)
    theirs = optax.adamw(0.1)
    expected, (adam, *_) = theirs.update(gradients_at(params, 1.0), theirs.init(params), params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert_same(updates, expected, zeros)
    rounded = jax.tree.map(lambda m: m.astype(kept or m.dtype).astype(m.dtype), adam.mu)
    for one, other in zip(*map(jax.tree.leaves, (state.mu, rounded)), strict=True):
        assert one.dtype == (kept or jnp.float32)
        np.testing.assert_allclose(one.astype("float32"), other, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype):
    """The state is float32, and updates are those of float32, rounded once."""
    params = params_of(dtype)
    transformation = adamw(0.1, use_ema=True)
    state = transformation.init(params)
    updates, state = transformation.update(gradients_at(params, 1.0), state, params)
    wide = jax.tree.map(lambda p: p.astype("float32"), params)
    grads = jax.tree.map(lambda g: g.astype("float32"), gradients_at(params, 1.0))
    expected, inside = transformation.update(grads, transformation.init(wide), wide)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.mu, state.nu, state.average))} == {"float32"}
    assert_same(state.mu, inside.mu, jax.tree.map(jnp.zeros_like, wide))
    for one, other in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        assert one.dtype == dtype
        np.testing.assert_array_equal(one, other.astype(dtype))


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex(dtype):
    """Real and imaginary parts by themselves."""
    with jax.enable_x64(dtype == "complex128"):
        params = {"z": jnp.asarray([1 + 2j, -0.5j, 3], dtype)}
        ours, _ = trained(adamw(0.1, weight_decay=0.3), params)
        theirs, _ = trained(optax.contrib.split_real_and_imaginary(optax.adamw(0.1, weight_decay=0.3)), params)
        parts = [jax.tree.map(part, tree) for tree in (ours, theirs, params) for part in (jnp.real, jnp.imag)]
        assert_same(parts[:1], parts[2:3], parts[4:5])
        assert_same(parts[1:2], parts[3:4], parts[5:])


def test_a_step_beside_a_large_parameter_is_not_lost():
    """`new - old` in float32 has no step of 1e-6 beside a parameter of 100."""
    params = {"w": jnp.full(3, 100.0)}
    transformation = adamw(1e-6, weight_decay=0.0, use_ema=True)
    updates, _ = transformation.update({"w": jnp.ones(3)}, transformation.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-6, rtol=1e-6)


def test_loss_scale():
    params, transformation = params_of("float32"), adamw(0.1, global_clipnorm=0.5)
    grads = gradients_at(params, 1.0)
    scaled = jax.tree.map(lambda g: g * 1024, grads)
    expected, _ = transformation.update(grads, transformation.init(params), params)
    updates, _ = transformation.update(scaled, transformation.init(params), params, loss_scale=jnp.float32(1024))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)


def test_what_is_not_finite_is_skipped():
    params, transformation = params_of("float32"), adamw(0.1, nonfinite="skip", use_ema=True)
    update = jax.jit(transformation.update)
    grads = gradients_at(params, 1.0)
    _, before = update(grads, transformation.init(params), params)
    broken = grads | {"scale": jnp.inf}
    updates, after = update(broken, before, params)
    assert int(after.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(skipped=before.skipped), before)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, np.zeros_like(u)), updates)


def test_raising():
    params, transformation = params_of("float32"), adamw(0.1, nonfinite="raise")
    state = transformation.init(params)
    broken = gradients_at(params, 1.0) | {"scale": jnp.nan}
    with pytest.raises(FloatingPointError, match="not finite"):
        transformation.update(broken, state, params)
    with pytest.raises(ValueError, match="under a trace"):
        jax.jit(transformation.update)(broken, state, params)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("jit", [True, False])
def test_norms_of_any_size(size, jit):
    """Squares of float32 overflow from 1e19, and underflow below 1e-19."""
    params = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    grads = {"a": jnp.asarray([3.0, 0.0, 0.0]) * size, "b": jnp.asarray(4.0) * size}
    transformation = adamw(1.0, b1=0.0, b2=0.0, eps=0.0, global_clipnorm=size / 10)
    update = jax.jit(transformation.update) if jit else transformation.update
    _, state = update(grads, transformation.init(params), params)
    np.testing.assert_allclose(state.mu["a"][0] / size, 0.06, rtol=1e-5)
    np.testing.assert_allclose(state.mu["b"] / size, 0.08, rtol=1e-5)


def test_a_state_of_optax_goes_on():
    params = params_of("float32")
    theirs, ours = optax.adamw(0.1), adamw(0.1)
    params, (adam, *_) = trained(theirs, params)
    state = AdamWState(adam.count, adam.mu, adam.nu)
    expected, _ = theirs.update(gradients_at(params, 1.0), (adam, optax.EmptyState(), optax.EmptyState()), params)
    updates, _ = ours.update(gradients_at(params, 1.0), state, params)
    assert_same(updates, expected, jax.tree.map(jnp.zeros_like, params))


def test_a_state_is_exchanged():
    """`interop` takes and gives a state of the front as one of optax; what it would lose, it refuses."""
    params = params_of("float32")
    transformation = adamw(0.1)
    _, state = trained(transformation, params)
    optimizer = interop.from_optax(state, jax.tree.map(np.array, params), learning_rate=0.1)
    back = interop.to_optax(optimizer, transformation.init(params))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    with pytest.raises(ValueError, match="average"):
        interop.from_optax(adamw(0.1, use_ema=True).init(params), learning_rate=0.1)
