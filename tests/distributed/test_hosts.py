"""How many threads a rank uses."""

import os

import numpy as np
import pytest
from helpers.thread_ranks import on_ranks

from adamw_numba import AdamW
from adamw_numba.ranks.hosts import threads_of

ALL = list(range(8))
PLACES = {
    "alone": ([["a", ALL]], [None]),
    "two on a host": ([["a", ALL], ["a", ALL]], [4, 4]),
    "three on a host": ([["a", ALL]] * 3, [2, 2, 2]),
    "more than cores": ([["a", [0, 1]]] * 5, [1] * 5),
    "bound to cores": ([["a", [0, 1]], ["a", [2, 3]]], [None, None]),
    "bound in pairs": ([["a", [0, 1]], ["a", [0, 1]], ["a", [2, 3]]], [1, 1, None]),
    "two hosts": ([["a", ALL], ["b", ALL], ["b", ALL]], [None, 4, 4]),
}


@pytest.mark.parametrize("case", PLACES)
def test_cores_are_divided(case, monkeypatch):
    places, expected = PLACES[case]
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    assert [threads_of(rank, places) for rank in range(len(places))] == expected
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    assert [threads_of(rank, places) for rank in range(len(places))] == [None] * len(places)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not say")
def test_a_step_uses_its_part(monkeypatch):
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))

    def work(ranks):
        own, asked = AdamW(), AdamW(threads=5)
        for optimizer in (own, asked):
            optimizer.build([np.ones(2)], comm=ranks)
            optimizer.apply([np.ones(2)])
        return (
            own.engine.recipes.at(1, 0.1, 0.0, ()).threads,
            asked.engine.recipes.at(1, 0.1, 0.0, ()).threads,
            own.threads,
        )

    assert on_ranks(3, work) == [(2, 5, None)] * 3
    alone = AdamW()
    alone.build([np.ones(2)])
    alone.apply([np.ones(2)])
    assert alone.engine.recipes.at(1, 0.1, 0.0, ()).threads is None
