"""Reading an array by the compiled reader."""

import numpy as np

from adamw_numba import arrays, update
from adamw_numba.arrays import reader as headers


def read(reader, gradients):
    """Whether a reader knows all gradients."""
    return headers.read(id(gradients), reader.address) >= 0


def reader_of(array):
    """A reader that knows an array as what is written and as its gradient, and its table."""
    layout = arrays.layout_of(array)
    low, high = (end - layout.address for end in arrays.extent(layout))
    table = np.zeros((8, 1), np.int64)
    table[update.P] = layout.address
    records = [[headers.record(array, layout, low, high, flags)] for flags in (headers.WRITEABLE, headers.ALIGNED)]
    return headers.Reader(
        [array], np.array([[update.P], [0]]), *records, np.zeros((2, 0), np.int64), table, [False]
    ), table
