"""Moments in 16 and 8 bits, saved into every store and gone on with, bit for bit."""

import re

import numpy as np
import pytest
from helpers import libraries
from helpers.states import STORES
from helpers.thread_ranks import on_ranks

from adamw_numba import AdamW, LossScaleOptimizer
from adamw_numba.arrays import as_numpy
from adamw_numba.interop import to_torch

MOMENTS = ("bfloat16", "8bit")
OPTIONS = {"amsgrad": True, "use_ema": True, "global_clipnorm": 0.5}
SHAPES = {"a": (40, 64), "b": (5,), "c": (), "d/e": (1000,)}
MAKES = {"NumPy": libraries.numpy, "torch": libraries.to_torch}


def values(seed, make=libraries.numpy, dtype="float32"):
    generator = np.random.default_rng(seed)
    return {name: make(generator.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def go_on(optimizer, start, stop, make=libraries.numpy, dtype="float32"):
    for step in range(start, stop):
        optimizer.apply(values(1 + step, make, dtype))


def image(variables, optimizer):
    arrays = {**variables, **optimizer.state}
    return {name: as_numpy(array).tobytes() for name, array in arrays.items()}


def uninterrupted(moments, make=libraries.numpy, dtype="float32", stop=9):
    variables = values(0, make, dtype)
    optimizer = AdamW(0.01, moments=moments, seed=3, **OPTIONS)
    optimizer.build(variables)
    go_on(optimizer, 0, stop, make, dtype)
    return variables, optimizer


@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("moments", MOMENTS)
def test_every_store(moments, store, dtype, tmp_path):
    """Saved by NumPy's, gone on with by torch's."""
    expected = image(*uninterrupted(moments, dtype=dtype))
    _, optimizer = uninterrupted(moments, dtype=dtype, stop=4)
    path = tmp_path / f"state{store}"
    optimizer.save(path, variables=True)
    for make in MAKES.values():
        variables = values(7, make, dtype)
        loaded = AdamW.load(path, variables)
        assert (loaded.moments, loaded.seed) == (moments, 3)
        go_on(loaded, 4, 9, make, dtype)
        assert image(variables, loaded) == expected


@pytest.mark.parametrize("moments", MOMENTS)
def test_restored_and_its_weights_set(moments):
    """Also of a dynamic loss scale."""
    _, optimizer = uninterrupted(moments, stop=4)
    store = {}
    LossScaleOptimizer(optimizer).save(store)
    _, other = uninterrupted(moments, stop=2)
    LossScaleOptimizer(other).restore(store)
    _, weights = uninterrupted(moments, stop=0)
    weights.set_weights(optimizer.variables)
    wanted = {name: array.tobytes() for name, array in optimizer.state.items()}
    for found in (other, weights):
        assert {name: array.tobytes() for name, array in found.state.items()} == wanted


@pytest.mark.parametrize("moments", MOMENTS)
def test_positions_of_keras(moments):
    _, optimizer = uninterrupted(moments, stop=4)
    store = {}
    optimizer.save_own_variables(store)
    _, other = uninterrupted(moments, stop=0)
    other.load_own_variables(store)
    assert {n: a.tobytes() for n, a in other.state.items()} == {n: a.tobytes() for n, a in optimizer.state.items()}


@pytest.mark.parametrize("was", ["float32", *MOMENTS])
@pytest.mark.parametrize("now", ["float32", *MOMENTS])
def test_other_moments_are_refused(was, now):
    _, optimizer = uninterrupted(was, stop=2)
    store = {}
    optimizer.save(store)
    variables, other = uninterrupted(now, stop=2)
    before = image(variables, other)
    if was == now:
        other.restore(store)
        return
    with pytest.raises(ValueError, match="moments"):
        other.restore(store)
    assert image(variables, other) == before


CUTS = {1: [0, 40], 2: [0, 16, 40], 3: [0, 4, 20, 40]}  # rows of 64 elements, at multiples of a block


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize(("first", "then"), [(1, 3), (3, 2), (2, 1), (3, 3)])
def test_folders(first, then, moments, tmp_path):
    """Saved by some ranks, gone on with by others, which cut elsewhere."""
    whole = np.random.default_rng(0).standard_normal((12, 40, 64)).astype(np.float32)
    expected = whole[0].copy()
    optimizer = AdamW(0.01, moments=moments, **OPTIONS)
    optimizer.build({"w": expected})
    for gradient in whole[1:7]:
        optimizer.apply({"w": gradient})

    def run(ranks, size, start, stop, folder):
        own = slice(*CUTS[size][ranks.rank : ranks.rank + 2])
        piece = whole[0][own].copy()
        how = {"comm": ranks, "pieces": {"w": (own, slice(0, 64))}}
        if start:
            optimizer = AdamW.load(folder, {"w": piece}, **how)
        else:
            optimizer = AdamW(0.01, moments=moments, **OPTIONS)
            optimizer.build({"w": piece}, **how)
        for gradient in whole[1 + start : 1 + stop]:
            optimizer.apply({"w": gradient[own].copy()})
        if not start:
            optimizer.save(folder, variables=True)
        return piece

    folder = tmp_path / "together"
    on_ranks(first, lambda ranks: run(ranks, first, 0, 3, folder))
    found = on_ranks(then, lambda ranks: run(ranks, then, 3, 6, folder))
    np.testing.assert_array_equal(np.concatenate(found), expected)
    alone = whole[0].copy()
    loaded = AdamW.load(folder, {"w": alone})
    for gradient in whole[4:7]:
        loaded.apply({"w": gradient})
    np.testing.assert_array_equal(alone, expected)


@pytest.mark.parametrize("moments", MOMENTS)
def test_other_libraries_get_numbers(moments):
    """The float32 that the bits stand for."""
    pytest.importorskip("torch")
    _, optimizer = uninterrupted(moments, stop=3)
    wide, wanted = uninterrupted("float32", stop=3)
    found = to_torch(optimizer, leave_out=("use_ema", "global_clipnorm"))["state"]
    for number, name in enumerate(wide):
        for theirs, ours in (("exp_avg", "momentum"), ("exp_avg_sq", "velocity")):
            moment, exact = np.asarray(found[number][theirs]), wanted.state[f"{ours}/{name}"]
            assert moment.dtype == np.float32
            assert np.abs(moment - exact).mean() < 0.1 * np.abs(exact).mean()


@pytest.mark.parametrize(("moments", "size"), [("float32", 8), ("bfloat16", 4), ("8bit", 2)])
def test_the_bytes_of_the_state_are_told(moments, size):
    optimizer = AdamW(moments=moments)
    optimizer.build({"w": np.zeros(2**16, np.float32)})
    told = int(re.search(r"state_bytes=(\d+)", repr(optimizer))[1])
    assert told == 16 + size * 2**16 + (8 * 2**16 // 256 if moments == "8bit" else 0)


def optimizer_of(kind):
    optimizer = AdamW(moments="8bit", master_weights="remainder")
    optimizer.build([libraries.numpy(np.ones(512), kind)])
    optimizer.apply([np.ones(512, np.float32)])
    return optimizer


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("momentum/0", lambda x: x.astype(np.int64) + 300, "has dtype int64; expected uint8"),
        ("velocity/0", lambda x: x.astype(np.uint16), "has dtype uint16; expected uint8"),
        ("master/0", lambda x: x.astype(np.int32) + 70_000, "has dtype int32; expected int16"),
        ("momentum_scale/0", lambda x: x * 3, "expected powers of two"),
        ("velocity_scale/0", lambda x: -x, "'velocity_scale/0' holds -.* at 0; expected powers of two"),
        ("velocity_scale/0", lambda x: x.astype(np.float64) + 1e300, "expected powers of two"),
    ],
)
def test_weights_that_are_no_codes(name, change, expected):
    optimizer = optimizer_of("bfloat16")
    before = [as_numpy(array).tobytes() for array in optimizer.variables]
    weights = [change(x) if key == name else x for key, x in optimizer.state.items()]
    names = list(optimizer.state)
    assert name in names
    with pytest.raises(ValueError, match=expected):
        optimizer.set_weights(weights)
    assert [as_numpy(array).tobytes() for array in optimizer.variables] == before
