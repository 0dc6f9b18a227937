"""GPU arrays where they cannot be used: the error says what to install, and nothing else changes."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from adamw_numba import AdamW, arrays


class OnGPU:
    """What an array on a GPU shows of itself, without a GPU."""

    shape, dtype = (3,), np.dtype("float32")
    __cuda_array_interface__ = {"shape": (3,), "typestr": "<f4", "data": (4096, False), "version": 3}  # noqa: RUF012


class ByDLPack:
    shape, dtype = (3,), np.dtype("float32")

    def __dlpack_device__(self):
        return 2, 0


class OfWarp:
    """Four vectors, as Warp describes them: by an interface of version 2, in a stream of its own."""

    shape, dtype, version = (4,), type("vec3f", (), {}), 2

    device = SimpleNamespace(stream=SimpleNamespace(cuda_stream=4242))

    @property
    def __cuda_array_interface__(self):
        own = {"shape": (4, 3), "typestr": "<f4", "data": (4096, False), "strides": (12, 4), "version": self.version}
        return own | ({"stream": 7} if self.version == 3 else {})

    def __dlpack_device__(self):
        return 2, 1


class OfWarpOnTheHost:
    """Warp's arrays are of one type: where they lie decides which interface they have."""

    shape, dtype = (3,), np.dtype("float32")

    def __init__(self):
        self.inner = np.ones(3, np.float32)

    @property
    def __cuda_array_interface__(self):
        raise AttributeError("on the host")

    @property
    def __array_interface__(self):
        return self.inner.__array_interface__


def test_an_array_that_describes_itself_in_its_own_words_is_seen_in_numpys():
    found = arrays.seen(OfWarp())
    assert (found.shape, found.dtype, arrays.family(found), arrays.place(found)) == ((4, 3), "f4", "cuda", "cuda:1")
    assert found.__cuda_array_interface__["version"] == 3
    assert found.__cuda_array_interface__["stream"] == 4242
    found.owner.version = 3  # whoever tells the stream is believed
    assert found.__cuda_array_interface__["stream"] == 7
    found.owner.version, found.owner.device = 2, None
    assert found.__cuda_array_interface__["stream"] == 1
    for plain in (OnGPU(), ByDLPack()):
        assert arrays.seen(plain) is plain


def test_an_array_of_a_type_that_may_lie_on_a_gpu_and_does_not():
    x = OfWarpOnTheHost()
    assert (arrays.family(x), arrays.device(x)) == ("foreign", "cpu")
    optimizer = AdamW(0.1)
    optimizer.build([x])
    optimizer.apply([np.ones(3, np.float32)])
    assert x.inner[0] < 1


def no_gpu():
    try:
        from numba import cuda

        return not cuda.is_available()
    except ImportError:
        return True


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("array", [OnGPU(), ByDLPack(), OfWarp()])
@pytest.mark.parametrize("call", ["build", "apply"])
def test_without_a_driver_the_error_names_the_extra(array, call):
    pytest.importorskip("numba_cuda")
    optimizer = AdamW(0.1)
    with pytest.raises(RuntimeError, match=r"variable 'w' is a .*usable GPU.*adamw-numba\[cuda13\]"):
        optimizer.build({"w": array}) if call == "build" else optimizer.apply({"w": array}, {"w": array})
    assert not optimizer.built


@pytest.mark.parametrize("array", [OnGPU(), ByDLPack(), OfWarp()])
def test_without_numba_cuda_the_error_names_the_extra(array, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba_cuda" else find(name))
    with pytest.raises(ImportError, match=r"variable 'w' .*needs numba-cuda: pip install 'adamw-numba\[cuda13\]'"):
        AdamW(0.1).build({"w": array})


@pytest.mark.parametrize(
    ("name", "missing"), [("nvvm", "libnvvm.so"), ("nvrtc", "libnvrtc.so"), ("libdevice", "libdevice is missing")]
)
def test_without_the_compiler_the_error_names_the_extra(name, missing, monkeypatch):
    """numba-cuda alone does not bring libNVVM."""
    pytest.importorskip("numba_cuda")
    from numba.cuda import cuda_paths

    def nothing(*_):
        raise cuda_paths.pathfinder.DynamicLibNotFoundError(f'Failure finding "lib{name}.so"')

    monkeypatch.delattr(cuda_paths.get_cuda_paths, "_cached_result", raising=False)
    if name == "libdevice":
        absent = {"libdevice": cuda_paths._env_path_tuple("<unknown>", None)}
        monkeypatch.setattr(cuda_paths, "get_cuda_paths", lambda: absent)
    else:
        monkeypatch.setattr(cuda_paths, f"_get_{name}", nothing)
    with pytest.raises(
        ImportError, match=rf"variable 'w' .*compiler, libNVVM \(.*{missing}.*\): .*adamw-numba\[cuda13\]"
    ):
        AdamW(0.1).build({"w": OnGPU()})


def test_versions_that_do_not_go_together():
    """NumPy 2.5 lacks a function that numba-cuda wants: in a process of its own, since modules stay imported."""
    pytest.importorskip("numba_cuda")
    code = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1]); np.__dict__.pop('row_stack', None)\n"
        "from test_without_gpu import OnGPU; from adamw_numba import AdamW\n"
        "try: AdamW(0.1).build({'w': OnGPU()})\n"
        "except ImportError as error: print(error)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent)]
    said = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True).stdout
    versions = rf"numba-cuda \S+, numba \S+, numpy {re.escape(np.__version__)}; AttributeError: .*row_stack"
    assert re.match(
        rf"variable 'w' .*cannot be imported here \({versions}.*\); .*go together: .*adamw-numba\[cuda13\]", said
    )


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
