"""How error messages print a value: short, and telling what it is."""

import numpy as np
import pytest
import torch

from adamw_numba.arrays.brief import brief, brief_names


class Rude:
    def __repr__(self):
        raise RuntimeError("no")


class RudeShape:
    @property
    def shape(self):
        raise RuntimeError("no")


class Long:
    def __repr__(self):
        return "begin\n" + 10_000 * "x " + "end"


VALUES = {
    "a number": (0.1, "0.1"),
    "none": (None, "None"),
    "a name": ("enc/kernel", "'enc/kernel'"),
    "a list": ([1, 2.5, "a"], "[1, 2.5, 'a']"),
    "a long list": (list(range(100_000)), "[0, 1, 2, 3, ...]"),
    "a dict": ({"b": 1, "a": 2}, "{'a': 2, 'b': 1}"),
    "an array": (np.ones((2, 3), np.float32), "<ndarray of shape (2, 3), dtype float32>"),
    "a tensor": (torch.ones(2), "<Tensor of shape torch.Size([2]), dtype torch.float32>"),
    "arrays": ([np.ones(3)] * 200, "[" + 4 * "<ndarray of shape (3,), dtype float64>, " + "...]"),
    "a type": (np.ndarray, "<class 'numpy.ndarray'>"),
    "a rude object": (Rude(), "<Rude, whose repr raises RuntimeError>"),
    "a rude attribute": (RudeShape(), "<RudeShape, whose repr raises RuntimeError>"),
    "a huge integer": (10**5000, "<an integer of 16610 bits>"),
}


@pytest.mark.parametrize("case", VALUES)
def test_what_it_says(case):
    value, expected = VALUES[case]
    assert brief(value) == expected


HUGE = {
    "text": 100_000 * "x",
    "lines": Long(),
    "a module": torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(1000)]),
    "texts": 1000 * [100_000 * "x"],
    "a nesting": {str(i): {str(k): list(range(100)) for k in range(100)} for i in range(100)},
    "many axes": np.ones([1] * 64),
    "a large integer": 10**3000,
    "bytes": bytes(100_000),
    "a set": set(range(100_000)),
}


@pytest.mark.parametrize("case", HUGE)
def test_how_long_it_is(case):
    text = brief(HUGE[case])
    assert 10 < len(text) < 250
    assert "\n" not in text


def test_both_ends_of_a_long_text():
    assert brief("begin" + 1000 * "x" + "end").startswith("'beginxx")
    assert brief("begin" + 1000 * "x" + "end").endswith("xxend'")


def test_names():
    assert brief_names(["a", "b"]) == "['a', 'b']"
    assert brief_names(str(i) for i in range(100)) == "['0', '1', '2', '3', '4', '5', ... 94 more]"
    assert len(brief_names(1000 * [1000 * "x"])) < 800
