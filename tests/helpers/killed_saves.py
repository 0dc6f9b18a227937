"""Saves of several ranks in each of which one is killed: what is there afterwards.

    python killed_saves.py FOLDER

A process of its own, without other libraries' threads, forks the ranks. It prints one line of JSON: for each phase and
rank what the ranks' exit codes were, and what could be loaded.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from helpers.forked_ranks import die, on_forks

from adamw_numba import AdamW, saved_variables
from adamw_numba.saving import archive, folders
from adamw_numba.saving.stores import atomic

SIZE = 3


def before_its_file():
    folders.archive.write = lambda *arguments: die()


def in_its_file():
    rename = os.replace
    atomic.os.replace = lambda old, new: die() if "rank-" in str(new) else rename(old, new)


def after_its_file():
    write = archive.write

    def and_die(*arguments):
        write(*arguments)
        die()

    folders.archive.write = and_die


def before_the_index():
    folders.replacing = lambda *arguments: die()


def in_the_index():
    rename = os.replace
    atomic.os.replace = lambda old, new: die() if "index" in str(new) else rename(old, new)


def after_the_index():
    replacing = folders.replacing

    @contextlib.contextmanager
    def and_die(path, durable):
        with replacing(path, durable) as temporary:
            yield temporary
        die()

    folders.replacing = and_die


def when_tidying():
    folders.remove = lambda path: die()


# In the last four it is rank 0, which writes the index.
PHASES = [before_its_file, in_its_file, after_its_file, before_the_index, in_the_index, after_the_index, when_tidying]
CASES = [(phase.__name__, victim) for k, phase in enumerate(PHASES) for victim in range(SIZE if k < 3 else 1)]


def save(ranks, folder, steps, phase=None, victim=None):
    variables = {"w": np.linspace(0, 1, 5 + ranks.rank), "own": np.ones(3)}
    optimizer = AdamW(0.1)
    optimizer.build(variables, comm=ranks, replicated=["^own$"])
    for _ in range(steps):
        optimizer.apply({"w": np.ones(5 + ranks.rank), "own": np.ones(3)})
    if ranks.rank == victim:
        phase()
    optimizer.save(folder, variables=True)


def again(ranks, folder):
    """Other ranks go on with what there is, and save in the same folder."""
    cut = [slice(0, 9), slice(9, 18)][ranks.rank]
    variables = {"w": np.zeros(18)[cut], "own": np.zeros(3)}
    optimizer = AdamW.load(folder, variables, comm=ranks, replicated=["^own$"])
    optimizer.apply({"w": np.ones(9), "own": np.ones(3)})
    optimizer.save(folder, variables=True)


def loaded(folder):
    found = saved_variables(folder)
    optimizer = AdamW.load(folder, {name: np.zeros_like(array) for name, array in found.items()})
    return {"iterations": optimizer.iterations, "w": found["w"].tolist(), "own": found["own"].tolist()}


def outcome(folder, phase, victim):
    found = {"calm": on_forks(SIZE, lambda ranks: save(ranks, folder, 2)), "before": loaded(folder)}
    found["codes"] = on_forks(SIZE, lambda ranks: save(ranks, folder, 3, phase, victim))
    found["after"] = loaded(folder)
    found["again"] = on_forks(2, lambda ranks: again(ranks, folder))
    found["names"] = sorted(path.name[:10] for path in folder.iterdir())
    return found


def main(place):
    by_name = {phase.__name__: phase for phase in PHASES}
    found = {f"{name}-{k}": outcome(Path(place, f"{name}-{k}"), by_name[name], k) for name, k in CASES}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
