"""What users' compiled code with `adamw_numba.njit` is in other processes, in the simulator, and on a GPU."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

USER = """
import json, sys
import numpy as np
from numba import njit
from adamw_numba.njit import minimize, step

@njit(cache=True)
def bowl(x, center):
    return ((x - center) ** 2).sum(), 2 * (x - center)

@njit(cache=True)
def search(center):
    return minimize(bowl, np.zeros(2), (center,), 0.1, 200)

@njit(cache=True)
def descend(p, steps):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for number in range(steps):
        step(p, 2 * (p - 3), m, v, number, 0.1)
    return p
"""
MAIN = """
import json, user
found = user.search(3.0)
p = user.descend(user.np.zeros(3), 50)
stats = [function.stats for function in (user.search, user.descend)]
hits, misses = ([sum(kind.values()) for kind in kinds] for kinds in zip(*((s.cache_hits, s.cache_misses) for s in stats)))
print(json.dumps([[found.x.tolist(), found.fun, found.nit, found.status, p.tolist()], hits, misses]))
"""


def in_a_process(code, folder, **environment):
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_a_cached_function_is_loaded_and_not_compiled_again(tmp_path):
    import json

    import adamw_numba

    (tmp_path / "user.py").write_text(USER)
    path = os.pathsep.join([str(tmp_path), os.path.dirname(os.path.dirname(adamw_numba.__file__))])
    first, second = (json.loads(in_a_process(MAIN, tmp_path, PYTHONPATH=path)) for _ in range(2))
    assert first[1:] == [[0, 0], [1, 1]]
    assert second[1:] == [[1, 1], [0, 0]]
    assert first[0] == second[0]
    assert first[0][0] == pytest.approx([3.0, 3.0], abs=1e-2)


def test_importing_the_package_does_not_load_it():
    code = "import sys, adamw_numba; print([name for name in sys.modules if name == 'numba' or '.njit' in name])"
    assert in_a_process(code, None).strip() == "[]"


KERNEL = """
import numpy as np
from numba import cuda
from adamw_numba import AdamW
from adamw_numba.njit import coefficients, update, update_amsgrad

@cuda.jit
def kernel(p, g, m, v, c):
    i = cuda.grid(1)
    if i < p.size:
        p[i], m[i], v[i] = update(p[i], g[i], m[i], v[i], c)

@cuda.jit
def amsgrad_kernel(p, g, m, v, top, c):
    i = cuda.grid(1)
    if i < p.size:
        p[i], m[i], v[i], top[i] = update_amsgrad(p[i], g[i], m[i], v[i], top[i], c)
"""
IN_THE_SIMULATOR = """
rng = np.random.default_rng(0)
for dtype in ("float32", "float64"):
    for amsgrad in (False, True):
        p0, gradients = rng.normal(size=40).astype(dtype), rng.normal(size=(5, 40)).astype(dtype)
        p, *state = p0.copy(), *(np.zeros_like(p0) for _ in range(3 if amsgrad else 2))
        for number, g in enumerate(gradients):
            c = coefficients(number, 0.1, 0.01, clipvalue=0.7, nesterov=True)
            (amsgrad_kernel if amsgrad else kernel)[2, 32](p, g, *state, c)
        q = p0.copy()
        optimizer = AdamW(0.1, weight_decay=0.01, clipvalue=0.7, nesterov=True, amsgrad=amsgrad)
        optimizer.build([q])
        for g in gradients:
            optimizer.apply([g])
        assert p.tobytes() == q.tobytes(), (dtype, amsgrad, p - q)
        assert not (p == p0).any()
print("same bits")
"""


@pytest.mark.slow
def test_one_element_in_kernels_of_the_simulator(tmp_path):
    pytest.importorskip("numba_cuda")
    assert in_a_process(KERNEL + IN_THE_SIMULATOR, tmp_path, NUMBA_ENABLE_CUDASIM="1").strip() == "same bits"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_one_element_in_kernels_is_compiled_for_a_gpu(kind, monkeypatch):
    """As tests/gpu/test_ptx.py does, without a GPU."""
    pytest.importorskip("numba_cuda")
    from numba import cuda, typeof, types
    from numba.cuda import dispatcher

    from adamw_numba.njit import coefficients

    monkeypatch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=(8, 0)))
    scope = {}
    exec(KERNEL.replace("@cuda.jit", ""), scope)
    array = getattr(types, kind)[::1]
    ends = []
    for name, arrays in (("kernel", 4), ("amsgrad_kernel", 5)):
        ptx, _ = cuda.compile_ptx(scope[name], (array,) * arrays + (typeof(coefficients(0, 0.1)),), cc=(8, 0))
        suffix = {"float32": "f32", "float64": "f64"}[kind]
        assert re.search(rf"sqrt\.\S*{suffix}", ptx)
        assert re.search(rf"div\.\S*{suffix}", ptx)
        ends.append(len(re.findall(r"st\.global\S*\s", ptx)))
    assert ends == [3, 4]
