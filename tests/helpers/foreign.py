"""Arrays of no known library, which only tell where they lie; and those of Warp, where that is installed."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import libraries


class ByInterface:
    """An object with NumPy's array interface and nothing else."""

    def __init__(self, inner):
        self.inner = inner

    @property
    def __array_interface__(self):
        return self.inner.__array_interface__


class ByDLPack:
    """An object with DLPack for the CPU and nothing else."""

    def __init__(self, inner):
        self.inner = inner

    def __dlpack__(self, **options):
        return self.inner.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.inner.__dlpack_device__()


class OldDLPack(ByDLPack):
    """The same before version 1.0, which cannot say whether an array may be written."""

    def __dlpack__(self, stream=None):
        return self.inner.__dlpack__()


class InWords(ByInterface):
    """An object that gives bfloat16 as integers and says so in a word, as Warp does."""

    dtype = type("bfloat16", (), {})

    @property
    def __array_interface__(self):
        return self.inner.view(np.uint16).__array_interface__


def by_interface(array, dtype):
    inner = libraries.numpy(array, dtype)
    return InWords(inner) if dtype == "bfloat16" else ByInterface(inner)


def strided_by_interface(array, dtype):
    inner = libraries.strided(array, dtype)
    return InWords(inner) if dtype == "bfloat16" else ByInterface(inner)


def by_dlpack(array, dtype):
    if dtype == "bfloat16":
        pytest.skip("NumPy does not export it")
    return ByDLPack(libraries.numpy(array, dtype))


def warp():
    """Warp, told to say nothing; the test is skipped where it is missing."""
    found = pytest.importorskip("warp")
    found.config.quiet = True
    found.config.kernel_cache_dir = str(Path(os.environ["NUMBA_CACHE_DIR"]) / "warp")
    found.init()
    return found


def to_warp(array, dtype):
    wp = warp()
    if dtype.startswith("complex") or np.ndim(array) == 0:
        pytest.skip("Warp has no such arrays")
    if np.size(array) == 0:
        return wp.zeros(np.shape(array), dtype=getattr(wp, dtype), device="cpu")
    return wp.array(libraries.numpy(array, dtype).astype("float64"), dtype=getattr(wp, dtype), device="cpu")


def look(array):
    """The elements of any of them, as NumPy's; of bfloat16 in float32."""
    if isinstance(array, (ByInterface, ByDLPack)):
        array = array.inner
    elif hasattr(array, "numpy"):
        array = array.numpy()
    array = np.array(array, copy=True)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


KINDS = [by_interface, strided_by_interface, by_dlpack, to_warp]
