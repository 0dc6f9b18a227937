"""What a GPU counts by itself: steps that it skips, that an interrupt cuts off, that the host has to ask about.

See helpers/on_gpu.py for where these tests run.
"""

import math

import numpy as np
import pytest
from helpers import libraries
from helpers.interrupts import HOME, Injector, interrupted
from helpers.on_gpu import SIMULATED, array, equal, marks

from adamw_numba import AdamW, schedules

pytestmark = marks


@pytest.mark.parametrize(
    "options", [{}, {"clipnorm": 0.5}, {"gradient_accumulation_steps": 2}, {"global_clipnorm": 1.0}]
)
def test_the_gpu_skips_by_itself(options):
    good, bad = [np.ones(5), np.full(3, 2.0)], [np.array([1, np.nan, 1, 1, 1.0]), np.ones(3)]
    skipping = AdamW(schedules.ExponentialDecay(0.1, 1, 0.5), nonfinite="skip", **options)
    plain = AdamW(schedules.ExponentialDecay(0.1, 1, 0.5), **options)
    found, expected = [array(np.ones(n), "float64") for n in (5, 3)], [array(np.ones(n), "float64") for n in (5, 3)]
    skipping.build(found)
    plain.build(expected)
    for gradients in (good, bad, good, bad, bad, good, good):
        skipping.apply([array(g, "float64") for g in gradients])
        if gradients is good:
            plain.apply([array(g, "float64") for g in gradients])
    assert equal(found, expected)
    assert skipping.skipped_steps == 3
    assert skipping.last_step.applied
    assert skipping.iterations == plain.iterations
    assert equal(skipping.variables, plain.variables)
    skipping.apply([array(g, "float64") for g in bad])
    assert not skipping.last_step.applied
    assert skipping.skipped_steps == 4
    assert equal(found, expected)


@pytest.mark.parametrize("before", [0, 3])
def test_the_layout_of_gradients_changes_among_skipped_steps(before):
    """What the GPU has counted alone is not lost when the tables are made anew."""
    x, y = array(np.ones(6), "float64"), np.ones(6)
    optimizer, cpu = AdamW(0.1), AdamW(0.1)
    optimizer.build([x])
    cpu.build([y])
    g, wide = np.linspace(1, 2, 6), np.repeat(np.linspace(1, 2, 6), 2)
    bad = g * np.nan
    for _ in range(before):
        optimizer.apply([array(g, "float64")])
        cpu.apply([g])
    optimizer.nonfinite = cpu.nonfinite = "skip"
    for gradient in (g, bad, g, g):
        optimizer.apply([array(gradient, "float64")])
        cpu.apply([gradient])
    optimizer.apply([array(wide, "float64")[::2]])
    cpu.apply([wide[::2]])
    np.testing.assert_allclose(libraries.look(x), y, rtol=1e-14)
    assert (optimizer.iterations, optimizer.skipped_steps) == (cpu.iterations, cpu.skipped_steps) == (before + 4, 1)


# What a step does on the host; the arrays' part is tested by tests/step/test_interrupts.py.
HOST = tuple(
    f"{HOME}/{name}.py"
    for name in (
        "step/engine",
        "step/commit",
        "gpu/plan",
        "gpu/launcher",
        "gpu/counter",
        "gpu/rows",
        "gpu/tables",
        "gpu/streams",
    )
)


@pytest.mark.parametrize(
    ("options", "moved"),
    [({}, False), ({"nonfinite": "skip"}, True), ({"clipnorm": 1.0, "gradient_accumulation_steps": 2}, False)],
)
def test_an_interrupt_at_every_line(options, moved, monkeypatch):
    """Two kinds of arrays, so several launches: the step is taken, or not begun, and the next one is right."""
    from adamw_numba.gpu import rows

    monkeypatch.setattr(rows, "AHEAD", 1)  # so that rows are sent in the step that is interrupted

    def fresh():
        kinds = ["float32", "float64"]
        variables = [array(np.ones(2), kind) for kind in kinds]
        gradients = [[array(np.full(2, k), kind) for kind in kinds] for k in (1.0, -3.0)]
        optimizer = AdamW(**{"learning_rate": 0.1} | options)
        optimizer.build(variables)
        for _ in range(2):
            optimizer.apply(gradients[0])
        return variables, optimizer, gradients[moved]

    def look(variables, optimizer):
        return [libraries.look(a).tobytes() for a in [*variables, *optimizer.variables]]

    variables, optimizer, given = fresh()
    states = [look(variables, optimizer)]
    for _ in range(2):
        optimizer.apply(given)
        states.append(look(variables, optimizer))
    n, seen = 0, set()
    while True:
        n += 1
        variables, optimizer, given = fresh()
        line = interrupted(optimizer, given, Injector(n, HOST))
        if line is None:
            break
        taken = states.index(look(variables, optimizer))
        seen.add(taken)
        optimizer.apply(given)
        assert look(variables, optimizer) == states[taken + 1], line
    assert seen == {0, 1}
    assert n > 60


def test_a_launch_that_fails_counts_nothing(monkeypatch):
    if not SIMULATED:
        pytest.skip("needs a driver that can be made to fail")
    from adamw_numba.gpu import simulated_driver

    x, g = array(np.ones(4)), array(np.ones(4))
    optimizer = AdamW(0.1)
    optimizer.build([x])
    optimizer.apply([g])
    before = libraries.look(x).copy()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cuLaunchKernel") as caught:
        patch.setattr(simulated_driver, "kernels", [])
        optimizer.apply([g])
    assert caught.value.args[1] == 999
    assert np.array_equal(libraries.look(x), before)


def test_the_iteration_is_written_after_a_norm():
    optimizer = AdamW(0.1, global_clipnorm=1.0)
    optimizer.build([array(np.ones(3))])
    optimizer.apply([array(np.ones(3))])
    iteration = optimizer.variables[0]
    iteration[...] = 40
    assert optimizer.iterations == 40
    assert math.isclose(optimizer.last_step.gradient_norm, math.sqrt(3))
    optimizer.apply([array(np.ones(3))])
    assert optimizer.iterations == 41


def test_many_skips_outlast_the_rows(monkeypatch):
    """The host learns only now and then how far the GPU has counted."""
    from adamw_numba.gpu import rows

    monkeypatch.setattr(rows, "AHEAD", 4)
    optimizer = AdamW(schedules.PolynomialDecay(0.1, 300, 0.01), nonfinite="skip")
    reference = AdamW(schedules.PolynomialDecay(0.1, 300, 0.01))
    x, y = array([1.0], "float64"), np.array([1.0])
    optimizer.build([x])
    reference.build([y])
    good, bad = array([1.0], "float64"), array([np.inf], "float64")
    for k in range(45):
        optimizer.apply([bad if k % 3 else good])
        if not k % 3:
            reference.apply([np.array([1.0])])
    assert optimizer.iterations == 15
    np.testing.assert_allclose(libraries.look(x), y, rtol=1e-14)


def test_skips_are_counted_on_when_there_are_more_groups(monkeypatch):
    """What the host had asked of one group's counter is of no use for two."""
    from adamw_numba.gpu import rows

    monkeypatch.setattr(rows, "AHEAD", 2)
    optimizer, cpu = AdamW(0.1, nonfinite="skip"), AdamW(0.1, nonfinite="skip")
    found, expected = [array(np.ones(n), "float16") for n in (3, 2)], [np.ones(n, np.float16) for n in (3, 2)]
    optimizer.build(found)
    cpu.build(expected)
    for k in range(24):
        bad = np.nan if k % 3 else 1.0
        dtypes = "float16", "float32" if k > 11 else "float16"  # which are two groups, and one
        gradients = [np.full(n, bad, dtype) for n, dtype in zip((3, 2), dtypes, strict=True)]
        optimizer.apply([array(g, g.dtype.name) for g in gradients])
        cpu.apply(gradients)
    assert (optimizer.iterations, optimizer.skipped_steps) == (cpu.iterations, cpu.skipped_steps) == (8, 16)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(libraries.look(one), other, rtol=4e-3)


def test_an_interrupt_when_the_rows_have_moved(monkeypatch):
    """Kernels are told where the rows are now, though the first attempt was interrupted."""
    from adamw_numba.gpu.workload import Workload

    def interrupted(workload, addresses):
        raise KeyboardInterrupt

    x, y = array(np.ones(4), "float64"), np.ones(4)
    optimizer, cpu = AdamW(0.1), AdamW(0.1)
    optimizer.build([x])
    cpu.build([y])
    with monkeypatch.context() as patch:
        patch.setattr(Workload, "describe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.update_hyperparameters(1000)
    optimizer.learning_rate = cpu.learning_rate = 0.01
    for _ in range(2):
        optimizer.apply([array(np.ones(4), "float64")])
        cpu.apply([np.ones(4)])
    assert optimizer.iterations == 2
    np.testing.assert_allclose(libraries.look(x), y, rtol=1e-14)


def test_raise_names_the_variable_and_writes_nothing():
    variables = [array([1.0, 2.0]), array([3.0])]
    optimizer = AdamW(0.1, nonfinite="raise", clipnorm=1.0)
    optimizer.build({"a": variables[0], "b": variables[1]})
    with pytest.raises(FloatingPointError, match=r"\['b'\]"):
        optimizer.apply([array([1.0, 1.0]), array([np.inf])])
    assert optimizer.iterations == 0
    assert equal(variables, [np.float32([1, 2]), np.float32([3])])
    optimizer.apply([array([1.0, 1.0]), array([1.0])])
    reference = [np.float32([1, 2]), np.float32([3])]
    cpu = AdamW(0.1, clipnorm=1.0)
    cpu.build(reference)
    cpu.apply([np.float32([1, 1]), np.float32([1])])
    for found, expected in zip(variables, reference, strict=True):
        np.testing.assert_allclose(libraries.look(found), expected, rtol=1e-6)


def test_state_goes_from_the_gpu_to_the_host_and_back():
    """Saved on one, restored on the other, also among steps that the GPU has skipped by itself."""
    g, bad = np.linspace(1, 2, 5), np.full(5, np.nan)
    x, y = array(np.ones(5), "float64"), np.ones(5)
    optimizer, cpu = AdamW(0.1, nonfinite="skip", amsgrad=True), AdamW(0.1, nonfinite="skip", amsgrad=True)
    optimizer.build({"x": x})
    cpu.build({"x": y})
    for gradient in (g, bad, g):
        optimizer.apply([array(gradient, "float64")])
    store, back = {}, {}
    optimizer.save(store, variables=True)
    cpu.restore(store)
    assert (cpu.iterations, cpu.skipped_steps) == (2, 1)
    assert np.array_equal(libraries.look(x), y)
    cpu.apply([g])
    optimizer.apply([array(bad, "float64")])  # counted on the GPU alone when it is restored
    cpu.save(back, variables=True)
    optimizer.restore(back)
    assert (optimizer.iterations, optimizer.skipped_steps) == (3, 1)
    optimizer.apply([array(g, "float64")])
    cpu.apply([g])
    assert optimizer.iterations == 4
    np.testing.assert_allclose(libraries.look(x), y, rtol=1e-14)
