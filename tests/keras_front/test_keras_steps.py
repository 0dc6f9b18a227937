"""Steps beside those of Keras's own AdamW, one by one, on either backend."""

import keras
import numpy as np
import pytest
from helpers import oracle
from helpers.keras_runs import (
    BOTH,
    IS_TORCH,
    SHAPES,
    Journey,
    gradients_of,
    look,
    looked,
    only_torch,
    same,
    variables_of,
)
from keras import ops

import adamw_numba
from adamw_numba.keras import AdamW

SCHEDULES = keras.optimizers.schedules
OPTIONS = {
    "plain": {},
    "rates": {"learning_rate": 0.1, "weight_decay": 0.3},
    "no decay": {"weight_decay": 0.0},
    "betas": {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3},
    "amsgrad": {"amsgrad": True, "beta_2": 0.5},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.5},
    "loss_scale": {"loss_scale_factor": 8.0},
    "ema": {"use_ema": True, "ema_momentum": 0.9},
    "ema overwrites": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation clips": {"gradient_accumulation_steps": 2, "global_clipnorm": 0.3, "amsgrad": True},
    "cosine": {"learning_rate": SCHEDULES.CosineDecay(0.1, 6, warmup_target=0.2, warmup_steps=2)},
    "exponential": {"learning_rate": SCHEDULES.ExponentialDecay(0.1, 2, 0.5, staircase=True)},
    "callable": {"learning_rate": lambda: 0.03},
    "all": {"amsgrad": True, "use_ema": True, "clipnorm": 1.0, "weight_decay": 0.1, "loss_scale_factor": 4.0},
}


def make(options, dtype="float32", excluded=()):
    """Both optimizers, each with variables of its own."""
    pairs = []
    for cls in BOTH:
        variables, optimizer = variables_of(dtype), cls(**options)
        if excluded:
            optimizer.exclude_from_weight_decay(var_names=excluded)
        optimizer.build(variables)
        pairs.append((optimizer, variables))
    return pairs


def assert_state_close(ours, theirs):
    """Beside the largest number of its kind: gradients nearly cancel in some moments."""
    largest = {}
    for variable in theirs.variables:
        kind = variable.name.partition("_")[2]
        largest[kind] = max(largest.get(kind, 0.0), np.abs(look(variable)).max())
    for one, other in zip(ours.variables, theirs.variables, strict=True):
        assert one.path.partition("/")[2] == other.path.partition("/")[2]
        assert one.dtype == other.dtype
        atol = 1e-6 * largest[other.name.partition("_")[2]]
        np.testing.assert_allclose(look(one), look(other), rtol=2e-5, atol=atol)


@pytest.mark.parametrize("case", OPTIONS)
def test_steps_of_keras(case):
    (ours, variables), (theirs, expected) = make(OPTIONS[case])
    journey = Journey(expected)
    for step in range(7):
        for optimizer, own in ((ours, variables), (theirs, expected)):
            optimizer.apply(gradients_of(step), own)
        journey.go(expected)
        journey.assert_close(variables, expected)
        assert_state_close(ours, theirs)
        assert int(ours.iterations) == int(theirs.iterations)


@pytest.mark.parametrize(
    "exclude", [{"var_names": ["v1"]}, {"var_names": ["v0", "v2$"]}, "listed"], ids=["name", "names", "listed"]
)
def test_excluded_variables(exclude):
    """Seen with a decay that nearly empties what is not excluded."""
    runs = []
    for cls in BOTH:
        variables, optimizer = variables_of(), cls(0.1, weight_decay=9.0)
        optimizer.exclude_from_weight_decay(**({"var_list": [variables[1]]} if exclude == "listed" else exclude))
        journey = Journey(variables)
        for step in range(3):
            optimizer.apply(gradients_of(step), variables)
            journey.go(variables)
        runs.append(variables)
    journey.assert_close(*runs)


@only_torch
def test_float64():
    """Beside the textbook, since Keras computes its scalars in float32."""
    keras.config.set_floatx("float64")
    try:
        variables, optimizer = variables_of("float64"), AdamW(0.1, weight_decay=0.1, amsgrad=True)
    finally:
        keras.config.set_floatx("float32")
    reference = oracle.Oracle(0.1, weight_decay=0.1, amsgrad=True)
    reference.build(looked(variables))
    for step in range(5):
        optimizer.apply(gradients_of(step, "float64"), variables)
        reference.step(looked(gradients_of(step, "float64")))
    for one, other in zip(looked(variables), reference.variables, strict=True):
        np.testing.assert_allclose(one, other.reshape(one.shape), rtol=1e-12)


OURS = {
    "nesterov": {"nesterov": True},
    "decouple_lr": {"decouple_lr": True, "weight_decay": 0.01},
    "maximize": {"maximize": True},
    "corrected": {"epsilon_mode": "corrected", "epsilon": 0.1},
    "threads": {"threads": 1},
    "decay schedule": {"weight_decay": adamw_numba.schedules.CosineDecay(0.5, 4)},
    "decay schedule of Keras": {"weight_decay": SCHEDULES.CosineDecay(0.5, 4)},
}


@pytest.mark.parametrize("case", OURS)
def test_options_that_keras_lacks(case):
    """Those of `adamw_numba.AdamW`, over NumPy arrays."""
    options = {"learning_rate": 0.1} | OURS[case]
    variables, optimizer = variables_of(), AdamW(**options)
    expected, reference = looked(variables), adamw_numba.AdamW(**options)
    reference.build(expected)
    for step in range(4):
        optimizer.apply(gradients_of(step), variables)
        reference.apply(looked(gradients_of(step)))
    for one, other in zip(looked(variables), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    assert case == "threads" or np.abs(expected[0] - plain_steps()).max() > 1e-3


def plain_steps():
    variables, optimizer = looked(variables_of()), adamw_numba.AdamW(0.1)
    optimizer.build(variables)
    for step in range(4):
        optimizer.apply(looked(gradients_of(step)))
    return variables[0]


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_nonfinite(nonfinite):
    variables, optimizer = variables_of(), AdamW(0.1, nonfinite=nonfinite)
    before, gradients = looked(variables), gradients_of(0)
    gradients[1] = gradients[1] * np.float32("nan")
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError):
            optimizer.apply(gradients, variables)
    else:
        optimizer.apply(gradients, variables)
    if nonfinite == "propagate":
        assert np.isnan(look(variables[1])).all()
        assert int(optimizer.iterations) == 1
        return
    same(variables, before)
    assert int(optimizer.iterations) == 0
    if IS_TORCH:
        assert optimizer.skipped_steps == (nonfinite == "skip")


def test_an_override():
    variables, optimizer = variables_of(), AdamW(0.1, weight_decay=0.0)
    optimizer.override(var_names=["v0"], learning_rate_multiplier=0.0)
    optimizer.override([variables[1]], learning_rate=0.5)
    before = looked(variables)
    optimizer.apply(gradients_of(0), variables)
    moved = [np.abs(one - other) for one, other in zip(looked(variables), before, strict=True)]
    for one, distance in zip(moved, (0.0, 0.5, 0.1), strict=True):
        np.testing.assert_allclose(one, distance, rtol=1e-4)


# 16 bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("master_weights", [True, False])
def test_sixteen_bits(dtype, master_weights):
    """State in float32; with a master copy, small updates add up, which Keras's own loses."""
    variables, optimizer = variables_of(dtype), AdamW(1e-4, weight_decay=0.0, master_weights=master_weights)
    start = looked(variables)
    for _ in range(40):
        optimizer.apply(gradients_of(0, dtype), variables)
    assert [v.dtype for v in optimizer.variables[2:]] == ["float32"] * (6 + 3 * master_weights)
    assert [v.name for v in optimizer.variables[8:]] == ["v0_master", "v1_master", "v2_master"][: 3 * master_weights]
    values, reference = [value.astype(np.float32) for value in start], adamw_numba.AdamW(1e-4, weight_decay=0.0)
    reference.build(values)
    for _ in range(40):
        reference.apply([look(g).astype(np.float32) for g in gradients_of(0, dtype)])
    for master, variable, value in zip(optimizer.variables[8:], variables, values, strict=False):
        np.testing.assert_allclose(look(master), value, rtol=1e-6)
        np.testing.assert_array_equal(look(variable), look(ops.cast(master.value, dtype)))
    assert master_weights or not any(
        np.abs(look(v) - value).max() < 1e-4 for v, value in zip(variables, values, strict=True)
    )


def test_what_is_written_into_a_variable_holds_for_its_master():
    variables, optimizer = variables_of("bfloat16"), AdamW(1e-4, weight_decay=0.0)
    optimizer.build(variables)
    variables[1].assign(ops.ones((4,), "bfloat16") * 2)
    optimizer.apply(gradients_of(0, "bfloat16"))
    np.testing.assert_allclose(look(optimizer.variables[9]), 2.0, atol=2e-4)


# Which variables take part


@pytest.mark.parametrize("use_ema", [False, True])
def test_frozen_between_steps(use_ema):
    """A step with some of the variables leaves the others alone, apart from their averages, without a word."""
    runs = []
    for cls in BOTH:
        variables, optimizer = variables_of(), cls(0.1, use_ema=use_ema)
        journey = Journey(variables)
        for step in range(6):
            order = [0, 1, 2] if step % 3 == 0 else [2, 0] if step % 3 == 1 else [1]
            given = gradients_of(step)
            before = looked(variables)
            optimizer.apply([given[k] for k in order], [variables[k] for k in order])
            same([variables[k] for k in {0, 1, 2} - {*order}], [before[k] for k in {0, 1, 2} - {*order}])
            journey.go(variables)
        runs.append((variables, optimizer))
    journey.assert_close(runs[0][0], runs[1][0])
    assert_state_close(runs[0][1], runs[1][1])


def test_a_missing_gradient():
    runs = []
    for cls in BOTH:
        variables, optimizer = variables_of(), cls(0.1)
        optimizer.build(variables)
        journey = Journey(variables)
        for step in range(3):
            first, _, last = gradients_of(step)
            with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['v1'\]"):
                optimizer.apply([first, None, last], variables)
            journey.go(variables)
        runs.append(variables)
    journey.assert_close(*runs)


def test_constraints():
    runs = []
    for cls in BOTH:
        variables, optimizer = variables_of(), cls(0.5)
        variables[0].constraint = keras.constraints.NonNeg()
        journey = Journey(variables)
        for step in range(3):
            optimizer.apply(gradients_of(step), variables)
            journey.go(variables)
        assert look(variables[0]).min() == 0
        runs.append(variables)
    journey.assert_close(*runs)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"use_ema": True}], ids=str)
def test_variables_that_are_their_gradients(options):
    """As the scales of float8 layers: Keras writes them, and they have no moments."""
    runs = []
    for cls in BOTH:
        variables, optimizer = variables_of(), cls(0.1, **options)
        variables[1].overwrite_with_gradient = True
        journey = Journey(variables)
        for step in range(4):
            optimizer.apply(gradients_of(step), variables)
            journey.go(variables)
        runs.append((variables, optimizer))
    journey.assert_close(runs[0][0], runs[1][0])
    assert_state_close(runs[0][1], runs[1][1])


def test_two_variables_of_one_path():
    variables, optimizer = [keras.Variable(np.ones(2, "float32"), name="twin") for _ in range(2)], AdamW(0.1)
    optimizer.apply([ops.ones(2), -ops.ones(2)], variables)
    np.testing.assert_allclose(looked(variables), [[0.8996] * 2, [1.0996] * 2], rtol=1e-5)


# Other doors


def test_stateless_apply():
    """A pure function, of a state that nothing else holds: what `apply` gives, and its arguments stay."""
    options = {"learning_rate": 0.1, "amsgrad": True, "use_ema": True, "global_clipnorm": 1.0}
    variables, optimizer = variables_of(), AdamW(**options)
    expected, reference = variables_of(), AdamW(**options)
    optimizer.build(variables)
    state, values = [ops.copy(v.value) for v in optimizer.variables], [ops.copy(v.value) for v in variables]
    kept, start = looked(state), looked(values)
    given, own = state, values
    for step in range(3):
        own, given = optimizer.stateless_apply(given, gradients_of(step), own)
        reference.apply(gradients_of(step), expected)
    for one, other in zip([*own, *given], [*expected, *reference.variables], strict=True):
        np.testing.assert_allclose(look(one), look(other), rtol=2e-5, atol=1e-6)
    for found, before in ((values, start), (state, kept), (variables, start), (optimizer.variables, kept)):
        same(found, before)


def test_apply_gradients_and_set_weights():
    variables, optimizer = variables_of(), AdamW(0.1)
    optimizer.apply_gradients(zip(gradients_of(0), variables, strict=True))
    other_variables, other = variables_of(), AdamW(0.1)
    other.build(other_variables)
    other.set_weights(looked(optimizer.variables))
    for variable, value in zip(other_variables, looked(variables), strict=True):
        variable.assign(value)
    for each, own in ((optimizer, variables), (other, other_variables)):
        each.apply(gradients_of(1), own)
    same(variables, other_variables)


@only_torch
def test_update_step():
    variables, optimizer = variables_of(), AdamW(0.1)
    optimizer.build(variables)
    before = looked(variables)
    optimizer.update_step(ops.ones((4,)), variables[1], 0.5)
    np.testing.assert_allclose(look(variables[1]), before[1] - 0.5, rtol=1e-5)
    same([variables[0], variables[2]], [before[0], before[2]])


@only_torch
def test_the_state_that_users_see_is_the_state_of_the_steps():
    variables, optimizer = variables_of(), AdamW(0.1)
    optimizer.apply(gradients_of(0), variables)
    momentum = next(v for v in optimizer.variables if v.name == "v1_momentum")
    momentum.assign(ops.zeros((4,)))
    optimizer.variables[0].assign(41)
    optimizer.apply(gradients_of(1))
    np.testing.assert_allclose(look(momentum), 0.1 * look(gradients_of(1)[1]), rtol=1e-6)
    assert int(optimizer.iterations) == 42
    assert optimizer.last_step.learning_rate == np.float32(0.1)


def test_finalized_averages():
    """Of some of the variables too; before the first update they stay what they are."""
    variables, optimizer = variables_of(), AdamW(0.1, use_ema=True)
    optimizer.build(variables)
    before = looked(variables)
    optimizer.finalize_variable_values(variables)
    same(variables, before)
    for step in range(3):
        optimizer.apply(gradients_of(step))
    now = looked(variables)
    optimizer.finalize_variable_values([variables[2], variables[0]])
    averages = [v for v in optimizer.variables if v.name.endswith("_average")]
    same([variables[0], variables[2]], [averages[0], averages[2]])
    same([variables[1]], [now[1]])
    assert [v.shape for v in averages] == SHAPES
