"""Other threads, signals and the user's own functions, in the middle of a step."""

import copy
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers.training import built

from adamw_numba import AdamW, LossScaleOptimizer


def test_the_list_of_gradients_changes_while_a_step_runs():
    variable = np.zeros(3_000_000, np.float32)
    optimizer = built([variable], threads=1, global_clipnorm=1.0)
    given = [np.ones(3_000_000, np.float32)]
    optimizer.apply(given)

    def clear_once_begun(before):
        while variable[0] == before:
            time.sleep(0)
        given.clear()

    for _ in range(20):
        thread = threading.Thread(target=clear_once_begun, args=(variable[0].item(),))
        thread.start()
        optimizer.apply(given)
        thread.join()
        given.append(np.ones(3_000_000, np.float32))
    assert optimizer.iterations == 21


FIRST_STEP = """
import os, signal, threading, numpy as np
from adamw_numba import AdamW
n = 3_000_000
a, b = np.zeros(10, np.float32), np.zeros(n)
optimizer = AdamW(0.1, weight_decay=0.0)
optimizer.build([a, b])
def watch():
    while a[0] == 0:
        pass
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=watch, daemon=True).start()
try:
    optimizer.apply([np.ones(10, np.float32), np.ones(n)])
    while True:
        pass
except KeyboardInterrupt:
    pass
print(optimizer.iterations, int(np.count_nonzero(a)), int(np.count_nonzero(b)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_an_interrupt_in_the_first_step_of_a_process(cache, tmp_path):
    """Nothing is compiled, or loaded, between the first array and the last."""
    environment = os.environ | ({"NUMBA_CACHE_DIR": str(tmp_path)} if cache == "cold" else {})
    for _ in range(1 if cache == "cold" else 4):
        done = subprocess.run([sys.executable, "-c", FIRST_STEP], capture_output=True, text=True, env=environment)
        assert done.stdout.split() in (["0", "0", "0"], ["1", "10", "3000000"]), done.stdout + done.stderr


def test_a_rate_that_steps():
    variable = np.ones(3)
    optimizer = AdamW(
        lambda step: optimizer.apply([np.ones(3)]) or 0.1 if step == 1 and optimizer.iterations == 1 else 0.1
    )
    optimizer.build([variable])
    optimizer.apply([np.ones(3)])
    with pytest.raises((RuntimeError, RecursionError)):
        optimizer.apply([np.ones(3)])


def test_copies_and_saves_while_another_thread_steps():
    size = 300_000
    for wrap in (lambda o: o, LossScaleOptimizer):
        optimizer = wrap(AdamW(1.0, weight_decay=0.0, beta_1=0.0, beta_2=0.0, epsilon=1e-30))
        variables = [np.zeros(size), np.zeros(size)]
        optimizer.build(variables)
        stop = threading.Event()

        def go(optimizer=optimizer, stop=stop):
            while not stop.is_set():
                optimizer.apply([np.full(size, float(optimizer.iterations + 1))] * 2)

        thread = threading.Thread(target=go)
        thread.start()
        for _ in range(5):
            copied = copy.deepcopy(optimizer)
            store = {}
            optimizer.save_own_variables(store)
            moments = [array for array in store.values() if array.shape == (size,)][::2]
            assert all((m == m[0]).all() and m[0] == moments[0][0] for m in moments)
            inner = getattr(copied, "inner_optimizer", copied)
            assert all((v == -inner.iterations).all() for v in inner.trainable_variables)
        stop.set()
        thread.join()
