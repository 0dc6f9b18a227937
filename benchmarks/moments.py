"""What moments of 16 and 8 bits make of the time of a step, beside our own float32.

In the rows of 16-bit variables, these have remainders instead of master copies too.

    python -m benchmarks.moments [--seconds 20]

The three take turns in one process. It prints medians, and the ratio of float32's median to each; the memory traffic
alone would give 1.40 with bfloat16 and 1.75 with 8 bits (plain steps of float32 variables).
"""

import argparse
import statistics
import time
from collections.abc import Callable

from adamw_numba.arrays.moments import MOMENTS

from . import contenders
from .workloads import WORKLOADS, gradients, interleaved, step_of, values


def timed(step: Callable[[], object]) -> Callable[[bool], float]:
    """A call that returns the seconds of one step."""

    def call(counts: bool) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return call


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--seconds", type=float, default=20)
    seconds = parser.parse_args().seconds
    print(f"{'workload':10s} {'option':7s}" + "".join(f" {moments:>18s}" for moments in MOMENTS))
    for workload in ("one-64M", "gpt2"):
        for option in ("plain", "full", "16-bit"):
            shapes = WORKLOADS[workload]
            given = gradients(shapes, option)
            step = step_of(option, given)
            makers = {"float32": contenders.ours} | {moments: contenders.ours_in(moments) for moments in MOMENTS[1:]}
            made = {moments: make(values(shapes), step) for moments, make in makers.items()}
            for each in made.values():
                each.give(given)
            times = interleaved({name: timed(each.step) for name, each in made.items()}, seconds, least=40)
            medians = {name: statistics.median(found) for name, found in times.items()}
            cells = [f"{took * 1e3:6.1f} ms ({medians['float32'] / took:5.2f})" for took in medians.values()]
            print(f"{workload:10s} {option:7s} {'  '.join(cells)}", flush=True)
            del made


if __name__ == "__main__":
    main()
