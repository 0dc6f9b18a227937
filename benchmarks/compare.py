"""Every optimizer side by side on this machine, in one table.

    python -m benchmarks.compare [--quick] [--json FILE] [--plot FILE.svg]

Each contender takes turns with ours in one process, doing the same step, after a check that both arrive at the same
variables. A process holds one workload and the contenders that can share it (with --quick, all workloads). The table
shows medians, and the ratio of the contender's time to ours with its quartiles over the rounds: above 1, ours is
faster. The rows called "limit" show the time of the bare memory traffic, divided by ours.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import contenders, costs, model, report
from .contenders import PROCESSES, Absent, Unable
from .workloads import (
    LEARNING_RATE,
    OPTIONS,
    SMALL,
    WORKLOADS,
    Arrays,
    Contender,
    Shapes,
    Step,
    gradients,
    interleaved,
    step_of,
    values,
)

STEPS = 3  # to agree on
SECONDS, QUICK_SECONDS = 4.0, 0.15  # for each pair
BUSY = 0.5  # average number of processes running in the last minute
QUICK = {"one-1M": ("plain",), "one-65k": ("plain",), "one-10": ("plain",), "resnet50": ("plain", "full", "16-bit"),
         "mlp": ("plain",), "many-small": ("plain",)}  # fmt: skip
KERAS_ON_JAX = ("Keras on JAX", "Keras on JAX, jitted")
SLOW_TO_COMPILE = {"many-small plain": ("optax", *KERAS_ON_JAX), "resnet50 plain": KERAS_ON_JAX,
                   "resnet50 full": ("optax", *KERAS_ON_JAX)}  # fmt: skip
SWEEP = [10, 100, 1000, 4000, *(2**n for n in (13, 14, 16, 17, 18, 20, 21, 22, 24, 25, 26))]
COUNTS = [10, 100, 500, 2000]  # of arrays of 100
# How far variables may be apart from ours, in learning rates per step, of contenders that round their moments.
ROUNDED = {"ours, bfloat16 moments": 0.02, "ours, 8-bit moments": 0.3}
Row = dict[str, Any]


def agree(one: Contender, other: Contender, given: Arrays, step: Step, rounded: float = 0.0) -> float:
    """The largest difference between two contenders' variables after a few steps.

    They may be 0.002 learning rates apart for each step, and `rounded` more.

    Raises
    ------
    AssertionError
        If they did not do the same work.
    """
    for contender in (one, other):
        contender.give(given)
        for _ in range(STEPS):
            contender.again()
            contender.step()
    worst = 0.0
    for a, b in zip(one.look(), other.look(), strict=False):
        allowed = 2.0**-7 * np.abs(b) + 1e-4 if step.bits == 16 else 2e-3 * STEPS * LEARNING_RATE
        allowed += rounded * STEPS * LEARNING_RATE
        difference = np.abs(a - b)
        if not (difference <= allowed).all():
            raise AssertionError(f"variables differ by {difference.max()} after {STEPS} steps; expected the same work")
        worst = max(worst, float(difference.max(initial=0)))
    return worst


def timer(contender: Contender, given: Arrays, fresh: bool, count: int) -> Callable[[bool], float]:
    """A function that takes steps and returns the seconds per step."""

    def call(counts: bool) -> float:
        total, times = 0.0, count if counts else 1
        for _ in range(times):
            contender.give([g.copy() for g in given]) if fresh else contender.again()
            start = time.perf_counter()
            contender.step()
            total += time.perf_counter() - start
        return total / times

    return call


def pair(
    name: str, make: contenders.Maker, shapes: Shapes, option: str, kinds: list[str], seconds: float
) -> Iterator[Row]:
    """One contender beside ours: check that they agree, then yield rows of times."""
    gc.collect()  # optimizers hold themselves, and gigabytes of arrays, until then
    given, start = gradients(shapes, option), values(shapes)
    step = step_of(option, given)
    other, our = make(start, step), contenders.ours(start, step)
    agree(our, other, given, step, ROUNDED.get(name, 0.0))
    for kind in kinds:
        both = {"ours": our, name: other}
        fresh = kind == "fresh"
        calls = {key: timer(c, given, fresh, repeats(c, given, fresh)) for key, c in both.items()}
        times = interleaved(calls, seconds)
        ratios = [theirs / mine for theirs, mine in zip(times[name], times["ours"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        medians = {key: statistics.median(series) for key, series in times.items()}
        yield {"contender": name, "option": option, "gradients": kind, "ours": medians["ours"],
               "theirs": medians[name], "ratio": medians[name] / medians["ours"], "low": low, "high": high,
               "rounds": len(ratios)}  # fmt: skip


def repeats(contender: Contender, given: Arrays, fresh: bool = False) -> int:
    """How many steps take a few milliseconds."""
    call = timer(contender, given, fresh, 1)
    call(False)
    return int(np.clip(4e-3 / call(True), 1, 200))


def cells(quick: bool, wanted: list[str], options: list[str]) -> Iterator[tuple[str, str]]:
    """Workloads and options, in the order of the tables."""
    for workload in WORKLOADS:
        for option in OPTIONS:
            chosen = not quick or option in QUICK.get(workload, ())
            if chosen and workload in (wanted or WORKLOADS) and option in (options or OPTIONS):
                yield workload, option


def worker(arguments: argparse.Namespace) -> Iterator[Row]:
    """Everything that one process measures: rows, and which contenders are missing."""
    warnings.simplefilter("ignore")
    if arguments.sweep:
        yield from sweep(arguments.quick, arguments.seconds / 2)
        return
    quick, makers = arguments.quick, PROCESSES[arguments.worker]
    absent: set[str] = set()
    for workload, option in cells(quick, arguments.workload, arguments.option):
        for name, make in makers.items():
            skipped = quick and name in SLOW_TO_COMPILE.get(f"{workload} {option}", ())
            if name in absent or skipped or (arguments.contender and name not in arguments.contender):
                continue
            kinds = ["same", "fresh"] if workload in SMALL and name != "limit" else ["same"]
            seconds = QUICK_SECONDS if quick else arguments.seconds
            try:
                for row in pair(name, make, WORKLOADS[workload], option, kinds, seconds):
                    yield {"workload": workload, **row}
            except Unable as error:
                yield {"unable": f"{name}: {error}"}
            except Absent as error:
                absent.add(name)
                yield {"absent": name, "why": str(error)}


def sweep(quick: bool, seconds: float) -> Iterator[Row]:
    """One array of many sizes, and many arrays of one size: the data of the plot and of the cost model."""
    sizes = [[(n,)] for n in SWEEP if not quick or n <= 2**22]
    for shapes in [*sizes, *([(100,)] * count for count in COUNTS)]:
        for name in ("torch fused",) if quick else ("limit", "NumPy", "torch fused"):
            for row in pair(name, PROCESSES["torch"][name], shapes, "plain", ["same"], 0.1 if quick else seconds):
                yield {"sweep": [len(shapes), shapes[0][0]], **row}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all processes, one after another; returns their findings, by kind."""
    found: dict[str, Any] = {"rows": [], "sweep": [], "absent": {}, "unable": [], "ended": []}
    common = ["--seconds", str(arguments.seconds), *["--quick"] * arguments.quick]
    for key in ("option", "contender"):
        common += [text for value in getattr(arguments, key) for text in (f"--{key}", value)]
    wanted = arguments.workload or [*WORKLOADS]
    for workloads in [wanted] if arguments.quick else [[name] for name in WORKLOADS if name in wanted]:
        chosen = [text for name in workloads for text in ("--workload", name)]
        for process, makers in PROCESSES.items():
            if not arguments.contender or not set(arguments.contender).isdisjoint(makers):
                _run_worker(found, process, common + chosen)
    if _sweeps(arguments):
        _run_worker(found, "torch", [*common, "--sweep"])
    return found


def _sweeps(arguments: argparse.Namespace) -> bool:
    return arguments.sweep or not (arguments.workload or arguments.option or arguments.contender)


def _run_worker(found: dict[str, Any], process: str, options: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.compare", "--worker", process, *options]
    environment = os.environ | {"KERAS_BACKEND": process, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            _take(found, line)
    if child.returncode:
        found["ended"].append(f"the process of {process} ended with status {child.returncode}: {' '.join(options)}")
        print(found["ended"][-1], file=sys.stderr)  # what the others measure, and what it has measured, counts


def _take(found: dict[str, Any], line: str) -> None:
    if not line.startswith("{"):  # printed by a library
        return
    row = json.loads(line)
    if "absent" in row:
        if row["absent"] not in found["absent"]:
            print(f"not installed: {row['absent']}: {row['why']}", flush=True)
        found["absent"][row["absent"]] = row["why"]
    elif "unable" in row:
        found["unable"].append(row["unable"])
    elif "sweep" in row:
        found["sweep"].append(row)
    else:
        found["rows"].append(row)
        print(report.line(row), flush=True)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """An earlier run, in which the rows of a later, partial run replace the old ones."""
    known = [_key(row) for row in new["rows"]]
    rows = [row for row in old["rows"] if _key(row) not in known] + new["rows"]
    order = [_key(row) for row in old["rows"]]
    rows.sort(key=lambda row: order.index(_key(row)) if _key(row) in order else len(order))
    found = old | new | {"rows": rows, "command": f"{old['command']}; {new['command']}"}
    found["sweep"] = new["sweep"] or old["sweep"]
    here = {row["contender"] for row in new["rows"]}
    found["absent"] = {name: why for name, why in old["absent"].items() if name not in here} | new["absent"]
    if found["sweep"]:
        found["model"] = model.fit(found["sweep"], rows)
    return found


def _key(row: Row) -> tuple[str, ...]:
    return row["workload"], row["option"], row["contender"], row["gradients"]


def check(options: argparse.Namespace, machine: dict[str, Any]) -> None:
    """Refuse options that would only fail after an hour.

    Raises
    ------
    SystemExit
    """
    for key in ("json", "plot", "into"):
        file = getattr(options, key)
        if file and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise SystemExit(f"--{key} {file}: expected a file in a folder that exists")
        if file and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            raise SystemExit(f"--{key} {file}: this file cannot be written")
    if options.plot and options.plot.suffix != ".svg":
        raise SystemExit(f"--plot {options.plot}: expected a name that ends in .svg")
    if options.plot and not _sweeps(options):
        raise SystemExit("--plot shows time against size, which is not measured if you select rows: add --sweep")
    if options.json and options.into and options.json.resolve() == options.into.resolve():
        raise SystemExit(f"--json and --into are both {options.json}; expected two files, or only one of the options")
    if options.into:
        there = report.read(options.into)["machine"]
        if there != machine:
            raise SystemExit(f"--into {options.into}: that run was on another machine or with other versions: {there}")


def left_out() -> str:
    """A sentence that says what --quick does not measure."""
    whole = [name for name in WORKLOADS if name not in QUICK]
    options = [f"{name} except {', '.join(QUICK[name])}" for name in QUICK]
    slow = [f"{', '.join(names)} on {cell}" for cell, names in SLOW_TO_COMPILE.items()]
    return f"--quick leaves out {', '.join(whole)}; all options of {'; '.join(options)}; and {'; '.join(slow)}"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text!r}")
    return seconds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer workloads and rounds: about two minutes")
    parser.add_argument("--seconds", type=_seconds, default=SECONDS, help=f"for each pair (default: {SECONDS:g})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save what was measured")
    parser.add_argument("--into", type=Path, metavar="FILE", help="replace the same rows in the file of an earlier run")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="time against size; needs matplotlib")
    names = [name for makers in PROCESSES.values() for name in makers]
    for key, choices in (("workload", [*WORKLOADS]), ("option", [*OPTIONS]), ("contender", names)):
        parser.add_argument(
            f"--{key}", action="append", default=[], choices=choices, help="only this one; may be repeated"
        )
    parser.add_argument("--sweep", action="store_true", help="also measure arrays of all sizes, if you select rows")
    parser.add_argument("--worker", choices=PROCESSES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and save."""
    options = parse(arguments)
    if options.worker:
        for row in worker(options):
            print(json.dumps(row), flush=True)
        return 0
    machine = report.machine()
    check(options, machine)
    if options.plot:
        report.need_matplotlib()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = f"something else ran here in the last minute (load {load:.1f}): if it still does, the ratios are worthless"
    if load > BUSY:
        print(busy, file=sys.stderr)
    print(report.HEADING, flush=True)
    found = {"machine": machine, "load": load, "command": " ".join(["python -m benchmarks.compare", *sys.argv[1:]])}
    found |= run(options)
    unable, ended = found.pop("unable"), found.pop("ended")
    if not found["rows"] and not found["sweep"]:
        raise SystemExit(
            "; ".join(dict.fromkeys(ended + unable)) or (left_out() if options.quick else "nothing to measure")
        )
    if options.quick:
        print(left_out())
    if not (options.workload or options.option or options.contender):
        found["costs"] = costs.measure(options.quick)
        print(f"\nmemory, import, compilation\n{report.costs(found['costs'])}")
    if found["sweep"]:
        found["model"] = model.fit(found["sweep"], found["rows"])
        fitted = "fitted to arrays of all sizes" + " (roughly: the turns were short)" * options.quick
        print(f"\nwhat a plain step costs: constants {fitted}\n{report.model(found['model'])}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.into:
        both = merged(report.read(options.into), found)
        options.into.write_text(json.dumps(both, indent=1) + "\n")
    if options.plot:
        report.plot(found["sweep"], options.plot)
    for file in filter(None, (options.json, options.into, options.plot)):
        print(f"wrote {file}")
    if load > BUSY:
        print(busy, file=sys.stderr)
    return 1 if ended else 0


if __name__ == "__main__":
    sys.exit(main())
