"""The compiled reader: what it finds in the headers of arrays, and what it leaves to the slower check."""

import numpy as np
import pytest
import torch
from helpers import libraries
from helpers.reading import read, reader_of
from helpers.training import train

from adamw_numba import arrays, update
from adamw_numba.arrays import reader as headers

ARRAYS = {
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.ones(()),
    "four axes": np.ones((2, 3, 4, 5), np.float32),
    "fortran": np.asfortranarray(np.ones((3, 4))),
    "view": np.ones((10, 10), np.complex64)[::2, 1::3],
    "negative": np.ones(10)[::-1],
    "bfloat16": np.ones(4, libraries.DTYPES["bfloat16"]),
    "float16": np.ones(4, np.float16),
}


TENSORS = {
    "empty tensor": torch.zeros((0, 3)),
    "scalar tensor": torch.ones(()),
    "parameter": torch.nn.Parameter(torch.ones(2, 3, 4)),
    "transposed tensor": torch.ones(3, 4).T,
    "view of a tensor": torch.ones(10, 10, dtype=torch.complex64)[::2, 1::3],
    "bfloat16 tensor": torch.ones(4, dtype=torch.bfloat16),
    "float16 tensor": torch.ones(4, dtype=torch.float16),
}


@pytest.mark.parametrize("case", [*ARRAYS, *TENSORS])
def test_headers_agree_with_the_library(case):
    """What compiled code reads from an array's header is what its library says; every difference is noticed."""
    array = (ARRAYS | TENSORS)[case]
    reader, table = reader_of(array)
    assert read(reader, [array])
    assert table[update.G, 0] == arrays.address(array)
    assert read(reader, [None])
    assert table[update.G, 0] == 0
    one = np if case in ARRAYS else torch
    others = [array[None], one.zeros((7, 7), dtype=array.dtype), one.ones(array.shape, dtype=one.int8), 1.0, "text"]
    others += [np.ones(array.shape, "i2"), torch.ones(tuple(array.shape), dtype=torch.int16), torch.ones(2).to_sparse()]
    if case in TENSORS:
        others += [torch.empty_like(array, device="meta"), torch.ones(2, dtype=torch.bool)]
    for other in others:
        assert not read(reader, [other])
    if arrays.extent(layout := arrays.layout_of(array)) != (layout.address, layout.address):
        table[update.P] += 8
        assert not read(reader, [array])


def test_a_gradient_that_shares_memory_is_left_to_the_slower_check():
    array = np.ones(10)
    layout = arrays.layout_of(array[:5])
    record = headers.record(array[:5], layout, 0, 40, headers.ALIGNED)
    ranges = np.array([[layout.address], [layout.address + 40]])
    reader = headers.Reader([], np.zeros((2, 0), int), [], [record], ranges, np.zeros((8, 1), np.int64), [False])
    assert [read(reader, [array[k : k + 5]]) for k in (0, 4, 5)] == [False, False, True]


LAZY = {
    "neg": lambda g: torch._neg_view(g),
    "conj": lambda g: g.conj(),
    "expanded": lambda g: g[:1].expand(3),
    "view elsewhere": lambda g: torch.cat([g, g])[3:],
    "imaginary part": lambda g: torch.complex(g, -g).conj().imag if not g.is_complex() else g.conj(),
    "subclass": lambda g: torch.nn.Parameter(g),
    "cast": lambda g: g.to(torch.float16) if not g.is_complex() else g.to(torch.complex64),
}


@pytest.mark.parametrize("case", LAZY)
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_tensors_that_differ_in_what_headers_do_not_tell(case, dtype):
    """After steps with plain gradients, and before more of them."""
    plain = libraries.to_torch([1.0, -2.0, 3.0], dtype)
    other = LAZY[case](plain)
    variable, expected = libraries.parameter(np.ones(3), dtype), libraries.parameter(np.ones(3), dtype)
    same = torch.tensor(other.resolve_conj().resolve_neg().detach().tolist(), dtype=plain.dtype)
    train([variable], [[plain], [plain.clone()], [other], [other], [plain]])
    train([expected], [[plain], [plain], [same], [same], [plain]])
    assert torch.equal(variable, expected)


@pytest.mark.parametrize("make", [libraries.to_torch, libraries.parameter])
def test_a_torch_without_the_exchange_of_headers(make, monkeypatch):
    """Before 2.10: every tensor is asked in Python, with the same result."""
    results = []
    for old in (False, True):
        if old:
            monkeypatch.setattr(headers, "exporter", lambda kind: 0)
        variables = [make(np.ones(size), "float32") for size in (3, 4)]
        steps = [[make(np.full(size, k), "float32") for size in (3, 4)] for k in range(4)]
        optimizer = train(variables, steps, use_ema=True)
        with pytest.raises(ValueError, match="shares memory"):
            optimizer.apply([steps[0][0], optimizer.averages[1][:]])
        results.append([libraries.look(a) for a in [*variables, *optimizer.variables]])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
