"""The cost of our plain step: bytes over bandwidth, plus constants for the step, each array and the helpers."""

from typing import Any

import numpy as np

from .workloads import WORKLOADS, elements

BYTES = 28  # per float32 parameter, read and written by the plain step
PARALLEL_FROM = 2**15  # elements, from which helpers join in
SHARED_FROM = 2**18 + 1  # elements: four such arrays no longer fit the caches of two cores (4 MiB)
MEMORY_FROM = 2**23  # elements: four such arrays no longer fit any cache (128 MiB)
NEAR = 256  # arrays whose headers stay in the nearest cache
TERMS = ("step", "array", "array beyond 256", "helpers")
BANDWIDTHS = ("cache, one thread", "caches of all threads", "shared cache", "memory")


def _terms(arrays: int, count: int) -> list[float]:
    """The factor of each constant in `TERMS`, and of the inverse of each of the `BANDWIDTHS`."""
    parallel = count >= PARALLEL_FROM
    tier = sum(count >= start for start in (PARALLEL_FROM, SHARED_FROM, MEMORY_FROM))
    return [1, arrays, max(arrays - NEAR, 0), parallel, *(BYTES * count * (tier == k) for k in range(4))]


def _fitted(points: list[tuple[int, int, float]]) -> np.ndarray[Any, Any]:
    """The constants with the smallest relative errors, none of them negative."""
    seconds = np.array([time for _, _, time in points])
    terms = np.array([_terms(arrays, count) for arrays, count, _ in points]) / seconds[:, None]
    scale = np.abs(terms).max(0)
    scale[scale == 0] = 1
    free = np.ones(terms.shape[1], bool)
    while True:
        constants = np.zeros(terms.shape[1])
        constants[free] = np.linalg.lstsq(terms[:, free] / scale[free], np.ones(len(points)), rcond=None)[0]
        if (constants >= 0).all():
            return constants / scale
        free &= constants >= 0


def fit(sweep: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The constants, fitted to the sweep alone, and their predictions for the workloads, which were not fitted."""
    times: dict[tuple[int, int], list[float]] = {}
    for row in sweep:
        arrays, size = row["sweep"]
        times.setdefault((arrays, arrays * size), []).append(row["ours"])
    constants = _fitted([(*key, float(np.median(value))) for key, value in times.items()])
    found: dict[str, Any] = {"seconds": dict(zip(TERMS, constants[: len(TERMS)].tolist(), strict=True))}
    rest = constants[len(TERMS) :]
    found["bytes per second"] = {name: 1 / c if c else None for name, c in zip(BANDWIDTHS, rest, strict=True)}
    measured: dict[str, list[float]] = {}
    for row in rows:
        if (row["option"], row["gradients"]) == ("plain", "same"):
            measured.setdefault(row["workload"], []).append(row["ours"])
    seen = np.any([_terms(*key) for key in times], 0)  # a quick run has no array that is too large for the caches
    found["workloads"] = {
        name: {
            "measured": float(np.median(seconds)),
            "predicted": float(np.dot(_terms(len(WORKLOADS[name]), elements(WORKLOADS[name])), constants)),
        }
        for name, seconds in measured.items()
        if seen[np.nonzero(_terms(len(WORKLOADS[name]), elements(WORKLOADS[name])))].all()
    }
    return found
