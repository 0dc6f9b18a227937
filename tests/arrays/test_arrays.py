"""Arrays of every kind and layout, and what happens to them between steps."""

import gc
import weakref

import numpy as np
import pytest
import torch
from helpers import libraries
from helpers.oracle import Oracle
from hypothesis import given
from hypothesis import strategies as st

from adamw_numba import AdamW, arrays, update
from adamw_numba.arrays import reader as headers


def train(variables, gradients, **options):
    optimizer = AdamW(0.05, **options)
    optimizer.build(variables)
    for step in gradients:
        optimizer.apply(step)
    return optimizer


def relaid(array, order, step, sign):
    """The same numbers in another memory layout: axes in any order, with gaps, backwards."""
    shape = [array.shape[axis] for axis in order]
    large = np.zeros([size * step for size in shape], array.dtype)
    view = large[tuple(slice(None, None, step) for _ in shape)][tuple(slice(None, None, sign) for _ in shape)]
    view = view.transpose(np.argsort(order)) if shape else view
    view[...] = array
    return view


LAYOUTS = st.tuples(st.permutations(range(3)), st.integers(1, 3), st.sampled_from([1, -1]))


@given(
    shape=st.tuples(*[st.sampled_from([1, 2, 3, 17, 130])] * 3),
    layouts=st.lists(LAYOUTS, min_size=4, max_size=4),
    dtype=st.sampled_from(["float32", "float64", "complex64", "float16"]),
)
def test_any_layout_gives_the_same_bits(shape, layouts, dtype):
    """Of the variable and of each gradient, which may change from step to step."""
    random = np.random.default_rng(0)
    plain = [random.normal(size=shape).astype(dtype) for _ in range(4)]
    if dtype == "complex64":
        plain = [a + 1j * random.normal(size=shape).astype(np.float32) for a in plain]
    expected, given_ = plain[0].copy(), plain[1:]
    train([expected], [[g] for g in given_])
    laid = [relaid(a, *layout) for a, layout in zip(plain, layouts, strict=True)]
    train([laid[0]], [[g] for g in laid[1:]])
    np.testing.assert_array_equal(laid[0], expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128", "bfloat16"])
def test_gradients_that_are_read_only_broadcast_or_scalars(dtype):
    variables = [
        libraries.numpy(np.ones((3, 4)), dtype),
        libraries.numpy(np.ones(()), dtype),
        libraries.numpy([1.0], dtype),
    ]
    expected = [v.copy() for v in variables]
    ones = libraries.numpy(1.0, dtype)
    broadcast = np.broadcast_to(ones, (3, 4))
    assert not broadcast.flags.writeable
    train(variables, [[broadcast, ones[()], broadcast[0, :1]]] * 3)
    train(expected, [[np.ones_like(v) for v in expected]] * 3)
    for one, other in zip(variables, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_map(tmp_path):
    mapped = np.memmap(tmp_path / "weights", np.float32, "w+", shape=(100,))
    mapped[:] = 1
    train([mapped], [[np.ones(100, np.float32)]] * 2)
    mapped.flush()
    np.testing.assert_allclose(np.fromfile(tmp_path / "weights", np.float32), 0.9, rtol=1e-3)


def test_complex_is_a_pair_of_reals_as_in_torch():
    random = np.random.default_rng(0)
    value, gradient = (random.normal(size=(4, 6)) + 1j * random.normal(size=(4, 6)) for _ in range(2))
    variable, tensor = value.copy(), torch.tensor(value)
    train([variable], [[gradient]], weight_decay=0.01)
    tensor.grad = torch.tensor(gradient)
    torch.optim.AdamW([tensor], 0.05, eps=1e-7 / np.sqrt(1 - 0.999), weight_decay=0.01).step()
    np.testing.assert_allclose(variable, tensor.numpy(), rtol=1e-12)


def test_several_libraries_and_dtypes_in_one_optimizer():
    """Each variable is what it would be alone, but for the norm, which is of all of them."""
    kinds = [(libraries.numpy, "float32"), (libraries.to_torch, "float64"), (libraries.strict, "float64"),
             (libraries.numpy, "complex128"), (libraries.parameter, "bfloat16"), (libraries.fortran, "float64")]  # fmt: skip
    values = [np.full((3, 2), k + 1.0) for k in range(len(kinds))]
    variables = [make(v, kind) for (make, kind), v in zip(kinds, values, strict=True)]
    optimizer = train(
        variables, [[make(v, kind) for (make, kind), v in zip(kinds, values, strict=True)]] * 3, global_clipnorm=2.0
    )
    oracle = Oracle(0.05, global_clipnorm=2.0)
    oracle.build(values)
    for _ in range(3):
        oracle.step(values)
    for variable, expected, (_, kind) in zip(variables, oracle.variables, kinds, strict=True):
        tolerance = {"float32": 1e-6, "bfloat16": 5e-3}.get(kind, 1e-12)
        np.testing.assert_allclose(libraries.look(variable), expected, rtol=tolerance)
    assert optimizer.last_step.gradient_norm == pytest.approx(np.linalg.norm(values), rel=1e-12)


def test_autograd_notices_what_changed():
    """torch counts versions so that a graph is not run backward through values that have been overwritten."""
    weights = torch.nn.Parameter(torch.ones(3))
    untouched = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW(0.1)
    optimizer.build([weights, untouched])
    stale, fresh = (weights**2).sum(), (untouched**2).sum()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([torch.ones(3), None])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    fresh.backward()
    assert untouched.grad.tolist() == [2.0, 2.0, 2.0]


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        weights = torch.ones(3)
        train([weights], [[torch.ones(3)]])
    np.testing.assert_allclose(weights.numpy(), 0.95, rtol=1e-3)


def test_variables_that_move():
    """The same tensor, in other memory: found at the next step, and nothing written where it was."""
    parameter, array = torch.nn.Parameter(torch.ones(4)), np.ones(4)
    optimizer = AdamW(0.1, weight_decay=0.0)
    optimizer.build([parameter, array])
    optimizer.apply([torch.ones(4), np.ones(4)])
    old = parameter.data
    parameter.data = torch.full((4,), 5.0)
    optimizer.apply([torch.ones(4), np.ones(4)])
    np.testing.assert_allclose(parameter.detach().numpy(), 4.9, rtol=1e-5)
    np.testing.assert_allclose(old.numpy(), 0.9, rtol=1e-5)
    with pytest.raises(ValueError, match="shares memory with variable '0'"):
        optimizer.apply([parameter.data[:], np.ones(4)])


def test_no_gradient_is_kept_alive():
    variable = np.ones(1000, np.float32)
    optimizer = AdamW()
    optimizer.build([variable])
    for dtype in (np.float32, np.float64):
        gradient = np.ones(1000, dtype)
        reference = weakref.ref(gradient)
        optimizer.apply([gradient])
        del gradient
        gc.collect()
        assert reference() is None


def test_gradients_at_changing_addresses():
    random = np.random.default_rng(0)
    variable, expected = np.ones(100), np.ones(100)
    steps = [random.normal(size=100) for _ in range(50)]
    pool = np.zeros((7, 100))
    optimizer = AdamW(0.05)
    optimizer.build([variable])
    for k, g in enumerate(steps):
        pool[k % 7] = g
        optimizer.apply([pool[k % 7]])
    train([expected], [[g] for g in steps])
    np.testing.assert_array_equal(variable, expected)


def test_overflow_in_a_cast_is_an_infinity_not_a_warning():
    variable = np.ones(3, np.float32)
    optimizer = AdamW(nonfinite="skip")
    optimizer.build([variable])
    optimizer.apply([np.array([1e300, 1.0, 1.0])])
    assert optimizer.skipped_steps == 1


ARRAYS = {
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.ones(()),
    "four axes": np.ones((2, 3, 4, 5), np.float32),
    "fortran": np.asfortranarray(np.ones((3, 4))),
    "view": np.ones((10, 10), np.complex64)[::2, 1::3],
    "negative": np.ones(10)[::-1],
    "bfloat16": np.ones(4, libraries.DTYPES["bfloat16"]),
    "float16": np.ones(4, np.float16),
}


TENSORS = {
    "empty tensor": torch.zeros((0, 3)),
    "scalar tensor": torch.ones(()),
    "parameter": torch.nn.Parameter(torch.ones(2, 3, 4)),
    "transposed tensor": torch.ones(3, 4).T,
    "view of a tensor": torch.ones(10, 10, dtype=torch.complex64)[::2, 1::3],
    "bfloat16 tensor": torch.ones(4, dtype=torch.bfloat16),
    "float16 tensor": torch.ones(4, dtype=torch.float16),
}


def read(reader, gradients):
    return headers.read(id(gradients), reader.address) >= 0


def reader_of(array):
    layout = arrays.layout_of(array)
    low, high = (end - layout.address for end in arrays.extent(layout))
    table = np.zeros((8, 1), np.int64)
    table[update.P] = layout.address
    records = [[headers.record(array, layout, low, high, flags)] for flags in (headers.WRITEABLE, headers.ALIGNED)]
    return headers.Reader([array], np.array([[update.P], [0]]), *records, np.zeros((2, 0), np.int64), table), table


@pytest.mark.parametrize("case", [*ARRAYS, *TENSORS])
def test_headers_agree_with_the_library(case):
    """What compiled code reads from an array's header is what its library says; every difference is noticed."""
    array = (ARRAYS | TENSORS)[case]
    reader, table = reader_of(array)
    assert read(reader, [array])
    assert table[update.G, 0] == arrays.address(array)
    assert read(reader, [None])
    assert table[update.G, 0] == 0
    one = np if case in ARRAYS else torch
    others = [array[None], one.zeros((7, 7), dtype=array.dtype), one.ones(array.shape, dtype=one.int8), 1.0, "text"]
    others += [np.ones(array.shape, "i2"), torch.ones(tuple(array.shape), dtype=torch.int16), torch.ones(2).to_sparse()]
    if case in TENSORS:
        others += [torch.empty_like(array, device="meta"), torch.ones(2, dtype=torch.bool)]
    for other in others:
        assert not read(reader, [other])
    if arrays.extent(layout := arrays.layout_of(array)) != (layout.address, layout.address):
        table[update.P] += 8
        assert not read(reader, [array])


def test_a_gradient_that_shares_memory_is_left_to_the_slower_check():
    array = np.ones(10)
    layout = arrays.layout_of(array[:5])
    record = headers.record(array[:5], layout, 0, 40, headers.ALIGNED)
    ranges = np.array([[layout.address], [layout.address + 40]])
    reader = headers.Reader([], np.zeros((2, 0), int), [], [record], ranges, np.zeros((8, 1), np.int64))
    assert [read(reader, [array[k : k + 5]]) for k in (0, 4, 5)] == [False, False, True]


LAZY = {
    "neg": lambda g: torch._neg_view(g),
    "conj": lambda g: g.conj(),
    "expanded": lambda g: g[:1].expand(3),
    "view elsewhere": lambda g: torch.cat([g, g])[3:],
    "imaginary part": lambda g: torch.complex(g, -g).conj().imag if not g.is_complex() else g.conj(),
    "subclass": lambda g: torch.nn.Parameter(g),
    "cast": lambda g: g.to(torch.float16) if not g.is_complex() else g.to(torch.complex64),
}


@pytest.mark.parametrize("case", LAZY)
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_tensors_that_differ_in_what_headers_do_not_tell(case, dtype):
    """After steps with plain gradients, and before more of them."""
    plain = libraries.to_torch([1.0, -2.0, 3.0], dtype)
    other = LAZY[case](plain)
    variable, expected = libraries.parameter(np.ones(3), dtype), libraries.parameter(np.ones(3), dtype)
    same = torch.tensor(other.resolve_conj().resolve_neg().detach().tolist(), dtype=plain.dtype)
    train([variable], [[plain], [plain.clone()], [other], [other], [plain]])
    train([expected], [[plain], [plain], [same], [same], [plain]])
    assert torch.equal(variable, expected)


@pytest.mark.parametrize("make", [libraries.to_torch, libraries.parameter])
def test_a_torch_without_the_exchange_of_headers(make, monkeypatch):
    """Before 2.10: every tensor is asked in Python, with the same result."""
    results = []
    for old in (False, True):
        if old:
            monkeypatch.setattr(headers, "exporter", lambda kind: 0)
        variables = [make(np.ones(size), "float32") for size in (3, 4)]
        steps = [[make(np.full(size, k), "float32") for size in (3, 4)] for k in range(4)]
        optimizer = train(variables, steps, use_ema=True)
        with pytest.raises(ValueError, match="shares memory"):
            optimizer.apply([steps[0][0], optimizer.averages[1][:]])
        results.append([libraries.look(a) for a in [*variables, *optimizer.variables]])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_containers_of_every_kind():
    shapes = {"layers": [{"kernel": (2, 3), "bias": (3,)}, {"kernel": (3, 1)}], "scale": ()}
    tree = {"layers": [{k: np.ones(s) for k, s in layer.items()} for layer in shapes["layers"]], "scale": np.ones(())}
    optimizer = AdamW(0.1)
    optimizer.build(tree)
    names = ["layers/0/kernel", "layers/0/bias", "layers/1/kernel", "scale"]
    assert [n.removeprefix("momentum/") for n in optimizer.variable_names if n.startswith("momentum")] == names
    leaves = [tree["layers"][0]["kernel"], tree["layers"][0]["bias"], tree["layers"][1]["kernel"], tree["scale"]]
    reordered = {"scale": np.ones(()), "layers": tree["layers"]}
    copied = {
        "scale": np.ones(()),
        "layers": [{k: v.copy() for k, v in layer.items()} for layer in reordered["layers"]],
    }
    optimizer.apply(copied)
    optimizer.apply([np.ones_like(a) for a in leaves])
    optimizer.apply(np.ones_like(a) for a in leaves)
    assert all(np.allclose(a, 0.7, atol=0.002) for a in leaves)
    single = np.ones(3)
    alone = AdamW(0.1)
    alone.build(single)
    alone.apply(np.ones(3))
    assert np.allclose(single, 0.9, atol=0.001)
    model = torch.nn.Linear(2, 1)
    named = AdamW(0.1)
    named.exclude_from_weight_decay(var_names=["bias"])
    named.build(model.named_parameters())
    assert named.variable_names[2:] == ["momentum/weight", "velocity/weight", "momentum/bias", "velocity/bias"]
    before = model.bias.detach().clone()
    named.apply([(name, torch.zeros_like(p)) for name, p in model.named_parameters()][::-1])
    assert torch.equal(model.bias, before)
