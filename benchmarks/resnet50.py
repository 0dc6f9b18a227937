"""One step over ResNet-50's 161 arrays (25.6 million float32 parameters), side by side with torch's fused AdamW.

    python -m benchmarks.resnet50

Both are timed in one process, in turn; the figure is the ratio of their medians, larger than 1 where ours is faster.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable

import numba
import numpy as np
import torch

from adamw_numba import AdamW

ROUNDS = 60


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The shapes of torchvision's resnet50, in its order."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for outputs, size in ((width, 1), (width, 3), (4 * width, 1)):
                shapes += [(outputs, inputs, size, size), (outputs,), (outputs,)]
                inputs = outputs
            if block == 0:
                first = 64 if width == 64 else 2 * width
                shapes += [(4 * width, first, 1, 1), (4 * width,), (4 * width,)]
    return [*shapes, (1000, 2048), (1000,)]


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the contenders taking turns.

    A turn is one call that is not timed and one that is: the threads of whoever came before still spin for a while, and
    neither shall pay for the other's.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> int:
    """Print medians, quartiles and the ratio; the exit status says whether ours is at least as fast."""
    random = np.random.default_rng(0)
    values = [random.standard_normal(shape, np.float32) for shape in resnet50_shapes()]
    gradients = [random.standard_normal(shape, np.float32) for shape in resnet50_shapes()]
    assert (len(values), sum(v.size for v in values)) == (161, 25_557_032)

    ours = AdamW(1e-3, weight_decay=0.01)
    ours.build([v.copy() for v in values])
    tensors = [torch.nn.Parameter(torch.tensor(v)) for v in values]
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = torch.tensor(gradient)
    theirs = torch.optim.AdamW(tensors, lr=1e-3, weight_decay=0.01, fused=True)

    times = interleaved({"adamw_numba": lambda: ours.apply(gradients), "torch fused": theirs.step}, ROUNDS)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads of torch,", end=" ")
    print(
        f"{numba.config.NUMBA_NUM_THREADS} of Numba; Python {platform.python_version()}, NumPy {np.__version__},",
        end=" ",
    )
    print(f"Numba {numba.__version__}, torch {torch.__version__}")
    for name, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        print(f"{name:12s} median {1e3 * median:7.2f} ms   quartiles {1e3 * low:.2f} to {1e3 * high:.2f} ms")
    ratio = statistics.median(times["torch fused"]) / statistics.median(times["adamw_numba"])
    print(f"torch fused takes {ratio:.3f} times as long as adamw_numba")
    return 0 if ratio >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
