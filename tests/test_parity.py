"""The numbers: against an independent oracle, real Keras, torch and optax, on every array library."""

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
from helpers import libraries
from helpers.libraries import jax, jnp, keras, optax, torch
from helpers.oracle import Oracle, pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from adamw_numba import AdamW, schedules

SHAPES = st.lists(
    st.sampled_from([(), (1,), (3,), (5, 7), (2, 3, 4), (0,), (4, 0), (257,), (1, 9, 1), (300, 2)]),
    min_size=1,
    max_size=4,
)
RATES = st.sampled_from(
    [0.001, 0.05, 0.0, schedules.CosineDecay(0.1, 9, 0.1), schedules.PiecewiseConstantDecay([2, 5], [0.1, 0.01, 0.02])]
)
CLIPS = st.sampled_from([{}, {"clipnorm": 0.7}, {"clipvalue": 0.3}, {"global_clipnorm": 1.1}, {"global_clipnorm": 1e3}])
AVERAGES = st.sampled_from(
    [{}, {"use_ema": True}, {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 3}]
)
MOMENTS = st.sampled_from([{}, {"beta_1": 0.5, "beta_2": 0.9}, {"beta_1": 0.0}, {"beta_2": 0.0, "epsilon": 1e-3}])
SCALES = st.sampled_from([{}, {"loss_scale_factor": 1024.0}, {"loss_scale_factor": 3.0}])


@st.composite
def configurations(draw, accumulate=True):
    options = {
        "learning_rate": draw(RATES),
        "amsgrad": draw(st.booleans()),
        "weight_decay": draw(st.sampled_from([0.004, 0.0, 0.5])),
    }
    for part in (CLIPS, AVERAGES, MOMENTS, SCALES):
        options |= draw(part)
    if accumulate and draw(st.booleans()):
        options["gradient_accumulation_steps"] = draw(st.integers(2, 4))
    return options


@st.composite
def runs(draw, dtypes=("float64",), **kwargs):
    """Options, first values, and the gradients of some steps; now and then one is missing."""
    shapes = draw(SHAPES)
    kinds = [draw(st.sampled_from(dtypes)) for _ in shapes]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def values(scale):
        parts = [(random.normal(size=s), random.normal(size=s)) for s in shapes]
        return [
            scale * (re + 1j * im if kind.startswith("c") else re) for (re, im), kind in zip(parts, kinds, strict=True)
        ]

    steps = [values(10.0 ** draw(st.integers(-3, 1))) for _ in range(draw(st.integers(1, 12)))]
    if len(shapes) > 1:
        for gradients in steps:
            if draw(st.integers(0, 5)) == 0:
                gradients[draw(st.integers(0, len(shapes) - 1))] = None
    excluded = (0,) if len(shapes) > 1 and draw(st.booleans()) else ()
    return draw(configurations(**kwargs)), kinds, values(1.0), steps, excluded


def train(make, run):
    """Run on one array library; the variables, the averages and the optimizer."""
    options, kinds, values, steps, excluded = run
    variables = [make(value, kind) for value, kind in zip(values, kinds, strict=True)]
    optimizer = AdamW(**options)
    optimizer.exclude_from_weight_decay([variables[k] for k in excluded])
    optimizer.build(variables)
    for gradients in steps:
        missing = any(g is None for g in gradients)
        with pytest.warns(UserWarning, match="Gradients do not exist") if missing else nullcontext():
            optimizer.apply([None if g is None else make(g, k) for g, k in zip(gradients, kinds, strict=True)])
    return variables, optimizer


def ask_oracle(run):
    options, _, values, steps, excluded = run
    oracle = Oracle(**options, excluded=excluded)
    oracle.build(values)
    for gradients in steps:
        oracle.step(gradients)
    return oracle


def magnitudes(run, optimizer):
    """For each of the variables and of the state, the largest number that rounding may have happened at."""
    _, _, values, steps, _ = run
    largest = [
        max(np.max(np.abs(a), initial=1.0) for a in [v, *(s[k] for s in steps if s[k] is not None)])
        for k, v in enumerate(values)
    ]
    by_name = dict.fromkeys(optimizer.variable_names, 1.0)
    for k, size in enumerate(largest):
        by_name |= {f"{slot}/{k}": size for slot in ("momentum", "average", "gradient_accumulator")}
        by_name |= {f"{slot}/{k}": size**2 for slot in ("velocity", "velocity_hat")}
    return [*largest, *(by_name[name] for name in optimizer.variable_names)]


def assert_close(found, expected, tolerance):
    found = pairs(libraries.look(found)).astype(np.float64)
    largest = np.max(np.abs(expected), initial=1e-300)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * largest)


QUICK = (libraries.numpy, libraries.to_torch)


def quick_first(makers):
    """The quick round takes NumPy and torch; the others are slow, for the kernels of strided arrays that they need."""
    return [make if make in QUICK else pytest.param(make, marks=pytest.mark.slow) for make in makers]


@pytest.mark.parametrize("make", quick_first(libraries.IN_PLACE))
@settings(max_examples=200)
@given(run=runs(dtypes=("float64", "complex128")))
def test_float64_equals_the_textbook(make, run):
    if make is libraries.strict and any(k.startswith("c") for k in run[1]):
        run = (
            run[0],
            ["float64"] * len(run[1]),
            [v.real for v in run[2]],
            [[g if g is None else g.real for g in s] for s in run[3]],
            run[4],
        )
    assert_equals_the_textbook(make, run)


def assert_equals_the_textbook(make, run):
    variables, optimizer = train(make, run)
    oracle = ask_oracle(run)
    for k, variable in enumerate(variables):
        assert_close(variable, oracle.variables[k], 1e-12)
        assert_close(optimizer.state[f"momentum/{k}"], oracle.m[k], 1e-12)
        assert_close(optimizer.state[f"velocity/{k}"], oracle.v[k], 1e-12)
        if optimizer.use_ema:
            assert_close(optimizer.averages[k], oracle.average[k], 1e-12)
        if optimizer.gradient_accumulation_steps:
            assert_close(optimizer.state[f"gradient_accumulator/{k}"], oracle.total[k], 1e-12)
    assert optimizer.iterations == oracle.updates


@pytest.mark.parametrize("make", quick_first(make for make in libraries.IN_PLACE if make is not libraries.numpy))
@settings(max_examples=20)
@given(run=runs(dtypes=("float32", "float64")))
def test_every_library_gives_what_numpy_gives(make, run):
    """The same bits from the same kernels, whatever the layout, unless a norm is added up in another order."""
    expected, reference = train(libraries.numpy, run)
    found, optimizer = train(make, run)
    same_bits = make in libraries.KERNELS and not (run[0].get("clipnorm") or run[0].get("global_clipnorm"))
    scales = magnitudes(run, optimizer)
    for one, other, scale in zip(
        [*found, *optimizer.variables], [*expected, *reference.variables], scales, strict=True
    ):
        one, other = libraries.look(one), libraries.look(other)
        assert one.dtype == other.dtype
        ulp = 0.0 if same_bits else np.spacing(one.dtype.type(scale))
        np.testing.assert_allclose(one, other, rtol=0, atol=2 * len(run[3]) * ulp)


@pytest.mark.parametrize(
    "make",
    [libraries.numpy, libraries.to_torch, libraries.strict, pytest.param(libraries.to_jax, marks=pytest.mark.slow)],
)
@settings(max_examples=15)
@given(run=runs(dtypes=("float32",)))
def test_stateless_apply_gives_what_apply_gives(make, run):
    options, kinds, values, steps, excluded = run
    expected, reference = train(libraries.numpy, run)
    variables = [make(value, kind) for value, kind in zip(values, kinds, strict=True)]
    optimizer = AdamW(**options)
    optimizer.exclude_from_weight_decay([variables[k] for k in excluded])
    optimizer.build(variables)
    state, before = optimizer.variables, [libraries.look(a) for a in [*variables, *optimizer.variables]]
    inputs = [*variables, *state]
    for gradients in steps:
        gradients = [None if g is None else make(g, k) for g, k in zip(gradients, kinds, strict=True)]
        call = jax.jit(optimizer.stateless_apply) if make is libraries.to_jax else optimizer.stateless_apply
        variables, state = call(state, gradients, variables)
    for one, other in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(libraries.look(one), other)
    ulps = 20 if make is libraries.to_jax else 2  # JAX computes the coefficients themselves in float32
    scales = magnitudes(run, optimizer)
    for one, other, scale in zip([*variables, *state], [*expected, *reference.variables], scales, strict=True):
        tolerance = ulps * len(steps) * np.spacing(np.float32(scale))
        np.testing.assert_allclose(libraries.look(one), libraries.look(other), rtol=0, atol=tolerance)


def keras_run(options, kind, values, steps, excluded):
    keras.config.set_floatx(kind)
    variables = [keras.Variable(v.astype(kind), dtype=kind, name=f"v{k}") for k, v in enumerate(values)]
    optimizer = keras.optimizers.AdamW(**options)
    optimizer.exclude_from_weight_decay([variables[k] for k in excluded])
    for gradients in steps:
        optimizer.apply([torch.tensor(g.astype(kind)) for g in gradients], variables)
    keras.config.set_floatx("float32")
    return variables, optimizer


@pytest.mark.parametrize("kind", ["float32", "float64"])
@settings(max_examples=200)
@given(run=runs())
def test_real_keras(kind, run):
    """Within the rounding of Keras's own float32 scalars; its average under accumulation is another one."""
    options, _, values, steps, excluded = run
    steps = [[v * 0.1 if g is None else g for g, v in zip(gradients, values, strict=True)] for gradients in steps]
    if options.get("gradient_accumulation_steps"):
        options = {k: v for k, v in options.items() if not k.startswith(("use_ema", "ema"))}
    if options.get("beta_2") == 0.0:  # where Keras's `v + (g^2 - v) * (1 - beta_2)` loses a small g altogether
        options = options | {"beta_2": 0.5}
    if isinstance(options["learning_rate"], schedules.LearningRateSchedule):
        theirs = keras.optimizers.schedules.deserialize(schedules.serialize(options["learning_rate"]))
    else:
        theirs = options["learning_rate"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Keras divides by a norm of zero
        expected, reference = keras_run(options | {"learning_rate": theirs}, kind, values, steps, excluded)
    values = [v.astype(kind) for v in values]
    oracle = ask_oracle((options, None, values, [[g.astype(kind) for g in s] for s in steps], excluded))
    found, optimizer = train(libraries.numpy, (options, [kind] * len(values), values, steps, excluded))
    share = 2e-5 * max(1, 1e-3 / (1 - options.get("beta_2", 0.999)))
    for k, (one, other) in enumerate(zip(found, [libraries.look(v.value) for v in expected], strict=True)):
        largest = np.max(np.abs(other), initial=0.0)
        bound = share * np.max(oracle.travelled[k], initial=0.0) + len(steps) * np.spacing(np.float32(largest)) + 1e-30
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)
    assert optimizer.iterations == int(reference.iterations)
    shapes = [tuple(v.shape) for v in reference.variables]
    assert [v.shape for v in optimizer.variables] == shapes


@settings(max_examples=200)
@given(run=runs())
def test_torch_one_step_at_a_time(run):
    """torch adds its epsilon after the bias correction: `eps / sqrt(1 - beta_2^t)` is ours."""
    options, _, values, steps, _ = run
    ours = {k: options[k] for k in ("amsgrad", "weight_decay", "beta_1", "beta_2", "epsilon") if k in options}
    beta_1, beta_2 = ours.get("beta_1", 0.9), ours.get("beta_2", 0.999)
    tensors = [torch.tensor(v) for v in values]
    variables = [t.clone() for t in tensors]
    optimizer = AdamW(0.01, **ours)
    optimizer.build(variables)
    theirs = torch.optim.AdamW(
        tensors, lr=0.01, betas=(beta_1, beta_2), weight_decay=ours["weight_decay"], amsgrad=ours["amsgrad"]
    )
    for t, gradients in enumerate(steps, 1):
        gradients = [torch.tensor(v * 0.1 if g is None else g) for g, v in zip(gradients, values, strict=True)]
        for tensor, g in zip(tensors, gradients, strict=True):
            tensor.grad = g
        theirs.param_groups[0]["eps"] = ours.get("epsilon", 1e-7) / np.sqrt(1 - beta_2**t)
        theirs.step()
        optimizer.apply(gradients)
    for one, other in zip(variables, tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(other.abs().max() if other.numel() else 1))


@pytest.mark.slow
@settings(max_examples=200)
@given(run=runs())
def test_optax_one_step_at_a_time(run):
    """optax's epsilon is torch's; its decay is not yet multiplied by the learning rate."""
    options, _, values, steps, _ = run
    beta_1, beta_2 = options.get("beta_1", 0.9), options.get("beta_2", 0.999)
    with jax.enable_x64(True):
        expected = [jnp.asarray(v) for v in values]
        variables = [np.array(v) for v in values]
        optimizer = AdamW(0.01, options["weight_decay"], beta_1, beta_2)
        optimizer.build(variables)
        state = optax.adamw(0.01, beta_1, beta_2, weight_decay=options["weight_decay"]).init(expected)
        for t, gradients in enumerate(steps, 1):
            gradients = [v * 0.1 if g is None else np.asarray(g) for g, v in zip(gradients, values, strict=True)]
            theirs = optax.adamw(
                0.01, beta_1, beta_2, 1e-7 / np.sqrt(1 - beta_2**t), weight_decay=options["weight_decay"]
            )
            changes, state = theirs.update([jnp.asarray(g) for g in gradients], state, expected)
            expected = optax.apply_updates(expected, changes)
            optimizer.apply([np.asarray(g) for g in gradients])
        for one, other in zip(variables, expected, strict=True):
            assert_close(one, np.asarray(other), 1e-12)
