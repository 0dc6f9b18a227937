"""Numbers on a GPU: those of the CPU and of the textbook, wherever arrays lie and whatever changes between steps.

See helpers/on_gpu.py for where these tests run.
"""

import numpy as np
import pytest
from helpers import libraries
from helpers.on_gpu import BOUNDED, MAKE, SIMULATED, array, equal, marks, on_every_library, tensor
from helpers.oracle import Oracle
from hypothesis import given
from test_parity import assert_equals_the_textbook, magnitudes, runs, train

from adamw_numba import AdamW, LossScaleOptimizer, schedules

pytestmark = marks


@on_every_library
@BOUNDED
@given(run=runs(dtypes=("float64", "complex128")))
def test_float64_equals_the_textbook(make, run):
    assert_equals_the_textbook(make, run)


@on_every_library
@BOUNDED
@given(run=runs(dtypes=("float32", "complex64", "float16", "bfloat16")))
def test_every_dtype_agrees_with_the_cpu(make, run):
    """float32 arithmetic with other roundings (fused or not), in a run of few steps."""
    if make in (libraries.to_cupy, libraries.cupy_fortran, libraries.on_gpu) and not SIMULATED:
        run = (run[0], ["float16" if kind == "bfloat16" else kind for kind in run[1]], *run[2:])
    with np.errstate(over="ignore"):
        expected, cpu = train(libraries.numpy, run)
    found, gpu = train(make, run)
    sizes = magnitudes(run, cpu)
    for name, size, one, other in zip(
        [*range(len(found)), *gpu.variable_names],
        sizes,
        [*found, *gpu.variables],
        [*expected, *cpu.variables],
        strict=True,
    ):
        one, other = np.asarray(libraries.look(one)), np.asarray(libraries.look(other))
        kind = "float32" if isinstance(name, str) else run[1][name]
        unit = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(kind, 2e-5)
        finite = np.isfinite(np.abs(other.astype(complex)))
        np.testing.assert_allclose(
            one.astype(complex)[finite], other.astype(complex)[finite], rtol=4 * unit, atol=4 * unit * size
        )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("size", [1, 7, 64, 517])
def test_alignment_and_chunks_leave_the_bits_alone(dtype, options, size, monkeypatch):
    from adamw_numba.gpu import words, workload

    maker = tensor if dtype == "bfloat16" else array
    random = np.random.default_rng(size)
    values, gradients = random.normal(size=size), random.normal(size=(2, size))
    results = []
    for p_offset, g_offset, chunk in [(0, 0, None), (1, 1, None), (3, 0, None), (0, 5, None), (0, 0, 8), (2, 2, 8)]:
        with monkeypatch.context() as patch:
            if chunk:
                patch.setattr(workload, "chunk_of", lambda elements, processors: 8 * words.THREADS)
            large = maker(np.concatenate([np.zeros(p_offset), values, np.zeros(3)]), dtype)
            variable = large[p_offset : p_offset + size]
            optimizer = AdamW(0.1, **options)
            optimizer.build([variable])
            for row in gradients:
                g = maker(np.concatenate([np.zeros(g_offset), row]), dtype)[g_offset:]
                optimizer.apply([g])
            results.append(libraries.look(variable))
            whole = libraries.look(large)
            assert not whole[:p_offset].any()  # nothing else was written
            assert not whole[p_offset + size :].any()
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "sums"])
@pytest.mark.parametrize("size", [5, 129, 533])
def test_alignment_leaves_the_bits_of_norms_alone(dtype, options, size):
    maker = libraries.torch_on_gpu if dtype == "bfloat16" and not SIMULATED else MAKE
    size = size if SIMULATED else size * 300
    random = np.random.default_rng(size)
    values, norms = random.normal(size=(2, size)), set()
    for offset in (0, 1, 2, 5):
        optimizer = AdamW(0.1, global_clipnorm=1.0, **options)
        optimizer.build([maker(np.zeros(offset + size), dtype)[offset:]])
        for row in values:
            optimizer.apply([maker(np.concatenate([np.ones(offset), row]), dtype)[offset:]])
        norms.add(optimizer.last_step.gradient_norm)
    expected = np.linalg.norm(values.sum(0) / 2 if options else values[1])
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(expected, rel={"float16": 1e-3, "bfloat16": 1e-2}.get(dtype, 1e-6))


def test_repeated_runs_have_the_same_bits():
    random = np.random.default_rng(0)
    shapes = [(70,), (9, 11), ()] if SIMULATED else [(70_001,), (257, 129), ()]
    values = [random.normal(size=s) for s in shapes]
    gradients = [[random.normal(size=s) for s in shapes] for _ in range(3)]
    results = []
    for _ in range(2):
        variables = [array(v) for v in values]
        optimizer = AdamW(0.1, global_clipnorm=0.5, use_ema=True)
        optimizer.build(variables)
        for step in gradients:
            optimizer.apply([array(g) for g in step])
        results.append([*variables, *optimizer.variables, np.array(optimizer.last_step.gradient_norm)])
    assert equal(*results)


@pytest.mark.parametrize("value", [1e300, 1e-300, np.finfo(float).max, 5e-324])
def test_norms_of_extreme_float64(value):
    optimizer, cpu = AdamW(0.1, global_clipnorm=1.0), AdamW(0.1, global_clipnorm=1.0)
    x, y = array(np.ones(9), "float64"), np.ones(9)
    optimizer.build([x])
    cpu.build([y])
    optimizer.apply([array(np.full(9, value), "float64")])
    cpu.apply([np.full(9, value)])
    np.testing.assert_allclose(optimizer.last_step.gradient_norm, cpu.last_step.gradient_norm, rtol=1e-14)
    np.testing.assert_allclose(libraries.look(x), y, rtol=1e-14)


def test_without_momentum_the_first_moment_is_the_gradient():
    """A difference from a larger number would lose the last bits of a small gradient."""
    optimizer = AdamW(0.1, beta_1=0.0)
    optimizer.build([array(np.ones(3), "float64")])
    for gradient in ([1e3, -1e3, 1e6], [1.1, 1e-9, -0.3]):
        optimizer.apply([array(gradient, "float64")])
        np.testing.assert_array_equal(libraries.look(optimizer.state["momentum/0"]), gradient)


def steps_with_changes(make_array):
    """Steps among which all that may change does."""
    variables = {"a": make_array(np.ones(6)), "b": make_array(np.full(4, 2.0))}
    optimizer = AdamW(0.1, clipvalue=5.0, use_ema=True, weight_decay=0.1)
    optimizer.build(variables)
    random = np.random.default_rng(1)

    def step():
        optimizer.apply([make_array(random.normal(size=6)), make_array(random.normal(size=4))])

    step()
    optimizer.learning_rate = 0.03
    step()
    optimizer.learning_rate = schedules.ExponentialDecay(0.1, 2, 0.5)
    step()
    optimizer.weight_decay = lambda number: 0.1 / (number + 1)
    step()
    optimizer.beta_1 = 0.5
    step()
    optimizer.loss_scale_factor = 8.0
    step()
    optimizer.clipvalue, optimizer.global_clipnorm = None, 0.5
    step()
    optimizer.variables[0][...] = 40  # the iteration
    step()
    state = [libraries.look(a) for a in optimizer.variables]
    step()
    optimizer.set_weights(state)
    step()
    optimizer.update_step(make_array(np.ones(4)), variables["b"], 0.01)
    step()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, make_array(np.ones(4))])
    with optimizer.averaged():
        averages = [libraries.look(v) for v in variables.values()]
    store = {}
    optimizer.save_own_variables(store)
    optimizer.load_own_variables(store)
    step()
    config = optimizer.get_config()
    return [*variables.values(), *averages, *optimizer.variables], optimizer.iterations, config["learning_rate"]


def test_whatever_changes_between_steps_is_followed():
    found, expected = steps_with_changes(lambda a: array(a, "float64")), steps_with_changes(lambda a: np.array(a))
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(libraries.look(one), other, rtol=1e-12)
    assert found[1:] == expected[1:]


def test_a_loss_scale_on_the_gpu():
    x, y = array(np.ones(3), "float64"), np.ones(3)
    results = []
    for variable, make in ((x, lambda a: array(a, "float64")), (y, np.array)):
        optimizer = LossScaleOptimizer(AdamW(0.1), initial_scale=8.0, dynamic_growth_steps=2)
        optimizer.build([variable])
        for factor in (1.0, 1.0, np.nan, 1.0, 1.0):
            optimizer.apply([make(np.array([1.0, -2.0, 0.5]) * factor * optimizer.dynamic_scale)])
        results.append((optimizer.dynamic_scale, optimizer.skipped_steps, optimizer.iterations))
    np.testing.assert_allclose(libraries.look(x), y, rtol=1e-14)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"global_clipnorm": 0.5}, {"clipnorm": 0.3}, {"nonfinite": "skip"}, {"gradient_accumulation_steps": 2}],
)
def test_host_and_gpu_in_one_optimizer(options):
    random = np.random.default_rng(3)
    values = [random.normal(size=s) for s in (5, 8, 3)]
    found, expected = (
        [np.array(values[0]), array(values[1], "float64"), np.array(values[2])],
        [np.array(v) for v in values],
    )
    optimizers = [AdamW(0.1, **options), AdamW(0.1, **options)]
    optimizers[0].build(found)
    optimizers[1].build(expected)
    for k in range(4):
        gradients = [random.normal(size=s) for s in (5, 8, 3)]
        if k == 2 and options.get("nonfinite"):
            gradients[1][0] = np.nan
        optimizers[0].apply([gradients[0], array(gradients[1], "float64"), gradients[2]])
        optimizers[1].apply(gradients)
    for one, other in zip([*found, *optimizers[0].variables], [*expected, *optimizers[1].variables], strict=True):
        np.testing.assert_allclose(libraries.look(one), other, rtol=1e-13)
    assert optimizers[0].skipped_steps == optimizers[1].skipped_steps
    assert optimizers[0].iterations == optimizers[1].iterations


def test_two_storages_take_two_launches_and_one_step():
    variables = [array(np.ones(40), "float32"), array(np.ones(24), "float64")]
    optimizer = AdamW(0.1, global_clipnorm=1.0)
    optimizer.build(variables)
    reference = Oracle(learning_rate=0.1, global_clipnorm=1.0)
    reference.build([np.ones(40), np.ones(24)])
    for _ in range(3):
        optimizer.apply([array(np.ones(40), "float32"), array(np.ones(24), "float64")])
        reference.step([np.ones(40), np.ones(24)])
    np.testing.assert_allclose(libraries.look(variables[0]), reference.variables[0], rtol=1e-6)
    np.testing.assert_allclose(libraries.look(variables[1]), reference.variables[1], rtol=1e-12)
    assert optimizer.iterations == 3


def test_a_long_run_of_changing_shapes_of_work():
    """Gradients in another memory order, or cast, and back, between steps."""
    x, y = array(np.arange(12.0).reshape(3, 4), "float64"), np.arange(12.0).reshape(3, 4)
    optimizer, cpu = AdamW(0.1), AdamW(0.1)
    optimizer.build([x])
    cpu.build([y])
    g = np.linspace(-1, 1, 12).reshape(3, 4)
    for make in (libraries.on_gpu, libraries.gpu_strided, libraries.on_gpu):
        for dtype in ("float64", "float32"):
            if MAKE is libraries.on_gpu:
                optimizer.apply([make(g, dtype)])
                cpu.apply([g.astype(dtype)])
    np.testing.assert_allclose(libraries.look(x), y, rtol=1e-13)
    assert optimizer.iterations == 6
