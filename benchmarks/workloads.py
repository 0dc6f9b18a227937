"""What is measured: the shapes and values of the arrays, the options of a step, and how contenders take turns."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Shapes = list[tuple[int, ...]]
Arrays = list[np.ndarray[Any, Any]]

LEARNING_RATE, WEIGHT_DECAY, EPSILON = 1e-3, 0.01, 1e-8
SETTLING = 2e-2  # seconds before the timed part: OpenMP threads spin for about that long
LOSS_SCALE, EMA_MOMENTUM = 1024.0, 0.99


class Step(NamedTuple):
    """What a step has to do; the same for all contenders."""

    clip: float | None = None  # of the global norm
    full: bool = False  # also AMSGrad, moving average and loss scale
    bits: int = 32


class Contender(NamedTuple):
    """One optimizer on its own arrays."""

    give: Callable[[Arrays], None]  # the gradients of the next step, in the contender's own kind of array; not timed
    step: Callable[[], object]  # returns when the step is complete
    look: Callable[[], Arrays]  # its variables, as NumPy arrays
    again: Callable[[], None] = lambda: None  # restores gradients that the last step has scaled in place; not timed


def resnet50() -> Shapes:
    """The shapes of torchvision's resnet50, in its order."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for outputs, size in ((width, 1), (width, 3), (4 * width, 1)):
                shapes += [(outputs, inputs, size, size), (outputs,), (outputs,)]
                inputs = outputs
            if block == 0:
                first = 64 if width == 64 else 2 * width
                shapes += [(4 * width, first, 1, 1), (4 * width,), (4 * width,)]
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """The shapes of the smallest GPT-2, with its 12 blocks."""
    d = 768
    norm, block = [(d,), (d,)], []
    for inputs, outputs in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)):
        block += [*(norm if (inputs, outputs) in ((d, 3 * d), (d, 4 * d)) else []), (inputs, outputs), (outputs,)]
    return [(50257, d), (1024, d), *(12 * block), *norm]


WORKLOADS: dict[str, Shapes] = {
    "one-64M": [(64 * 2**20,)],
    "one-1M": [(2**20,)],
    "one-65k": [(2**16,)],
    "one-10": [(10,)],
    "resnet50": resnet50(),
    "gpt2": gpt2(),
    "mlp": [(784, 64), (64,), (64, 64), (64,), (64, 10), (10,)],
    "many-small": [(100,)] * 1000,
}
SMALL = ("one-65k", "one-10", "mlp", "many-small")
OPTIONS = ("plain", "clip", "full", "16-bit")


def elements(shapes: Shapes) -> int:
    """The number of elements in arrays of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def values(shapes: Shapes) -> Arrays:
    """Variables: standard normal."""
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def gradients(shapes: Shapes, option: str) -> Arrays:
    """Gradients away from zero, so that the different epsilons of the libraries do not matter."""
    random = np.random.default_rng(1)
    scale = np.float32(LOSS_SCALE if option == "full" else 1.0)
    return [scale * (0.5 + random.random(s, np.float32)) * (1 - 2 * random.integers(2, size=s, dtype=np.int8))
            for s in shapes]  # fmt: skip


def step_of(option: str, given: Arrays) -> Step:
    """The step of an option; a clip always takes effect, and halves the gradients."""
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in given))
    norm /= LOSS_SCALE if option == "full" else 1.0
    return Step(norm / 2 if option in ("clip", "full") else None, option == "full", 16 if option == "16-bit" else 32)


def interleaved(
    contenders: Mapping[str, Callable[[bool], float]], seconds: float, least: int = 3, most: int = 200
) -> dict[str, list[float]]:
    """The results of each contender's calls, with the contenders taking turns for about so many seconds.

    A turn is calls with False for some milliseconds, which do not count, and one with True. The threads of the previous
    contender still spin for a while, and the next one should not pay for that.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    for turn in range(most):
        for name, call in contenders.items():
            until = time.perf_counter() + SETTLING
            while time.perf_counter() < until:
                call(False)
            times[name].append(call(True))
        if turn + 1 >= least and time.perf_counter() > end:
            break
    return times
