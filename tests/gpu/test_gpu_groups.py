"""Groups on a GPU: a row of coefficients for each, which captured graphs follow.

See helpers/on_gpu.py for where these tests run.
"""

import numpy as np
import pytest
from helpers import libraries
from helpers.on_gpu import MAKE, equal, marks, tensor
from helpers.oracle import Oracle

from adamw_numba import AdamW, schedules

pytestmark = marks

SIZES = [5, 3, 7, 2]
GROUPS = [
    {"learning_rate": schedules.ExponentialDecay(0.05, 4, 0.7), "beta_1": 0.8, "epsilon": 1e-3},
    {"learning_rate_multiplier": 0.1, "weight_decay": 0.0, "beta_2": 0.9, "clipnorm": 0.3},
]
OPTIONS = {
    "plain": {},
    "clip of the common group": {"clipnorm": 0.4, "amsgrad": True},
    "values": {"clipvalue": 0.2, "use_ema": True, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2, "loss_scale_factor": 4.0},
    "conventions": {"decouple_lr": True, "maximize": True, "nesterov": True, "epsilon_mode": "corrected"},
}


def values_of(seed):
    random = np.random.default_rng(seed)
    return [random.standard_normal(size) for size in SIZES]


def grouped(variables, **options):
    optimizer = AdamW(schedules.CosineDecay(0.1, 20), weight_decay=0.02, **options)
    optimizer.override(var_list=variables[1::3], **GROUPS[0])
    optimizer.override(var_list=variables[2::3], **GROUPS[1])
    optimizer.build(variables)
    return optimizer


@pytest.mark.parametrize("options", OPTIONS)
def test_groups_as_in_the_textbook(options):
    start = values_of(0)
    own = {1: GROUPS[0], 2: GROUPS[1] | {"clipvalue": None}}
    oracle = Oracle(schedules.CosineDecay(0.1, 20), 0.02, **OPTIONS[options], own=own)
    oracle.build(start)
    variables = [MAKE(x, "float64") for x in start]
    optimizer = grouped(variables, **OPTIONS[options])
    for step in range(6):
        oracle.step(values_of(1 + step))
        optimizer.apply([MAKE(g, "float64") for g in values_of(1 + step)])
    for ours, theirs in zip(variables, oracle.variables, strict=True):
        np.testing.assert_allclose(libraries.look(ours), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", ["plain", "clip of the common group", "accumulation", "conventions"])
def test_a_captured_graph_follows_the_schedules_of_all_groups(options):
    from test_gpu_graphs import captured

    results = []
    for is_captured in (False, True):
        variables, gradients = ([tensor(x) for x in values_of(seed)] for seed in (0, 1))
        optimizer = grouped(variables, **OPTIONS[options])
        optimizer.apply(gradients)
        if is_captured:
            with captured() as graph:
                optimizer.apply(gradients)
            for _ in range(9):
                graph.replay()
        else:
            for _ in range(9):
                optimizer.apply(gradients)
        optimizer.groups[1].learning_rate_multiplier = 3.0
        optimizer.apply(gradients)
        results.append([*variables, *optimizer.variables])
    assert equal(*results)


def test_frozen_and_thawed():
    variables = [MAKE(x, "float32") for x in values_of(0)]
    optimizer = AdamW(0.1)
    optimizer.override(var_list=variables[1:3], trainable=False)
    optimizer.build(variables)
    gradients = [MAKE(g, "float32") for g in values_of(1)]
    for _ in range(3):
        optimizer.apply(gradients)
    for k in (1, 2):
        np.testing.assert_array_equal(libraries.look(variables[k]), values_of(0)[k].astype("float32"))
    optimizer.groups[1].trainable = True
    optimizer.apply(gradients)
    late = [MAKE(values_of(0)[k], "float32") for k in (1, 2)]
    begun = AdamW(0.1)
    begun.build(late)
    begun.apply([gradients[k] for k in (1, 2)])
    for ours, theirs in zip(variables[1:3], late, strict=True):
        np.testing.assert_array_equal(libraries.look(ours), libraries.look(theirs))
    assert optimizer.iterations == 4


# Which of the variables have a gradient, step by step
TURNS = ["1111", "1010", "0101", "1100", "0000", "1111", "0011", "1000"]


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"clipnorm": 0.7, "use_ema": True}], ids=str)
def test_variables_that_count_for_themselves(options):
    """As on the host: each has the bias correction of its own steps, as in torch."""
    results = []
    for make in (lambda x: MAKE(x, "float64"), np.array):
        variables = [make(x) for x in values_of(0)]
        optimizer = grouped(variables, **options, epsilon_mode="corrected")
        optimizer.engine.hyper.counts_each = True
        for step, turn in enumerate(TURNS):
            gradients = values_of(1 + step)
            if step in (1, 6) and "nonfinite" in options:
                gradients[int(turn[0] == "0") * 2][0] = np.nan
            optimizer.apply([make(g) if mark == "1" else None for g, mark in zip(gradients, turn, strict=True)])
        results.append((variables, optimizer))
    for ours, theirs in zip(*(variables for variables, _ in results), strict=True):
        np.testing.assert_allclose(libraries.look(ours), theirs, rtol=1e-11, atol=1e-11)
    counts = [[group.started for group in optimizer.groups] for _, optimizer in results]
    assert counts[0] == counts[1]
    assert any(counts[0])


def test_nothing_is_frozen_once_a_graph_was_captured():
    from test_gpu_graphs import captured

    variables, gradients = ([tensor(x) for x in values_of(seed)] for seed in (0, 1))
    optimizer = grouped(variables)
    optimizer.apply(gradients)
    with captured():
        optimizer.apply(gradients)
    with pytest.raises(RuntimeError, match=r"cannot change once a graph was captured"):
        optimizer.groups[1].trainable = False
    assert optimizer.groups[1].trainable
