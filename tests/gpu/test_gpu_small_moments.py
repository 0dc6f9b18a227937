"""Moments in 16 and 8 bits on a GPU: the bits of whole-array functions, and what must not make a difference.

See helpers/on_gpu.py for where these tests run, and cpu/test_small_moments.py for the same on the CPU.
"""

import numpy as np
import pytest
from helpers import libraries
from helpers.on_gpu import HAS_TORCH, MAKE, SIMULATED, array, marks, on_every_library, tensor
from helpers.rounding import BLOCK, as_bfloat, as_bytes, noise, numbers
from helpers.thread_ranks import on_ranks
from test_gpu_graphs import captured

from adamw_numba import AdamW, LossScaleOptimizer, schedules
from adamw_numba.arrays import as_numpy

pytestmark = marks

MOMENTS = ("bfloat16", "8bit")
OPTIONS = {
    "plain": {},
    "clip": {"global_clipnorm": 0.5, "use_ema": True},
    "values": {"clipvalue": 0.5, "amsgrad": True, "maximize": True},
    "accumulation": {"gradient_accumulation_steps": 2, "nesterov": True, "clipnorm": 0.5},
    "overwriting": {"use_ema": True, "ema_overwrite_frequency": 2, "loss_scale_factor": 8.0},
    "no masters": {"master_weights": False, "gradient_accumulation_steps": 2, "amsgrad": True},
}
SHAPES = {"a": (10, 27), "b": (5,), "c": (), "d": (0, 3), "e": (300,)}
if not SIMULATED:
    SHAPES |= {"a": (301, 70), "e": (100_037,)}
on_both = pytest.mark.parametrize("moments", MOMENTS)


def values(seed, dtype="float32"):
    generator = np.random.default_rng(seed)
    found = {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
    if dtype.startswith("complex"):
        found = {name: value + 1j * generator.standard_normal(value.shape) for name, value in found.items()}
    return found


def made(make, seed, dtype="float32"):
    return {name: make(value, dtype) for name, value in values(seed, dtype).items()}


def go_on(optimizer, start, stop, make=None, dtype="float32"):
    for step in range(start, stop):
        optimizer.apply(made(make or MAKE, 1 + step, dtype))


def trained(make=None, dtype="float32", stop=4, **options):
    variables = made(make or MAKE, 0, dtype)
    optimizer = AdamW(0.01, seed=3, **options)
    optimizer.build(variables)
    go_on(optimizer, 0, stop, make, dtype)
    return image(variables, optimizer), optimizer


def image(variables, optimizer):
    """All arrays, of bfloat16 the bits."""
    return {name: as_numpy(each) for name, each in ({**variables, **optimizer.state}).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, each in found.items():
        np.testing.assert_array_equal(each, expected[name], err_msg=name)


def close(found, expected):
    """The same codes, but for numbers that differ in their last bit, since another compiler fuses other operations."""
    for name, each in found.items():
        wanted = expected[name]
        if wanted.dtype.kind == "u" and wanted.size:
            assert np.sum(each != wanted) <= 1 + 0.005 * wanted.size, name
        elif wanted.size and wanted.dtype.kind != "i":
            unit = 2e-3 if wanted.dtype == np.float16 else 1e-5
            differs = np.abs(each.astype(complex) - wanted) > 1e-5 + unit * np.abs(wanted)
            assert np.sum(differs) <= 1 + 0.01 * wanted.size, name


# The numbers


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_the_first_step_in_16_bits(seed):
    gradient = np.random.default_rng(0).standard_normal(500) * 10.0 ** np.arange(-9, 11).repeat(25)
    gradient = gradient.astype(np.float32)
    gradient[:3] = 0, -0.0, 1
    optimizer = AdamW(moments="bfloat16", seed=seed)
    optimizer.build({"w": array(np.zeros(500))})
    optimizer.apply({"w": array(gradient)})
    bits = noise(seed, "w", 0, range(500))
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
    optimizer.build({"w": array(np.zeros(1000))})
    optimizer.apply({"w": array(gradient)})
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


@pytest.mark.parametrize(
    ("dtype", "options"),
    [*(("float32", each) for each in OPTIONS.values()), ("complex64", OPTIONS["accumulation"])],
    ids=[*OPTIONS, "complex"],
)
@on_both
def test_the_bits_of_whole_arrays(moments, dtype, options):
    """Where nothing fuses a product and a sum, in the simulator, and norms are not those of float32."""
    found, _ = trained(dtype=dtype, moments=moments, **options)
    expected, _ = trained(libraries.strict if SIMULATED else libraries.numpy, dtype, moments=moments, **options)
    is_exact = SIMULATED and not {"clipnorm", "global_clipnorm"} & options.keys()
    (same if is_exact else close)(found, expected)


@pytest.mark.parametrize("options", [OPTIONS[name] for name in ("clip", "values", "no masters")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@on_both
def test_variables_of_16_bits_are_close_to_the_cpu(moments, dtype, options):
    make = tensor if dtype == "bfloat16" else MAKE
    found, _ = trained(make, dtype, moments=moments, **options)
    expected, _ = trained(libraries.numpy, dtype, moments=moments, **options)
    if dtype == "bfloat16":  # variables as their bits in one, as numbers in the other
        found, expected = ({n: a for n, a in each.items() if "/" in n} for each in (found, expected))
    close(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@on_both
@on_every_library
def test_libraries(make, moments, dtype):
    """In 16 bits every layout has the same bits; in 8 bits those that are not in the order of the axes keep float32."""
    options = OPTIONS["accumulation"]
    found, optimizer = trained(make, dtype, moments=moments, **options)
    expected, _ = trained(libraries.on_gpu, dtype, moments=moments, **options)
    if moments == "bfloat16":
        same(found, expected)
        return
    wide, _ = trained(make, dtype, **options)
    for name in SHAPES:
        narrow = f"momentum_scale/{name}" in found
        assert narrow == (f"momentum_scale/{name}" in optimizer.state)
        np.testing.assert_array_equal(found[name], (expected if narrow else wide)[name], err_msg=name)


# What must not make a difference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("size", [7, 517])
@on_both
def test_alignment_and_chunks(moments, size, options, dtype, monkeypatch):
    from adamw_numba.gpu import words, workload

    maker = tensor if dtype == "bfloat16" else array
    random = np.random.default_rng(size)
    start, gradients = random.normal(size=size), random.normal(size=(2, size))
    results = []
    chunks = (256, 512, 2048) if SIMULATED else (4 * words.THREADS, 8 * words.THREADS)
    for p_offset, g_offset, chunk in [
        (0, 0, None),
        (1, 1, None),
        (0, 5, None),
        *((0, 0, c) for c in chunks),
        (2, 2, 512),
    ]:
        with monkeypatch.context() as patch:
            if chunk:
                patch.setattr(workload, "chunk_of", lambda elements, processors, chunk=chunk: chunk)
            large = maker(np.concatenate([np.zeros(p_offset), start, np.zeros(3)]), dtype)
            variable = large[p_offset : p_offset + size]
            optimizer = AdamW(0.1, moments=moments, **options)
            optimizer.build([variable])
            for row in gradients:
                optimizer.apply([maker(np.concatenate([np.zeros(g_offset), row]), dtype)[g_offset:]])
            results.append({"p": libraries.look(variable)} | {n: as_numpy(a) for n, a in optimizer.state.items()})
            whole = libraries.look(large)
            assert not whole[:p_offset].any()  # nothing else was written
            assert not whole[p_offset + size :].any()
    for other in results[1:]:
        same(other, results[0])


def every_other(values):
    return array(np.repeat(values, 2, axis=1))[:, ::2]


def backwards(values):
    """In memory that runs through the axes backwards."""
    return array(np.asfortranarray(values))


@pytest.mark.parametrize("other", [every_other, backwards])
@on_both
def test_gradients_of_other_layouts(moments, other):
    results = []
    for make in (array, other):
        variable = array(np.ones((20, 30)))
        optimizer = AdamW(0.1, moments=moments)
        optimizer.build({"w": variable})
        for step in range(2):
            optimizer.apply({"w": make(np.random.default_rng(step).normal(size=(20, 30)))})
        results.append(image({"w": variable}, optimizer))
    same(*results)


@on_both
def test_a_name_and_a_seed_and_a_step_have_noise_of_their_own(moments):
    """Which variables there are besides, in what order, makes no difference."""
    start, gradient = np.zeros(600), np.random.default_rng(0).normal(size=600)

    def moment(*names, seed=1, steps=1):
        optimizer = AdamW(0.0, beta_1=0.0, moments=moments, seed=seed)
        optimizer.build({name: array(start) for name in names})
        for _ in range(steps):
            optimizer.apply({name: array(gradient) for name in names})
        return as_numpy(optimizer.state["momentum/w"])

    expected = moment("w")
    np.testing.assert_array_equal(moment("a", "w", "z"), expected)
    for other in (moment("w", seed=2), moment("w", steps=2), moment("w", seed=2**32 - 1)):
        assert 0.1 < np.mean(other != expected) < 0.9
    optimizer = AdamW(0.0, beta_1=0.0, moments=moments, seed=1)
    optimizer.build({name: array(start) for name in "wa"})
    optimizer.apply({name: array(gradient) for name in "wa"})
    assert np.any(as_numpy(optimizer.state["momentum/a"]) != as_numpy(optimizer.state["momentum/w"]))


@on_both
def test_groups(moments):
    """Each with numbers of its own."""
    found = []
    for make in (libraries.strict, MAKE) if SIMULATED else (libraries.numpy, MAKE):
        variables = made(make, 0)
        optimizer = AdamW(0.01, moments=moments)
        optimizer.override(var_names=["^a$"], learning_rate=0.1, beta_1=0.5)
        optimizer.build(variables)
        go_on(optimizer, 0, 3, make)
        found.append(image(variables, optimizer))
    (same if SIMULATED else close)(*found)


@on_both
def test_a_skipped_step_takes_no_noise(moments):
    results = []
    for factors in ((1.0, np.nan, 1.0), (1.0, 1.0)):
        variable = array(np.ones(300))
        optimizer = AdamW(0.1, moments=moments, nonfinite="skip")
        optimizer.build({"w": variable})
        for factor in factors:
            optimizer.apply({"w": array(np.linspace(-1, 1, 300) * factor)})
        assert optimizer.skipped_steps == len(factors) - 2
        results.append(image({"w": variable}, optimizer))
    same(*results)


@on_both
def test_a_loss_scale(moments):
    results = []
    for scale in (1.0, 8.0):  # a power of two changes no bit
        variable = array(np.ones(300))
        optimizer = LossScaleOptimizer(AdamW(0.1, moments=moments), initial_scale=scale, dynamic_growth_steps=100)
        optimizer.build({"w": variable})
        for _ in range(2):
            optimizer.apply({"w": array(np.linspace(-1, 1, 300) * optimizer.dynamic_scale)})
        results.append(image({"w": variable}, optimizer.inner_optimizer))
    same(*results)


@on_both
def test_update_step(moments):
    """It counts nothing, and takes the noise of the step that comes next."""
    variables = [array(np.ones(300)) for _ in range(2)]
    optimizers = [AdamW(0.1, weight_decay=0.0, moments=moments) for _ in range(2)]
    gradient = array(np.linspace(-1, 1, 300))
    for variable, optimizer in zip(variables, optimizers, strict=True):
        optimizer.build({"w": variable})
        optimizer.apply({"w": gradient})
    optimizers[0].apply({"w": gradient})
    optimizers[1].update_step(gradient, variables[1], 0.1)
    assert (optimizers[0].iterations, optimizers[1].iterations) == (2, 1)
    for key in ("momentum/w", "velocity/w"):
        np.testing.assert_array_equal(as_numpy(optimizers[0].state[key]), as_numpy(optimizers[1].state[key]))


@on_both
def test_parts_of_a_whole_variable(moments):
    """Two ranks, each with some rows, have the bits of one that has all."""
    start, gradients = np.ones((96, 8)), np.random.default_rng(0).normal(size=(2, 96, 8))
    whole = array(start)
    optimizer = AdamW(0.01, moments=moments)
    optimizer.build({"w": whole})
    for gradient in gradients:
        optimizer.apply({"w": array(gradient)})
    rows = [(slice(0, 64), slice(0, 8)), (slice(64, 96), slice(0, 8))]

    def work(ranks):
        own = rows[ranks.rank]
        piece = array(start[own])
        optimizer = AdamW(0.01, moments=moments)
        optimizer.build({"w": piece}, comm=ranks, pieces={"w": own})
        for gradient in gradients:
            optimizer.apply({"w": array(gradient[own])})
        return libraries.look(piece)

    found = on_ranks(2, work)
    np.testing.assert_array_equal(np.concatenate(found), libraries.look(whole))


# Graphs

GRAPH_OPTIONS = [
    {},
    {"global_clipnorm": 0.5, "amsgrad": True},
    {"gradient_accumulation_steps": 3, "use_ema": True, "ema_overwrite_frequency": 2},
    {"nonfinite": "skip", "clipnorm": 1.0},
]


@pytest.mark.parametrize("options", GRAPH_OPTIONS)
@on_both
def test_a_captured_graph_rounds_like_eager_steps(moments, options):
    """Every replay by the number of its own step."""
    results, steps = [], 6 if SIMULATED else 20
    for is_captured in (False, True):
        sizes = (517, 3) if SIMULATED else (100_037, 6)
        variables = {str(n): tensor(np.ones(n)) for n in sizes}
        gradients = {str(n): tensor(np.linspace(-1, 1, n)) for n in sizes}
        optimizer = AdamW(schedules.CosineDecay(0.1, 30, 0.1), moments=moments, **options)
        optimizer.build(variables)
        optimizer.apply(gradients)
        if is_captured:
            with captured() as graph:
                optimizer.apply(gradients)
            for _ in range(steps):
                graph.replay()
        else:
            for _ in range(steps):
                optimizer.apply(gradients)
        optimizer.apply(gradients)
        results.append(image(variables, optimizer))
    same(*results)


@on_both
def test_a_replay_follows_the_seed(moments):
    results = []
    for is_captured in (False, True):
        variable, gradient = tensor(np.ones(300)), tensor(np.linspace(-1, 1, 300))
        optimizer = AdamW(0.1, moments=moments)
        optimizer.build({"w": variable})
        optimizer.apply({"w": gradient})
        if is_captured:
            with captured() as graph:
                optimizer.apply({"w": gradient})
        optimizer.seed = 99
        optimizer.update_hyperparameters(5)
        for _ in range(2):
            graph.replay() if is_captured else optimizer.apply({"w": gradient})
        results.append(image({"w": variable}, optimizer))
    same(*results)


# What steps come to


@pytest.mark.parametrize("beta_2", [0.9, 0.999])
@pytest.mark.parametrize(("moments", "most"), [("bfloat16", 2e-3), ("8bit", 1e-2)])
def test_rounding_does_not_drift(moments, most, beta_2):
    """The mean over many elements is that of exact arithmetic, and no moment stays behind."""
    count, steps = (512, 12) if SIMULATED else (2**15, 10_000)
    most = 10 * most if SIMULATED else most  # of few elements
    factors = (2.0 ** np.linspace(-1, 0, count)).astype(np.float32)
    optimizer = AdamW(1e-6, beta_2=beta_2, moments=moments)
    optimizer.build({"w": array(np.zeros(count))})
    m = v = 0.0
    gradient = array(factors)
    for _ in range(steps):
        optimizer.apply({"w": gradient})
        m, v = 0.9 * m + 0.1, beta_2 * v + (1 - beta_2)
    for found, wanted in zip(numbers(optimizer, "w"), (m * factors, v * factors.astype(float) ** 2), strict=True):
        assert found.mean() == pytest.approx(wanted.mean(), rel=most)
        assert (np.abs(np.log2(found / wanted)) < 4).all()


def test_what_is_not_finite_in_16_bits():
    largest = np.finfo(np.float32).max
    gradient = np.array([np.inf, -np.inf, np.nan, largest, -largest, 1], np.float32)
    gradient = np.concatenate([gradient, np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)])
    for seed in range(5):
        optimizer = AdamW(beta_1=0.0, moments="bfloat16", seed=seed)
        optimizer.build({"w": array(np.ones(len(gradient)))})
        optimizer.apply({"w": array(gradient)})
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
    optimizer.build({"w": array(np.ones(1000))})
    optimizer.apply({"w": array(gradient)})
    for moment in numbers(optimizer, "w"):
        np.testing.assert_array_equal(np.isnan(moment), (np.arange(1000) // BLOCK) == 1)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@on_both
def test_variables_of_64_bits_are_refused(moments, dtype):
    optimizer = AdamW(moments=moments)
    with pytest.raises(ValueError, match=rf"moments='{moments}': variable 'v' has dtype {dtype}"):
        optimizer.build({"w": array(np.ones(300)), "v": array(np.ones(300), dtype)})
    assert not optimizer.built


@pytest.mark.skipif(not HAS_TORCH, reason="torch has no GPU here")
def test_a_variable_of_other_strides_in_8_bits():
    """It cannot be cut into blocks any more, and nothing is written."""
    variable = tensor(np.zeros((64, 64)))
    optimizer = AdamW(moments="8bit")
    optimizer.build({"w": variable})
    variable.data = tensor(np.zeros((64, 64))).t()
    with pytest.raises(ValueError, match=r"'w'.*order of its axes"):
        optimizer.apply({"w": tensor(np.ones((64, 64)))})
    assert not variable.any()
    assert optimizer.iterations == 0


# Saving


@pytest.mark.parametrize("dtype", ["float32", "complex64", "float16"])
@on_both
def test_saved_on_one_and_loaded_on_the_other(moments, dtype):
    """The bits of the state are kept both ways, and a run that is gone on with has those of one that was not stopped."""
    options = {"amsgrad": True, "use_ema": True, "global_clipnorm": 0.5}
    for first, second in ((MAKE, libraries.numpy), (libraries.numpy, MAKE), (MAKE, MAKE)):
        saved, optimizer = trained(first, dtype, stop=2, moments=moments, **options)
        store, variables = {}, made(second, 9, dtype)
        optimizer.save(store, variables=True)
        loaded = AdamW.load(store, variables)
        assert (loaded.moments, loaded.seed) == (moments, 3)
        same(image(variables, loaded), saved)
        go_on(loaded, 2, 4, second, dtype)
        expected, _ = trained(second, dtype, moments=moments, **options)
        (same if first is second else close)(image(variables, loaded), expected)


@on_both
def test_restored_and_its_weights_set(moments):
    saved, optimizer = trained(stop=2, moments=moments)
    store = {}
    optimizer.save(store)
    _, other = trained(stop=1, moments=moments)
    other.restore(store)
    _, weights = trained(stop=0, moments=moments)
    weights.set_weights(optimizer.variables)
    wanted = {name: each for name, each in saved.items() if name not in SHAPES}
    for found in (other, weights):
        same(image({}, found), wanted)
