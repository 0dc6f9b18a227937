"""Ratios that only a real regression can break, on any machine, however noisy: for continuous integration.

    python -m benchmarks.guard

Each try is a median over rounds in which both take turns. A row of steps fails if the best of several tries is below
its bound. Those bounds are about half of what was measured on two cores. What it takes to begin is compared with the
import of a library that does not change; those bounds are twice what was measured. The exit status says whether all of
them hold.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

from . import compare, contenders
from .contenders import Maker
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
# Of ours with moments of fewer bits: how much of its time float32 moments take, at least.
SMALL = [
    ("one-65k", "plain", "bfloat16", 0.35),
    ("one-65k", "plain", "8bit", 0.25),
    ("one-1M", "16-bit", "bfloat16", 0.5),
]
TRIES = 4
SECONDS = 0.4

# What it takes to begin, of which library's import it is a multiple, and how many times as long it takes, at most.
STARTS = [("import", "NumPy", 2.0), ("first step", "Numba", 5.0)]
STARTING = """
import json, time
def seconds(act):
    start = time.process_time()
    act()
    return time.process_time() - start
def first_step():
    for size in (1000, 200_000):
        optimizer = adamw_numba.AdamW()
        optimizer.build([np.ones(size, np.float32)])
        optimizer.apply([np.ones(size, np.float32)])
found = {"NumPy": seconds(lambda: __import__("numpy"))}
found["import"] = seconds(lambda: __import__("adamw_numba"))
found["Numba"] = seconds(lambda: __import__("numba"))
import adamw_numba, numpy as np
found["first step"] = seconds(first_step)
print(json.dumps(found))
"""


def measured(shapes: Shapes, option: str, ours: Maker, theirs: Maker, bound: float, rounded: float = 0.0) -> float:
    """The best ratio of a few tries; stops as soon as the bound is reached."""
    given, start = gradients(shapes, option), values(shapes)
    step = step_of(option, given)
    both = {key: make(start, step) for key, make in (("ours", ours), ("theirs", theirs))}
    compare.agree(*both.values(), given, step, rounded)
    calls = {key: compare.timer(each, given, False, compare.repeats(each, given)) for key, each in both.items()}
    best = 0.0
    for _ in range(TRIES):
        times = interleaved(calls, SECONDS, least=5)
        best = max(best, statistics.median(times["theirs"]) / statistics.median(times["ours"]))
        if best >= bound:
            break
    return best


def starting() -> dict[str, float]:
    """The least processor seconds that beginning takes in a new process, with cached kernels."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"NUMBA_CACHE_DIR": folder}
        _, *found = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", STARTING], check=True, stdout=subprocess.PIPE, env=environment
                ).stdout
            )
            for _ in range(1 + TRIES)
        ]
    return {name: min(each[name] for each in found) for name in found[0]}


def main() -> int:
    """Measure each row, and print which ones are too slow."""
    failed, seconds = 0, starting()
    for name, library, most in STARTS:
        ratio = seconds[name] / seconds[library]
        failed += ratio > most
        verdict = "" if ratio <= most else "   TOO SLOW"
        print(f"{name} over import of {library:5s} {ratio:6.2f}, at most {most:5.2f}{verdict}", flush=True)
    rows: list[tuple[str, str, str, Maker, Maker, float, float]] = [
        (workload, option, f"{name:6s} over ours", contenders.ours, contenders.PROCESSES["torch"][name], bound, 0.0)
        for workload, option, name, bound in BOUNDS
    ]
    rows += [
        (workload, option, f"ours over {moments}", contenders.ours_in(moments), contenders.ours, bound, 0.3)
        for workload, option, moments, bound in SMALL
    ]
    for workload, option, what, ours, theirs, bound, rounded in rows:
        ratio = measured(WORKLOADS[workload], option, ours, theirs, bound, rounded)
        failed += ratio < bound
        verdict = "" if ratio >= bound else "   TOO SLOW"
        print(f"{workload:11s} {option:6s} {what} {ratio:6.2f}, at least {bound:5.2f}{verdict}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
