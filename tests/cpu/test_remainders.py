"""`master_weights="remainder"`: a bfloat16 variable and 16 bits beside it are the float32 master, bit for bit."""

import re

import numpy as np
import pytest
from helpers import libraries
from helpers.remainders import OPTIONS, bits_of, joined, patterns
from helpers.states import STORES
from numba import njit

from adamw_numba import AdamW
from adamw_numba.array_api.words import bindings
from adamw_numba.arrays import as_numpy, namespace
from adamw_numba.arrays.masters import make_splitting
from adamw_numba.cpu import words

MAKES = {"NumPy": libraries.numpy, "strided": libraries.strided, "torch": libraries.to_torch}


def trained(make, steps=7, shape=(9, 70), **options):
    generator = np.random.default_rng(1)
    variable = make(generator.standard_normal(shape), "bfloat16")
    optimizer = AdamW(1e-3, **options)
    optimizer.build([variable])
    for _ in range(steps):
        optimizer.apply([make(generator.standard_normal(shape), "bfloat16")])
    return variable, optimizer


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_numbers_are_those_of_masters(options, make):
    """Variables differ where a master is a tie, which rounds to the even neighbour, and here away from zero."""
    expected, with_masters = trained(make, **options)
    found, optimizer = trained(make, master_weights="remainder", **options)
    remainder = libraries.look(optimizer.state["master/0"])
    assert str(remainder.dtype) == "int16"
    np.testing.assert_array_equal(
        joined(found, remainder), libraries.look(with_masters.state["master/0"]).view(np.uint32)
    )
    is_tie = np.abs(remainder.astype(int)) == 2**15
    np.testing.assert_array_equal(bits_of(found)[~is_tie], bits_of(expected)[~is_tie])
    for name, slot in with_masters.state.items():
        if not name.startswith("master"):
            np.testing.assert_array_equal(libraries.look(optimizer.state[name]), libraries.look(slot), err_msg=name)


def test_whole_arrays_give_the_same():
    """JAX's functions compute with it too; a gradient that is a power of two leaves no rounding to differ in."""
    gradient = np.full(300, 0.5)
    found = {}
    for name, make in (("kernel", libraries.numpy), ("JAX", libraries.to_jax)):
        variables = [make(np.linspace(-3, 3, 300), "bfloat16")]
        optimizer = AdamW(1e-3, weight_decay=0.0, master_weights="remainder")
        optimizer.build(variables)
        state = optimizer.variables
        for _ in range(5):
            variables, state = optimizer.stateless_apply(state, [make(gradient, "bfloat16")], variables)
        found[name] = joined(np.asarray(variables[0]), np.asarray(state[-1])).view(np.float32)
    np.testing.assert_allclose(found["JAX"], found["kernel"], rtol=1e-6)
    assert np.abs(found["kernel"] - np.linspace(-3, 3, 300)).max() > 0.004


def compiled():
    split, joined, _ = make_splitting(njit, words.word, words.bits_of, words.number_of, words.choose)

    @njit
    def both(x):
        upper, again = np.empty(x.size, np.uint32), np.empty(x.size, np.uint32)
        for i in range(x.size):
            upper[i], remainder = split(x[i])
            again[i] = words.bits_of(joined(upper[i], remainder))
        return upper, again

    return both


def whole(make):
    def both(x):
        array = make(x, "float32")
        xp = namespace(array)
        split, joined, _ = make_splitting(*bindings(xp))
        upper, remainder = split(array)
        return as_numpy(upper).astype(np.uint32), as_numpy(joined(upper, remainder)).view(np.uint32)

    return both


@pytest.mark.parametrize(
    "both", [compiled(), whole(libraries.numpy), whole(libraries.to_torch)], ids=["compiled", "NumPy", "torch"]
)
def test_every_number_comes_back(both):
    x = patterns().view(np.float32)
    is_nan = np.isnan(x)
    upper, again = both(x)
    np.testing.assert_array_equal(again[~is_nan], x.view(np.uint32)[~is_nan])
    assert np.isnan(again.view(np.float32)[is_nan]).all()
    with np.errstate(all="ignore"):
        nearest = x.astype(libraries.DTYPES["bfloat16"]).view(np.uint16)
    is_tie = (x.view(np.uint32) & 0xFFFF) == 0x8000
    np.testing.assert_array_equal(upper[~is_tie & ~is_nan], nearest[~is_tie & ~is_nan])
    np.testing.assert_array_equal(upper[is_tie & ~is_nan], ((x.view(np.uint32) >> 16) + 1)[is_tie & ~is_nan])


def test_a_negative_remainder_beside_a_0_is_ignored():
    _, joined, _ = make_splitting(*bindings(np))
    zeros, remainders = np.array([0, 0, 0, 0x8000, 0x8000], np.uint32), np.array([0, 5, 0xFFFF, 0x8000, 3], np.uint32)
    found = joined(zeros, remainders).view(np.uint32)
    np.testing.assert_array_equal(found, [0, 5, 0, 0x80000000, 0x80000003])


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_what_the_owner_writes_counts_to_its_last_bit(make):
    """It is half a unit in the last place from what is gone on with, at most; and a 0 never becomes a NaN."""
    variable, optimizer = trained(make, master_weights="remainder", weight_decay=0.0)
    remainder = libraries.look(optimizer.state["master/0"])
    assert (remainder < 0).any()
    assert (remainder > 0).any()
    written = np.full((9, 70), 7.0)
    written[::2], written[1] = 0.0, -0.0
    variable[...] = make(written, "bfloat16")
    optimizer.learning_rate = 0.0
    optimizer.apply([make(np.ones((9, 70)), "bfloat16")])
    np.testing.assert_array_equal(np.asarray(libraries.look(variable), np.float32), written)


@pytest.mark.parametrize("store", STORES)
def test_every_store(store, tmp_path):
    """Saved by NumPy's, gone on with by torch's."""
    generator = np.random.default_rng(2)
    gradients = [generator.standard_normal(300) for _ in range(6)]
    finals = {}
    for stops in (False, True):
        variable = libraries.numpy(np.linspace(-1, 1, 300), "bfloat16")
        optimizer = AdamW(1e-3, master_weights="remainder", moments="bfloat16")
        optimizer.build([variable])
        for k, gradient in enumerate(gradients):
            if stops and k == 3:
                optimizer.save(tmp_path / f"state{store}", variables=True)
                variable = libraries.to_torch(np.zeros(300), "bfloat16")
                optimizer = AdamW.load(tmp_path / f"state{store}", [variable])
                assert optimizer.master_weights == "remainder"
            optimizer.apply(
                [gradient.astype(np.float32)] if k < 3 or not stops else [libraries.to_torch(gradient, "float32")]
            )
        finals[stops] = joined(variable, optimizer.state["master/0"])
    np.testing.assert_array_equal(finals[True], finals[False])


@pytest.mark.parametrize("kinds", [("remainder", True), (True, "remainder")])
def test_a_save_of_the_other_kind_is_refused(kinds):
    store = {}
    trained(libraries.numpy, master_weights=kinds[0])[1].save(store)
    other = trained(libraries.numpy, master_weights=kinds[1])[1]
    with pytest.raises(ValueError, match=re.escape("master of '0' (on which `master_weights` decides)")):
        other.restore(store)


def test_who_has_one():
    variables = [libraries.numpy(np.ones(3), kind) for kind in ("bfloat16", "float16", "float32")]
    optimizer = AdamW(master_weights="remainder")
    optimizer.build(variables)
    masters = {name: str(array.dtype) for name, array in optimizer.state.items() if name.startswith("master")}
    assert masters == {"master/0": "int16", "master/1": "float32"}
    assert AdamW.from_config(optimizer.get_config()).master_weights == "remainder"


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_averages_come_and_go(make):
    variable, optimizer = trained(make, master_weights="remainder", use_ema=True, ema_momentum=0.9)
    before, remainder = bits_of(variable), bits_of(optimizer.state["master/0"])
    with optimizer.averaged():
        assert (bits_of(variable) != before).any()
    np.testing.assert_array_equal(bits_of(variable), before)
    np.testing.assert_array_equal(bits_of(optimizer.state["master/0"]), remainder)


def test_bytes_of_state():
    """18 bytes for a parameter, gradient and variable included, instead of 30 with masters and float32 moments."""
    found = {}
    for kind, options in (("small", {"master_weights": "remainder", "moments": "bfloat16"}), ("default", {})):
        optimizer = AdamW(**options)
        optimizer.build([libraries.numpy(np.ones(1000), "bfloat16")])
        found[kind] = sum(array.nbytes for name, array in optimizer.state.items() if "/" in name)
    assert found == {"small": 6_000, "default": 12_000}
