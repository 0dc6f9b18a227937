"""An exception at any line of ours leaves the optimizer before the step or after it, and fit to go on."""

import os
import signal
import sys
import threading

import numpy as np
import pytest
from helpers import libraries, plain_library
from helpers.interrupts import HOME, Injector, interrupted
from helpers.libraries import torch
from helpers.remembered import Remembered

from adamw_numba import AdamW, LossScaleOptimizer
from adamw_numba.step import commit, engine


def variables(elsewhere=True):
    arrays = [
        np.ones((4, 3), np.float32),
        np.ones(5, np.float64),
        np.ones(5, np.float16),
        torch.nn.Parameter(torch.ones(3, 2)),
        plain_library.ones((4,)),
        plain_library.ones((2, 2), dtype=plain_library.float32),
    ]
    return arrays if elsewhere else arrays[:4]


def gradients(k, elsewhere=True):
    random = np.random.default_rng(k)
    made = [random.normal(size=tuple(v.shape)) for v in variables()]
    makers = [libraries.numpy] * 3 + [libraries.to_torch] + [libraries.plain] * 2
    kinds = ["float32", "float64", "float16", "float32", "float64", "float32"]
    return [make(g, kind) for make, g, kind in zip(makers, made, kinds, strict=True)][: 6 if elsewhere else 4]


OPTIONS = {
    "plain": {},
    "everything": {
        "amsgrad": True, "use_ema": True, "ema_overwrite_frequency": 2, "global_clipnorm": 1.0, "nonfinite": "skip",
        "weight_decay": lambda step: 0.01 * step,
    },
    "micro-step": {"gradient_accumulation_steps": 4},
    "last micro-step": {"gradient_accumulation_steps": 3},
}  # fmt: skip


def build(options, wrap, elsewhere=True):
    optimizer = LossScaleOptimizer(AdamW(**options), dynamic_growth_steps=1) if wrap else AdamW(**options)
    arrays = variables(elsewhere)
    optimizer.build(arrays)
    for k in range(2):
        optimizer.apply(gradients(k, elsewhere))
    return arrays, optimizer


def snapshot(arrays, optimizer):
    return [libraries.look(a).tobytes() for a in [*arrays, *optimizer.variables]], optimizer.last_step


# What the step does, whether with a loss scale, with arrays that have no kernels, and at every opcode
CASES = [
    *[(name, False, True, False) for name in OPTIONS],
    ("everything", True, True, False),
    ("everything", False, True, True),
    ("plain", False, False, False),
    ("everything", True, False, True),
]
MARKED = [pytest.param(*case, marks=pytest.mark.slow) if case[2] else case for case in CASES]


@pytest.mark.parametrize(("name", "wrap", "elsewhere", "opcodes"), MARKED)
def test_at_every_line(name, wrap, elsewhere, opcodes):
    """Or, where the commit is, at every opcode."""
    arrays, optimizer = build(OPTIONS[name], wrap, elsewhere)
    start, before = Remembered(arrays, optimizer), snapshot(arrays, optimizer)
    optimizer.apply(gradients(2, elsewhere))
    after = snapshot(arrays, optimizer)
    optimizer.apply(gradients(3, elsewhere))
    end = snapshot(arrays, optimizer)
    where = (engine.__file__, commit.__file__) if opcodes else HOME

    seen, n = set(), 0
    while True:
        n += 1
        start.put_back()
        line = interrupted(optimizer, gradients(2, elsewhere), Injector(n, where, opcodes))
        if line is None:
            break
        found = snapshot(arrays, optimizer)
        assert found in (before, after), f"torn by an interrupt at {line}"
        seen.add(found == after)
        if found == before:
            optimizer.apply(gradients(2, elsewhere))
        optimizer.apply(gradients(3, elsewhere))
        assert snapshot(arrays, optimizer) == end, f"the next step differs after an interrupt at {line}"
    assert seen == {False, True}
    assert n > (40 if (name, elsewhere) == ("plain", False) else 100)  # a step like the last one has few lines


@pytest.mark.parametrize(("name", "wrap", "elsewhere"), dict.fromkeys(case[:3] for case in CASES))
def test_what_is_put_back_is_like_new(name, wrap, elsewhere):
    """Line by line; so that the test above may begin each time with the same optimizer."""

    def lines_of(optimizer):
        injector = Injector(-1)
        interrupted(optimizer, gradients(2, elsewhere), injector)
        return injector.lines

    lines_of(build(OPTIONS[name], wrap, elsewhere)[1])  # the first of its kind looks for kernels
    arrays, optimizer = build(OPTIONS[name], wrap, elsewhere)
    start = Remembered(arrays, optimizer)
    expected = lines_of(optimizer)
    after = snapshot(arrays, optimizer)
    for n in range(1, len(expected), 1 + len(expected) // 20):
        start.put_back()
        interrupted(optimizer, gradients(2, elsewhere), Injector(n))
        start.put_back()
        assert lines_of(optimizer) == expected
        assert snapshot(arrays, optimizer) == after
    arrays, optimizer = build(OPTIONS[name], wrap, elsewhere)
    assert lines_of(optimizer) == expected
    assert snapshot(arrays, optimizer) == after


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_signals_during_long_steps():
    """A real SIGINT, at times that nobody chose, in the middle of compiled code."""
    sizes = [400_000, 300_000]
    arrays = [np.zeros(sizes[0], np.float32), np.zeros(sizes[1], np.float64)]
    optimizer = AdamW(1.0, weight_decay=0.0, beta_1=0.0, beta_2=0.0, epsilon=1e-30)
    optimizer.build(arrays)
    given = [np.ones(sizes[0], np.float32), np.ones(sizes[1])]
    optimizer.apply(given)
    random, interrupts = np.random.default_rng(0), 0
    for _ in range(60):
        timer = threading.Timer(random.uniform(0, 0.002), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            for _ in range(20):
                optimizer.apply(given)
            timer.join()
            signal.pthread_sigmask(signal.SIG_BLOCK, [])
        except KeyboardInterrupt:
            interrupts += 1
        timer.join()
        steps = int(optimizer.variables[0])
        for array in arrays:
            assert (array == -steps).all()
    assert interrupts > 10


def test_averages_are_not_left_in_the_variables():
    """At whatever line the end of the block is interrupted: they are what they were, or every step says why not."""
    restored, refused, n = 0, 0, 0
    while True:
        n += 1
        arrays = variables()
        optimizer = AdamW(0.1, use_ema=True)
        optimizer.build(arrays)
        for k in range(2):
            optimizer.apply(gradients(k))
        before = [np.array(libraries.look(array)) for array in arrays]
        block, injector, old = optimizer.averaged(), Injector(n), sys.gettrace()
        block.__enter__()
        sys.settrace(injector)
        try:
            block.__exit__(None, None, None)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(old)
        now = [np.array(libraries.look(array)) for array in arrays]
        if all(map(np.array_equal, now, before)):
            restored += 1
            optimizer.apply(gradients(2))
        else:
            refused += 1
            with pytest.raises(RuntimeError, match="averages"):
                optimizer.apply(gradients(2))
        if injector.line is None:
            break
    assert n > 50
    assert restored > 10 * refused
