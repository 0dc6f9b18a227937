"""Thousands of arrays: work that grows with their number, and what is found of one array holding for those like it."""

import pickle
import sys

import numpy as np
import pytest
import torch
from helpers import libraries

from adamw_numba import AdamW
from adamw_numba.arrays.table import AddressTable


def calls_of(act):
    """How many functions, of Python and of C, are called."""
    count = 0

    def notice(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(notice)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def work(make, sizes):
    """The calls in `build` and in the first step of so many arrays, half of them without decay."""
    variables, gradients = ([make(np.ones(size), "float32") for size in sizes] for _ in range(2))
    optimizer = AdamW()
    optimizer.exclude_from_weight_decay(variables[: len(sizes) // 2], ["7$"])
    return calls_of(lambda: optimizer.build(variables)), calls_of(lambda: optimizer.apply(gradients))


@pytest.mark.parametrize("make", [libraries.numpy, libraries.parameter, libraries.strict])
@pytest.mark.parametrize("alike", [True, False])
def test_twice_the_arrays_are_twice_the_work(make, alike):
    work(make, [10] * 10)  # loads code
    once, twice = ([10 if alike else 10 + k for k in range(count)] for count in (200, 400))
    for one, two in zip(work(make, once), work(make, twice), strict=True):
        assert two < 2.1 * one


def test_few_calls_for_an_array():
    """Of Python and C, where each takes a tenth of a microsecond or more."""
    work(libraries.numpy, [10] * 10)
    build, step = work(libraries.numpy, [10] * 1000)
    assert build < 150 * 1000
    assert step < 75 * 1000


BAD = {
    "no memory": (lambda: torch._efficientzerotensor((4,)), "storage holds"),
    "freed memory": (lambda: freed(torch.ones(4)), "storage holds"),
    "integers": (lambda: torch.ones(4, dtype=torch.int32), "int32"),
}


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_one_bad_variable_among_good_ones_that_are_alike(case, first):
    make, words = BAD[case]
    good = [torch.ones(4) for _ in range(5)]
    variables = [make(), *good] if first else [*good, make()]
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        AdamW().build(variables)
    assert f"variable '{0 if first else 5}'" in str(raised.value)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_one_bad_gradient_among_good_ones_that_are_alike(case, steps):
    make, words = BAD[case]
    variables = [torch.ones(4) for _ in range(5)]
    optimizer = AdamW(0.1)
    optimizer.build(variables)
    for _ in range(steps):
        optimizer.apply([torch.ones(4) for _ in range(5)])
    before = [variable.clone() for variable in variables]
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        optimizer.apply([*(torch.ones(4) for _ in range(4)), make()])
    assert "the gradient of '4'" in str(raised.value)
    assert all(torch.equal(one, other) for one, other in zip(variables, before, strict=True))


def test_a_variable_given_as_its_own_gradient():
    variables = [np.ones(0), np.ones(0), np.ones(3)]
    optimizer = AdamW()
    optimizer.build(variables)
    with pytest.raises(ValueError, match="'1' is the variable itself"):
        optimizer.apply([np.ones(0), variables[1], np.ones(3)])


def test_equal_dtypes_that_are_other_objects():
    """As pickles make them: the compiled reader knows a dtype by its address."""
    variables = [np.ones(3), pickle.loads(pickle.dumps(np.ones(3))), np.ones(3)]
    assert variables[0].dtype == variables[1].dtype
    assert variables[0].dtype is not variables[1].dtype
    slots = [{"momentum": np.zeros(3), "velocity": np.zeros(3)} for _ in variables]
    table = AddressTable("cpu", list("abc"), variables, slots)
    gradients = [pickle.loads(pickle.dumps(np.ones(3))), np.ones(3), np.ones(3)]
    table.refresh(gradients)
    table.remember()
    assert table.reads(gradients) == 3
    assert table.addresses[1].tolist() == [gradient.ctypes.data for gradient in gradients]
    assert table.addresses[0].tolist() == [variable.ctypes.data for variable in variables]
