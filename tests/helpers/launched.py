"""One rank of a real launch: steps with a clip over a cut set of variables, and an error on one rank.

    python launched.py mpi                  under mpiexec
    python launched.py torch RANK SIZE FILE

It prints one line of JSON: what its variables have become, and what it was told when another rank failed.
"""

import json
import sys

import numpy as np

from adamw_numba import AdamW

SIZES = (1000, 3, 1, 50)
STEPS = 4


def communicator(arguments):
    if arguments[0] == "mpi":
        from mpi4py import MPI

        return MPI.COMM_WORLD, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    from torch import distributed

    rank, size = int(arguments[1]), int(arguments[2])
    distributed.init_process_group("gloo", init_method=f"file://{arguments[3]}", rank=rank, world_size=size)
    return distributed.group.WORLD, rank, size


def variables():
    return {f"w{k}": np.linspace(-1, 1, size, dtype=np.float32) for k, size in enumerate(SIZES)}


def gradients(step):
    generator = np.random.default_rng(step)
    return {f"w{k}": generator.standard_normal(size).astype(np.float32) for k, size in enumerate(SIZES)}


def of_rank(tree, rank, size):
    return {name: array for k, (name, array) in enumerate(tree.items()) if k % size == rank}


def main(arguments):
    comm, rank, size = communicator(arguments)
    own = of_rank(variables(), rank, size)
    optimizer = AdamW(0.1, global_clipnorm=0.5)
    optimizer.build(own, comm=comm)
    for step in range(STEPS):
        optimizer.apply(of_rank(gradients(step), rank, size))
    try:
        optimizer.apply(3 if rank == size - 1 else of_rank(gradients(0), rank, size))
        told = ""
    except (RuntimeError, TypeError) as error:
        told = f"{type(error).__name__}: {error}"
    print(json.dumps({"rank": rank, "values": {name: array.tolist() for name, array in own.items()}, "told": told}))


if __name__ == "__main__":
    main(sys.argv[1:])
