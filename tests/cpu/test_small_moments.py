"""Moments in 16 and 8 bits: their rounding compared with plain NumPy, and what must not make a difference."""

import numpy as np
import pytest
from helpers import libraries
from helpers.rounding import BLOCK, as_bfloat, as_bytes, noise, numbers
from helpers.thread_ranks import on_ranks

from adamw_numba import AdamW
from adamw_numba.arrays import as_numpy
from adamw_numba.distributed import Sharded

# The first step, whose moments are numbers that are known


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_the_first_step_in_16_bits(seed):
    gradient = (np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-9, 11).repeat(50)).astype(
        np.float32
    )
    gradient[:3] = 0, -0.0, 1
    optimizer = AdamW(moments="bfloat16", seed=seed)
    optimizer.build({"w": np.zeros(1000, np.float32)})
    optimizer.apply({"w": gradient})
    bits = noise(seed, "w", 0, range(1000))
    m = gradient * np.float32(1 - 0.9)
    v = gradient * gradient * np.float32(1 - 0.999)
    np.testing.assert_array_equal(numbers(optimizer, "w")[0], as_bfloat(m, bits & 0xFFFF))
    np.testing.assert_array_equal(numbers(optimizer, "w")[1], as_bfloat(v, bits >> 16))


def test_the_first_step_in_8_bits():
    gradient = np.random.default_rng(0).standard_normal(1000)
    gradient[:300] *= 10.0 ** -np.arange(15).repeat(20)
    gradient = gradient.astype(np.float32)
    gradient[300:303] = 0, -0.0, 1e-17
    optimizer = AdamW(moments="8bit", seed=3)
    optimizer.build({"w": np.zeros(1000, np.float32)})
    optimizer.apply({"w": gradient})
    bits, starts = noise(3, "w", 0, range(1000)), np.arange(0, 1000, BLOCK)
    for found, exact, shifted, offset in zip(
        numbers(optimizer, "w"),
        (gradient * np.float32(1 - 0.9), gradient * gradient * np.float32(1 - 0.999)),
        (bits & 0xFFFFF, bits >> 12),
        (2.0**-15, 2.0**-31),
        strict=True,
    ):
        largest = np.maximum.reduceat(np.abs(exact), starts).repeat(BLOCK)[:1000]
        np.testing.assert_array_equal(found, as_bytes(exact, largest, shifted, offset))


# What 10,000 steps come to

COUNT, STEPS = 2**15, 10_000
GRADIENTS = {
    "constant": lambda t: 1.0,
    "decaying": lambda t: 0.9995**t,
    "alternating": lambda t: (-1.0) ** t + 0.5,
}


@pytest.mark.slow
@pytest.mark.parametrize("beta_2", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(("moments", "most"), [("bfloat16", 2e-3), ("8bit", 1e-2)])
def test_rounding_does_not_drift(moments, most, kind, beta_2):
    """The mean over many elements is that of exact arithmetic, and no moment stays behind."""
    # No element has another's numbers: 8 bits have 8 steps to a doubling, and all phases of them are here.
    factors = (2.0 ** np.linspace(-1, 0, COUNT)).astype(np.float32)
    optimizer = AdamW(1e-6, beta_2=beta_2, moments=moments)
    optimizer.build({"w": np.zeros(COUNT, np.float32)})
    m = v = 0.0
    checked = {100, 1000, STEPS - 1}
    for t in range(STEPS):
        x = GRADIENTS[kind](t)
        optimizer.apply({"w": factors * np.float32(x)})
        m, v = 0.9 * m + 0.1 * x, beta_2 * v + (1 - beta_2) * x * x
        if t in checked:
            found = numbers(optimizer, "w")
            for mean, wanted in zip(found, (m * factors, v * factors.astype(float) ** 2), strict=True):
                assert mean.mean() == pytest.approx(wanted.mean(), rel=most)
                # Each is a random walk around that; one that had stayed where it was would be a thousandfold.
                assert (np.abs(np.log2(mean / wanted)) < 4).all()


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_moments_of_gradients_that_have_stopped_go_to_0(moments):
    optimizer = AdamW(beta_2=0.9, moments=moments)
    optimizer.build({"w": np.zeros(500, np.float32)})
    optimizer.apply({"w": np.linspace(-1, 1, 500, dtype=np.float32)})
    for _ in range(1500):
        optimizer.apply({"w": np.zeros(500, np.float32)})
    assert not any(np.any(moment) for moment in numbers(optimizer, "w"))


@pytest.mark.parametrize("below", [0, 2.0**-20, 2.0**-16, 2.0**-15, 2.0**-14])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_of_a_block_has_a_code(sign, below):
    """Also where rounding up makes the next power of two of it."""
    largest = sign * np.float32(1.875 - below)
    optimizer = AdamW(0.01, beta_1=0.0, weight_decay=0.0, moments="8bit")
    optimizer.build({"w": np.ones(2**20, np.float32)})
    optimizer.apply({"w": np.full(2**20, largest)})
    momentum, velocity = numbers(optimizer, "w")
    np.testing.assert_allclose(momentum, largest, rtol=0.07)
    assert abs(momentum.mean() / largest - 1) < 1e-3
    assert velocity.min() > 0


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_noise_is_not_correlated(moments):
    """Of what is lost by rounding: between neighbours, both moments, and steps."""
    n, lost = 2**18, []
    optimizer = AdamW(1e-6, beta_1=0.0, beta_2=0.0, moments=moments)
    optimizer.build({"w": np.zeros(n, np.float32)})
    gradient = np.full(n, 1.0625 if moments == "8bit" else 1 + 2.0**-8, np.float32)  # half way
    for _ in range(3):
        optimizer.apply({"w": gradient})
        lost += [each - each.mean() for each in numbers(optimizer, "w")]
    most = 5 / np.sqrt(n)
    for k, one in enumerate(lost):
        for lag in (1, 2, 3, 16, 256, 16384):
            assert abs(np.corrcoef(one[lag:], one[:-lag])[0, 1]) < most
        for other in lost[k + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < most


# What must not make a difference

OPTIONS = {
    "plain": {},
    "clip": {"global_clipnorm": 0.5, "use_ema": True},
    "values": {"clipvalue": 0.5, "amsgrad": True, "maximize": True},
    "accumulation": {"gradient_accumulation_steps": 2, "nesterov": True, "clipnorm": 0.5},
    "overwriting": {"use_ema": True, "ema_overwrite_frequency": 2, "loss_scale_factor": 8.0},
}
SHAPES = {"a": (300, 70), "b": (5,), "c": (), "d": (0, 3), "e": (1000,), "f": (3, 4, 128)}


def values(seed, dtype="float32"):
    generator = np.random.default_rng(seed)
    found = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    if dtype.startswith("complex"):
        found = {name: value + 1j * generator.standard_normal(value.shape) for name, value in found.items()}
    return found


def trained(make, dtype="float32", steps=6, **options):
    variables = {name: make(value, dtype) for name, value in values(0, dtype).items()}
    optimizer = AdamW(0.01, **options)
    optimizer.build(variables)
    for step in range(steps):
        optimizer.apply({name: make(value, dtype) for name, value in values(1 + step, dtype).items()})
    return {name: as_numpy(variable) for name, variable in variables.items()}, optimizer


def same(found, expected):
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_threads(moments, options, monkeypatch):
    """Nor the size of chunks, as long as it is one of blocks."""
    expected, _ = trained(libraries.numpy, moments=moments, threads=1, **options)
    for name in ("HELPED_FROM", "WOKEN_FROM", "LEAST", "PART"):
        monkeypatch.setattr(f"adamw_numba.cpu.pool.{name}", 256)
    for chunk, threads in ((16_384, 2), (2048, 2), (512, 3)):
        monkeypatch.setattr("adamw_numba.arrays.runs.CHUNK", chunk)
        same(trained(libraries.numpy, moments=moments, threads=threads, **options)[0], expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
def test_layouts_in_16_bits(dtype, options):
    """Strided, backwards, and in Fortran's order: the noise of an element is that of its place."""
    expected, _ = trained(libraries.numpy, dtype, moments="bfloat16", **options)
    for make in (libraries.strided, libraries.fortran, libraries.to_torch):
        same(trained(make, dtype, moments="bfloat16", **options)[0], expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "complex64"])
@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_close_to_float32(moments, dtype, options):
    expected, _ = trained(libraries.numpy, dtype, **options)
    found, optimizer = trained(libraries.numpy, dtype, moments=moments, **options)
    exact = {"a", "e", "f"} - set(SHAPES) if moments == "bfloat16" else {"b", "c"}  # less than a block
    for name, array in found.items():
        moved = (
            np.abs(expected[name].astype(complex) - libraries.numpy(values(0, dtype)[name], dtype)).mean()
            if array.size
            else 1
        )
        error = np.abs(array.astype(complex) - expected[name]).mean() if array.size else 0
        assert error <= (0.0 if name in exact else {"bfloat16": 0.01, "8bit": 0.06}[moments] * moved), name
    assert f"state_bytes={sum(a.nbytes for a in optimizer.variables)}" in repr(optimizer)


@pytest.mark.parametrize("options", ["values", "accumulation"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_gradients_of_other_layouts(moments, dtype, options):
    """Each layout has its own loop, in all of which the same sums are rounded in the same way."""
    found = []
    for make in (libraries.numpy, libraries.strided, libraries.fortran):
        optimizer = AdamW(0.1, moments=moments, **OPTIONS[options])
        optimizer.build({"w": libraries.numpy(values(9)["a"], dtype)})
        for step in range(8):
            optimizer.apply({"w": make(values(step)["a"], dtype)})
        found.append({name: as_numpy(array) for name, array in optimizer.state.items()})
    same(found[1], found[0])
    same(found[2], found[0])


@pytest.mark.parametrize(("make", "odd"), [(libraries.strided, "aef"), (libraries.fortran, "af")])
def test_variables_of_other_layouts_keep_float32_in_8_bits(make, odd):
    found, optimizer = trained(make, moments="8bit")
    wide, narrow = trained(make)[0], trained(libraries.numpy, moments="8bit")[0]
    same(found, narrow | {name: wide[name] for name in odd})
    scaled = {name for name in SHAPES if f"momentum_scale/{name}" in optimizer.state}
    assert scaled == set("aef") - set(odd)


def test_a_variable_of_other_strides_in_8_bits():
    """It cannot be cut into blocks any more, and nothing is written."""
    torch = libraries.torch
    variable = torch.zeros(64, 64)
    optimizer = AdamW(moments="8bit")
    optimizer.build({"w": variable})
    variable.data = torch.zeros(64, 64).t()
    with pytest.raises(ValueError, match=r"'w'.*order of its axes"):
        optimizer.apply({"w": torch.ones(64, 64)})
    assert not variable.any()
    assert optimizer.iterations == 0


PIECES = {
    "rows": [(slice(0, 64), slice(0, 8)), (slice(64, 96), slice(0, 8)), (slice(96, 100), slice(0, 8))],
    "columns": [(slice(0, 100), slice(0, 3)), (slice(0, 100), slice(3, 4)), (slice(0, 100), slice(4, 8))],
    "tiles": [(slice(0, 37), slice(0, 8)), (slice(37, 100), slice(0, 5)), (slice(37, 100), slice(5, 8))],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cut", PIECES)
@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_pieces(moments, cut, options):
    whole, start = (
        [np.random.default_rng(k).standard_normal((100, 8)).astype(np.float32) for k in range(5)],
        np.ones((100, 8), np.float32),
    )
    optimizer = AdamW(0.01, moments=moments, **options)
    optimizer.build({"w": start})
    for gradient in whole:
        optimizer.apply({"w": gradient})

    def work(ranks):
        own = PIECES[cut][ranks.rank]
        piece = np.ones((100, 8), np.float32)[own].copy()
        optimizer = AdamW(0.01, moments=moments, **options)
        optimizer.build({"w": piece}, comm=ranks, pieces={"w": own})
        for gradient in whole:
            optimizer.apply({"w": gradient[own].copy()})
        return piece

    found = on_ranks(3, work)
    if moments == "8bit" and cut != "rows":
        assert any("begins and ends with a block of 256" in str(each) for each in found)
        return
    for own, piece in zip(PIECES[cut], found, strict=True):
        np.testing.assert_array_equal(piece, start[own])


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares(size, moments):
    """Of variables that all ranks have."""
    expected, _ = trained(libraries.numpy, moments=moments, global_clipnorm=0.5)

    def work(ranks):
        variables = {name: libraries.numpy(value, "float32") for name, value in values(0).items()}
        optimizer = Sharded(AdamW(0.01, moments=moments, global_clipnorm=0.5), ranks, gradients="reduced")
        optimizer.build(variables)
        for step in range(6):
            optimizer.apply({name: libraries.numpy(value, "float32") for name, value in values(1 + step).items()})
        return variables

    for found in on_ranks(size, work):
        same(found, expected)


# What is not finite, and what is refused


def test_what_is_not_finite_in_16_bits():
    largest = np.finfo(np.float32).max
    gradient = np.array([np.inf, -np.inf, np.nan, largest, -largest, 1], np.float32)
    gradient = np.concatenate([gradient, np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)])
    for seed in range(50):
        optimizer = AdamW(beta_1=0.0, moments="bfloat16", seed=seed)
        optimizer.build({"w": np.ones(len(gradient), np.float32)})
        optimizer.apply({"w": gradient})
        m, v = numbers(optimizer, "w")
        np.testing.assert_array_equal(m[:6], [np.inf, -np.inf, np.nan, 2.0**128 - 2.0**120, -(2.0**128) + 2.0**120, 1])
        assert np.isnan(m[6:]).all()
        assert np.isnan(v[[2, 6, 7, 8]]).all()
        assert (v[[0, 1, 3, 4]] == np.inf).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_8_bits(bad):
    """It makes its block NaN, and nothing else."""
    gradient = np.ones(1000, np.float32)
    gradient[300] = bad
    optimizer = AdamW(moments="8bit")
    optimizer.build({"w": np.ones(1000, np.float32)})
    optimizer.apply({"w": gradient})
    for moment in numbers(optimizer, "w"):
        np.testing.assert_array_equal(np.isnan(moment), (np.arange(1000) // BLOCK) == 1)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_variables_of_64_bits_are_refused(dtype, moments):
    optimizer = AdamW(moments=moments)
    with pytest.raises(ValueError, match=rf"moments='{moments}': variable 'v' has dtype {dtype}"):
        optimizer.build({"w": np.ones(300, np.float32), "v": np.ones(300, dtype)})
    assert not optimizer.built


def test_it_is_an_argument():
    optimizer = AdamW(moments="8bit", seed=5)
    config = optimizer.get_config()
    assert (config["moments"], config["seed"]) == ("8bit", 5)
    again = AdamW.from_config(config)
    assert (again.moments, again.seed) == ("8bit", 5)
    assert not {"moments", "seed"} & AdamW().get_config().keys()
    again.build({"w": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="`moments` cannot change once the optimizer is built"):
        again.moments = "bfloat16"
    again.seed = 6


def test_update_step():
    """It counts nothing, and takes the noise of the step that comes next."""
    variables = [np.ones(300, np.float32) for _ in range(2)]
    optimizers = [AdamW(0.1, weight_decay=0.0, moments="bfloat16") for _ in range(2)]
    gradient = np.linspace(-1, 1, 300, dtype=np.float32)
    for variable, optimizer in zip(variables, optimizers, strict=True):
        optimizer.build({"w": variable})
        optimizer.apply({"w": gradient})
    optimizers[0].apply({"w": gradient})
    optimizers[1].update_step(gradient, variables[1], 0.1)
    np.testing.assert_array_equal(optimizers[0].state["velocity/w"], optimizers[1].state["velocity/w"])


# Whole-array functions


def bits(state):
    return {name: as_numpy(array) for name, array in state.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_whole_arrays(moments, dtype, options):
    """The same bits of the same numbers, which differ in their last bit in few elements."""
    _, expected = trained(libraries.numpy, dtype, moments=moments, **options)
    _, found = trained(libraries.strict, dtype, moments=moments, **options)
    for name, array in found.state.items():
        wanted = expected.state[name]
        if wanted.dtype.kind == "u" and wanted.size:
            assert np.mean(np.asarray(array) != wanted) <= 0.005, name


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_jax(moments):
    jnp = libraries.jnp
    expected, _ = trained(libraries.numpy, moments=moments)
    variables = {name: jnp.asarray(value, "float32") for name, value in values(0).items()}
    optimizer = AdamW(0.01, moments=moments)
    optimizer.build(variables)
    state, step = optimizer.variables, libraries.jax.jit(optimizer.stateless_apply)
    for k in range(6):
        variables, state = step(state, {n: jnp.asarray(g, "float32") for n, g in values(1 + k).items()}, variables)
    for name, variable in variables.items():
        np.testing.assert_allclose(variable, expected[name], rtol=0, atol=1e-4)  # another bit of noise, in few elements
        assert np.mean(np.abs(np.asarray(variable) - expected[name]) > 1e-6) < 0.01 if variable.size else True
