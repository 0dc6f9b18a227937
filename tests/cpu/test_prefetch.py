"""The way in which large steps ask for elements: chosen by the first of them, without a change of any bit."""

import json
from itertools import starmap
from operator import call

import numpy as np
import pytest

from adamw_numba import AdamW
from adamw_numba.cpu import plan, prefetch
from adamw_numba.cpu.prefetch import ROUNDS, USUAL, WAYS, Trial, Way, way_of
from adamw_numba.step.commit import exhaust


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(prefetch, "_found", {})
    monkeypatch.setattr(prefetch, "_read", set())


def tried(monkeypatch, trial, seconds):
    """The way that a trial ends with, where a step takes so many seconds in each way; in the first round ten more."""
    clock, done = [0.0], []
    monkeypatch.setattr(prefetch, "perf_counter", lambda: clock[0])

    def step(way):
        clock[0] += seconds[way] + 10.0 * (len(done) < len(WAYS))
        done.append(way)

    way, is_known = trial.next()
    while not is_known:
        exhaust(starmap(call, trial.timed([(step, way)])))
        way, is_known = trial.next()
    assert done == list(WAYS) * ROUNDS
    return way


@pytest.mark.parametrize("best", WAYS)
def test_the_fastest_way_is_taken(best, monkeypatch):
    seconds = dict.fromkeys(WAYS, 1.0) | {best: 0.5}
    assert tried(monkeypatch, Trial("a kind", None), seconds) == best


def test_a_way_that_is_hardly_faster_is_not(monkeypatch):
    seconds = dict.fromkeys(WAYS, 0.96) | {USUAL: 1.0}
    assert tried(monkeypatch, Trial("a kind", None), seconds) == USUAL


def test_a_way_that_is_slow_is_tried_once(monkeypatch):
    slow = WAYS[3]
    trial, done = Trial("a kind", None), []
    clock = [0.0]
    monkeypatch.setattr(prefetch, "perf_counter", lambda: clock[0])
    way, is_known = trial.next()
    while not is_known:
        done.append(way)
        before, after = trial.timed([])
        exhaust(starmap(call, [before]))
        clock[0] += 2.0 if way in (slow, USUAL) else 1.0
        exhaust(starmap(call, [after]))
        way, is_known = trial.next()
    assert (done.count(slow), done.count(USUAL), done.count(WAYS[1])) == (1, ROUNDS, ROUNDS)
    assert way not in (slow, USUAL)


def test_what_was_found_is_kept_for_the_next_process(monkeypatch, tmp_path):
    trial = way_of("a kind", tmp_path)
    assert tried(monkeypatch, trial, dict.fromkeys(WAYS, 1.0) | {WAYS[2]: 0.5}) == WAYS[2]
    assert way_of("a kind", tmp_path) == WAYS[2]
    monkeypatch.setattr(prefetch, "_found", {})
    monkeypatch.setattr(prefetch, "_read", set())
    assert way_of("a kind", tmp_path) == WAYS[2]
    other = way_of("another kind", tmp_path)
    assert isinstance(other, Trial)
    assert tried(monkeypatch, other, dict.fromkeys(WAYS, 1.0)) == USUAL
    assert list(json.loads((tmp_path / prefetch.FILE).read_text()).values()) == [list(WAYS[2]), list(USUAL)]
    assert [found.name for found in tmp_path.iterdir()] == [prefetch.FILE]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": 3}', '{"a": [1]}', '{"a": [-1, 10]}', "\x00"])
def test_a_file_that_holds_something_else(text, tmp_path):
    (tmp_path / prefetch.FILE).write_text(text)
    assert isinstance(way_of("a kind", tmp_path), Trial)


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    trial = way_of("a kind", tmp_path / "nowhere")
    assert tried(monkeypatch, trial, dict.fromkeys(WAYS, 1.0)) == USUAL


@pytest.mark.parametrize("options", [{}, {"global_clipnorm": 0.5, "use_ema": True}], ids=str)
def test_every_way_gives_the_same_bits(options, monkeypatch):
    steps = ROUNDS * len(WAYS) + 2
    expected = _stepped(options, steps)
    monkeypatch.setattr(plan, "FAR", 1)
    monkeypatch.setattr(plan, "cache_folder", lambda: None)
    found = _stepped(options, steps)
    np.testing.assert_array_equal(found, expected)
    ways = list(prefetch._found.values())
    assert len(ways) == 1
    assert isinstance(ways[0], Way)


def _stepped(options, steps):
    generator = np.random.default_rng(0)
    variables = [np.ones(5000, np.float32), np.ones((7, 11), np.float32), np.ones((64, 64), np.float32).T]
    optimizer = AdamW(**options)
    optimizer.build(variables)
    for _ in range(steps):
        optimizer.apply([generator.standard_normal(v.shape, np.float32) for v in variables])
    return np.concatenate([np.ravel(v) for v in variables])
