"""Files made to do harm: each is refused with its own message, before memory is taken; and random ones."""

import io
import json
import pickle
import resource
import shutil
import struct
import warnings
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from adamw_numba import AdamW, Checkpoints, CorruptFileError, interop
from adamw_numba.saving import archive
from adamw_numba.saving.stores import npz

W = np.arange(3, dtype=np.float32)


def good(path, **options):
    optimizer = AdamW(0.25, **options)
    optimizer.build({"w": W.copy()})
    optimizer.save(path, durable=False)
    return path


def sealed(document):
    """A document with a right checksum: damage is not the point here."""
    text = json.dumps({k: v for k, v in document.items() if k != "crc32"}).encode()
    return b'{"crc32":"%08x",' % zlib.crc32(text) + text[1:]


def npz_with(path, change=None, raw=None, members=(), **options):
    """A good file, with its document changed, or members put in or replaced."""
    with zipfile.ZipFile(good(path.with_name("good.npz"))) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    document = json.loads(contents[npz.MANIFEST])
    if change:
        change(document)
    contents[npz.MANIFEST] = sealed(document) if raw is None else raw
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **options) as archive:
        warnings.simplefilter("ignore")
        for name, content in [*contents.items(), *members]:
            archive.writestr(zipfile.ZipInfo(name) if not options else name, content)
    return path


def npy(array=None, descr="<f4", shape=(3,), body=b""):
    stream = io.BytesIO()
    if array is not None:
        np.save(stream, array)
        return stream.getvalue()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


def replaced(content):
    return lambda path: npz_with(path, members=[("momentum/w.npy", content)]) and only_last(path)


def only_last(path):
    """Of doubles the last alone, so that what is tested is not that there are doubles."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def changed(**fields):
    return lambda path: npz_with(path, lambda document: document.update(fields))


def entry(**fields):
    return lambda path: npz_with(path, lambda document: document["arrays"]["momentum/w"].update(fields))


def config(**fields):
    return lambda path: npz_with(path, lambda document: document["config"].update(fields))


def with_h5(change):
    def make(path):
        path = good(path.with_name("bad.h5"))
        with h5py.File(path, "r+") as file:
            change(file)
        content = bytearray(path.read_bytes())
        content[:29] = b"adamw_numba crc32 %08x\n" % zlib.crc32(bytes(content[512:])) + content[27:29]
        path.write_bytes(content)
        return path

    return make


def h5_replaced(create):
    def change(file):
        del file["momentum/w"]
        create(file)

    return with_h5(change)


def virtual(file):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "data", (3,))
    file.create_virtual_dataset("momentum/w", layout)


def with_zarr(change):
    def make(path):
        path = good(path.with_name("bad.zarr"))
        root = zarr.open_group(path, mode="r+")
        change(root, path)
        return path

    return make


def zarr_bomb(root, path):
    file = path / root.attrs["adamw_numba"] / "momentum" / "w" / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["shape"] = [2**40]
    file.write_text(json.dumps(metadata))


def safetensors_of(header, body=b""):
    def make(path):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = path.with_name("bad.safetensors")
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        return path

    return make


def written(name, content):
    def make(path):
        path.with_name(name).write_bytes(content)
        return path.with_name(name)

    return make


def zip_of_keras(path):
    path = path.with_name("bomb.keras")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b" " * 50_000_000)
        archive.writestr("model.weights.h5", b"")
    return path


DEEP = b'{"crc32":"00000000",' + b'"a":[' * 100_000
GOOD_ENTRY = {"dtype": "float32", "shape": [3], "crc32": 0}
# a file that `make` writes beside the path given -> error, words of its message
FILES = {
    "pickle": (written("s.npz", pickle.dumps({"a": 1})), CorruptFileError, ["BadZipFile"]),
    "pickle in npy": (replaced(npy(np.array([print], object))), CorruptFileError, ["Python objects", "pickle"]),
    "empty": (written("s.npz", b""), CorruptFileError, ["s.npz"]),
    "compressed": (lambda p: npz_with(p, compression=zipfile.ZIP_DEFLATED), CorruptFileError, ["compressed"]),
    "zip bomb": (
        lambda p: npz_with(p, members=[("x.npy", bytes(10_000_000))], compression=zipfile.ZIP_DEFLATED),
        CorruptFileError,
        ["compressed"],
    ),
    "parent folder": (
        lambda p: npz_with(p, members=[("../../x.npy", b"")]),
        CorruptFileError,
        ["../../x.npy", "leads out"],
    ),
    "absolute": (lambda p: npz_with(p, members=[("/etc/x.npy", b"")]), CorruptFileError, ["/etc/x.npy", "leads out"]),
    "drive": (lambda p: npz_with(p, members=[("C:\\x.npy", b"")]), CorruptFileError, ["C:", "leads out"]),
    "doubles": (
        lambda p: npz_with(p, members=[("velocity/w.npy", b"")]),
        CorruptFileError,
        ["velocity/w.npy", "more than once"],
    ),
    "overflowing npy": (replaced(npy(shape=(2**62, 4))), CorruptFileError, ["declares", "4611686018427387904"]),
    "huge npy": (replaced(npy(shape=(2**40,))), CorruptFileError, ["declares", "1099511627776"]),
    "huge and empty": (replaced(npy(shape=(0, 2**60))), CorruptFileError, ["declares", "1152921504606846976"]),
    "negative npy": (replaced(npy(shape=(-1, -3), body=bytes(12))), CorruptFileError, ["(-1, -3)"]),
    "long npy header": (replaced(npy(shape=(1,) * 9000, body=bytes(4))), CorruptFileError, ["momentum", "bad.npz"][1:]),
    "text": (replaced(npy(np.array(["abc"]))), CorruptFileError, ["<U3"]),
    "no npy": (replaced(b"something else"), CorruptFileError, ["no .npy file"]),
    "other dtype": (replaced(npy(np.zeros(3))), CorruptFileError, ["float64", "float32"]),
    "other numbers": (replaced(npy(np.ones(3, "f4"))), CorruptFileError, ["momentum/w", "CRC-32"]),
    "member missing": (changed(arrays={"momentum/none": GOOD_ENTRY}), CorruptFileError, ["lacks", "momentum/none"]),
    "no document": (lambda p: npz_with(p, raw=b""), CorruptFileError, ["manifest.json", "checksum"]),
    "newer": (changed(version=3), ValueError, ["schema version 3", "newer adamw_numba"]),
    "other format": (changed(format="other"), CorruptFileError, ["'other'"]),
    "class": (changed(**{"class": "os.system"}), CorruptFileError, ["os.system", "AdamW"]),
    "class of schedule": (
        config(learning_rate={"class_name": "os.system", "module": "os", "config": {"command": "true"}}),
        ValueError,
        ["os.system", "CosineDecay"],
    ),
    "unknown argument": (config(evil=1), ValueError, ["evil"]),
    "beta": (config(beta_1=7.0), ValueError, ["beta_1", "7.0"]),
    "config of a list": (changed(config=[]), CorruptFileError, ["'config'", "dict"]),
    "negative step": (changed(step=-1), CorruptFileError, ["negative"]),
    "huge skips": (changed(skipped_steps=10**100), CorruptFileError, ["huge", "skipped"]),
    "other step": (changed(step=5), CorruptFileError, ["step 5", "iteration"]),
    "no extra": (
        lambda p: npz_with(p, lambda document: document.pop("extra")),
        CorruptFileError,
        ["lacks 'extra'"],
    ),
    "double variables": (
        lambda p: npz_with(p, lambda document: document["variables"].append(document["variables"][0])),
        CorruptFileError,
        ["variable more than once"],
    ),
    "huge number in a config": (
        config(learning_rate={"class_name": "CosineDecay", "config": {"initial_learning_rate": 10**400}}),
        ValueError,
        ["config that cannot be used"],
    ),
    "nested npy header": (
        replaced(b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 9000),
        CorruptFileError,
        ["momentum/w"],
    ),
    "step of a float": (changed(step=1e300), CorruptFileError, ["'step'"]),
    "overflowing shape": (entry(shape=[2**62, 4]), CorruptFileError, ["shape", "more bytes"]),
    "huge integers": (entry(shape=[2**70]), CorruptFileError, ["shape"]),
    "many axes": (entry(shape=[1] * 100), CorruptFileError, ["shape"]),
    "shape of booleans": (entry(shape=[True]), CorruptFileError, ["shape"]),
    "dtype of objects": (entry(dtype="object"), CorruptFileError, ["'object'", "float32"]),
    "checksum of text": (entry(crc32="x"), CorruptFileError, ["CRC-32"]),
    "variables": (changed(variables=[{"name": 1}]), CorruptFileError, ["describes the variable"]),
    "added": (changed(added=[["x"]]), CorruptFileError, ["added variable"]),
    "deep JSON": (
        lambda p: npz_with(p, raw=b'{"crc32":"%08x",' % zlib.crc32(b"{" + DEEP[20:]) + DEEP[20:]),
        CorruptFileError,
        ["no valid JSON"],
    ),
    "double keys": (
        lambda p: npz_with(p, raw=b'{"crc32":"%08x",' % zlib.crc32(b'{"a":1,"a":2}') + b'"a":1,"a":2}'),
        CorruptFileError,
        ["more than once"],
    ),
    "HDF5 without checksum": (written("x.h5", bytes(1000)), CorruptFileError, ["checksum in front"]),
    "soft link": (
        h5_replaced(lambda f: f.__setitem__("momentum/w", h5py.SoftLink("/velocity/w"))),
        CorruptFileError,
        ["SoftLink"],
    ),
    "external link": (
        h5_replaced(lambda f: f.__setitem__("momentum/w", h5py.ExternalLink("/etc/x.h5", "/a"))),
        CorruptFileError,
        ["ExternalLink"],
    ),
    "link to a group": (
        with_h5(lambda f: (f.__delitem__("momentum"), f.__setitem__("momentum", h5py.SoftLink("/velocity")))),
        CorruptFileError,
        ["SoftLink"],
    ),
    "virtual": (h5_replaced(virtual), CorruptFileError, ["virtual"]),
    "external data": (
        h5_replaced(lambda f: f.create_dataset("momentum/w", (3,), "f4", external=[("/etc/passwd", 0, 12)])),
        CorruptFileError,
        ["external"],
    ),
    "HDF5 bomb": (
        h5_replaced(lambda f: f.create_dataset("momentum/w", (2**40,), "f4", chunks=(2**20,))),
        CorruptFileError,
        ["declares", "1099511627776"],
    ),
    "HDF5 filter": (
        h5_replaced(lambda f: f.create_dataset("momentum/w", data=np.zeros(10**6), compression="gzip")),
        CorruptFileError,
        ["filters"],
    ),
    "HDF5 objects": (
        h5_replaced(lambda f: f.create_dataset("momentum/w", data=["a"], dtype=h5py.string_dtype())),
        CorruptFileError,
        ["dtype object"],
    ),
    "HDF5 group": (h5_replaced(lambda f: f.create_group("momentum/w")), CorruptFileError, ["Group"]),
    "zarr bomb": (with_zarr(zarr_bomb), CorruptFileError, ["declares", "1099511627776"]),
    "zarr generation": (
        with_zarr(lambda root, path: root.update_attributes({"adamw_numba": "../../x"})),
        CorruptFileError,
        ["no current generation"],
    ),
    "zarr folder": (
        lambda p: (p.with_name("x.zarr").mkdir(), p.with_name("x.zarr"))[1],
        CorruptFileError,
        ["no zarr group"],
    ),
    "safetensors header": (written("s.safetensors", struct.pack("<Q", 2**62)), CorruptFileError, ["s.safetensors"]),
    "safetensors of others": (safetensors_of({}), CorruptFileError, ["metadata"]),
    "safetensors sizes": (
        safetensors_of({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, bytes(4)),
        CorruptFileError,
        ["SafetensorError"],
    ),
    "Keras bomb": (zip_of_keras, CorruptFileError, ["compressed"]),
}


@pytest.mark.parametrize(("make", "error", "words"), FILES.values(), ids=FILES)
def test_refused_before_memory_is_taken(make, error, words, tmp_path):
    path = make(tmp_path / "bad.npz")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(error) as caught:
        (interop.from_keras if path.suffix == ".keras" else AdamW.load)(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    for word in [path.name, *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [{}, {"inner_optimizer": 3}, {"inner_optimizer": {}}], ids=repr)
def test_restoring_from_a_strange_config(value, tmp_path):
    path = changed(config=value)(tmp_path / "bad.npz")
    optimizer = AdamW(0.25)
    optimizer.build({"w": W.copy()})
    if value:
        with pytest.raises(ValueError, match=r"bad.npz holds a config that cannot be used"):
            optimizer.restore(path)
    else:
        assert optimizer.restore(path) is None


def test_messages_differ():
    assert len({tuple(words) for _, _, words in FILES.values()}) > 40


@pytest.fixture(scope="module", params=["s.npz", "s.safetensors", "s.h5"])
def whole_file(request, tmp_path_factory):
    """A file's path, its bytes and what is read from it."""
    path = good(tmp_path_factory.mktemp("fuzz") / request.param)
    return path, path.read_bytes(), archive.read(path)


@settings(max_examples=150)
@given(data=st.data())
def test_random_bytes_in_random_places(whole_file, data):
    path, whole, expected = whole_file
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 40)))
        content[start:end] = data.draw(st.binary(max_size=40))
    path.unlink()  # to write over a file costs some file systems milliseconds
    path.write_bytes(content)
    try:
        found = archive.read(path)
    except CorruptFileError as error:
        assert path.name in str(error)
    else:
        assert found.document == expected.document
        assert {k: v.tobytes() for k, v in found.arrays.items()} == {k: v.tobytes() for k, v in expected.arrays.items()}


class Runs(RuleBasedStateMachine):
    """Steps, saves, losses and damages in any order: what is restored is what was saved, the newest that is whole."""

    @initialize()
    def begin(self):
        import tempfile

        self.folder = tempfile.mkdtemp()
        self.checkpoints = Checkpoints(self.folder, keep=3, durable=False)
        self.variables = {"w": np.zeros(5)}
        self.optimizer = AdamW(0.1)
        self.optimizer.build(self.variables)
        self.saved, self.damaged, self.number = {}, set(), 0

    def image(self):
        return {k: v.tobytes() for k, v in [*self.optimizer.state.items(), *self.variables.items()]}

    @rule(value=st.floats(-3, 3))
    def step(self, value):
        self.optimizer.apply({"w": np.full(5, value)})

    @rule()
    def save(self):
        self.number += 1
        self.checkpoints.save(self.optimizer, self.number, extra=self.number, variables=True)
        self.saved[self.number] = self.image()
        self.saved = {n: self.saved[n] for n in sorted(self.saved)[-3:]}

    @rule(place=st.integers(0, 2**20))
    def corrupt(self, place):
        if self.saved:
            path = self.checkpoints._path(max(self.saved))
            content = path.read_bytes()
            path.write_bytes(content[: place % max(len(content), 1)])
            self.damaged.add(max(self.saved))

    @rule()
    def crash(self):
        """A new process: nothing but the files."""
        self.variables = {"w": np.full(5, 9.0)}
        self.optimizer = AdamW(0.1)
        self.optimizer.build(self.variables)
        self.checkpoints = Checkpoints(self.folder, keep=3, durable=False)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                restored = self.checkpoints.restore_latest(self.optimizer)
            except CorruptFileError:
                restored = "damaged"
        whole = [n for n in self.saved if n not in self.damaged]
        assert len(seen) == len([n for n in self.saved if n > max(whole, default=0)])
        if whole:
            assert restored.step == restored.extra == max(whole)
            assert self.image() == self.saved[max(whole)]
        else:
            assert restored == ("damaged" if self.saved else None)

    def teardown(self):
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)


TestRuns = pytest.mark.slow(Runs.TestCase)
TestRuns.settings = settings(max_examples=15, stateful_step_count=15)
