"""What tests of remainders have in common: see cpu/test_remainders.py and gpu/test_gpu_remainders.py."""

import numpy as np

from adamw_numba.arrays import as_numpy

OPTIONS = {
    "plain": {},
    "all options": {
        "amsgrad": True,
        "use_ema": True,
        "ema_overwrite_frequency": 3,
        "gradient_accumulation_steps": 2,
        "clipnorm": 0.5,
        "nesterov": True,
    },
    "overwritten each time": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 1},
    "bfloat16": {"moments": "bfloat16", "seed": 3},
    "8 bits": {"moments": "8bit", "clipvalue": 0.1},
}


def bits_of(array):
    return np.ascontiguousarray(as_numpy(array)).view(np.int16).astype(np.int64)


def joined(variable, remainder):
    """The definition: the variable is the upper half, and the remainder is added to the lower one."""
    return (((bits_of(variable) << 16) + bits_of(remainder)) & 0xFFFFFFFF).astype(np.uint32)


def patterns():
    """All upper halves, with lower halves that are exact, nearly ties, ties, and anything."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD], np.uint32)
    return ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] | lower).ravel()
