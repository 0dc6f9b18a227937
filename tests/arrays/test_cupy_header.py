"""CuPy's arrays as compiled code reads them: real ones, over memory of the host, which need no GPU."""

import numpy as np
import pytest
from helpers.reading import read, reader_of

from adamw_numba import arrays, update
from adamw_numba.arrays import cupy_header
from adamw_numba.arrays import reader as headers

cupy = pytest.importorskip("cupy")


def over(host, device=0):
    """An array of CuPy over the memory of one of NumPy."""
    low = host
    while low.base is not None:
        low = low.base
    memory = cupy.cuda.UnownedMemory(low.ctypes.data, low.nbytes, low, device)
    offset = host.ctypes.data - low.ctypes.data
    return cupy.ndarray(host.shape, host.dtype, cupy.cuda.MemoryPointer(memory, offset), host.strides)


ARRAYS = {
    "vector": np.ones(5, np.float32),
    "empty": np.ones((0, 3)),
    "scalar": np.ones(()),
    "four axes": np.ones((2, 3, 4, 5), np.float16),
    "fortran": np.asfortranarray(np.ones((3, 4))),
    "view": np.ones((10, 10), np.complex64)[::2, 1::3],
    "part": np.ones(10)[3:],
}


@pytest.mark.parametrize("case", ARRAYS)
def test_what_is_read_is_what_cupy_says(case):
    array = over(ARRAYS[case].copy(order="K") if case != "view" else ARRAYS[case])
    reader, table = reader_of(array)
    assert read(reader, [array])
    assert table[update.G, 0] == array.data.ptr
    assert arrays.layout_of(array)[1:3] == (array.shape, array.strides)
    same = over(np.ones(array.shape, array.dtype))
    assert read(reader, [same]) == (same.strides == array.strides)
    others = [over(np.ones((7, 7))), over(np.ones(array.shape, np.int8)), over(np.ones(array.shape, array.dtype), 1)]
    for other in [*others, np.ones(array.shape, array.dtype), 1.0, cupy.ndarray]:
        assert not read(reader, [other])


def test_an_array_that_changes():
    array = over(np.ones(6))
    reader, _ = reader_of(array)
    assert read(reader, [array])
    array.shape = (2, 3)
    assert not read(reader, [array])
    array.shape = (6,)
    assert read(reader, [array])


def test_other_types_are_not_read():
    class Array(cupy.ndarray):
        pass

    assert cupy_header.fields(np.ndarray) is None
    assert cupy_header.fields(int) is None
    reader, _ = reader_of(over(np.ones(5)))
    odd = over(np.ones(5)).view(Array)
    assert not read(reader, [odd])


def test_where_nothing_is_found_arrays_are_asked(monkeypatch):
    """Fields that are not in the memory of an array, as in a version to come, are not guessed."""
    words_of = cupy_header._words_of
    for forged in (lambda thing: [0] * 16, lambda thing: [*words_of(thing), *words_of(thing)]):
        monkeypatch.setattr(cupy_header, "_words_of", forged)
        assert cupy_header.fields.__wrapped__(cupy.ndarray) is None
    monkeypatch.setattr(cupy_header, "fields", lambda kind: None)
    array = over(np.ones(5))
    assert headers.record(array, arrays.layout_of(array), 0, 40, 0) == headers.UNSEEN
