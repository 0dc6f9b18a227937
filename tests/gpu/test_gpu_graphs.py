"""Captured graphs: their replays follow the schedules, and what they cannot follow is refused.

See helpers/on_gpu.py for where these tests run.
"""

import contextlib

import numpy as np
import pytest
from helpers import libraries
from helpers.libraries import torch
from helpers.on_gpu import SIMULATED, equal, marks, tensor

from adamw_numba import AdamW, schedules

pytestmark = marks


class Graph:
    """A stand-in for a captured graph in the simulator: what is launched meanwhile is kept, and can be replayed."""

    def __enter__(self):
        from adamw_numba.gpu import simulated_driver

        self.recorded = simulated_driver.recorded = []

    def __exit__(self, *error):
        from adamw_numba.gpu import simulated_driver

        simulated_driver.recorded = None

    def replay(self):
        for action in self.recorded:
            action()


@contextlib.contextmanager
def captured():
    if SIMULATED:
        graph = Graph()
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
def test_a_captured_graph_follows_the_schedules(options):
    """20 replays with changing rates have the bits of 20 eager steps."""
    rates = {
        "learning_rate": schedules.CosineDecay(0.1, 30, 0.1),
        "weight_decay": schedules.PolynomialDecay(0.1, 25, 0.01),
    }
    results = []
    for is_captured in (False, True):
        sizes = (11, 3) if SIMULATED else (100_037, 6)
        variables, gradients = [tensor(np.ones(n)) for n in sizes], [tensor(np.ones(n)) for n in sizes]
        optimizer = AdamW(**rates, **options)
        optimizer.build(variables)
        optimizer.apply(gradients)
        if is_captured:
            with captured() as graph:
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
    x, g = tensor(np.ones(5)), tensor(np.ones(5))
    optimizer = AdamW(0.1)
    optimizer.build([x])
    optimizer.apply([g])
    return x, g, optimizer


def test_eager_steps_of_other_kinds_between_replays():
    """After a step for which the host waits, replays are still counted, and the rows have to be sent again."""
    x, g, optimizer = stepped_once()
    with captured() as graph:
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


def test_norms_that_the_host_judges_decide_nothing_on_the_gpu():
    """A step that the host refuses leaves what a replay has said of itself."""
    x, g = tensor(np.ones(4)), tensor(np.ones(4))
    optimizer = AdamW(0.1, nonfinite="skip")
    optimizer.build([x])
    optimizer.apply([g])
    with captured() as graph:
        optimizer.apply([g])
    graph.replay()
    optimizer.nonfinite = "raise"
    with pytest.raises(FloatingPointError):
        optimizer.apply([tensor(np.full(4, np.nan))])
    assert optimizer.last_step.applied
    assert optimizer.last_step.gradient_norm == 2.0
    assert optimizer.iterations == 2
    optimizer.nonfinite = "skip"
    optimizer.update_hyperparameters(9)
    graph.replay()
    assert optimizer.iterations == 3


def restore(optimizer, at_one):
    optimizer.restore(at_one)


def load_own_variables(optimizer, at_one):
    store = {}
    optimizer.save_own_variables(store)
    optimizer.load_own_variables(store | {"0": np.int64(1)})


def set_weights(optimizer, at_one):
    optimizer.set_weights([np.int64(1), *optimizer.variables[1:]])


def write(optimizer, at_one):
    optimizer.variables[0][...] = 1


@pytest.mark.parametrize("back", [restore, load_own_variables, set_weights, write])
def test_the_iteration_is_set_back_after_a_capture(back):
    _, g, optimizer = stepped_once()
    at_one = {}
    optimizer.save(at_one)
    with captured() as graph:
        optimizer.apply([g])
    optimizer.update_hyperparameters(20)
    for _ in range(3):
        graph.replay()
    assert optimizer.iterations == 4
    back(optimizer, at_one)
    assert optimizer.iterations == 1
    assert int(optimizer.variables[0]) == 1
    optimizer.update_hyperparameters(20)
    for _ in range(2):
        graph.replay()
    assert optimizer.iterations == 3
    optimizer.apply([g])
    assert optimizer.iterations == 4


def test_rows_survive_a_callable_that_raises():
    _, g, optimizer = stepped_once()
    with captured() as graph:
        optimizer.apply([g])
    good = optimizer.learning_rate
    optimizer.learning_rate = lambda step: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.update_hyperparameters(1000)
    optimizer.learning_rate = good
    graph.replay()
    assert optimizer.iterations == 2


def test_a_graph_that_runs_out_of_rows_stops_and_says_so():
    x, g, optimizer = stepped_once()
    optimizer.update_hyperparameters(70)
    with captured() as graph:
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
def test_what_cannot_be_captured_is_refused(options, prepare):
    x, g = tensor(np.ones(5)), tensor(np.ones(5))
    optimizer = AdamW(**options)
    optimizer.build([x])
    if prepare:
        optimizer.apply([g])
    if prepare == "change":
        optimizer.beta_1 = 0.5
    before = libraries.look(x).copy()
    with pytest.raises(RuntimeError, match="captured"), captured():
        optimizer.apply([g])
    assert np.array_equal(libraries.look(x), before)
