"""Whatever `minimize` and `multistart` are given, however large: the message is short, and names the argument."""

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds

from adamw_numba import minimize, multistart

MOST = 2_000  # characters
TEXT = 100_000 * "x"
NUMBERS = list(range(100_000))
NAMES = [f"encoder/layer_{i}/attention/kernel" for i in range(2_000)]
MANY = {name: np.ones(2) for name in NAMES}
HUGE = {f"key_{i}": list(range(100)) for i in range(1_000)}
SMALL = np.ones(3)


def bowl(x):
    return ((x - 1) ** 2).sum(), 2 * (x - 1)


def no_call(x):
    pytest.fail("called")


# What is wrong: keywords that replace good ones, words
REFUSED = {
    "fun": ({"fun": HUGE}, "`fun`"),
    "x0 of texts": ({"x0": ["text"] * 100_000}, "x0"),
    "x0 of long texts": ({"x0": [TEXT] * 3}, "x0"),
    "x0 a text": ({"x0": TEXT}, "x0"),
    "x0 a dict of lists": ({"x0": HUGE}, "x0"),
    "x0 with a long name": ({"x0": {TEXT: np.array([np.nan])}}, "x0"),
    "x0 of a long dtype": ({"x0": np.zeros(2, [(f"field_{i}", "f8") for i in range(5_000)])}, "x0"),
    "jac": ({"jac": HUGE}, "`jac`"),
    "jac a text": ({"jac": TEXT}, "`jac`"),
    "bounds a number": ({"bounds": 10**10_000}, "bounds"),
    "bounds a text": ({"bounds": TEXT}, "bounds"),
    "bounds of other counts": ({"bounds": [tuple(range(i)) for i in range(3_000)]}, "bounds"),
    "bounds of texts": ({"bounds": [(TEXT, TEXT)] * 3}, "bounds"),
    "bounds of lists": ({"bounds": [(HUGE, NUMBERS)] * 3}, "bounds"),
    "bounds of another shape": ({"bounds": Bounds(np.zeros(100_000), np.ones(100_000))}, "bounds"),
    "bounds of many names": ({"x0": MANY, "bounds": {f"{name}_": (0, 1) for name in NAMES}}, "bounds"),
    "bounds of too many": ({"x0": [SMALL], "bounds": [(0, 1)] * 100_000}, "bounds"),
    "nested bounds a text": ({"x0": MANY, "bounds": TEXT}, "bounds"),
    "nested bounds inside": ({"x0": {TEXT: SMALL}, "bounds": {TEXT: TEXT}}, "bounds"),
    "nested bounds crossed": ({"x0": {TEXT: SMALL}, "bounds": {TEXT: (1, 0)}}, "bounds"),
    "callback": ({"callback": HUGE}, "callback"),
    "tol": ({"tol": HUGE}, "tol"),
    **{
        f"option {name}": ({name: HUGE}, name)
        for name in ("maxiter", "maxfev", "maxtime", "gtol", "patience", "disp", "progress", "history", "return_best")
    },
    "checkpoint": ({"checkpoint": HUGE}, "checkpoint"),
    "state": ({"state": NUMBERS}, "state"),
    "a state of many names": ({"state": MANY}, "state"),
    "a state of long names": ({"state": {TEXT: 1}}, "state"),
    "nonfinite": ({"nonfinite": TEXT}, "nonfinite"),
    "batches": ({"batches": 10**10_000}, "batches"),
    "batches walked once": ({"batches": (number for number in NUMBERS)}, "batches"),
    "learning rate": ({"learning_rate": NUMBERS}, "learning_rate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_objective_is_called(case):
    keywords, word = REFUSED[case]
    with pytest.raises((TypeError, ValueError)) as raised:
        minimize(**{"fun": no_call, "x0": SMALL, "jac": True} | keywords)
    assert word in str(raised.value)
    assert len(str(raised.value)) <= MOST


# What an objective returns
RETURNED = {
    "a text": (lambda x: TEXT, {"x0": SMALL}),
    "a dict": (lambda x: (HUGE, x), {"x0": SMALL}),
    "numbers": (lambda x: (NUMBERS, x), {"x0": SMALL}),
    "a huge number": (lambda x: (10**10_000, x), {"x0": SMALL}),
    "an array": (lambda x: (np.ones(100_000), x), {"x0": SMALL}),
    "a gradient of another shape": (lambda x: (1.0, np.ones(100_000)), {"x0": SMALL}),
    "a gradient of texts": (lambda x: (1.0, [TEXT] * 3), {"x0": SMALL}),
    "a gradient of other names": (lambda x: (1.0, {f"{name}_": np.ones(2) for name in NAMES}), {"x0": MANY}),
    "a gradient of a long name": (lambda x: (1.0, {TEXT: np.ones(7)}), {"x0": {TEXT: SMALL}}),
    "what torch cannot use": (lambda x: TEXT, {"x0": SMALL, "jac": "torch"}),
    "a complex number": (lambda x: TEXT, {"x0": SMALL, "jac": "cs"}),
}


@pytest.mark.parametrize("case", RETURNED)
def test_what_an_objective_returns(case):
    fun, keywords = RETURNED[case]
    with pytest.raises((TypeError, ValueError)) as raised:
        minimize(**{"fun": fun, "jac": True} | keywords)
    assert len(str(raised.value)) <= MOST
    assert sum(map(len, raised.value.__notes__)) <= MOST


def test_the_notes_of_an_exception_in_many_arrays():
    calls = []

    def fun(x):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return sum(leaf.sum() for leaf in x.values()), {name: np.ones(2) for name in x}

    with pytest.raises(ZeroDivisionError) as raised:
        minimize(fun, MANY, jac=True)
    assert "iteration 2" in "\n".join(raised.value.__notes__)
    assert sum(map(len, raised.value.__notes__)) <= MOST


@pytest.mark.parametrize("options", [HUGE, {TEXT: 1}], ids=["many", "long"])
def test_unknown_options(options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        minimize(bowl, SMALL, jac=True, maxiter=1, **options)
    (message,) = [str(each.message) for each in caught]
    assert message.startswith("Unknown solver options: ")
    assert len(message) <= MOST


STARTS = {
    "x0s": {"x0s": HUGE},
    "x0s a text": {"x0s": TEXT},
    "a huge count": {"x0s": 10**1_000, "bounds": None},
    "a negative count": {"x0s": -(10**1_000), "bounds": [(0, 1)]},
    "infinite bounds": {"x0s": 4, "bounds": Bounds(np.zeros(100_000), np.full(100_000, np.inf))},
    "checkpoint": {"x0s": np.ones((2, 2)), "checkpoint": TEXT},
    "workers": {"x0s": np.ones((2, 2)), "workers": HUGE},
}


@pytest.mark.parametrize("case", STARTS)
def test_starts(case):
    with pytest.raises((TypeError, ValueError)) as raised:
        multistart(no_call, jac=True, **STARTS[case])
    assert len(str(raised.value)) <= MOST


def test_tensors():
    with pytest.raises((TypeError, ValueError)) as raised:
        minimize(lambda x: (1.0, torch.ones(100_000)), torch.ones(3), jac=True)
    assert len(str(raised.value)) <= MOST
