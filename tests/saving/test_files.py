"""The files themselves: what peers see in them, old ones, checksums, names, and stores that others plug in."""

import json
import os
import zipfile
import zlib
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import zarr
from helpers import libraries
from helpers.states import STORES, build, go_on, image, variables_of

from adamw_numba import AdamW, LossScaleOptimizer, saved_variables
from adamw_numba.saving.stores import checksums, npz, zips
from adamw_numba.saving.stores import zarr as zarrs


def test_peers_open_the_files(tmp_path):
    variables, optimizer = variables_of("bfloat16"), AdamW(0.25)
    optimizer.build(variables)
    go_on(optimizer, variables, 0, 3)
    momentum, key = optimizer.state["momentum/v-0-.x"], "momentum/v-0-.x"
    for name in STORES:
        optimizer.save(tmp_path / name, extra="π", variables=True)
    with np.load(tmp_path / "s.npz") as file:
        np.testing.assert_array_equal(file[key], momentum)
        assert json.loads(file["manifest.json"])["extra"] == "π"
    with h5py.File(tmp_path / "s.h5") as file:
        np.testing.assert_array_equal(file[key], momentum)
        assert file[key].fletcher32
    with safetensors.safe_open(tmp_path / "s.safetensors", "pt") as file:
        np.testing.assert_array_equal(file.get_tensor(key), momentum)
        bfloat16 = file.get_tensor("variables/v-0-.x")
        np.testing.assert_array_equal(bfloat16.float(), variables["v-0-.x"].astype(np.float32))
    for name in ("s.zarr", "s.zarr.zip"):
        store = tmp_path / name if name == "s.zarr" else zarr.storage.ZipStore(tmp_path / name, mode="r")
        root = zarr.open_group(store, mode="r")
        generation = root.attrs["adamw_numba"]
        np.testing.assert_array_equal((root[generation] if generation else root)[key][...], momentum)
        if name == "s.zarr.zip":
            store.close()


def test_safetensors_gets_contiguous_arrays(tmp_path):
    """Its 0.8.0 writes others wrongly: what it is given, not what is read back, decides."""
    variable = libraries.strided(np.arange(12.0).reshape(3, 4), "float32")
    optimizer = AdamW()
    optimizer.build({"w": variable})
    optimizer.save(tmp_path / "s.safetensors", variables=True)
    found = safetensors.numpy.load_file(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(found["variables/w"], np.arange(12.0).reshape(3, 4))


def test_a_plug_by_suffix(tmp_path, monkeypatch):
    """The example of docs/saving.md, as an entry point."""
    folder = tmp_path / "plug"
    (folder / "folders-1.dist-info").mkdir(parents=True)
    (folder / "folders-1.dist-info" / "entry_points.txt").write_text("[adamw_numba.stores]\nnpy = folders:opened\n")
    (folder / "folders-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: folders\nVersion: 1\n")
    (folder / "folders.py").write_text(
        "import contextlib, pickle\n"
        "@contextlib.contextmanager\n"
        "def opened(path, mode):\n"
        "    store = {} if mode == 'w' else dict(__import__('numpy').load(path))\n"
        "    yield store\n"
        "    if mode == 'w':\n"
        "        with open(path, 'wb') as file:\n"
        "            __import__('numpy').savez(file, **store)\n"
    )
    monkeypatch.syspath_prepend(folder)
    variables = {"w": np.ones(3)}
    build(variables).save(tmp_path / "s.npy", extra=1)
    assert AdamW.load(tmp_path / "s.npy", variables).extra == 1


def test_checksums_that_are_combined():
    random = np.random.default_rng(0)
    for one, other in ((0, 0), (1, 7), (128, 1), (100, 65_537)):
        a, b = random.bytes(one), random.bytes(other)
        assert checksums.shifted(zlib.crc32(a), other) ^ zlib.crc32(b) == zlib.crc32(a + b)
    for array in (np.arange(24.0).reshape(4, 6).T, np.arange(600_000)[::-2], np.zeros((0, 3)), np.array(2.0)):
        assert checksums.crc32(array) == zlib.crc32(array.tobytes())


def test_a_large_state_is_not_copied(tmp_path):
    """One array, dense or not, is written and read in pieces."""
    import tracemalloc

    for variable in (np.zeros(8_000_000), np.zeros((2000, 4000), order="F"), torch.zeros(8_000_000)):
        optimizer = build({"w": variable})
        tracemalloc.start()
        optimizer.save(tmp_path / "s.npz", variables=True, durable=False)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 16e6


GOLDEN = sorted((Path(__file__).parent / "data").glob("version-1.*"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_files_of_schema_version_1_load_for_ever(path):
    expected = json.loads((path.parent / "expected-1.json").read_text())
    variables = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, ml_dtypes.bfloat16)}
    optimizer = LossScaleOptimizer.load(path, variables)
    assert image(optimizer, variables) == expected["image"]
    assert optimizer.extra == expected["extra"]
    common, excluded = optimizer.groups
    assert (common.names, excluded.names, excluded.weight_decay) == (("w",), ("b",), 0)


def test_golden_files_are_there():
    assert len(GOLDEN) == 5


def test_the_name_of_the_document():
    assert npz.MANIFEST == "manifest.json"


NAMES = {
    "long": ["n" * 300, "n" * 299 + "m"],
    "Chinese": ["権" * 120, "権" * 119 + "重"],
    "paths": ["enc/kernel", "enc%2Fkernel", "enc%252Fkernel", "enc\\kernel"],
    "hidden": ["_w", "%5Fw", ".w", "%2Ew", "..", "."],
    "taken": ["zarr.json", "manifest.json", "__metadata__", "c", "iteration", "momentum/w"],
    "not printed": ["a b", "a\nb", "a\0b", "C:", "é", "e\u0301", "😀"],
    "one looks like the other's short form": ["n" * 300, zarrs.short("n" * 300)],
}


@pytest.mark.parametrize("store", [*STORES, "mapping", "zarr group", "memory"])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_come_back(names, store, tmp_path):
    """Every array to its own variable, in whatever order; an older file system would have called them too long."""
    target = {
        "mapping": dict,
        "zarr group": lambda: zarr.open_group(tmp_path / "own", mode="w"),
        "memory": zarr.storage.MemoryStore,
    }.get(store, lambda: tmp_path / store)()
    optimizer = build([(name, np.full(2, float(index))) for index, name in enumerate(names)], use_ema=True)
    for index, name in enumerate(names):
        optimizer.state[f"momentum/{name}"][...] = 100 + index
    optimizer.save(target, variables=True)
    assert {name: array[0] for name, array in saved_variables(target).items()} == {n: i for i, n in enumerate(names)}
    copies = {name: np.zeros(2) for name in reversed(names)}
    loaded = AdamW.load(target, copies)
    for index, name in enumerate(names):
        assert (copies[name][0], loaded.state[f"momentum/{name}"][1]) == (index, 100 + index)


@pytest.mark.parametrize("key", ["momentum/w", "a/" + "n" * 255, "iteration"])
def test_keys_that_a_file_system_takes_stay_as_they_are(key):
    assert zarrs.short(key) == key


def test_long_names_of_earlier_versions_are_found(tmp_path, monkeypatch):
    """They are in zips and in object stores, where nothing was too long."""
    with monkeypatch.context() as patches:
        patches.setattr(zarrs, "short", lambda key: key)
        build({"n" * 300: np.ones(2)}).save(tmp_path / "s.zarr.zip", variables=True)
    assert list(saved_variables(tmp_path / "s.zarr.zip")) == ["n" * 300]


@pytest.mark.parametrize("count", [3, pytest.param(70_000, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("limit", [2**31 - 1, 300], ids=["small", "zip64"])
def test_zips_are_as_others_write_them(count, limit, tmp_path, monkeypatch):
    """Compared with `zipfile`, which reads every byte and every checksum."""
    monkeypatch.setattr(zips, "_LIMIT", limit)
    path, array = tmp_path / "s.zip", np.arange(100.0)
    with open(path, "wb") as file:
        archive = zips.Writer(file)
        for index in range(count):
            archive.add(f"member {index} é", b"%d" % index)
        assert archive.add_array("large", b"header", array) == zlib.crc32(array.tobytes())
        archive.close()
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        assert found.namelist() == [*(f"member {index} é" for index in range(count)), "large"]
        assert found.read(f"member {count - 1} é") == b"%d" % (count - 1)
        assert found.read("large") == b"header" + array.tobytes()
        assert zips.checked_members(found, "s.zip").keys() == set(found.namelist())


@pytest.mark.parametrize("store", STORES)
def test_a_new_file_has_the_mode_of_the_umask(store, tmp_path):
    before = os.umask(0o027)
    try:
        build({"w": np.ones(2)}).save(tmp_path / store)
    finally:
        os.umask(before)
    assert (tmp_path / store).stat().st_mode & 0o777 == (0o750 if store == "s.zarr" else 0o640)


@pytest.mark.parametrize("folder", [".", "new/folders"])
def test_a_first_save_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    """No folder, no empty group; what another writer has put there meanwhile stays."""
    path = tmp_path / folder / "s.zarr"

    def fail(self):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr(zarrs.Group, "check_complete", fail)
        with pytest.raises(OSError, match="No space"):
            build({"w": np.ones(2)}).save(path)
    assert list(tmp_path.iterdir()) == []
    build({"w": np.ones(2)}).save(path)
    assert AdamW.load(path).iterations == 0
