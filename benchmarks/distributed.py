"""What it costs several ranks to take a step together, beside one process that has all variables.

    mpiexec -n 2 python -m benchmarks.distributed

Every rank has an equal part of one array, and one thread. Then rank 0 has all of it and as many threads as there are
ranks, while the others sleep. It prints medians in microseconds: of a gather of one row, and of steps over 100 and over
32 million elements in all, plain and clipped. Then, of `Sharded` over the variables of a ResNet-50, beside an Allreduce
of each gradient and a step over all variables on every rank.

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.distributed

prints the same of `Sharded` on gloo, beside torch's `ZeroRedundancyOptimizer`, with gradients that are reduced already.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from adamw_numba import AdamW
from adamw_numba.distributed import Sharded
from adamw_numba.ranks.words import WORDS

from .workloads import WORKLOADS

LARGE = 32 * 2**20
ROUNDS = 9


def median(act: Callable[[], Any], times: int, barrier: Callable[[], Any] | None) -> float:
    """Microseconds."""
    found = []
    for _ in range(ROUNDS):
        if barrier is not None:
            barrier()
        start = time.perf_counter()
        for _ in range(times):
            act()
        found.append((time.perf_counter() - start) / times * 1e6)
    return statistics.median(found)


def side_by_side(acts: dict[str, Callable[[], Any]], barrier: Callable[[], Any]) -> dict[str, float]:
    """Medians in microseconds of what all ranks do together, up to when the last one has done it."""
    found: dict[str, list[float]] = {name: [] for name in acts}
    for k in range(ROUNDS + 2):
        for name, act in acts.items():
            barrier()
            start = time.perf_counter()
            act()
            barrier()
            if k > 1:
                found[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


def meet(comm: Any) -> None:
    """Wait for the other ranks without a busy loop, which would take one of their cores."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.02)


def step_of(size: int, comm: Any, threads: int, **options: Any) -> Callable[[], None]:
    """A step over one array."""
    gradient = np.random.default_rng(0).standard_normal(size, np.float32)
    optimizer = AdamW(threads=threads, **options)
    optimizer.build([np.ones(size, np.float32)], comm=comm)

    def step() -> None:
        optimizer.apply([gradient])

    for _ in range(3):
        step()
    return step


def resnet50(seed: int) -> tuple[list[Any], list[Any]]:
    """Its variables, and gradients."""
    generator, shapes = np.random.default_rng(seed), WORKLOADS["resnet50"]
    return [np.ones(s, np.float32) for s in shapes], [generator.standard_normal(s, np.float32) for s in shapes]


def under_mpi() -> dict[str, float]:
    """What is measured on MPI."""
    from mpi4py import MPI

    from adamw_numba.ranks.mpi import MpiRanks

    comm = MPI.COMM_WORLD
    rank, size = comm.rank, comm.size
    ranks, row = MpiRanks(comm), np.zeros(WORDS)
    found = {"gather of a row": median(lambda: ranks.gather(row), 1000, comm.Barrier)}
    for elements, times in ((100, 1000), (LARGE, 3)):
        for name, options in (("plain", {}), ("clip", {"global_clipnorm": 1.0})):
            together = step_of(elements // size, comm, 1, **options)
            found[f"{elements} {name}, {size} ranks of one thread"] = median(together, times, comm.Barrier)
            del together
            meet(comm)
            if rank == 0:
                for threads in (1, size):
                    alone = step_of(elements, None, threads, **options)
                    found[f"{elements} {name}, one process of {threads} threads"] = median(alone, times, None)
                    del alone
            meet(comm)
    variables, gradients = resnet50(rank)
    sharded, whole = Sharded(AdamW(threads=1), comm), AdamW(threads=1)
    sharded.build(variables)
    whole.build(resnet50(rank)[0])

    def reduce_and_step() -> None:
        for gradient in gradients:
            comm.Allreduce(MPI.IN_PLACE, gradient)
            gradient /= size
        whole.apply(gradients)

    acts = {"Sharded": lambda: sharded.apply(gradients), "Allreduce and a whole step": reduce_and_step}
    return found | {f"resnet50, {name}": took for name, took in side_by_side(acts, comm.Barrier).items()}


def under_torch() -> dict[str, float]:
    """What is measured on gloo."""
    import torch
    from torch import distributed
    from torch.distributed.optim import ZeroRedundancyOptimizer

    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    variables, gradients = ([torch.from_numpy(np.asarray(each)) for each in those] for those in resnet50(0))
    sharded = Sharded(AdamW.like_torch(threads=1), distributed.group.WORLD, gradients="reduced")
    sharded.build(variables)
    acts = {"Sharded": lambda: sharded.apply(gradients)}
    for name, views in (("with buckets", True), ("without", False)):
        given = [torch.nn.Parameter(v.clone()) for v in variables]
        for parameter, gradient in zip(given, gradients, strict=True):
            parameter.grad = gradient
        zero = ZeroRedundancyOptimizer(given, torch.optim.AdamW, parameters_as_bucket_view=views, fused=True)
        acts[f"ZeroRedundancyOptimizer {name}"] = zero.step
    found = side_by_side(acts, distributed.barrier)
    rank = distributed.get_rank()
    distributed.destroy_process_group()
    return found if rank == 0 else {}


def main() -> None:
    """Measure, and print on rank 0."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        found = under_torch()
    else:
        found = under_mpi()
        from mpi4py import MPI

        found = found if MPI.COMM_WORLD.rank == 0 else {}
    for name, time_of_one in found.items():
        print(f"{name:45s} {time_of_one:12,.1f} us")


if __name__ == "__main__":
    main()
