"""Handwritten digits: a multilayer perceptron in plain NumPy, trained by `AdamW`.

Everything that a framework would do is written out here, in float32: the forward pass, the backward pass, the
mini-batches. The optimizer takes the parameters as the nested dict that they are, and updates them in place. It shows

- a nested dict of parameters and of gradients, matched by name;
- weight decay for the kernels but not for the biases (`exclude_from_weight_decay`);
- a learning rate that warms up linearly and then falls along a cosine (`CosineDecay`);
- clipping of all gradients together (`global_clipnorm`), with the gradient norm of each step in `last_step`;
- a moving average of the parameters (`use_ema`), put in their place for an evaluation (`averaged`).

At the end it takes the same steps with the same gradients in plain NumPy, and compares the results and the times.

The data are 8 x 8 images of digits: see data/README.md. Run it with

    python examples/digits.py
"""

import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from adamw_numba import AdamW
from adamw_numba.schedules import CosineDecay

Array = np.ndarray
Parameters = dict[str, dict[str, Array]]  # layer -> "kernel" or "bias" -> array

SEED = 1
WIDTHS = [64, 256, 128, 10]  # pixels, two hidden layers, classes
TRAINING_IMAGES = 1437
BATCH_SIZE = 32
EPOCHS = 30
STEPS_PER_EPOCH = math.ceil(TRAINING_IMAGES / BATCH_SIZE)
REQUIRED_ACCURACY = 0.97

WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7
EMA_MOMENTUM = 0.98
SCHEDULE = CosineDecay(
    initial_learning_rate=1e-4,
    warmup_target=3e-3,
    warmup_steps=3 * STEPS_PER_EPOCH,
    decay_steps=(EPOCHS - 3) * STEPS_PER_EPOCH,
    alpha=0.01,
)


# The data


class Digits(NamedTuple):
    """Images as rows of 64 numbers from 0 to 1, and the digits that they show."""

    images: Array
    labels: Array


def load_digits() -> tuple[Digits, Digits]:
    """The images for training and for testing: a shuffled split, always the same."""
    with np.load(Path(__file__).parent / "data" / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    images = images.reshape(len(images), -1).astype(np.float32) / 16
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def batches(digits: Digits, generator: np.random.Generator) -> Iterator[Digits]:
    """Mini-batches of one epoch, in a new order."""
    order = generator.permutation(len(digits.images))
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        yield Digits(digits.images[chosen], digits.labels[chosen])


# The model


def new_parameters(generator: np.random.Generator) -> Parameters:
    """Kernels with the variance 2 / inputs (He et al. 2015), and biases of zero."""
    parameters: Parameters = {}
    for number, (inputs, outputs) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False), start=1):
        kernel = generator.standard_normal((inputs, outputs), dtype=np.float32) * np.float32(math.sqrt(2 / inputs))
        parameters[f"layer{number}"] = {"kernel": kernel, "bias": np.zeros(outputs, np.float32)}
    return parameters


def forward(parameters: Parameters, images: Array) -> tuple[list[Array], Array]:
    """The inputs of every layer, and the logits."""
    inputs = [images]
    *hidden, last = parameters.values()
    for layer in hidden:
        inputs.append(np.maximum(inputs[-1] @ layer["kernel"] + layer["bias"], 0))
    return inputs, inputs[-1] @ last["kernel"] + last["bias"]


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The mean cross-entropy of a batch, and its gradient with respect to the logits."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    error = np.exp(log_probabilities)
    error[rows, labels] -= 1
    return -float(log_probabilities[rows, labels].mean()), error / len(labels)


def backward(parameters: Parameters, inputs: list[Array], error: Array) -> Parameters:
    """The gradients of all parameters, from the last layer to the first."""
    gradients: Parameters = {}
    for name, layer_inputs in zip(reversed(parameters), reversed(inputs), strict=True):
        gradients[name] = {"kernel": layer_inputs.T @ error, "bias": error.sum(axis=0)}
        error = (error @ parameters[name]["kernel"].T) * (layer_inputs > 0)
    return gradients


def loss_and_gradients(parameters: Parameters, batch: Digits) -> tuple[float, Parameters]:
    """One forward and one backward pass."""
    inputs, logits = forward(parameters, batch.images)
    loss, error = cross_entropy(logits, batch.labels)
    return loss, backward(parameters, inputs, error)


def accuracy(parameters: Parameters, digits: Digits) -> float:
    """The fraction of the images that are read correctly."""
    _, logits = forward(parameters, digits.images)
    return float((logits.argmax(axis=1) == digits.labels).mean())


# The training


def new_optimizer(parameters: Parameters) -> AdamW:
    """AdamW for these parameters; the biases, known by their names, are not decayed."""
    optimizer = AdamW(
        learning_rate=SCHEDULE,
        weight_decay=WEIGHT_DECAY,
        beta_1=BETA_1,
        beta_2=BETA_2,
        epsilon=EPSILON,
        global_clipnorm=CLIP_NORM,
        use_ema=True,
        ema_momentum=EMA_MOMENTUM,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build(parameters)
    return optimizer


def train(parameters: Parameters, optimizer: AdamW, training: Digits, test: Digits) -> None:
    """Train for all epochs, and print a line about each."""
    generator = np.random.default_rng(SEED)
    print("epoch  training loss  learning rate  gradient norm  test accuracy")
    for epoch in range(1, EPOCHS + 1):
        losses = []
        for batch in batches(training, generator):
            loss, gradients = loss_and_gradients(parameters, batch)
            optimizer.apply(gradients)
            losses.append(loss)
        _report(epoch, statistics.mean(losses), optimizer, accuracy(parameters, test))


def _report(epoch: int, loss: float, optimizer: AdamW, test_accuracy: float) -> None:
    norm, rate = optimizer.last_step.gradient_norm, optimizer.last_step.learning_rate
    print(f"{epoch:5}  {loss:13.4f}  {rate:13.6f}  {norm:13.4f}  {test_accuracy:13.2%}")


# The same step in plain NumPy


class NumpyState:
    """What `numpy_step` remembers: the number of steps, and three arrays for every parameter."""

    def __init__(self, parameters: Parameters) -> None:
        self.steps = 0
        self.momentum = _mapped(np.zeros_like, parameters)
        self.velocity = _mapped(np.zeros_like, parameters)
        self.average = _mapped(np.copy, parameters)
