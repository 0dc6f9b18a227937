"""Optimizers that tests start from."""

import numpy as np
from helpers import libraries

from adamw_numba import AdamW


def built(variables, **options):
    """An optimizer with a large learning rate, built."""
    optimizer = AdamW(0.1, **options)
    optimizer.build(variables)
    return optimizer


def train(variables, gradients, **options):
    """An optimizer that has taken a step with each list of gradients."""
    optimizer = AdamW(0.05, **options)
    optimizer.build(variables)
    for step in gradients:
        optimizer.apply(step)
    return optimizer


def stepped(kind):
    """A variable, a gradient, an optimizer that has taken a step with them, and its momentum."""
    make = libraries.to_torch if kind == "torch" else libraries.numpy
    variable, gradient = (make(np.ones(6), "float32" if kind == "torch" else "float64") for _ in range(2))
    optimizer = built([variable])
    optimizer.apply([gradient])
    return variable, gradient, optimizer, optimizer.state["momentum/0"]
