"""Saved, loaded in a new process, and gone on with: bit for bit, through every store; what peers see in the files."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import zarr
from helpers import libraries

import adamw_numba
from adamw_numba import AdamW, Checkpoints, CorruptFileError, LossScaleOptimizer, saved_variables, schedules
from adamw_numba.__main__ import main
from adamw_numba.saving import archive, manifest
from adamw_numba.saving import snapshot
from adamw_numba.saving.stores import checksums, npz

STORES = ["s.npz", "s.safetensors", "s.h5", "s.zarr", "s.zarr.zip"]
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
SHAPES = [(3, 4), (), (0, 2), (5,)]
# options of AdamW; the wrapper's scale, or None
CONFIGS = {
    "plain": ({}, None),
    "everything": (
        {"amsgrad": True, "use_ema": True, "ema_overwrite_frequency": 3, "gradient_accumulation_steps": 3},
        None,
    ),
    "scaled": ({"amsgrad": True, "gradient_accumulation_steps": 2, "global_clipnorm": 0.5}, 8.0),
    "schedule": ({"learning_rate": schedules.CosineDecay(0.1, 20), "clipvalue": 0.5, "nonfinite": "skip"}, None),
    "decay": ({"weight_decay": schedules.ExponentialDecay(0.1, 5, 0.5), "use_ema": True, "clipnorm": 0.3}, 2.0),
}


def drawn(seed):
    """A configuration by chance."""
    random = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[random.integers(len(choices))]

    options = {
        "learning_rate": one_of(
            0.05, schedules.CosineDecay(0.1, 20), schedules.PiecewiseConstantDecay([3], [0.1, 0.01])
        ),
        "weight_decay": one_of(0.0, 0.004, schedules.ExponentialDecay(0.1, 5, 0.5)),
        "beta_1": one_of(0.9, 0.5, 0.0),
        "beta_2": one_of(0.999, 0.9),
        "amsgrad": one_of(False, True),
        "gradient_accumulation_steps": one_of(None, 2, 3, 4),
        "nonfinite": one_of("propagate", "skip"),
    }
    options |= one_of({}, {"use_ema": True}, {"use_ema": True, "ema_overwrite_frequency": 2})
    options |= one_of({}, {"clipnorm": 0.3}, {"global_clipnorm": 0.5}, {"clipvalue": 0.5})
    return options, one_of(None, None, 8.0)


DRAWN = {f"drawn {seed}": DTYPES[seed % len(DTYPES)] for seed in range(18)}
CONFIGS |= {name: drawn(int(name.split()[1])) for name in DRAWN}


def variables_of(dtype, make=libraries.numpy):
    random = np.random.default_rng(7)
    return {f"v/{i}/.x".replace("/", "-"): make(random.normal(size=shape), dtype) for i, shape in enumerate(SHAPES)}


def optimizer_of(config):
    options, scale = CONFIGS[config]
    optimizer = AdamW(**options)
    optimizer.exclude_from_weight_decay(var_names=["^v-0"])
    return optimizer if scale is None else LossScaleOptimizer(optimizer, scale, dynamic_growth_steps=3)


def go_on(optimizer, variables, first, last, make=libraries.numpy):
    for step in range(first, last):
        random = np.random.default_rng(step)
        gradients = {
            k: make(random.normal(size=v.shape), adamw_numba.arrays.dtype_name(v)) for k, v in variables.items()
        }
        if step == 4 and isinstance(optimizer, LossScaleOptimizer):
            gradients["v-3-.x"][0] = np.nan
        optimizer.apply(gradients)


def image(optimizer, variables):
    """Every bit of the state and of the variables, as text."""
    state = {**optimizer.state, **{f"variables/{k}": v for k, v in variables.items()}}
    return {k: adamw_numba.arrays.as_numpy(v).tobytes().hex() for k, v in state.items()} | {
        "skipped": optimizer.skipped_steps
    }


def resume(jobs):
    """In a new process: load, go on, tell every bit."""
    result = []
    for path, dtype, config in jobs:
        variables = {k: np.zeros_like(v) for k, v in variables_of(dtype).items()}
        cls = LossScaleOptimizer if CONFIGS[config][1] else AdamW
        optimizer = cls.load(path, variables)
        go_on(optimizer, variables, 5, 9)
        result.append(image(optimizer, variables))
    return result


@pytest.mark.parametrize("store", STORES)
def test_resumed_in_a_new_process_bit_for_bit(store, tmp_path):
    jobs, expected = [], []
    for dtype in DTYPES:
        for config in CONFIGS:
            if DRAWN.get(config, dtype) != dtype:
                continue
            variables, optimizer = variables_of(dtype), optimizer_of(config)
            optimizer.build(variables)
            go_on(optimizer, variables, 0, 5)
            path = tmp_path / f"{dtype}-{config}-{store}"
            optimizer.save(path, extra={"epoch": 5}, variables=True, durable=False)
            jobs.append((str(path), dtype, config))
            go_on(optimizer, variables, 5, 9)
            expected.append(image(optimizer, variables))
    code = f"import sys, json; sys.path[:0] = {[str(p) for p in Path(__file__).parents[:2]]!r}; import conftest, test_saving; "
    code += "print(json.dumps(test_saving.resume(json.load(sys.stdin))))"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for job, found, wanted in zip(jobs, json.loads(done.stdout), expected, strict=True):
        assert found == wanted, job


def remote_bucket():
    """An S3-compatible server on loopback with a bucket, and its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    import boto3

    boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket="runs")
    return server, address


@pytest.mark.parametrize(
    "kind", ["dict", "h5py", "zarr group", "memory URL", "memory store", "s3 fsspec", "s3 obstore"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:moto")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_passed_is_the_store(kind, tmp_path, monkeypatch):
    """Twice into the same target; the second prevails; then more steps, bit for bit."""
    server = None
    if kind.startswith("s3"):
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "testing")
        server, address = remote_bucket()
    if kind == "s3 fsspec":
        target = zarr.storage.FsspecStore.from_url(
            "s3://runs/a.zarr", storage_options={"endpoint_url": address, "asynchronous": True}
        )
    elif kind == "s3 obstore":
        import obstore

        target = zarr.storage.ObjectStore(
            obstore.store.S3Store(
                "runs", prefix="b.zarr", endpoint=address, region="us-east-1", client_options={"allow_http": True}
            )
        )
    else:
        target = {
            "dict": dict,
            "h5py": lambda: h5py.File(tmp_path / "own.h5", "w").create_group("deep/down"),
            "zarr group": lambda: zarr.open_group(tmp_path / "own", mode="w"),
            "memory URL": lambda: "memory://bucket/run.zarr",
            "memory store": zarr.storage.MemoryStore,
        }[kind]()
    try:
        for dtype in ("bfloat16", "complex64"):
            variables, optimizer = variables_of(dtype), optimizer_of("everything")
            optimizer.build(variables)
            for last in (2, 5):
                go_on(optimizer, variables, optimizer.state["iteration"].item(), last)
                optimizer.save(target, extra=[last], variables=True)
            copies = {k: np.zeros_like(v) for k, v in variables.items()}
            loaded = AdamW.load(target, copies)
            assert loaded.extra == [5]
            go_on(loaded, copies, 5, 9)
            go_on(optimizer, variables, 5, 9)
            assert image(loaded, copies) == image(optimizer, variables)
            if kind in ("dict", "h5py", "zarr group"):
                for key in list(target.keys()):
                    del target[key]
    finally:
        if server is not None:
            server.stop()


@pytest.mark.parametrize("store", [dict, h5py.File, zarr.open_group], ids=["dict", "h5py", "zarr"])
def test_keras_positions_in_any_mapping(store, tmp_path):
    store = store() if store is dict else store(tmp_path / "positions", mode="w")
    variables, optimizer = variables_of("float64"), optimizer_of("scaled")
    optimizer.build(variables)
    go_on(optimizer, variables, 0, 3)
    optimizer.save_own_variables(store)
    optimizer.save_own_variables(store)
    other = optimizer_of("scaled")
    other.build({k: v.copy() for k, v in variables.items()})
    other.load_own_variables(store)
    assert image(other, variables) == image(optimizer, variables) | {"skipped": 0}
    if isinstance(store, h5py.File):
        store.close()


@pytest.mark.parametrize("one", [libraries.numpy, libraries.to_torch, libraries.fortran, libraries.strided])
@pytest.mark.parametrize("other", [libraries.numpy, libraries.to_torch, libraries.transposed, libraries.strict])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_from_one_library_and_loaded_into_another(one, other, dtype, tmp_path):
    if other is libraries.strict and dtype == "bfloat16":
        pytest.skip("array_api_strict has no bfloat16")
    variables = variables_of(dtype, one)
    optimizer = AdamW(0.1, amsgrad=True)
    optimizer.build(variables)
    go_on(optimizer, variables, 0, 3, one)
    for suffix in ("npz", "safetensors", "h5"):
        optimizer.save(tmp_path / f"s.{suffix}", variables=True, durable=False)
        copies = {k: other(np.zeros(v.shape), dtype) for k, v in variables.items()}
        loaded = AdamW.load(tmp_path / f"s.{suffix}", copies)
        for name, array in optimizer.state.items():
            np.testing.assert_array_equal(libraries.look(loaded.state[name]), libraries.look(array))
        for name, array in variables.items():
            np.testing.assert_array_equal(*(libraries.look(a).astype("c16") for a in (copies[name], array)))


def test_bits_of_bfloat16_survive(tmp_path):
    """NaNs with a payload, denormals, both zeros."""
    bits = np.arange(2**16, dtype=np.uint16)
    for suffix in STORES:
        optimizer = AdamW(master_weights=False)
        optimizer.build({"n": bits.copy().view(ml_dtypes.bfloat16)})
        optimizer.save(tmp_path / suffix, variables=True)
        tensor = torch.zeros(2**16, dtype=torch.bfloat16)
        AdamW.load(tmp_path / suffix, {"n": tensor})
        np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), bits)


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


def test_pending_until_the_first_build(tmp_path):
    variables, optimizer = variables_of("float32"), optimizer_of("everything")
    optimizer.add_variable((2,), "ones", name="mine")
    optimizer.build(variables)
    go_on(optimizer, variables, 0, 5)
    optimizer.save(
        tmp_path / "s.npz", extra={"best": float("inf"), "rng": np.random.default_rng(0).bit_generator.state}
    )
    loaded = AdamW.load(tmp_path / "s.npz")
    assert loaded.built is False
    assert (loaded.iterations, loaded.extra["best"]) == (1, float("inf"))
    random = np.random.default_rng(1)
    random.bit_generator.state = loaded.extra["rng"]
    assert random.random() == np.random.default_rng(0).random()
    with pytest.raises(ValueError, match=r"lacks the variables \['x'\] and holds \['v-0"):
        loaded.build({"x": np.zeros(3)})
    assert loaded.built is False
    # In another order, and still by name.
    copies = {k: variables[k].copy() for k in reversed(variables)}
    loaded.build(copies)
    assert image(loaded, copies) == image(optimizer, variables)
    assert list(loaded.engine.workspace.decayed) == list(reversed(optimizer.engine.workspace.decayed))


def build(variables, **options):
    optimizer = AdamW(**options)
    optimizer.build(variables)
    return optimizer


W = np.zeros(3, np.float32)
CIRCLE = []
CIRCLE.append(CIRCLE)
# what is done with a file of {"w": float32 (3,)} saved by AdamW(0.1) -> error, words
MISFITS = {
    "shape": (lambda p: AdamW.load(p, {"w": np.zeros(4, "f4")}), ValueError, ["'w'", "(3,)", "(4,)"]),
    "dtype": (lambda p: AdamW.load(p, {"w": np.zeros(3)}), ValueError, ["'w'", "float32", "float64"]),
    "name": (lambda p: AdamW.load(p, [W]), ValueError, ["'0'", "'w'"]),
    "class": (lambda p: LossScaleOptimizer.load(p), ValueError, ["AdamW", "LossScaleOptimizer"]),
    "amsgrad": (lambda p: build({"w": W}, amsgrad=True).restore(p), ValueError, ["velocity_hat", "'w'"]),
    "schedule": (
        lambda p: build({"w": W}, learning_rate=lambda: 0.1).restore(p),
        ValueError,
        ["learning_rate", "assign a schedule after"],
    ),
    "not built": (lambda p: AdamW().restore(p), ValueError, ["restore", "build"]),
    "no file": (lambda p: AdamW.load(p.with_name("none.npz")), FileNotFoundError, ["none.npz"]),
    "suffix": (lambda p: AdamW.load(p.with_name("s.pkl")), ValueError, ["s.pkl", ".npz", ".safetensors"]),
    "Keras's suffix": (lambda p: AdamW.load(p.with_name("s.weights.h5")), ValueError, ["from_keras"]),
    "no target": (lambda p: AdamW.load(3), TypeError, ["3", "int", "mapping"]),
    "save nowhere": (lambda p: build([W]).save(3.0), TypeError, ["3.0", "float"]),
    "save unbuilt": (lambda p: AdamW().save(p), ValueError, ["save", "build"]),
    "no folder": (lambda p: build([W]).save(p.parent / "none" / "s.npz"), FileNotFoundError, ["none"]),
    "extra array": (lambda p: build([W]).save(p, {"x": [W]}), TypeError, ["extra['x'][0]", "ndarray", "tolist"]),
    "extra keys": (lambda p: build([W]).save(p, {"x": {1: 2}}), TypeError, ["extra['x']", "key 1", "strings"]),
    "keep": (lambda p: Checkpoints(p.parent, keep=0), ValueError, ["keep", "0"]),
    "every": (lambda p: Checkpoints(p.parent, every=0), ValueError, ["every", "0"]),
    "folder at a URL": (lambda p: Checkpoints("s3://bucket/run", suffix=".zarr"), ValueError, ["directory", "s3://"]),
    "URL as a path": (lambda p: build([W]).save(Path("memory://x.zarr")), ValueError, ["memory:/x.zarr", "string"]),
    "dtype that no file holds": (
        lambda p: AdamW().add_variable((3,), dtype=">f4"),
        TypeError,
        ["dtype", ">f4", "native"],
    ),
    "lone surrogate": (lambda p: build({"\ud800": W}), ValueError, ["\\ud800", "surrogate"]),
    "extra of itself": (lambda p: build([W]).save(p, CIRCLE), ValueError, ["extra", "holds itself"]),
    "extra too long": (lambda p: build([W]).save(p, [10**5000]), ValueError, ["extra[0]", "bits"]),
    "no .safetensors": (lambda p: AdamW.load(p.with_name("n.safetensors")), FileNotFoundError, ["n.safetensors"]),
    "kind of file": (lambda p: Checkpoints(p.parent, suffix=".pt"), ValueError, [".pt", ".npz"]),
}


@pytest.mark.parametrize(("act", "error", "words"), MISFITS.values(), ids=MISFITS)
def test_misfits_change_nothing(act, error, words, tmp_path):
    path = tmp_path / "s.npz"
    build({"w": W}, learning_rate=0.1).save(path)
    before = path.read_bytes()
    with pytest.raises(error) as caught:
        act(path)
    for word in words:
        assert word in str(caught.value)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("store", [*STORES, "mapping"])
def test_added_arrays_keep_their_dtype(store, tmp_path):
    optimizer, target = build({"w": W}), {} if store == "mapping" else tmp_path / store
    array = optimizer.add_variable((3,), "ones", dtype=ml_dtypes.bfloat16, name="mine")
    optimizer.save(target)
    found = AdamW.load(target, {"w": W.copy()}).state["mine"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    other = build({"w": W})
    other.add_variable((3,), dtype="uint16", name="mine")
    with pytest.raises(ValueError, match=r"mine.*bfloat16.*uint16"):
        other.restore(target)


def test_a_mapping_keeps_what_is_its_own():
    store = {}
    optimizer = build({"w": W})
    optimizer.save(store)
    AdamW.load(store).state["iteration"][...] = 5
    loaded = AdamW.load(store)
    store["momentum/w"][...] = 7
    loaded.build({"w": W})
    np.testing.assert_array_equal(loaded.state["momentum/w"], 0)


def test_the_largest_document_loads(monkeypatch):
    optimizer = build({"w": W})
    length = len(manifest.encode(snapshot.take(optimizer, "").document))
    monkeypatch.setattr(manifest, "LONGEST", length + 1000)
    saved = 0
    for size in range(500, 1000):
        store = {}
        try:
            optimizer.save(store, "x" * size)
        except ValueError as error:
            assert "extra" in str(error)
        else:
            saved += 1
            assert len(AdamW.load(store).extra) == size
    assert 0 < saved < 500


def test_exclusions_that_were_saved_are_not_dropped_in_silence():
    store, optimizer = {}, AdamW()
    optimizer.exclude_from_weight_decay(var_names=["w"])
    optimizer.build({"w": W})
    optimizer.save(store)
    with pytest.warns(UserWarning, match=r"\['w'\], are replaced"):
        AdamW.load(store).exclude_from_weight_decay(var_names=["b"])


def test_functions_come_back_through_custom_objects(tmp_path):
    def rate(step):
        return 0.1 / (step + 1)

    variables = {"w": np.ones(3)}
    build(variables, learning_rate=rate).save(tmp_path / "s.npz")
    with pytest.raises(ValueError, match=r"s\.npz.*'rate'.*custom_objects"):
        AdamW.load(tmp_path / "s.npz")
    assert AdamW.load(tmp_path / "s.npz", variables, {"rate": rate}).learning_rate == 0.1


def test_restoring_tells_what_differs(tmp_path):
    optimizer = build({"w": np.ones(3)}, learning_rate=0.5, beta_1=0.8)
    optimizer.save(tmp_path / "s.npz")
    other = AdamW(0.1)
    other.exclude_from_weight_decay(var_names=["w"])
    other.build({"w": np.ones(3)})
    with pytest.warns(UserWarning, match=r"beta_1 is 0\.9, and was 0\.8; \['w'\] are excluded"):
        other.restore(tmp_path / "s.npz")
    assert (other.learning_rate, other.beta_1) == (0.5, 0.9)


def test_immutable_arrays(tmp_path):
    import jax.numpy as jnp

    build({"w": jnp.arange(3.0)}).save(tmp_path / "s.npz", variables=True)
    with pytest.raises(TypeError, match="saved_variables"):
        AdamW.load(tmp_path / "s.npz", {"w": jnp.zeros(3)})
    found = {name: jnp.asarray(array) for name, array in saved_variables(tmp_path / "s.npz").items()}
    assert AdamW.load(tmp_path / "s.npz", found).iterations == 0
    np.testing.assert_array_equal(found["w"], [0, 1, 2])


def test_averaged_variables_are_not_saved():
    optimizer = build({"w": np.ones(3)}, use_ema=True)
    with optimizer.averaged(), pytest.raises(RuntimeError, match="averaged"):
        optimizer.save({})


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("suffix", [".npz", ".zarr"])
def test_checkpoints(background, suffix, tmp_path):
    variables = {"w": np.ones(3)}
    optimizer = build(variables)
    seen = {}
    with Checkpoints(tmp_path / "runs", keep=2, every=2, background=background, suffix=suffix) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore_latest(optimizer) is None
        for step in range(1, 8):
            optimizer.apply({"w": np.full(3, float(step))})
            saved = checkpoints.save(optimizer, step, extra={"step": step}, variables=True, force=step == 7)
            assert (saved is None) == (step in (1, 3, 5))
            seen[step] = image(optimizer, variables)
        assert checkpoints.latest().name == f"step-000000000007{suffix}"
        names = [path.name for path in sorted((tmp_path / "runs").iterdir())]
        assert names == [f"step-000000000006{suffix}", f"step-000000000007{suffix}"]
        assert checkpoints.restore_latest(optimizer).step == 7
        if suffix == ".npz":
            newest = tmp_path / "runs" / names[-1]
            newest.write_bytes(newest.read_bytes()[:-50])
            with pytest.warns(UserWarning, match=r"step-000000000007.*cannot be read"):
                step, extra, path = checkpoints.restore_latest(optimizer)
            assert (step, extra, path.name) == (6, {"step": 6}, names[0])
            assert image(optimizer, variables) == seen[6]


def test_background_errors_surface_and_steps_go_on(tmp_path, monkeypatch):
    variables = {"w": np.ones(3)}
    optimizer = build(variables)
    checkpoints = Checkpoints(tmp_path, background=True)
    gate, write = threading.Event(), adamw_numba.saving.archive.write
    monkeypatch.setattr(adamw_numba.saving.archive, "write", lambda *given: (gate.wait(10), write(*given)))
    before = image(optimizer, variables)
    checkpoints.save(optimizer, 1, variables=True)
    optimizer.apply({"w": np.ones(3)})
    gate.set()
    assert checkpoints.restore_latest(optimizer).step == 1
    assert image(optimizer, variables) == before

    def fail(*given):
        raise OSError(28, "No space left on device")

    for surfacing in (lambda: checkpoints.save(optimizer, 3), checkpoints.close):
        monkeypatch.setattr(adamw_numba.saving.archive, "write", fail)
        checkpoints.save(optimizer, 2)
        with pytest.raises(OSError, match="No space"):
            surfacing()
    checkpoints.close()


def test_errors_of_the_background_are_not_lost(tmp_path, monkeypatch):
    """Not by an interrupt while they are waited for, not where nobody calls `close`; a step not due does not wait."""
    optimizer, gate = build({"w": np.ones(3)}), threading.Event()

    def fail(*given):
        gate.wait(10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adamw_numba.saving.archive, "write", fail)
    checkpoints = Checkpoints(tmp_path, background=True, every=2)
    checkpoints.save(optimizer, 2)
    assert checkpoints.save(optimizer, 3) is None
    with monkeypatch.context() as patches:
        patches.setattr(
            adamw_numba.saving.checkpoints, "wait", lambda futures: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            checkpoints.close()
    gate.set()
    with pytest.raises(OSError, match="No space"):
        checkpoints.close()
    code = "import numpy, adamw_numba; from adamw_numba import manifest\n"
    code += "def fail(*given): raise OSError(28, 'No space left')\narchive.write = fail\n"
    code += "optimizer = adamw_numba.AdamW(); optimizer.build([numpy.ones(3)])\n"
    code += f"adamw_numba.Checkpoints({str(tmp_path)!r}, background=True).save(optimizer, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "could not be written" in done.stderr


def test_going_back_gives_up_what_was_later(tmp_path):
    optimizer = build({"w": np.ones(3)})
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 8, 9, 3, 4):
        checkpoints.save(optimizer, step, extra=step)
        assert checkpoints.restore_latest(optimizer).step == step
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_of_checkpoints_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("relative")
    monkeypatch.chdir("/")
    checkpoints.save(build({"w": np.ones(3)}), 1)
    assert checkpoints.latest() == tmp_path / "relative" / "step-000000000001.npz"


def test_what_cannot_be_read_is_not_nothing(tmp_path, monkeypatch):
    optimizer, checkpoints = build({"w": np.ones(3)}), Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(optimizer, step)
    with monkeypatch.context() as patches:
        patches.setattr(npz, "open", lambda *given: (_ for _ in ()).throw(OSError(5, "I/O error")), raising=False)
        for act in (checkpoints.latest, lambda: checkpoints.restore_latest(optimizer)):
            with pytest.raises(OSError, match="I/O error"):
                act()
    for path in tmp_path.iterdir():
        path.write_bytes(b"PK")
    for act in (checkpoints.latest, lambda: checkpoints.restore_latest(optimizer)):
        with pytest.warns(UserWarning, match="left out"), pytest.raises(CorruptFileError, match="holds 2 checkpoints"):
            act()


def test_a_save_beside_a_step_is_of_one_moment(tmp_path):
    """Steps and saves in two threads: every array of a file is of the same step."""
    variables = {f"w{i}": np.zeros(2000) for i in range(20)}
    optimizer = build(variables, learning_rate=0.1, weight_decay=0.0)
    ones, stop = {k: np.ones(2000) for k in variables}, threading.Event()

    def work():
        while not stop.is_set():
            optimizer.apply(ones)

    thread = threading.Thread(target=work)
    thread.start()
    for number in range(10):
        time.sleep(0.01)
        optimizer.save(tmp_path / f"{number}.npz", variables=True, durable=False)
    stop.set()
    thread.join()
    for number in range(10):
        found = saved_variables(tmp_path / f"{number}.npz")
        assert len({array.tobytes() for array in found.values()}) == 1


@pytest.mark.parametrize("source", STORES)
def test_command_line(source, tmp_path, capsys):
    variables, optimizer = variables_of("bfloat16"), optimizer_of("scaled")
    optimizer.build(variables)
    go_on(optimizer, variables, 0, 5)
    optimizer.save(tmp_path / source, extra={"e": 1}, variables=True)
    assert main(["inspect", str(tmp_path / source)]) == 0
    table = capsys.readouterr().out
    assert "LossScaleOptimizer, step 4" in table
    assert "bfloat16" in table
    assert main(["inspect", "--json", str(tmp_path / source)]) == 0
    assert json.loads(capsys.readouterr().out)["extra"] == {"e": 1}
    for target in STORES:
        converted = tmp_path / f"converted-{target}"
        assert main(["convert", str(tmp_path / source), str(converted)]) == 0
        assert main(["verify", str(converted)]) == 0
        copies = {k: np.zeros_like(v) for k, v in variables.items()}
        assert image(LossScaleOptimizer.load(converted, copies), copies) == image(optimizer, variables)
    if source == "s.npz":
        (tmp_path / source).write_bytes(b"PK nonsense")
        capsys.readouterr()
        assert main(["verify", str(tmp_path / source)]) == 1
        assert "s.npz" in capsys.readouterr().err


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
    import zlib

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
    assert (optimizer.extra, optimizer.inner_optimizer.engine.workspace.decayed) == (expected["extra"], [True, False])


def test_golden_files_are_there():
    assert len(GOLDEN) == 5


def test_errors_are_one_class():
    assert issubclass(CorruptFileError, ValueError)
    assert npz.MANIFEST == "manifest.json"
