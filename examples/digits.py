"""Handwritten digits: a multilayer perceptron in plain NumPy, trained by `AdamW`.

Everything that a framework would do is written out here, in float32: the forward pass, the backward pass, the
mini-batches. The optimizer takes the nested dict of parameters as it is, and updates the arrays in place. The example
shows

- a nested dict of parameters and of gradients, matched by name;
- weight decay for the kernels but not for the biases (`exclude_from_weight_decay`);
- a learning rate that warms up linearly and then falls along a cosine (`CosineDecay`);
- clipping of all gradients together (`global_clipnorm`), with the gradient norm of each step in `last_step`;
- a moving average of the parameters (`use_ema`), which replaces them during an evaluation (`averaged`).

At the end it takes the same steps with the same gradients in plain NumPy, and compares the results and the times.

The data are 8 x 8 images of digits, described in data/README.md. Run the example with

    python examples/digits.py

It takes about two seconds, and a few more the first time, when Numba compiles the optimizer and caches the result.
"""

import copy
import math
import statistics
import sys
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from adamw_numba import AdamW
from adamw_numba.schedules import CosineDecay

Array = np.ndarray
Parameters = dict[str, dict[str, Array]]  # layer -> "kernel" or "bias" -> array

SEED = 0
WIDTHS = [64, 128, 64, 10]  # pixels, two hidden layers, classes
TRAINING_IMAGES = 1437
BATCH_SIZE = 32
EPOCHS = 20
WARMUP_EPOCHS = 3
STEPS_PER_EPOCH = math.ceil(TRAINING_IMAGES / BATCH_SIZE)
COMPARED_EPOCHS = 10
REQUIRED_ACCURACY = 0.97

WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7
EMA_MOMENTUM = 0.98
SCHEDULE = CosineDecay(
    initial_learning_rate=1e-4,
    warmup_target=3e-3,
    warmup_steps=WARMUP_EPOCHS * STEPS_PER_EPOCH,
    decay_steps=(EPOCHS - WARMUP_EPOCHS) * STEPS_PER_EPOCH,
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
    for number, (inputs, outputs) in enumerate(pairwise(WIDTHS), start=1):
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
    """The gradients of all parameters, from the last layer to the first; the optimizer matches them by name."""
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
    """The fraction of the images that are classified correctly."""
    _, logits = forward(parameters, digits.images)
    return float((logits.argmax(axis=1) == digits.labels).mean())


# The training


def new_optimizer(parameters: Parameters) -> AdamW:
    """AdamW for these parameters; the biases, selected by name, are not decayed."""
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


def train(
    parameters: Parameters, optimizer: AdamW, training: Digits, test: Digits, generator: np.random.Generator
) -> None:
    """Train for all epochs, and print a line for each."""
    print("Learning rate and gradient norm (before clipping) are from the last step of each epoch.")
    print("epoch  training loss  learning rate  gradient norm  test accuracy")
    for epoch in range(1, EPOCHS + 1):
        losses = []
        for batch in batches(training, generator):
            loss, gradients = loss_and_gradients(parameters, batch)
            optimizer.apply(gradients)
            losses.append(loss)
        report_epoch(epoch, statistics.mean(losses), optimizer, accuracy(parameters, test))


def report_epoch(epoch: int, loss: float, optimizer: AdamW, test_accuracy: float) -> None:
    """Print the mean loss of an epoch, and the learning rate and gradient norm of its last step."""
    norm, rate = optimizer.last_step.gradient_norm, optimizer.last_step.learning_rate
    print(f"{epoch:5}  {loss:13.4f}  {rate:13.6f}  {norm:13.4f}  {test_accuracy:13.2%}")


# The same step in plain NumPy


def flat(tree: Parameters) -> dict[str, Array]:
    """The arrays of a nested dict by their paths, as in "layer1/kernel"."""
    return {f"{layer}/{name}": array for layer, arrays in tree.items() for name, array in arrays.items()}


class NumpyState:
    """The state of `numpy_step`: the number of steps, and three arrays per parameter."""

    def __init__(self, parameters: Parameters) -> None:
        self.steps = 0
        self.momentum, self.velocity, self.average = (
            {name: np.zeros_like(array) for name, array in flat(parameters).items()} for _ in range(3)
        )


def numpy_step(parameters: Parameters, gradients: Parameters, state: NumpyState) -> None:
    """What `optimizer.apply(gradients)` does: clip, decay, Adam with its "epsilon hat", and moving averages."""
    learning_rate = SCHEDULE(state.steps)
    state.steps += 1
    t = state.steps
    alpha = learning_rate * math.sqrt(1 - BETA_2**t) / (1 - BETA_1**t)
    arrays = flat(gradients)
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in arrays.values()))
    clip = CLIP_NORM / max(norm, CLIP_NORM)
    for name, p in flat(parameters).items():
        g, m, v, average = arrays[name] * clip, state.momentum[name], state.velocity[name], state.average[name]
        m += (1 - BETA_1) * (g - m)
        v += (1 - BETA_2) * (g * g - v)
        if not name.endswith("/bias"):
            p -= learning_rate * WEIGHT_DECAY * p
        p -= m * alpha / (np.sqrt(v) + EPSILON)
        average += (1 - EMA_MOMENTUM if t > 1 else 1) * (p - average)


# The comparison


class Comparison(NamedTuple):
    """Seconds of every step with `AdamW` and with NumPy, and the arrays of both after the last one."""

    times: list[tuple[float, float]]
    ours: list[Array]
    plain: list[Array]

    @property
    def difference(self) -> float:
        """The largest difference between any two numbers."""
        return max(float(np.abs(ours - plain).max()) for ours, plain in zip(self.ours, self.plain, strict=True))

    @property
    def agrees(self) -> bool:
        """Whether the results are the same, up to rounding in float32 (a relative precision of 1.2e-7)."""
        return all(np.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(self.ours, self.plain, strict=True))


def compare(training: Digits, generator: np.random.Generator) -> Comparison:
    """Take the same steps with the same gradients with `AdamW` and `numpy_step`, in turn, on copies of a model."""
    ours = new_parameters(generator)
    plain = copy.deepcopy(ours)
    optimizer, state, times = new_optimizer(ours), NumpyState(plain), []
    for batch in chain.from_iterable(batches(training, generator) for _ in range(COMPARED_EPOCHS)):
        _, gradients = loss_and_gradients(ours, batch)
        start = perf_counter()
        optimizer.apply(gradients)
        middle = perf_counter()
        numpy_step(plain, gradients, state)
        times.append((middle - start, perf_counter() - middle))
    return Comparison(
        times,
        ours=[*flat(ours).values(), *optimizer.averages],
        plain=[*flat(plain).values(), *state.average.values()],
    )


def report(comparison: Comparison) -> None:
    """Print the times and the difference."""
    seconds, numpy_seconds = np.median(comparison.times, axis=0)
    print(f"\nOne step of the optimizer (median of {len(comparison.times)} each, in turn, with the same gradients)")
    print(f"  AdamW        {seconds * 1e6:6.0f} microseconds")
    print(f"  plain NumPy  {numpy_seconds * 1e6:6.0f} microseconds, {numpy_seconds / seconds:.1f} times as long")
    verdict = "the same to float32 rounding" if comparison.agrees else "NOT the same"
    print(f"  Parameters and averages after all steps: {verdict} (largest difference {comparison.difference:.1e})")


def main() -> int:
    """Train, test and compare; returns 0 if the accuracies suffice and the comparison agrees, else 1."""
    training, test = load_digits()
    generator = np.random.default_rng(SEED)
    parameters = new_parameters(generator)
    optimizer = new_optimizer(parameters)
    count = sum(array.size for array in flat(parameters).values())
    print(f"{len(training.labels)} training images, {len(test.labels)} test images; {count:,} parameters\n")
    train(parameters, optimizer, training, test, generator)
    accuracies = [accuracy(parameters, test)]
    with optimizer.averaged():
        accuracies.append(accuracy(parameters, test))
    print(f"\nTest accuracy (at least {REQUIRED_ACCURACY:.0%} expected)")
    print(f"  parameters as trained  {accuracies[0]:.2%}")
    print(f"  their moving averages  {accuracies[1]:.2%}")
    comparison = compare(training, generator)
    report(comparison)
    return 0 if min(accuracies) >= REQUIRED_ACCURACY and comparison.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
