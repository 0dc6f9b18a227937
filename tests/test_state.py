"""The arrays of the state: their names, what may be assigned to them, and copies of them."""

import copy
import pickle

import numpy as np
import pytest
from helpers.training import built, stepped

from adamw_numba import AdamW, LossScaleOptimizer


def test_names_that_are_taken():
    optimizer = built([np.ones(2)])
    for name in ("iteration", "learning_rate", "momentum/0", "a/b", 3):
        with pytest.raises(ValueError, match="`name`"):
            optimizer.add_variable((), name=name)
    nested = built(tree := {"dense": {"kernel": np.ones(2)}})
    nested.add_variable_from_reference(tree["dense"]["kernel"], "extra")
    nested.add_variable((2,), dtype="int8")
    nested.add_variable((2,))
    assert "dense_kernel_extra" in nested.variable_names
    assert repr(nested)


@pytest.mark.parametrize(("index", "value"), [(0, -1), (0, 2**63 - 1), (1, -1.0), (1, np.nan)])
def test_counters_that_make_no_sense(index, value):
    optimizer = built([np.ones(2)])
    weights = [np.array(a) for a in optimizer.variables]
    weights[index] = np.array(value)
    with pytest.raises(ValueError, match=r"iteration|learning_rate"):
        optimizer.set_weights(weights)


def test_set_weights_into_read_only_state_writes_nothing():
    _, _, optimizer, _ = stepped("numpy")
    before = [np.array(a) for a in optimizer.variables]
    optimizer.variables[-1].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        optimizer.set_weights([a * 0 for a in before])
    for one, two in zip(optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(one, two)


def test_variables_of_one_s_own_are_not_taken_for_counters():
    optimizer = AdamW()
    optimizer.add_variable((3,), name="step_counter")
    optimizer.add_variable((), lambda shape, dtype: np.full(shape, -1, dtype), name="dynamic_scale")
    optimizer.build([np.ones(2)])
    store = {}
    optimizer.save_own_variables(store)
    optimizer.load_own_variables(store)
    assert float(optimizer.state["dynamic_scale"]) == -1


def test_subclasses_have_attributes_of_their_own():
    class Scaled(LossScaleOptimizer):
        def __init__(self, inner):
            super().__init__(inner)
            self.history = []

    class Counted(AdamW):
        def __init__(self):
            super().__init__()
            self.history = []

    assert Scaled(Counted()).history == Counted().history == []
    with pytest.raises(AttributeError, match="LossScaleOptimizer"):
        _ = LossScaleOptimizer(AdamW()).what


@pytest.mark.parametrize("wrap", [lambda o: o, LossScaleOptimizer])
def test_pickles_over_read_only_memory(wrap):
    variable = np.ones(3)
    optimizer = wrap(AdamW(0.1, use_ema=True))
    optimizer.build([variable])
    optimizer.apply([np.ones(3)])
    buffers = []
    data = pickle.dumps(optimizer, protocol=5, buffer_callback=buffers.append)
    other = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])
    for each in (optimizer, other):
        each.apply([np.ones(3)])
    np.testing.assert_array_equal(other.trainable_variables[0], variable)
    together = copy.deepcopy({"optimizer": optimizer, "slot": optimizer.variables[-1]})
    assert together["slot"] is together["optimizer"].variables[-1]
