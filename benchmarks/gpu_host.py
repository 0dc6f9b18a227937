"""What a step on a GPU costs the host, apart from the driver: measured without a GPU.

    python -m benchmarks.gpu_host [--kind torch] [--seconds 1]

Arrays in the host's memory stand in for arrays on a GPU (torch's tensors, and CuPy's arrays, which need no GPU as long
as nobody computes with them), and compiled functions that do nothing stand in for CUDA's driver. All else is what a
step does on a GPU: arrays are looked at, coefficients worked out, launches made. What is added there is the driver's
own time: some microseconds for each launch, of which there is one for each kind of array, and two more for norms.
"""

import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # before anything imports Numba

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
from numba import carray, cfunc, types

from adamw_numba import AdamW, arrays
from adamw_numba.arrays import gpu as gpu_arrays
from adamw_numba.arrays import reader

COUNTS = (1, 10, 100, 1000)
# Microseconds: for up to ten arrays, and for each further one.
FIRST, FURTHER = 12.0, {"torch": 0.4, "CuPy": 0.5}
OPTIONS = {"plain": {}, "clip": {"global_clipnorm": 1.0}}


@cfunc(types.int32(types.CPointer(types.int64)))
def _no_context(out):
    carray(out, 1)[0] = 0
    return 0


@cfunc(types.int32(types.int64, types.int64, types.CPointer(types.int64)))
def _default_stream(kind, device, out):
    carray(out, 1)[0] = 0
    return 0


def _nothing(count: int) -> Any:
    """A C function of so many integers that does nothing."""
    names = ", ".join("abcdefghijk"[:count])
    return cfunc(types.int32(*[types.int64] * count))(eval(f"lambda {names}: 0"))


def stand_in_for_the_driver() -> Any:
    """The addresses of functions that do nothing, in the place of the driver's."""
    from adamw_numba.gpu import driver

    compiled = [driver.ARGUMENTS[name] for name in list(driver.ARGUMENTS)[: len(driver.addresses())]]
    functions = [_no_context, *[_nothing(len(arguments)) for arguments in compiled[1:]]]
    return functions, np.array([function.address for function in functions], np.int64)


def tensors(count: int) -> list[Any]:
    """Tensors of torch."""
    import torch

    return [torch.nn.Parameter(torch.ones(100)) for _ in range(count)]


def cupy_arrays(count: int) -> list[Any]:
    """Arrays of CuPy over memory of the host."""
    return [cupy_array(np.ones(100, np.float32)) for _ in range(count)]


def cupy_array(array: Any, dtype: str = "float32") -> Any:
    """One of them."""
    import cupy

    held = np.zeros(array.shape, dtype)
    memory = cupy.cuda.UnownedMemory(held.ctypes.data, held.nbytes, held, 0)
    return cupy.ndarray(array.shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


KINDS: dict[str, Callable[[int], list[Any]]] = {"torch": tensors, "CuPy": cupy_arrays}


def step_of(kind: str, count: int, options: dict[str, Any]) -> Callable[[], None]:
    """A step of so many arrays, which lie where they did at the last one."""
    variables, gradients = KINDS[kind](count), KINDS[kind](count)
    if kind == "torch":
        gradients = [gradient.detach() for gradient in gradients]
    optimizer = AdamW(0.01, **options)
    optimizer.build(variables)
    return lambda: optimizer.apply(gradients)


def measure(steps: dict[Any, Callable[[], None]], seconds: float) -> dict[Any, float]:
    """Median microseconds of each, taken in turns."""
    times: dict[Any, list[float]] = {key: [] for key in steps}
    for step in steps.values():
        for _ in range(100):
            step()
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end:
        for key, step in steps.items():
            repeats = max(5, 200 // key[1])
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            times[key].append(1e6 * (time.perf_counter() - start) / repeats)
    return {key: statistics.median(each) for key, each in times.items()}


def pretending() -> ExitStack:
    """In which arrays of the host are taken for arrays on a GPU."""
    from adamw_numba.gpu import driver

    functions, addresses = stand_in_for_the_driver()
    stack = ExitStack()
    stack.callback(functions.clear)
    patch = mock.patch.object
    stack.enter_context(patch(arrays, "place", lambda array: "cuda:0"))
    stack.enter_context(patch(gpu_arrays, "require", lambda name, array: None))
    stack.enter_context(patch(gpu_arrays, "current_stream", lambda array, device, consumer=0: (0, None)))
    stack.enter_context(patch(reader, "stream_function", lambda kind: _default_stream.address))
    stack.enter_context(patch(gpu_arrays, "zeros_like", cupy_array))
    stack.enter_context(patch(driver, "addresses", lambda: addresses))
    return stack


def main(arguments: list[str] | None = None) -> int:
    """Print what a step takes; the exit status says whether that is within the bounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_host", description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    chosen = parser.parse_args(arguments)
    slow = []
    with pretending():
        for kind in chosen.kind or KINDS:
            cases = [(name, count) for name in OPTIONS for count in COUNTS]
            found = measure({case: step_of(kind, case[1], OPTIONS[case[0]]) for case in cases}, chosen.seconds)
            for name in OPTIONS:
                times = [found[name, count] for count in COUNTS]
                further = (times[-1] - times[1]) / (COUNTS[-1] - COUNTS[1])
                told = "".join(f"{n:7,d}: {t:8.1f} us" for n, t in zip(COUNTS, times, strict=True))
                print(f"{kind:6s} {name:6s}{told}   {further:.2f} us for each further array")
                if name == "plain":
                    slow += [f"{kind}: ten arrays"] * (max(times[:2]) > FIRST)
                    slow += [f"{kind}: further arrays"] * (further > FURTHER[kind])
    print("too slow: " + ", ".join(slow) if slow else "all within their bounds")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
