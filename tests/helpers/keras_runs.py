"""What the tests of the front for Keras share: variables, gradients, models, and how two runs are compared.

They run on the backend that Keras has: torch, and in a process of its own JAX (see test_keras_on_jax.py).
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from adamw_numba.keras import AdamW

BOTH = (AdamW, keras.optimizers.AdamW)
IS_TORCH = keras.backend.backend() == "torch"
only_torch = pytest.mark.skipif(not IS_TORCH, reason="in place, on the torch backend")
only_jax = pytest.mark.skipif(IS_TORCH, reason="for the JAX backend")
SHAPES = [(3, 4), (4,), ()]


def variables_of(dtype="float32", shapes=SHAPES):
    random = np.random.default_rng(0)
    values = [random.normal(size=shape) for shape in shapes]
    return [
        keras.Variable(ops.convert_to_tensor(value, dtype), dtype=dtype, name=f"v{k}") for k, value in enumerate(values)
    ]


def gradients_of(step, dtype="float32", shapes=SHAPES):
    random = np.random.default_rng(100 + step)
    return [ops.convert_to_tensor(3 * random.normal(size=shape), dtype) for shape in shapes]


def look(array):
    """A NumPy copy, in float32 where NumPy lacks the dtype."""
    array = array.value if isinstance(array, keras.Variable) else array
    is_short = keras.backend.standardize_dtype(array.dtype) == "bfloat16"
    return np.array(ops.convert_to_numpy(ops.cast(array, "float32") if is_short else array))


def looked(arrays):
    return [look(array) for array in arrays]


def same(ours, theirs):
    """Bit for bit."""
    for one, other in zip(looked(ours), looked(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


class Journey:
    """How far the variables of a run have travelled, of which Keras's float32 scalars lose a share.

    Beside that, each of two runs rounds a variable twice a step, for the decay and for the update.
    """

    def __init__(self, variables):
        self.before, self.travelled, self.steps = looked(variables), [0.0 for _ in variables], 0

    def go(self, variables):
        now = looked(variables)
        for k, (one, other) in enumerate(zip(now, self.before, strict=True)):
            self.travelled[k] += float(np.abs(one.astype(float) - other).max())
        self.before, self.steps = now, self.steps + 1

    def assert_close(self, ours, theirs):
        for one, other, distance in zip(looked(ours), looked(theirs), self.travelled, strict=True):
            bound = 2e-5 * distance + 2 * self.steps * np.spacing(np.float32(np.abs(other).max())) + 1e-30
            np.testing.assert_allclose(one, other, rtol=0, atol=bound)


# Models

sys.path.append(str(Path(__file__).parents[2] / "examples"))
BATCH = 32


def digits():
    """The images and labels that examples/digits.py trains on."""
    import digits as example

    training, _ = example.load_digits()
    return training.images, training.labels


@contextmanager
def under(policy):
    """A policy of Keras for all layers and models made inside, and for those loaded from files."""
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def model_of(optimizer, policy="float32", **compiling):
    """A classifier of the digits, always with the same weights."""
    keras.utils.set_random_seed(1)
    with under(policy):
        layers = [keras.layers.Dense(width, "tanh", name=f"hidden_{width}") for width in (64, 32)]
        model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10, name="out")], name="net")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, **compiling)
    return model


def fit(model, epochs, callbacks=(), first=0, **options):
    """The loss of every epoch; batches come in the same order in all of them."""
    images, labels = digits()
    given = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | options
    history = model.fit(images, labels, epochs=first + epochs, initial_epoch=first, callbacks=[*callbacks], **given)
    return history.history["loss"]
