"""What a step asks of CUDA's driver, call by call: a stand-in for the driver in Numba's simulator notes it."""

import logging
from collections import Counter

import numpy as np
import pytest
from helpers import libraries
from helpers.on_gpu import SIMULATED, array, marks

from adamw_numba import AdamW, schedules

pytestmark = marks
if not SIMULATED:
    pytest.skip("the driver does not tell what it was asked", allow_module_level=True)

from adamw_numba.arrays import gpu as gpu_arrays  # noqa: E402
from adamw_numba.gpu import driver, simulated_driver  # noqa: E402
from adamw_numba.update import ROWS  # noqa: E402


def calls_of(action):
    """How often each function of the driver is called."""
    simulated_driver.calls.clear()
    action()
    return Counter(name for name, _ in simulated_driver.calls)


def stepping(kinds, **options):
    """An optimizer that has taken some steps, and two lists of gradients."""
    variables = [array(np.ones(4), kind) for kind in kinds]
    gradients = [[array(np.ones(4), kind) for kind in kinds] for _ in range(2)]
    optimizer = AdamW(**{"learning_rate": 0.1} | options)
    optimizer.build(variables)
    for _ in range(3):
        optimizer.apply(gradients[0])
    return optimizer, gradients


ASKED = {"cuStreamIsCapturing": 1, "cuCtxGetCurrent": 1}


@pytest.mark.parametrize(
    ("kinds", "options", "launches"),
    [
        (["float32"], {}, 1),
        (["float32"] * 5, {"amsgrad": True, "use_ema": True}, 1),
        (["float32", "float64", "float32"], {}, 2),
        (["float32"] * 5, {"global_clipnorm": 1.0}, 3),  # squares, norms with what is decided, update
        (["float32", "float64"], {"clipnorm": 1.0}, 5),
        (["float32"], {"learning_rate": schedules.CosineDecay(0.1, 100)}, 1),
        (["float32"], {"gradient_accumulation_steps": 2}, 1),
    ],
)
def test_a_step_with_unchanged_arrays(kinds, options, launches):
    optimizer, (gradients, _) = stepping(kinds, **options)
    assert calls_of(lambda: optimizer.apply(gradients)) == ASKED | {"cuLaunchKernel": launches}


def test_gradients_elsewhere_are_one_copy():
    optimizer, (gradients, others) = stepping(["float32"] * 3)
    optimizer.apply(others)
    optimizer.apply(gradients)
    found = calls_of(lambda: optimizer.apply(others))
    copy = {"cuEventQuery": 1, "cuMemcpyHtoDAsync_v2": 1, "cuEventRecord": 1}
    assert found == ASKED | copy | {"cuLaunchKernel": 1, "cuCtxGetCurrent": 2}
    (size,) = (given[2] for name, given in simulated_driver.calls if name == "cuMemcpyHtoDAsync_v2")
    assert size == 8 * ROWS * 3


def test_hyperparameters_that_change_are_one_copy():
    optimizer, (gradients, _) = stepping(["float32"])
    optimizer.learning_rate = 0.2
    found = calls_of(lambda: optimizer.apply(gradients))
    assert found["cuMemcpyHtoDAsync_v2"] == 1
    assert calls_of(lambda: optimizer.apply(gradients))["cuLaunchKernel"] == 1


def test_the_context_is_entered_where_another_is_current():
    optimizer, (gradients, _) = stepping(["float32"])
    driver.call("cuCtxPushCurrent_v2", 5)
    try:
        found = calls_of(lambda: optimizer.apply(gradients))
    finally:
        driver.answer("cuCtxPopCurrent_v2")
    entered = [given for name, given in simulated_driver.calls if name == "cuCtxPushCurrent_v2"]
    assert found == ASKED | {"cuLaunchKernel": 1, "cuCtxPushCurrent_v2": 1, "cuCtxPopCurrent_v2": 1}
    assert entered == [(None,)]  # in the simulator, that of the GPU


def test_buffers_that_are_under_way(monkeypatch, caplog):
    """A copy that is not done is no error: another buffer is taken, and nothing is said of it."""
    optimizer, (_, others) = stepping(["float32"])
    busy = iter([600, 600] + [0] * 100)
    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setitem(simulated_driver.STAND_INS, "cuEventQuery", lambda event: next(busy))
        found = calls_of(lambda: optimizer.apply(others))
    assert found["cuEventCreate"] == 1
    assert found["cuMemcpyHtoDAsync_v2"] == 1
    assert found["cuEventSynchronize"] == 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert all(given[1] == 2 for name, given in simulated_driver.calls if name == "cuEventCreate")  # without timing
    assert optimizer.iterations == 4


def test_a_capture_that_was_invalidated(monkeypatch):
    optimizer, (gradients, _) = stepping(["float32"])
    before = libraries.look(optimizer.trainable_variables[0]).copy()
    monkeypatch.setattr(driver, "capture_of", lambda stream: driver.INVALIDATED)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="invalidated"):
        patch.setattr(driver, "begins_as_before", lambda board: False)
        optimizer.apply(gradients)
    assert optimizer.iterations == 3
    assert np.array_equal(libraries.look(optimizer.trainable_variables[0]), before)


@pytest.mark.parametrize("owner", [None, object()])
def test_a_stream_that_may_be_gone(owner, monkeypatch):
    """Nobody keeps alive the stream that an array's interface names: nothing is done in it once the step is over."""
    optimizer, (gradients, _) = stepping(["float32"])
    now = [5]
    monkeypatch.setattr(gpu_arrays, "current_stream", lambda array, device, consumer=0: (now[0], owner))
    monkeypatch.setattr(gpu_arrays, "numba_stream", lambda array: now[0])
    optimizer.apply(gradients)
    optimizer.apply(gradients)
    now[0] = 6
    calls_of(lambda: optimizer.apply(gradients))
    recorded = [given[1] for name, given in simulated_driver.calls if name == "cuEventRecord"]
    waiting = [given[0] for name, given in simulated_driver.calls if name == "cuStreamWaitEvent"]
    assert recorded == ([6] if owner is None else [5])
    assert waiting == [6]
