"""Optimizers in many configurations, to be saved and to go on with.

As a script it is the new process of a resumed run: from stdin it takes a list of ``[path, dtype, config]``, loads each
file, goes on, and prints every bit as JSON.
"""

import json
import sys

import ml_dtypes
import numpy as np

import adamw_numba
from adamw_numba import AdamW, LossScaleOptimizer, schedules

STORES = ["s.npz", "s.safetensors", "s.h5", "s.zarr", "s.zarr.zip"]
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
SHAPES = [(3, 4), (), (0, 2), (5,)]
# options of AdamW; the wrapper's scale, or None
CONFIGS = {
    "plain": ({}, None),
    "everything": (
        {"amsgrad": True, "use_ema": True, "ema_overwrite_frequency": 3, "gradient_accumulation_steps": 3},
        None,
    ),
    "scaled": ({"amsgrad": True, "gradient_accumulation_steps": 2, "global_clipnorm": 0.5}, 8.0),
    "schedule": ({"learning_rate": schedules.CosineDecay(0.1, 20), "clipvalue": 0.5, "nonfinite": "skip"}, None),
    "decay": ({"weight_decay": schedules.ExponentialDecay(0.1, 5, 0.5), "use_ema": True, "clipnorm": 0.3}, 2.0),
}


def drawn(seed):
    """A configuration by chance."""
    random = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[random.integers(len(choices))]

    options = {
        "learning_rate": one_of(
            0.05, schedules.CosineDecay(0.1, 20), schedules.PiecewiseConstantDecay([3], [0.1, 0.01])
        ),
        "weight_decay": one_of(0.0, 0.004, schedules.ExponentialDecay(0.1, 5, 0.5)),
        "beta_1": one_of(0.9, 0.5, 0.0),
        "beta_2": one_of(0.999, 0.9),
        "amsgrad": one_of(False, True),
        "gradient_accumulation_steps": one_of(None, 2, 3, 4),
        "nonfinite": one_of("propagate", "skip"),
    }
    options |= one_of({}, {"use_ema": True}, {"use_ema": True, "ema_overwrite_frequency": 2})
    options |= one_of({}, {"clipnorm": 0.3}, {"global_clipnorm": 0.5}, {"clipvalue": 0.5})
    return options, one_of(None, None, 8.0)


DRAWN = {f"drawn {seed}": DTYPES[seed % len(DTYPES)] for seed in range(18)}
CONFIGS |= {name: drawn(int(name.split()[1])) for name in DRAWN}


def plain(array, dtype):
    return np.array(array).astype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))


def variables_of(dtype, make=plain):
    random = np.random.default_rng(7)
    return {f"v/{i}/.x".replace("/", "-"): make(random.normal(size=shape), dtype) for i, shape in enumerate(SHAPES)}


def optimizer_of(config):
    options, scale = CONFIGS[config]
    optimizer = AdamW(**options)
    optimizer.exclude_from_weight_decay(var_names=["^v-0"])
    return optimizer if scale is None else LossScaleOptimizer(optimizer, scale, dynamic_growth_steps=3)


def go_on(optimizer, variables, first, last, make=plain):
    for step in range(first, last):
        random = np.random.default_rng(step)
        gradients = {
            k: make(random.normal(size=v.shape), adamw_numba.arrays.dtype_name(v)) for k, v in variables.items()
        }
        if step == 4 and isinstance(optimizer, LossScaleOptimizer):
            gradients["v-3-.x"][0] = np.nan
        optimizer.apply(gradients)


def image(optimizer, variables):
    """Every bit of the state and of the variables, as text."""
    state = {**optimizer.state, **{f"variables/{k}": v for k, v in variables.items()}}
    return {k: adamw_numba.arrays.as_numpy(v).tobytes().hex() for k, v in state.items()} | {
        "skipped": optimizer.skipped_steps
    }


def build(variables, **options):
    optimizer = AdamW(**options)
    optimizer.build(variables)
    return optimizer


def resume(jobs):
    """Load, go on, tell every bit."""
    result = []
    for path, dtype, config in jobs:
        variables = {k: np.zeros_like(v) for k, v in variables_of(dtype).items()}
        cls = LossScaleOptimizer if CONFIGS[config][1] else AdamW
        optimizer = cls.load(path, variables)
        go_on(optimizer, variables, 5, 9)
        result.append(image(optimizer, variables))
    return result


if __name__ == "__main__":
    print(json.dumps(resume(json.load(sys.stdin))))
