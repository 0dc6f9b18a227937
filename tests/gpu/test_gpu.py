"""Arrays on a GPU: the same table as on the CPU, and what only a GPU has.

With a GPU: ``pytest -m gpu``. Without one, test_cuda_simulator.py runs this file in Numba's simulator, where the same
kernels read the host's memory; what the simulator has not is skipped there.
"""

import contextlib
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import libraries
from helpers.oracle import Oracle
from hypothesis import HealthCheck, given, settings
from numba import config
from test_parity import assert_equals_the_textbook, magnitudes, runs, train

from adamw_numba import AdamW, LossScaleOptimizer, schedules

SIMULATED = bool(config.ENABLE_CUDASIM)


def gpu_makers():
    """Every library that can make arrays on a GPU here, and why there is none."""
    if SIMULATED:
        return [libraries.on_gpu, libraries.gpu_strided], ""
    try:
        from numba import cuda

        if not cuda.is_available():
            return [], "no GPU here"
    except ImportError as error:
        return [], str(error)
    makers = [libraries.on_gpu]
    with contextlib.suppress(ImportError):
        import cupy  # noqa: F401

        makers += [libraries.to_cupy, libraries.cupy_fortran]
    if torch.cuda.is_available():
        makers += [libraries.torch_on_gpu, libraries.parameter_on_gpu, libraries.transposed_on_gpu]
    return makers, ""


MAKERS, REASON = gpu_makers()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not MAKERS, reason=REASON),
]
if SIMULATED:  # NumPy's scalars warn of what a GPU does in silence
    pytestmark.append(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
EXAMPLES = 6 if SIMULATED else 200
needs_gpu = pytest.mark.skipif(SIMULATED, reason="the simulator has no streams and no graphs")
on_every_library = pytest.mark.parametrize("make", MAKERS or [None], ids=lambda make: getattr(make, "__name__", "none"))
if SIMULATED:
    # The simulator's threads are Python's, and one that looks after them never sleeps: each waits for its turn at the
    # interpreter's lock, which by default comes after 5 milliseconds.
    sys.setswitchinterval(1e-4)
BOUNDED = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
MAKE = MAKERS[0] if MAKERS else None


def array(values, dtype="float32"):
    return MAKE(np.asarray(values), dtype)


def equal(one, other):
    return all(
        np.array_equal(libraries.look(a), libraries.look(b), equal_nan=True) for a, b in zip(one, other, strict=True)
    )


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

    maker = libraries.torch_on_gpu if dtype == "bfloat16" and not SIMULATED else MAKE
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


@pytest.mark.parametrize("what", ["addresses", "rows"])
def test_an_interrupt_while_something_is_sent(what, monkeypatch):
    from adamw_numba.gpu.tables import Mirror

    x, y = array(np.ones(4), "float64"), np.ones(4)
    optimizer, cpu = AdamW(0.1, beta_1=0.0), AdamW(0.1, beta_1=0.0)
    optimizer.build([x])
    cpu.build([y])
    gradients = [array(np.ones(4), "float64"), array(np.full(4, -3.0), "float64")]
    optimizer.apply([gradients[0]])
    cpu.apply([np.ones(4)])
    if what == "rows":
        optimizer.learning_rate = cpu.learning_rate = 0.01
    send = Mirror.send

    class Interrupted:
        def copy_to_device(self, *args):
            raise KeyboardInterrupt

    def interrupted(mirror, stream):
        device, mirror.device = mirror.device, Interrupted()
        try:
            send(mirror, stream)
        finally:
            mirror.device = device

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.apply([gradients[what == "addresses"]])
    for _ in range(2):
        optimizer.apply([gradients[1]])
        cpu.apply([np.full(4, -3.0)])
    np.testing.assert_allclose(libraries.look(x), y, rtol=1e-14)


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


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", range(6))
@pytest.mark.parametrize(
    "options",
    [{"global_clipnorm": 1.0}, {"nonfinite": "skip"}, {"global_clipnorm": 1.0, "gradient_accumulation_steps": 2}],
)
def test_an_interrupt_among_the_launches(when, nth, options, monkeypatch):
    """Two kinds of arrays, so several launches: the step is taken, or not begun."""
    from adamw_numba.gpu.launcher import Launcher

    def run(interrupted):
        variables = [array(np.ones(4), "float32"), array(np.ones(4), "float64")]
        optimizer = AdamW(0.1, **options)
        optimizer.build(variables)
        gradients = [array(np.ones(4), "float32"), array(np.ones(4), "float64")]
        for _ in range(3 if "gradient_accumulation_steps" in options else 1):
            optimizer.apply(gradients)
        before = [libraries.look(v).copy() for v in variables]
        count = iter(range(10**6))
        configured = Launcher.configured

        def interrupting(launcher, kernel, grid):
            launch = configured(launcher, kernel, grid)

            def call(*words):
                here = next(count) == nth
                if here and when == "before":
                    raise KeyboardInterrupt
                launch(*words)
                if here:
                    raise KeyboardInterrupt

            return call

        if interrupted:
            with monkeypatch.context() as patch:
                patch.setattr(Launcher, "configured", interrupting)
                with contextlib.suppress(KeyboardInterrupt):
                    optimizer.apply(gradients)
        else:
            optimizer.apply(gradients)
        return (
            before,
            [libraries.look(v).copy() for v in variables],
            optimizer.iterations,
            optimizer,
            variables,
            gradients,
        )

    before, after, *_ = run(False)
    _, found, iterations, optimizer, variables, gradients = run(True)
    assert iterations in (1, 2)
    assert equal(found, after if iterations == 2 else before)
    for _ in range(options.get("gradient_accumulation_steps", 1)):
        optimizer.apply(gradients)
    assert optimizer.iterations == iterations + 1
    assert not equal(variables, found)


class Graph:
    """A stand-in for a captured graph in the simulator: what is launched meanwhile is kept, and can be replayed."""

    def __init__(self, monkeypatch):
        self.recorded, self.patch = [], monkeypatch

    def __enter__(self):
        from adamw_numba.gpu import streams
        from adamw_numba.gpu.launcher import Launcher
        from adamw_numba.gpu.tables import Mirror

        configured = Launcher.configured
        self.context = self.patch.context()
        patch = self.context.__enter__()
        patch.setattr(streams, "is_captured", lambda handle: True)
        patch.setattr(
            Launcher,
            "configured",
            lambda own, kernel, grid: lambda *words: self.recorded.append((configured(own, kernel, grid), words)),
        )
        patch.setattr(Mirror, "send_captured", lambda mirror, stream: self.recorded.append((keep(mirror), ())))

    def __exit__(self, *error):
        return self.context.__exit__(*error)

    def replay(self):
        for call, words in self.recorded:
            call(*words)


def keep(mirror):
    buffer = mirror.host.copy()
    return lambda: mirror.device.copy_to_device(buffer)


@contextlib.contextmanager
def captured(monkeypatch, stream=None):
    if SIMULATED:
        graph = Graph(monkeypatch)
        with graph:
            yield graph
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph


GRAPH_OPTIONS = [
    {},
    {"global_clipnorm": 0.5, "amsgrad": True},
    {"gradient_accumulation_steps": 3, "use_ema": True, "ema_overwrite_frequency": 2},
    {"nonfinite": "skip", "clipnorm": 1.0},
    {"gradient_accumulation_steps": 2, "global_clipnorm": 0.5},
]


@pytest.mark.parametrize("options", GRAPH_OPTIONS)
def test_a_captured_graph_follows_the_schedules(options, monkeypatch):
    """20 replays with changing rates have the bits of 20 eager steps."""
    maker = array if SIMULATED else (lambda a: libraries.torch_on_gpu(a, "float32"))
    rates = {
        "learning_rate": schedules.CosineDecay(0.1, 30, 0.1),
        "weight_decay": schedules.PolynomialDecay(0.1, 25, 0.01),
    }
    results = []
    for is_captured in (False, True):
        sizes = (11, 3) if SIMULATED else (100_037, 6)
        variables, gradients = [maker(np.ones(n)) for n in sizes], [maker(np.ones(n)) for n in sizes]
        optimizer = AdamW(**rates, **options)
        optimizer.build(variables)
        optimizer.apply(gradients)
        if is_captured:
            with captured(monkeypatch) as graph:
                optimizer.apply(gradients)
            assert optimizer.iterations == 1 // (options.get("gradient_accumulation_steps") or 1)
            for _ in range(19):
                graph.replay()
        else:
            for _ in range(19):
                optimizer.apply(gradients)
        optimizer.apply(gradients)  # an eager step after the replays
        results.append([*variables, *optimizer.variables])
        assert optimizer.skipped_steps == 0
    assert equal(*results)


def stepped_once():
    maker = array if SIMULATED else (lambda a: libraries.torch_on_gpu(a, "float32"))
    x, g = maker(np.ones(5)), maker(np.ones(5))
    optimizer = AdamW(0.1)
    optimizer.build([x])
    optimizer.apply([g])
    return x, g, optimizer


def test_eager_steps_of_other_kinds_between_replays(monkeypatch):
    """After a step for which the host waits, replays are still counted, and the rows have to be sent again."""
    x, g, optimizer = stepped_once()
    with captured(monkeypatch) as graph:
        optimizer.apply([g])
    optimizer.nonfinite = "raise"
    optimizer.apply([g])
    optimizer.nonfinite = "propagate"
    optimizer.update_hyperparameters(20)
    for _ in range(3):
        graph.replay()
    assert optimizer.iterations == 5
    assert int(optimizer.variables[0]) == 5
    with pytest.raises(RuntimeError, match="captured"):
        optimizer.update_step(g, x, 0.1)
    for option, value in (("global_clipnorm", 0.1), ("nonfinite", "skip")):
        before = getattr(optimizer, option)
        setattr(optimizer, option, value)
        with pytest.raises(RuntimeError, match="another capture"):
            optimizer.update_hyperparameters(5)
        setattr(optimizer, option, before)
    graph.replay()
    assert optimizer.iterations == 6


def test_rows_survive_a_callable_that_raises(monkeypatch):
    _, g, optimizer = stepped_once()
    with captured(monkeypatch) as graph:
        optimizer.apply([g])
    good = optimizer.learning_rate
    optimizer.learning_rate = lambda step: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.update_hyperparameters(1000)
    optimizer.learning_rate = good
    graph.replay()
    assert optimizer.iterations == 2


def test_a_graph_that_runs_out_of_rows_stops_and_says_so(monkeypatch):
    x, g, optimizer = stepped_once()
    optimizer.update_hyperparameters(70)
    with captured(monkeypatch) as graph:
        optimizer.apply([g])
    optimizer.update_hyperparameters(70)
    for _ in range(140):
        graph.replay()
    with pytest.raises(RuntimeError, match=r"replayed beyond iteration.*update_hyperparameters"):
        _ = optimizer.iterations
    reached = optimizer.iterations
    assert 71 <= reached < 140
    optimizer.learning_rate = 0.0
    optimizer.weight_decay = 0.0
    optimizer.update_hyperparameters(70)
    before = libraries.look(x).copy()
    graph.replay()
    assert np.array_equal(libraries.look(x), before)  # the replay follows the new learning rate
    assert optimizer.iterations == reached + 1


@pytest.mark.parametrize(
    ("options", "prepare"),
    [({}, None), ({"nonfinite": "raise"}, "step"), ({"learning_rate": 0.2}, "change")],
)
def test_what_cannot_be_captured_is_refused(options, prepare, monkeypatch):
    maker = array if SIMULATED else (lambda a: libraries.torch_on_gpu(a, "float32"))
    x, g = maker(np.ones(5)), maker(np.ones(5))
    optimizer = AdamW(**options)
    optimizer.build([x])
    if prepare:
        optimizer.apply([g])
    if prepare == "change":
        optimizer.beta_1 = 0.5
    before = libraries.look(x).copy()
    with pytest.raises(RuntimeError, match="captured"), captured(monkeypatch):
        optimizer.apply([g])
    assert np.array_equal(libraries.look(x), before)


def with_overlap(a):
    large = a(np.zeros(8))
    return [large[:5], large[3:]]


@pytest.mark.parametrize(
    ("build", "gradients", "error", "match"),
    [
        (lambda a: [a(np.ones(3))], lambda a: [np.ones(3, np.float32)], TypeError, "like its variable"),
        (lambda a: [a(np.ones(3))], lambda a: [a(np.ones(4))], ValueError, r"shape \(4,\); expected \(3,\)"),
        (lambda a: [np.ones(3, np.float32)], lambda a: [a(np.ones(3))], TypeError, "like its variable"),
        (lambda a: [a(np.ones(3))], lambda a: [None], ValueError, "No gradients provided"),
        (with_overlap, lambda a: [a(np.ones(5)), a(np.ones(5))], ValueError, "share memory"),
        (lambda a: [a(np.ones(3)), a(np.ones(2))], lambda a: [a(np.ones(3))], ValueError, "one-to-one"),
        (lambda a: [array(np.ones(3), "int32")], lambda a: [a(np.ones(3))], TypeError, "dtype int32"),
    ],
)
def test_bad_input(build, gradients, error, match):
    optimizer = AdamW(0.1)
    with pytest.raises(error, match=match):
        variables = build(array)
        optimizer.build(variables)
        before = [libraries.look(v).copy() for v in variables]
        try:
            optimizer.apply(gradients(array))
        finally:
            assert equal(variables, before)


def test_a_gradient_that_is_a_variable_is_refused():
    x = array(np.ones(4))
    optimizer = AdamW(0.1)
    optimizer.build([x])
    for bad in (x, x[:]):
        with pytest.raises(ValueError, match="shares memory"):
            optimizer.apply([bad])


@needs_gpu
def test_torch_sees_the_writes_and_streams():
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    x = torch.nn.Parameter(torch.ones(1 << 22, device="cuda"))
    optimizer = AdamW(0.1)
    optimizer.build([x])
    optimizer.apply([torch.ones_like(x)])
    version = x._version
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        slow = torch.ones(1 << 22, device="cuda")
        for _ in range(200):
            slow = slow * 1.01 - slow * 0.01  # the gradient is still being made when `apply` is called
        optimizer.apply([slow])
    torch.cuda.current_stream().wait_stream(side)
    assert x._version == version + 1
    y = torch.ones(1 << 22)
    cpu = AdamW(0.1)
    cpu.build([y])
    cpu.apply([torch.ones(1 << 22)])
    cpu.apply([slow.cpu()])
    torch.testing.assert_close(x.detach().cpu(), y)
    loss = (x * x).sum()
    optimizer.apply([torch.ones_like(x)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_gpu
def test_whatever_speaks_an_interface():
    """An object of no known library: by the CUDA array interface, or by DLPack alone."""

    class Interface:
        def __init__(self, inner):
            self.inner, self.shape, self.dtype = inner, inner.shape, inner.dtype

        @property
        def __cuda_array_interface__(self):
            return self.inner.__cuda_array_interface__

    class Capsule:
        def __init__(self, inner):
            self.inner, self.shape, self.dtype = inner, tuple(inner.shape), np.dtype("float32")

        def __dlpack__(self, **kwargs):
            return self.inner.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.inner.__dlpack_device__()

    inner = array(np.ones(5)), (torch.ones(5, device="cuda") if torch.cuda.is_available() else None)
    for wrapped, own in ((Interface(inner[0]), inner[0]), (Capsule(inner[1]), inner[1])):
        if own is None:
            continue
        optimizer = AdamW(0.1)
        optimizer.build([wrapped])
        optimizer.apply([type(wrapped)(own * 0 + 1 if hasattr(own, "data_ptr") else array(np.ones(5)))])
        found = libraries.look(own)
        np.testing.assert_allclose(found, np.full(5, 0.9 - 0.1 * 0.004, np.float32), rtol=1e-5)


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


def test_repr_and_deepcopy_and_averages():
    x = array(np.ones(3))
    optimizer = AdamW(0.1, use_ema=True)
    optimizer.build([x])
    assert "devices='cuda:0'" in repr(optimizer)
    optimizer.apply([array(np.ones(3))])
    assert math.isclose(float(libraries.look(optimizer.averages[0])[0]), 0.9 - 0.1 * 0.004, rel_tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.finalize_variable_values([x])
