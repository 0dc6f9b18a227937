"""docs/coming_from.md: the code there and the code here, run side by side."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.libraries import jax
from test_groups import tensorflow_addons

PAGE = Path(__file__).parents[1] / "docs" / "coming_from.md"
START = np.linspace(-2, 3, 7)
# Keras computes its scalars in float32: 2e-5 of the way, of 20 steps of 0.1.
TOLERANCE = {"Keras": 4e-5, "torch": 1e-12, "optax": 1e-11, "A pasted NumPy Adam": 1e-12}


def blocks():
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
    return {each.split("\n", 1)[0]: re.findall(r"```py\n(.*?)```", each, re.S) for each in sections}


def result_of(code, name):
    namespace = {"start": START.copy()}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace[name]


@pytest.mark.parametrize("section", TOLERANCE)
def test_both_end_at_the_same_numbers(section):
    library = {"Keras": "keras", "A pasted NumPy Adam": "numpy"}.get(section, section)
    pytest.importorskip(library)
    there, here = blocks()[section]
    if section == "optax":
        with jax.enable_x64(True):
            theirs, ours = result_of(there, "theirs"), result_of(here, "ours")
    else:
        theirs, ours = result_of(there, "theirs"), result_of(here, "ours")
    assert np.abs(np.asarray(theirs) - START).max() > 0.5
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=TOLERANCE[section])


@pytest.mark.parametrize(("name", "excluded"), [("kernel", set()), ("bias", {0})])
def test_tensorflow_addons(name, excluded):
    """It does not install any more: its arithmetic is in test_groups.py."""
    _, here = blocks()["TensorFlow Addons"]
    expected = tensorflow_addons([START], lambda t, x: [2 * (x[0] - 1)], 20, lambda t: 0.1, lambda t: 0.01, excluded)
    np.testing.assert_allclose(result_of(here, "ours")[name], expected[0], rtol=0, atol=1e-12)


def test_every_section_has_its_code():
    assert {name for name, found in blocks().items() if found} == {*TOLERANCE, "TensorFlow Addons"}
