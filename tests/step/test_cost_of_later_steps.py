"""What a step does not do: compile or allocate; and importing the package loads no other library."""

import gc
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from helpers import libraries
from helpers.libraries import torch

from adamw_numba import AdamW

VARIANTS = {
    "plain": {},
    "everything": {
        "amsgrad": True,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "clipvalue": 1.0,
        "nonfinite": "skip",
    },
    "global clip": {"global_clipnorm": 1.0},
    "clip by norm": {"clipnorm": 1.0},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("make", [libraries.numpy, libraries.to_torch, libraries.strided])
def test_later_steps_neither_compile_nor_allocate(options, dtype, make, monkeypatch):
    size = 200_000
    variables = [make(np.ones(size), dtype), make(np.ones(size), dtype)]
    optimizer = AdamW(**options)
    optimizer.build(variables)
    given = [make(np.ones(size), dtype) for _ in variables]
    for _ in range(4):
        optimizer.apply(given)

    def refuse(*args, **kwargs):
        raise AssertionError("a step compiled something")

    monkeypatch.setattr("numba.core.compiler.compile_extra", refuse)
    monkeypatch.setattr("numba.core.compiler.Compiler.__init__", refuse)
    fresh = [make(np.ones(size), dtype) for _ in variables]
    gc.collect()
    tracemalloc.start()
    optimizer.apply(fresh)
    optimizer.apply(given)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4


def test_torch_allocates_nothing_either():
    size = 100_000
    variables = [torch.nn.Parameter(torch.ones(size))]
    optimizer = AdamW(global_clipnorm=1.0)
    optimizer.build(variables)
    given = [torch.ones(size)]
    optimizer.apply(given)
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.apply(given)
    assert sum(event.self_cpu_memory_usage for event in profile.key_averages()) < size


def in_new_process(code):
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def test_import_is_light():
    loaded = in_new_process("import adamw_numba, sys, json; print(json.dumps(sorted(sys.modules)))")
    heavy = {"torch", "jax", "cupy", "scipy", "numba", "numba.cuda", "llvmlite", "keras", "h5py", "ml_dtypes"}
    assert not heavy & set(loaded)
