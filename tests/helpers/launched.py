"""One rank of a real launch: steps with a clip over a cut set of variables, minimizations, and errors on one rank.

    python launched.py mpi FOLDER                  under mpiexec
    python launched.py torch FOLDER RANK SIZE

It prints one line of JSON: what its variables have become, what it has found, and what it was told when another rank
failed.
"""

import json
import math
import os
import signal
import sys

import numpy as np

from adamw_numba import AdamW, minimize
from adamw_numba.distributed import Sharded
from adamw_numba.ranks.engines import ranks_of

SIZES = (1000, 3, 1, 50)
STEPS = 4
UNKNOWNS = 11
ITERATIONS = 60


def communicator(arguments):
    if arguments[0] == "mpi":
        from mpi4py import MPI

        return MPI.COMM_WORLD, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    from torch import distributed

    rank, size = int(arguments[2]), int(arguments[3])
    distributed.init_process_group("gloo", init_method=f"file://{arguments[1]}/meeting", rank=rank, world_size=size)
    return distributed.group.WORLD, rank, size


def variables():
    return {f"w{k}": np.linspace(-1, 1, size, dtype=np.float32) for k, size in enumerate(SIZES)}


def gradients(step, rank=0):
    generator = np.random.default_rng(100 * step + rank)
    return {f"w{k}": generator.standard_normal(size).astype(np.float32) for k, size in enumerate(SIZES)}


def of_rank(tree, rank, size):
    return {name: array for k, (name, array) in enumerate(tree.items()) if k % size == rank}


def mean_gradients(step, size):
    """Added in the order of the ranks."""
    each = [gradients(step, rank) for rank in range(size)]
    found = {name: each[0][name].copy() for name in each[0]}
    for other in each[1:]:
        for name, array in found.items():
            array += other[name]
    return {name: array / np.float32(size) for name, array in found.items()}


def sharded(comm, rank, folder):
    """What the variables have become that all ranks have, some steps before and some after a save and a load."""
    own = variables()
    optimizer = Sharded(AdamW(0.1, global_clipnorm=0.5), comm, bucket_bytes=1024)
    optimizer.build(own)
    for step in range(STEPS):
        optimizer.apply(gradients(step, rank))
    optimizer.save(f"{folder}/state", variables=True)
    again = Sharded(AdamW.load(f"{folder}/state"), comm)
    own = {name: np.zeros_like(array) for name, array in own.items()}
    again.build(own)
    for step in range(STEPS, 2 * STEPS):
        again.apply(gradients(step, rank))
    again.verify()
    return {name: array.tolist() for name, array in own.items()}


class Alone:
    rank, size = 0, 1

    def gather(self, row):
        return row[None]


def chain(ranks):
    """Where a rank starts, and Rosenbrock's function of all ranks' unknowns."""
    own = np.array_split(np.arange(UNKNOWNS), ranks.size)[ranks.rank]

    def fun(x):
        row = np.zeros(UNKNOWNS)
        row[own] = x
        y = ranks.gather(row).sum(axis=0)
        a, b = y[1:] - y[:-1] ** 2, 1 - y[:-1]
        gradient = np.zeros(UNKNOWNS)
        gradient[:-1] = -40 * a * y[:-1] - 2 * b
        gradient[1:] += 20 * a
        return math.fsum(10 * a**2 + b**2), gradient[own].astype(x.dtype)

    return np.full(len(own), -0.5, np.float32), fun


def minimized(comm):
    """Of this rank: where it has come, and how."""
    x0, fun = chain(ranks_of(comm))
    found = minimize(fun, x0, jac=True, maxiter=ITERATIONS, comm=comm, value="same")
    return {"x": found.x.tolist(), "fun": found.fun, "nit": found.nit, "message": found.message}


def told_of(comm, fails):
    """What a rank raises where a function fails on one after some evaluations."""
    calls = iter(range(100))

    def fun(x):
        if next(calls) == 5:
            fails()
        return float((x**2).sum()), 2 * x

    try:
        minimize(fun, np.ones(2), jac=True, comm=comm)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def fails(at_fault, how):
    return how if at_fault else lambda: None


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
    at_fault = rank == size - 1
    report = {
        "rank": rank,
        "values": {name: array.tolist() for name, array in own.items()},
        "told": told,
        "sharded": sharded(comm, rank, arguments[1]),
        "minimized": minimized(comm),
        "error": told_of(comm, fails(at_fault, lambda: 1 / 0)),
        "interrupt": told_of(comm, fails(at_fault, lambda: os.kill(os.getpid(), signal.SIGINT))),
        "again": minimized(comm),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
