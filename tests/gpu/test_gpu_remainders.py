"""`master_weights="remainder"` on a GPU: the numbers of float32 masters, bit for bit.

See helpers/on_gpu.py for where these tests run, and cpu/test_remainders.py for the same on the CPU.
"""

import warnings

import numpy as np
import pytest
from helpers import libraries
from helpers.on_gpu import MAKERS, SIMULATED, marks, tensor
from helpers.remainders import OPTIONS, bits_of, joined, patterns
from test_gpu_graphs import captured

from adamw_numba import AdamW, schedules
from adamw_numba.array_api.words import bindings
from adamw_numba.arrays import as_numpy, namespace
from adamw_numba.arrays.masters import make_splitting

pytestmark = marks

WITHOUT_BFLOAT = () if SIMULATED else (libraries.on_gpu, libraries.to_cupy, libraries.cupy_fortran)
MAKES = [make for make in MAKERS if make not in WITHOUT_BFLOAT]
MOMENTS = ("float32", "bfloat16", "8bit")
SHAPES = {"a": (9, 70), "b": (5,), "c": (), "d": (0, 3)}
if not SIMULATED:
    SHAPES |= {"a": (301, 70), "b": (100_037,)}
on_every_library = pytest.mark.parametrize("make", MAKES or [None], ids=lambda make: getattr(make, "__name__", "none"))
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
with_moments = pytest.mark.parametrize("moments", MOMENTS)


def made(make, seed):
    generator = np.random.default_rng(seed)
    return {name: make(generator.standard_normal(shape), "bfloat16") for name, shape in SHAPES.items()}


def go_on(optimizer, start, stop, make=tensor):
    """Every third step without some of the gradients."""
    for step in range(start, stop):
        gradients = made(make, 1 + step) | ({"a": None, "c": None} if step % 3 == 2 else {})
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            optimizer.apply(gradients)


def trained(make=tensor, stop=7, **options):
    variables = made(make, 0)
    optimizer = AdamW(1e-3, **options)
    optimizer.build(variables)
    go_on(optimizer, 0, stop, make)
    return variables, optimizer


def image(variables, optimizer):
    """All arrays, of bfloat16 the bits."""
    return {name: as_numpy(each) for name, each in ({**variables, **optimizer.state}).items()}


def numbers(variables, optimizer):
    return {name: joined(each, optimizer.state[f"master/{name}"]) for name, each in variables.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, each in found.items():
        np.testing.assert_array_equal(each, expected[name], err_msg=name)


@with_options
@on_every_library
def test_the_numbers_are_those_of_masters(make, options):
    """Variables differ where a master is a tie, which rounds to the even neighbour, and here away from zero."""
    expected, with_masters = trained(make, **options)
    variables, optimizer = trained(make, master_weights="remainder", **options)
    masters = {name: as_numpy(with_masters.state[f"master/{name}"]).view(np.uint32) for name in SHAPES}
    same(numbers(variables, optimizer), masters)
    for name, variable in variables.items():
        remainder = as_numpy(optimizer.state[f"master/{name}"])
        assert remainder.dtype == np.int16
        is_tie = np.abs(remainder.astype(int)) == 2**15
        np.testing.assert_array_equal(bits_of(variable)[~is_tie], bits_of(expected[name])[~is_tie])
    others = ({n: a for n, a in image({}, each).items() if "master" not in n} for each in (optimizer, with_masters))
    same(*others)


def test_every_number_comes_back():
    """Those that the CPU has split, through a step that changes nothing."""
    x = patterns() if not SIMULATED else patterns().reshape(-1, 8)[::1997].ravel()
    x = x.view(np.float32)[np.isfinite(x.view(np.float32))]
    split, *_ = make_splitting(*bindings(namespace(x)))
    upper, remainder = split(x)
    variable = libraries.numpy(np.zeros(x.shape), "bfloat16")
    optimizer = AdamW(0.0, weight_decay=0.0, master_weights="remainder")
    optimizer.build({"w": variable})
    variable[...] = upper.astype(np.uint16).view(variable.dtype)
    optimizer.state["master/w"][...] = remainder.astype(np.uint16).view(np.int16)
    store, variables = {}, {"w": tensor(np.zeros(x.shape), "bfloat16")}
    optimizer.save(store, variables=True)
    loaded = AdamW.load(store, variables)
    loaded.apply({"w": tensor(np.ones(x.shape), "bfloat16")})
    np.testing.assert_array_equal(numbers(variables, loaded)["w"], x.view(np.uint32))


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("size", [7, 517])
@with_moments
def test_alignment_and_chunks(moments, size, options, monkeypatch):
    from adamw_numba.gpu import workload

    random = np.random.default_rng(size)
    start, gradients = random.normal(size=size), random.normal(size=(2, size))
    results = []
    for p_offset, g_offset, chunk in [(0, 0, None), (1, 1, None), (8, 8, None), (0, 5, None), (0, 0, 256), (8, 0, 512)]:
        with monkeypatch.context() as patch:
            if chunk:
                patch.setattr(workload, "chunk_of", lambda elements, processors, chunk=chunk: chunk)
            large = tensor(np.concatenate([np.zeros(p_offset), start, np.zeros(3)]), "bfloat16")
            variable = large[p_offset : p_offset + size]
            optimizer = AdamW(0.1, moments=moments, master_weights="remainder", **options)
            optimizer.build({"w": variable})
            for row in gradients:
                optimizer.apply({"w": tensor(np.concatenate([np.zeros(g_offset), row]), "bfloat16")[g_offset:]})
            results.append(image({"w": variable}, optimizer))
            whole = libraries.look(large)
            assert not whole[:p_offset].any()  # nothing else was written
            assert not whole[p_offset + size :].any()
    for other in results[1:]:
        same(other, results[0])


def test_what_the_owner_writes_counts_and_a_zero_never_becomes_a_nan():
    variables, optimizer = trained(master_weights="remainder", weight_decay=0.0)
    remainder = as_numpy(optimizer.state["master/a"])
    assert (remainder < 0).any()
    assert (remainder > 0).any()
    written = np.full(SHAPES["a"], 7.0)
    written[::2], written[1] = 0.0, -0.0
    if SIMULATED:
        variables["a"].copy_to_device(libraries.numpy(written, "bfloat16"))
    else:
        variables["a"].copy_(tensor(written, "bfloat16"))
    optimizer.learning_rate = 0.0
    go_on(optimizer, 0, 1)
    found = np.asarray(libraries.look(variables["a"]), np.float64)
    np.testing.assert_array_equal(found, written)


@on_every_library
def test_averages_come_and_go(make):
    variables, optimizer = trained(make, master_weights="remainder", use_ema=True, ema_momentum=0.9)
    before = image(variables, optimizer)
    with optimizer.averaged():
        assert (as_numpy(variables["a"]) != before["a"]).any()
    same(image(variables, optimizer), before)


@with_moments
def test_saved_on_one_and_gone_on_with_on_the_other(moments):
    """The bits are kept both ways, and so is what later steps make of them, but for fused products and sums."""
    options = {"master_weights": "remainder", "moments": moments}
    for first, second in ((libraries.numpy, tensor), (tensor, libraries.numpy)):
        saved, optimizer = trained(first, stop=4, **options)
        store, variables = {}, made(second, 9)
        optimizer.save(store, variables=True)
        loaded = AdamW.load(store, variables)
        assert loaded.master_weights == "remainder"
        same(image(variables, loaded), image(saved, optimizer))
        go_on(loaded, 4, 7, second)
        go_on(optimizer, 4, 7, first)
        for name, found in numbers(variables, loaded).items():
            expected = numbers(saved, optimizer)[name].view(np.float32)
            np.testing.assert_allclose(found.view(np.float32), expected, rtol=1e-5, atol=1e-3)
            differs = np.abs(found.view(np.float32) - expected) > 1e-6 + 1e-5 * np.abs(expected)
            assert np.sum(differs) <= 0.01 * expected.size


@pytest.mark.parametrize(
    "options", [{}, {"use_ema": True, "ema_overwrite_frequency": 2, "gradient_accumulation_steps": 3, "clipnorm": 0.5}]
)
@with_moments
def test_replays_have_the_bits_of_eager_steps(moments, options):
    results, steps = [], 6 if SIMULATED else 20
    for is_captured in (False, True):
        variables, gradients = made(tensor, 0), made(tensor, 1)
        rate = schedules.CosineDecay(0.1, 30, 0.1)
        optimizer = AdamW(rate, moments=moments, master_weights="remainder", **options)
        optimizer.build(variables)
        optimizer.apply(gradients)
        if is_captured:
            with captured() as graph:
                optimizer.apply(gradients)
        for _ in range(steps):
            graph.replay() if is_captured else optimizer.apply(gradients)
        optimizer.apply(gradients)
        results.append(image(variables, optimizer))
    same(*results)
