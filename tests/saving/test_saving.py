"""Saved, loaded in a new process, and gone on with: bit for bit, through every store and every library."""

import json
import subprocess
import sys
import threading
import time

import h5py
import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from helpers import libraries, states
from helpers.states import CONFIGS, DRAWN, DTYPES, STORES, build, go_on, image, optimizer_of, variables_of

from adamw_numba import AdamW, saved_variables

W = np.zeros(3, np.float32)


@pytest.fixture(scope="module")
def interrupted_runs(tmp_path_factory):
    """Runs of every kind, saved at step 5 into every store: the files, and every bit after step 9."""
    folder, jobs, expected = tmp_path_factory.mktemp("runs"), [], []
    for dtype in DTYPES:
        for config in CONFIGS:
            if DRAWN.get(config, dtype) != dtype:
                continue
            variables, optimizer = variables_of(dtype), optimizer_of(config)
            optimizer.build(variables)
            go_on(optimizer, variables, 0, 5)
            for store in STORES:
                path = folder / f"{dtype}-{config}-{store}"
                optimizer.save(path, extra={"epoch": 5}, variables=True, durable=False)
            jobs.append((str(folder / f"{dtype}-{config}-"), dtype, config))
            go_on(optimizer, variables, 5, 9)
            expected.append(image(optimizer, variables))
    return jobs, expected


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_resumed_in_a_new_process_bit_for_bit(store, interrupted_runs):
    runs, expected = interrupted_runs
    jobs = [(f"{start}{store}", dtype, config) for start, dtype, config in runs]
    done = subprocess.run([sys.executable, states.__file__], input=json.dumps(jobs), capture_output=True, text=True)
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
    "kind",
    [
        *("dict", "h5py", "zarr group", "memory URL", "memory store"),
        pytest.param("s3 fsspec", marks=pytest.mark.slow),
        pytest.param("s3 obstore", marks=pytest.mark.slow),
    ],
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
    decays = [[each.group_of(name).weight_decay for name in variables] for each in (loaded, optimizer)]
    assert decays[0] == decays[1]


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
        before = optimizer.iterations
        while optimizer.iterations == before and thread.is_alive():
            time.sleep(0.001)
        optimizer.save(tmp_path / f"{number}.npz", variables=True, durable=False)
    stop.set()
    thread.join()
    for number in range(10):
        found = saved_variables(tmp_path / f"{number}.npz")
        assert len({array.tobytes() for array in found.values()}) == 1
