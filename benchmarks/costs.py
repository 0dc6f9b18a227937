"""What a step costs besides time: memory, imports, first steps, compilation. Each is measured in its own process."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

VARIANTS = {
    "plain": {},
    "AMSGrad": {"amsgrad": True},
    "average": {"use_ema": True},
    "clip by value": {"clipvalue": 1.0},
    "accumulation": {"gradient_accumulation_steps": 2},
    "all of these": {"amsgrad": True, "use_ema": True, "clipvalue": 1.0, "gradient_accumulation_steps": 2},
    "norm": {"global_clipnorm": 1.0},
    "float64": {},
    "float16": {},
}

IMPORT = """
import time
start = time.perf_counter(); import numpy; between = time.perf_counter(); import adamw_numba
found = {"numpy": between - start, "adamw_numba": time.perf_counter() - between}
"""

FIRST_STEP = """
import time, numpy as np
from adamw_numba import AdamW
variables = [np.ones(1000, np.float32)]
start = time.perf_counter()
optimizer = AdamW(); optimizer.build(variables); between = time.perf_counter()
optimizer.apply([np.ones(1000, np.float32)])
found = {"build": between - start, "apply": time.perf_counter() - between}
"""

COMPILE = """
import time, warnings, numpy as np
from adamw_numba import AdamW
def first_steps(options, dtype):
    optimizer = AdamW(**options); optimizer.build([np.ones(1000, dtype)])
    start = time.perf_counter()
    for _ in range(2): optimizer.apply([np.ones(1000, dtype)])
    return time.perf_counter() - start
first_steps({}, np.float32)
found = {name: first_steps(options, name if name.startswith("float") else np.float32)
         for name, options in VARIANTS.items() if name != "plain"}
"""

MEMORY = """
import tracemalloc
from benchmarks import contenders, workloads
shapes = workloads.WORKLOADS["resnet50"]
given = workloads.gradients(shapes, OPTION)
step = workloads.step_of(OPTION, given)
maker = {**{"ours": contenders.ours}, **contenders.PROCESSES["torch"]}[NAME]
contender = maker(workloads.values(shapes), step)
contender.give(given)
for _ in range(3):
    contender.again(); contender.step()
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def peak():
    contender.again()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS"); contender.step()
    return max(0, status("VmHWM") - before)
found = {"resident": min(peak() for _ in range(3))}
contender.again()
tracemalloc.start(); contender.step(); found["allocated"] = tracemalloc.get_traced_memory()[1]
"""
MEASURED = ["ours", "NumPy", "torch fused", "torch foreach", "Keras on torch"]


def _in_new_process(code: str, **environment: str) -> Any:
    """The value of `found` after running a piece of code in a new process."""
    code += "\nimport json\nprint('FOUND' + json.dumps(found))"
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True,
        env=os.environ | {"KERAS_BACKEND": "torch"} | environment,
    ).stdout  # fmt: skip
    return json.loads(output.rpartition("FOUND")[2])


def _importing(times: int) -> dict[str, float]:
    found = [_in_new_process(IMPORT) for _ in range(times + 1)][1:]
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def _first_steps() -> dict[str, dict[str, float]]:
    """`build` compiles what all variants share, `apply` the default variant; with a cache both are loaded instead."""
    with tempfile.TemporaryDirectory() as folder:
        cold, *warm = [_in_new_process(FIRST_STEP, NUMBA_CACHE_DIR=folder) for _ in range(4)]
    return {"cold": cold, "warm": {key: statistics.median(each[key] for each in warm) for key in cold}}


def _compiling() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, float] = _in_new_process(f"VARIANTS = {VARIANTS!r}\n{COMPILE}", NUMBA_CACHE_DIR=folder)
    return found


def _memory(option: str, names: list[str]) -> dict[str, dict[str, int]]:
    return {name: _in_new_process(f"NAME, OPTION = {name!r}, {option!r}\n{MEMORY}") for name in names}


def measure(quick: bool) -> dict[str, Any]:
    """Seconds and bytes; the memory is what a step of ResNet-50 takes in addition."""
    found: dict[str, Any] = {"import": _importing(1 if quick else 5), "first step": _first_steps()}
    found["compile"] = {} if quick else _compiling()
    linux = sys.platform == "linux"
    for option in ("plain",) if quick else ("plain", "full"):
        found[f"memory {option}"] = _memory(option, MEASURED[: 1 if quick else None]) if linux else {}
    return found
