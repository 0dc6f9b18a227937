"""Thousands of small arrays: what `build`, the first step, later steps, saving and restoring cost for each of them.

    python -m benchmarks.many_arrays [--arrays N] [--rounds N] [--kind numpy]

Every array holds ten float32 elements. Ours and `torch.optim.AdamW(params, fused=True)` take turns, each round with new
arrays, and the figures are medians. Everything is measured with N and with 2 N arrays: nothing may take more than 2.5
times as long for twice the arrays. What torch calls `build` is its constructor, and its first step makes its state.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adamw_numba import AdamW

ELEMENTS = 10
# Microseconds for each array, times torch's, and growth for twice as many arrays.
BUILD, OVER_TORCH, SAVE, GROWTH = 40.0, 6.0, 120.0, 2.5
GROWS = ("build", "first step", "save", "restore")
Times = dict[str, list[float]]


def values(count: int) -> list[np.ndarray[Any, Any]]:
    """New arrays, each with memory of its own."""
    return [np.ones(ELEMENTS, np.float32) for _ in range(count)]


def tensors(count: int) -> list[Any]:
    """The same, as parameters of torch."""
    import torch

    return [torch.nn.Parameter(torch.ones(ELEMENTS)) for _ in range(count)]


def ours(variables: list[Any], gradients: list[Any]) -> tuple[AdamW, Iterator[tuple[str, Callable[[], object]]]]:
    """An optimizer, and what is timed of it, in order."""
    optimizer = AdamW()
    step = lambda: optimizer.apply(gradients)  # noqa: E731
    calls = {"build": lambda: optimizer.build(variables), "first step": step, "second step": step, "later step": step}
    return optimizer, iter(calls.items())


def fused(parameters: list[Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same of torch's optimizer, which is given the gradients beforehand."""
    import torch

    made: list[Any] = []

    def build() -> None:
        made.append(torch.optim.AdamW(parameters, fused=True))

    def step() -> None:
        made[0].step()

    return iter({"build": build, "first step": step, "second step": step, "later step": step}.items())


def timed(calls: Iterator[tuple[str, Callable[[], object]]], times: Times) -> None:
    """Run each call once, and note how long it took."""
    for name, call in calls:
        start = time.perf_counter()
        call()
        times.setdefault(name, []).append(time.perf_counter() - start)


def one_round(kind: str, count: int, folder: Path, times: Times) -> None:
    """One turn of one contender, with arrays of its own; ours is saved and restored as well."""
    make = values if kind == "NumPy" else tensors
    variables, gradients = make(count), values(count) if kind == "NumPy" else [each.detach() for each in tensors(count)]
    gc.collect()
    if kind == "torch fused":
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        timed(fused(variables), times)
        return
    optimizer, calls = ours(variables, gradients)
    timed(calls, times)
    path = folder / "many.npz"
    timed(iter({"save": lambda: optimizer.save(path), "restore": lambda: optimizer.restore(path)}.items()), times)


def measure(kinds: list[str], count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by contender and what was done; the first round, in which code is loaded, does not count."""
    found: dict[str, Times] = {kind: {} for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        for kind in kinds:
            one_round(kind, 10, Path(name), {})
        for _ in range(rounds):
            for kind in kinds:
                one_round(kind, count, Path(name), found[kind])
    medians = {kind: {key: statistics.median(each) for key, each in times.items()} for kind, times in found.items()}
    for times in medians.values():
        times["build and first step"] = times["build"] + times["first step"]
    return medians


def report(found: dict[int, dict[str, dict[str, float]]]) -> None:
    """Print microseconds for each array, and the growth from N to 2 N of them."""
    (count, once), (double, twice) = found.items()
    print(f"{'':42s} {count:>10,d} {double:>10,d}   microseconds an array, and how often the time of the former")
    for kind, times in once.items():
        for name, seconds in times.items():
            later = twice[kind][name]
            one, two = 1e6 * seconds / count, 1e6 * later / double
            print(f"{kind:20s} {name:21s} {one:10.2f} {two:10.2f}   {later / seconds:.2f}")


def verdict(found: dict[int, dict[str, dict[str, float]]]) -> list[str]:
    """What is slower than it should be."""
    (count, once), (_, twice) = found.items()
    wrong = []
    for kind in once:
        if kind == "torch fused":
            continue
        bounds = {"build": BUILD, "save": SAVE, "restore": SAVE}
        wrong += [f"{kind}: {key}" for key, bound in bounds.items() if 1e6 * once[kind][key] / count > bound]
        wrong += [f"{kind}: growth of {key}" for key in GROWS if twice[kind][key] > GROWTH * once[kind][key]]
        if "torch fused" in once:
            ratio = once[kind]["build"] / once["torch fused"]["build and first step"]
            print(f"{kind}: build takes {ratio:.2f} times torch's constructor and first step ({OVER_TORCH:g} allowed)")
            wrong += [f"{kind}: build beside torch"] if ratio > OVER_TORCH else []
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Print all figures; the exit status says whether they are within their bounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_arrays", description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kind", action="append", choices=["NumPy", "torch", "torch fused"])
    chosen = parser.parse_args(arguments)
    kinds = chosen.kind or ["NumPy", "torch", "torch fused"]
    found = {count: measure(kinds, count, chosen.rounds) for count in (chosen.arrays, 2 * chosen.arrays)}
    report(found)
    wrong = verdict(found)
    print("too slow: " + ", ".join(wrong) if wrong else "all within their bounds")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
