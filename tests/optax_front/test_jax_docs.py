"""The examples of docs/jax.md train as they do with optax's own transformation."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "jax.md"
EXAMPLES = dict(re.findall(r"^### (.+?)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
OURS, THEIRS = "from adamw_numba.optax import adamw", "from optax import adamw"
PACKAGES = {
    "Donated buffers": "optax",
    "optax.chain": "optax",
    "Flax NNX": "flax",
    "Flax Linen": "flax",
    "Equinox": "equinox",
    "NumPyro": "numpyro",
    "Orbax": "orbax.checkpoint",
}


def loss_after(code):
    namespace = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return float(namespace["loss"])


@pytest.mark.parametrize("heading", PACKAGES)
def test_example(heading):
    pytest.importorskip(PACKAGES[heading])
    code = EXAMPLES[heading]
    assert code.count(OURS) == 1
    np.testing.assert_allclose(loss_after(code), loss_after(code.replace(OURS, THEIRS)), rtol=1e-4, atol=1e-6)


def test_every_example_is_run():
    assert EXAMPLES.keys() == PACKAGES.keys()
    assert PAGE.read_text().partition("### ")[2].count("```python") == len(EXAMPLES)
