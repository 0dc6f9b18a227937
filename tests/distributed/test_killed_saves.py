"""A rank is killed in each phase of a save: what was saved before counts, or all of the new, and nothing in between."""

import contextlib
import os
import signal

import numpy as np
import pytest
from helpers.forked_ranks import die, on_forks

from adamw_numba import AdamW, saved_variables
from adamw_numba.saving import archive, folders
from adamw_numba.saving.stores import atomic

SIZE = 3


def run(ranks, steps):
    variables = {"w": np.linspace(0, 1, 5 + ranks.rank), "own": np.ones(3)}
    optimizer = AdamW(0.1)
    optimizer.build(variables, comm=ranks, replicated=["^own$"])
    for _ in range(steps):
        optimizer.apply({"w": np.ones(5 + ranks.rank), "own": np.ones(3)})
    return optimizer


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


CASES = [(phase, victim) for k, phase in enumerate(PHASES) for victim in range(SIZE if k < 3 else 1)]


@pytest.mark.parametrize(("phase", "victim"), CASES, ids=[f"{phase.__name__}-{victim}" for phase, victim in CASES])
def test_a_rank_that_is_killed(phase, victim, tmp_path):
    folder = tmp_path / "state"

    def save(ranks, steps=2, dies=False):
        optimizer = run(ranks, steps)
        if dies and ranks.rank == victim:
            phase()
        optimizer.save(folder, variables=True)

    assert on_forks(SIZE, save) == [0] * SIZE
    before = saved_variables(folder)
    codes = on_forks(SIZE, lambda ranks: save(ranks, 3, dies=True))
    assert codes[victim] == -signal.SIGKILL
    # Where rank 0 tidies, the others have gone already, and well.
    assert all(code == (0 if phase is when_tidying else 3) for k, code in enumerate(codes) if k != victim)
    is_new = PHASES.index(phase) >= 5
    loaded = AdamW.load(folder, {name: np.zeros_like(array) for name, array in before.items()})
    assert loaded.iterations == (3 if is_new else 2)
    if not is_new:
        for name, array in saved_variables(folder).items():
            np.testing.assert_array_equal(array, before[name])
    assert on_forks(2, lambda ranks: again(ranks, folder)) == [0, 0]
    assert sorted(path.name[:10] for path in folder.iterdir()) == ["index.json", "rank-00000", "rank-00001"]


def again(ranks, folder):
    """Other ranks go on with what there is, and save in the same folder."""
    cut = [slice(0, 9), slice(9, 18)][ranks.rank]
    variables = {"w": np.zeros(18)[cut], "own": np.zeros(3)}
    optimizer = AdamW.load(folder, variables, comm=ranks, replicated=["^own$"])
    optimizer.apply({"w": np.ones(9), "own": np.ones(3)})
    optimizer.save(folder, variables=True)
