"""Threads, forks, threading layers and folders that cannot be written."""

import concurrent.futures
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adamw_numba import AdamW
from adamw_numba.cpu.pool import WOKEN_FROM

SIZE = 2 * WOKEN_FROM


def work(seed=0, steps=5):
    random = np.random.default_rng(seed)
    variable, gradient = random.standard_normal((2, SIZE), np.float32)
    optimizer = AdamW(0.01, global_clipnorm=1.0)
    optimizer.build([variable])
    for _ in range(steps):
        optimizer.apply([gradient])
        gradient = np.roll(gradient, 1)
    return variable.tobytes()


def test_many_optimizers_in_many_threads():
    expected = [work(seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == expected


def test_one_optimizer_in_many_threads():
    """Steps follow each other; each is whole."""
    variable = np.zeros(SIZE, np.float32)
    optimizer = AdamW(0.01, weight_decay=0.0)
    optimizer.build([variable])
    ones = np.ones(SIZE, np.float32)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: optimizer.apply([ones]), range(40)))
    assert optimizer.iterations == 40
    expected = np.zeros(SIZE, np.float32)
    alone = AdamW(0.01, weight_decay=0.0)
    alone.build([expected])
    for _ in range(40):
        alone.apply([ones])
    np.testing.assert_array_equal(variable, expected)


FORK = """
import multiprocessing, os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
import numpy as np
from adamw_numba import AdamW
from test_forks_and_layers import work
expected = work()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(work, [0, 0, 0]).get(timeout=200) == [expected] * 3

# A fork while another thread is in the middle of a step: the child's optimizer is not locked for ever.
variable = np.zeros(20_000_000, np.float32)
optimizer = AdamW(threads=1)
optimizer.build([variable])
optimizer.apply([variable + 1])
gradient, forked = variable * 0 + 1, threading.Event()

def take_steps():
    while not forked.is_set():
        optimizer.apply([gradient])

thread = threading.Thread(target=take_steps)
thread.start()
while optimizer.iterations < 3:
    time.sleep(0.001)
child = os.fork()
if child == 0:
    signal.alarm(200)
    optimizer.apply([gradient])
    os._exit(7)
forked.set()
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print("survived")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_use_and_in_the_middle():
    code = FORK.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert done.stdout.strip() == "survived", done.stderr[-2000:]


LAYER = """
import hashlib, sys, threading
sys.path.insert(0, {tests!r})
import numba, numpy as np
from test_forks_and_layers import work

@numba.njit(parallel=True)
def parallel(a):
    for i in numba.prange(a.size):
        a[i] += 1

parallel(np.zeros(10))
assert numba.threading_layer() == {layer!r}, numba.threading_layer()
results = []
threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(4)]
[t.start() for t in threads]
[parallel(np.zeros(1000)) for _ in range(100)]
[t.join() for t in threads]
assert results == [work()] * 4
print("survived", hashlib.sha256(results[0]).hexdigest() == {expected!r})
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])
def test_beside_each_threading_layer_of_numba(layer):
    """The kernels use none of them, and so work beside any, also where two threads at once would be too many for it."""
    code = LAYER.format(tests=str(Path(__file__).parent), layer=layer, expected=hashlib.sha256(work()).hexdigest())
    libraries = os.pathsep.join([os.path.join(sys.prefix, "lib"), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = os.environ | {"NUMBA_THREADING_LAYER": layer, "LD_LIBRARY_PATH": libraries}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=500)
    if "No threading layer could be loaded" in done.stderr:
        pytest.skip(f"the {layer} layer is not installed here")
    assert done.stdout.strip() == "survived True", done.stderr[-2000:]


def test_without_a_folder_for_the_cache(tmp_path):
    """Nothing is cached, and everything works: a home that is a file, and a cache folder inside a file."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    environment = {"NUMBA_CACHE_DIR": str(blocked / "cache"), "HOME": str(blocked), "PATH": os.environ["PATH"]}
    code = (
        "import numpy as np, adamw_numba; v = np.ones(3); o = adamw_numba.AdamW(0.1); o.build([v]); "
        "o.apply([np.ones(3)]); print(v[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("0.8996"), done.stderr[-2000:]
