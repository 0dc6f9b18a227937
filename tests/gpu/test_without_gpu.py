"""GPU arrays where they cannot be used: the error says what to install, and nothing else changes."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from adamw_numba import AdamW


class OnGPU:
    """What an array on a GPU shows of itself, without a GPU."""

    shape, dtype = (3,), np.dtype("float32")
    __cuda_array_interface__ = {"shape": (3,), "typestr": "<f4", "data": (4096, False), "version": 3}  # noqa: RUF012


class ByDLPack:
    shape, dtype = (3,), np.dtype("float32")

    def __dlpack_device__(self):
        return 2, 0


def no_gpu():
    try:
        from numba import cuda

        return not cuda.is_available()
    except ImportError:
        return True


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("array", [OnGPU(), ByDLPack()])
@pytest.mark.parametrize("call", ["build", "apply"])
def test_without_a_driver_the_error_names_the_extra(array, call):
    pytest.importorskip("numba_cuda")
    optimizer = AdamW(0.1)
    with pytest.raises(RuntimeError, match=r"variable 'w' is a .*usable GPU.*adamw-numba\[cuda13\]"):
        optimizer.build({"w": array}) if call == "build" else optimizer.apply({"w": array}, {"w": array})
    assert not optimizer.built


@pytest.mark.parametrize("array", [OnGPU(), ByDLPack()])
def test_without_numba_cuda_the_error_names_the_extra(array, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba_cuda" else find(name))
    with pytest.raises(ImportError, match=r"variable 'w' .*needs numba-cuda: pip install 'adamw-numba\[cuda13\]'"):
        AdamW(0.1).build({"w": array})


def test_a_gpu_gradient_for_a_host_variable():
    variable = np.ones(3, np.float32)
    optimizer = AdamW(0.1)
    optimizer.build([variable])
    with pytest.raises(TypeError, match="like its variable"):
        optimizer.apply([OnGPU()])
    assert (variable == 1).all()


def test_arrays_on_the_host_load_nothing_of_cuda():
    code = (
        "import sys, numpy as np; from adamw_numba import AdamW; o = AdamW(); x = np.ones(3); o.build([x]); o.apply([x + 1]);"
        "assert 'numba.cuda' not in sys.modules or 'adamw_numba.gpu.kernels' not in sys.modules;"
        "assert 'adamw_numba.gpu.plan' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
