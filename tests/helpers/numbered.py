"""Saves that hold one number everywhere: whatever is read from a file tells which save it is of."""

import numpy as np

from adamw_numba import AdamW
from adamw_numba.saving import archive

FILES = ["s.npz", "s.safetensors", "s.h5", "s.zarr.zip"]


def optimizer_of(number, size=40):
    """An optimizer whose every array holds one number."""
    variables = {"a": np.full(size, float(number), np.float32), "b": np.full((2, 3), float(number))}
    optimizer = AdamW(0.5)
    optimizer.build(variables)
    fill(optimizer, number)
    return optimizer


def fill(optimizer, number):
    for name, array in [*optimizer.state.items(), *zip("ab", optimizer.trainable_variables, strict=True)]:
        if name in ("a", "b") or "/" in name:
            array[...] = number


def save(number, path, durable=True):
    optimizer_of(number).save(path, extra=number, variables=True, durable=durable)


def found_in(path):
    """The number that a file holds, all of it."""
    saved = archive.read(path)
    numbers = {float(x) for key, array in saved.arrays.items() if "/" in key for x in array.ravel()}
    assert numbers == {float(saved.document["extra"])}
    return saved.document["extra"]
