"""What groups of hyperparameters cost: a step with none, one, ten, and as many as there are arrays.

    python -m benchmarks.groups [--before FOLDER]

Optimizers take turns in one process; figures are ratios of medians. `--before` names the folder of another version of
the repository, whose plain steps take turns as well. The exit status says whether the bounds that are printed hold.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import adamw_numba

from .minimize import version_at
from .workloads import WORKLOADS

ROUNDS = 25
SECONDS = 0.05  # of a turn
MOST = {"before": 1.05, 10: 1.05, 161: 1.08}  # times a step without groups


def optimizer(package: Any, name: str, groups: int) -> Callable[[], object]:
    """A step of an optimizer whose arrays are spread over so many groups besides the common one."""
    random = np.random.default_rng(0)
    variables = [random.standard_normal(shape, np.float32) for shape in WORKLOADS[name]]
    gradients = [random.standard_normal(shape, np.float32) for shape in WORKLOADS[name]]
    made = package.AdamW(1e-3)
    for k in range(groups):
        own = {
            "learning_rate": 1e-3 * (1 + k),
            "weight_decay": 0.01 * k,
            "beta_1": 0.9 - 1e-4 * k,
            "epsilon": 1e-7 * (1 + k),
        }
        made.override(var_list=variables[k::groups], **own)
    made.build(variables)
    return lambda: made.apply(gradients)


def medians(steps: dict[object, Callable[[], object]]) -> dict[object, float]:
    """Seconds of a step of each; all take turns."""
    counts: dict[object, int] = {}
    for key, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        counts[key] = max(1, int(SECONDS / (time.perf_counter() - start)))
    times: dict[object, list[float]] = {key: [] for key in steps}
    for _ in range(ROUNDS):
        for key, step in steps.items():
            for _ in range(counts[key] // 4 + 1):
                step()
            start = time.perf_counter()
            for _ in range(counts[key]):
                step()
            times[key].append((time.perf_counter() - start) / counts[key])
    return {key: statistics.median(each) for key, each in times.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.groups", description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="FOLDER")
    chosen = parser.parse_args(arguments)
    before = version_at(chosen.before) if chosen.before else None
    good = True
    for name in ("one-10", "mlp", "one-65k", "resnet50", "many-small"):
        steps: dict[object, Callable[[], object]] = {0: optimizer(adamw_numba, name, 0)}
        if before is not None:
            steps["before"] = optimizer(before, name, 0)
        for groups in (1, 10, 161):
            if groups <= len(WORKLOADS[name]):
                steps[groups] = optimizer(adamw_numba, name, groups)
        found = medians(steps)
        print(f"{name}: {1e6 * found[0]:.2f} us without groups")
        for key, seconds in found.items():
            ratio = found[0] / seconds if key == "before" else seconds / found[0]
            label = "without groups, over the version before" if key == "before" else f"{key} groups, over none"
            if key:
                bound = MOST.get(key) if name == "resnet50" or key == "before" else None  # type: ignore[call-overload]
                good &= bound is None or ratio <= bound
                print(f"    {label:42s} {ratio:.3f}" + ("" if bound is None else f"   ({bound:g} allowed)"), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
