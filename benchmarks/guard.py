"""Ratios that only a real regression can break, on any machine, however noisy: for continuous integration.

    python -m benchmarks.guard

Each try is a median over rounds in which both take turns. A row fails if the best of several tries is below its bound.
The bounds are about half of what was measured on two cores. The exit status says whether all of them hold.
"""

import statistics
import sys

from . import compare, contenders
from .workloads import WORKLOADS, Shapes, gradients, interleaved, step_of, values

# Workload, option, contender, and the least ratio of its time to ours.
BOUNDS = [
    ("one-65k", "plain", "limit", 0.15),
    ("one-1M", "full", "NumPy", 3.0),
    ("one-10", "plain", "NumPy", 1.1),
    ("mlp", "plain", "NumPy", 2.5),
    ("many-small", "plain", "NumPy", 15.0),
    ("many-small", "clip", "NumPy", 8.0),
]
TRIES = 4
SECONDS = 0.4


def measured(shapes: Shapes, option: str, name: str, bound: float) -> float:
    """The best ratio of a few tries; stops as soon as the bound is reached."""
    given, start = gradients(shapes, option), values(shapes)
    step = step_of(option, given)
    makers = {"ours": contenders.ours, name: contenders.PROCESSES["torch"][name]}
    both = {key: make(start, step) for key, make in makers.items()}
    compare.agree(*both.values(), given, step)
    calls = {key: compare.timer(each, given, False, compare.repeats(each, given)) for key, each in both.items()}
    best = 0.0
    for _ in range(TRIES):
        times = interleaved(calls, SECONDS, least=5)
        best = max(best, statistics.median(times[name]) / statistics.median(times["ours"]))
        if best >= bound:
            break
    return best


def main() -> int:
    """Measure each row, and print which ones are too slow."""
    failed = 0
    for workload, option, name, bound in BOUNDS:
        ratio = measured(WORKLOADS[workload], option, name, bound)
        failed += ratio < bound
        verdict = "" if ratio >= bound else "   TOO SLOW"
        print(
            f"{workload:11s} {option:6s} {name:6s} over ours {ratio:6.2f}, at least {bound:5.2f}{verdict}", flush=True
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
