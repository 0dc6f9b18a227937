"""Saving 1 GB of state, compared with the same bytes in a plain file, `np.savez`, safetensors and `torch.save`.

    python -m benchmarks.saving [folder]

None of them waits for the disk (`durable=False`). The contenders take turns. The result is the speed of `.npz` as a
fraction of a plain file's speed, and the memory that the save took in addition, measured in its own process.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adamw_numba import AdamW

ROUNDS = 5
ARRAYS, ELEMENTS = 8, 1 << 24  # times two moments of four bytes: 1 GiB


def optimizer_of() -> AdamW:
    """An optimizer with 1 GiB of moments."""
    random = np.random.default_rng(0)
    optimizer = AdamW()
    optimizer.build([np.zeros(ELEMENTS, np.float32) for _ in range(ARRAYS)])
    for name, array in optimizer.state.items():
        if "/" in name:
            random.standard_normal(dtype=np.float32, out=array)
    return optimizer


def extra_memory(folder: str) -> None:
    """Print by how many MB a save raises the peak memory of this process."""
    optimizer = optimizer_of()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer.save(Path(folder) / "memory.npz", durable=False)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def contenders(optimizer: AdamW, folder: Path) -> dict[str, Callable[[], object]]:
    """The contenders, by name; those whose package is missing are left out."""
    state = {name.replace("/", "_"): array for name, array in optimizer.state.items()}

    def plain() -> None:
        with open(folder / "plain", "wb") as file:
            for array in state.values():
                file.write(array.tobytes() if array.ndim == 0 else memoryview(array).cast("B"))

    result: dict[str, Callable[[], object]] = {"plain file": plain}
    for suffix in (".npz", ".safetensors", ".h5", ".zarr"):
        target = folder / f"ours{suffix}"
        result[f"AdamW.save, {suffix}"] = lambda target=target: optimizer.save(target, durable=False)
    result["np.savez"] = lambda: np.savez(folder / "numpy.npz", **state)
    try:
        import safetensors.numpy

        result["safetensors"] = lambda: safetensors.numpy.save_file(state, folder / "s.safetensors")
    except ImportError:
        del result["AdamW.save, .safetensors"]
    try:
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        result["torch.save"] = lambda: torch.save(tensors, folder / "torch.pt")
    except ImportError:
        pass
    return result


def main() -> int:
    """Print medians; the exit status says whether `.npz` is fast enough and takes little enough memory."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        code = f"from benchmarks.saving import extra_memory; extra_memory({name!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        memory = float(done.stdout)
        calls = contenders(optimizer_of(), folder)
        times: dict[str, list[float]] = {key: [] for key in calls}
        for _ in range(ROUNDS):
            for key, call in calls.items():
                os.sync()
                start = time.perf_counter()
                call()
                times[key].append(time.perf_counter() - start)
    reference = statistics.median(times["plain file"])
    for key, seconds in times.items():
        median = statistics.median(seconds)
        print(
            f"{key:26s} {median:6.2f} s  {1.0737 / median:5.2f} GB/s  {reference / median:.2f} of a plain file's speed"
        )
    ratio = reference / statistics.median(times["AdamW.save, .npz"])
    print(f".npz: {ratio:.2f} of a plain file's speed (0.40 wanted), {memory:.0f} MB of extra memory (64 allowed)")
    return 0 if ratio >= 0.4 and memory < 64 else 1


if __name__ == "__main__":
    sys.exit(main())
