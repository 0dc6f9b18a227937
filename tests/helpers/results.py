"""Results of minimizations, compared."""

import numpy as np


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one.keys() - {"history", "state"}:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    for key in one.history.keys() - {"time"}:
        np.testing.assert_array_equal(one.history[key], other.history[key], err_msg=key)
    for name, array in one.state.items():
        np.testing.assert_array_equal(array, other.state[name], err_msg=name)
