"""Moments in 16 and 8 bits: the bits of the optimizer of arrays, resumed bit for bit, and exchanged with torch's."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from helpers.twins import AdamW, assert_same_bits

import adamw_numba

MOMENTS = ("bfloat16", "8bit")
ALL = ("float32", *MOMENTS)
SHAPES = {"a": (12, 64), "b": (5,), "c": (), "d": (1000,)}
LARGE = ("a", "d")  # of a block and more
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "seed": 4}
THEIRS = {"learning_rate": 0.01, "weight_decay": 0.1, "epsilon": 1e-8, "epsilon_mode": "corrected", "seed": 4}
both_moments = pytest.mark.parametrize("moments", MOMENTS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])


def values(seed, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    wide = torch.complex64 if dtype.is_complex else torch.float32
    return {name: torch.randn(shape, generator=random, dtype=wide).to(dtype) for name, shape in SHAPES.items()}


def made(moments, dtype=torch.float32, start=None, **options):
    params = {name: torch.nn.Parameter(value.clone()) for name, value in (start or values(0, dtype)).items()}
    return params, AdamW(params.items(), moments=moments, **OPTIONS | options)


def train(params, optimizer, start, stop, only=lambda step, name: True):
    for step in range(start, stop):
        for name, gradient in values(1 + step, params["a"].dtype).items():
            params[name].grad = gradient.clone() if only(step, name) else None
        optimizer.step()


def image(params, optimizer):
    return {
        name: (param.detach().clone(), copy.deepcopy(dict(optimizer.state[param]))) for name, param in params.items()
    }


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_dtype
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2}])
@both_moments
def test_bits_of_the_optimizer_of_arrays(moments, options, dtype):
    params, optimizer = made(moments, dtype, **options)
    arrays, other = values(0, dtype), adamw_numba.AdamW(moments=moments, **THEIRS | options)
    other.build(arrays)
    train(params, optimizer, 0, 5)
    for step in range(5):
        other.apply(values(1 + step, dtype))
    for name, param in params.items():
        assert torch.equal(param, arrays[name])
        own = optimizer.state[param]
        for theirs, ours in (("exp_avg", "momentum"), ("exp_avg_sq", "velocity")):
            found = own[theirs] if theirs in own else own[f"{theirs}_code"]
            assert_same_bits(found, other.state[f"{ours}/{name}"])
            if f"{theirs}_scale" in own:
                assert_same_bits(own[f"{theirs}_scale"], other.state[f"{ours}_scale/{name}"])


def test_names_and_dtypes():
    """Numbers have torch's names; what torch would take for numbers has others."""
    wanted = {
        ("bfloat16", torch.float32): {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16},
        ("bfloat16", torch.complex64): {"exp_avg_code": torch.uint32, "exp_avg_sq_code": torch.uint32},
        ("8bit", torch.float32): {"exp_avg_code": torch.uint8, "exp_avg_sq_code": torch.uint8},
        ("8bit", torch.complex64): {"exp_avg_code": torch.uint16, "exp_avg_sq_code": torch.uint16},
    }
    for (moments, dtype), names in wanted.items():
        params, optimizer = made(moments, dtype)
        train(params, optimizer, 0, 1)
        own = dict(optimizer.state[params["d"]])
        assert own.pop("step") == 1
        assert own.pop("iteration") == 1
        scales = {name: own.pop(name).shape for name in list(own) if name.endswith("_scale")}
        blocks = (8 if dtype.is_complex else 4,)
        assert scales == ({"exp_avg_scale": blocks, "exp_avg_sq_scale": blocks} if moments == "8bit" else {})
        assert {name: value.dtype for name, value in own.items()} == names
        if moments == "8bit":
            assert optimizer.state[params["b"]]["exp_avg"].dtype == dtype


@every_dtype
@pytest.mark.parametrize("way", ["file", "pickle", "copy"])
@both_moments
def test_resumed_bit_for_bit(moments, way, dtype):
    """Also where no parameter had a gradient at every step, so that none has counted all of them."""

    if way == "pickle" and dtype.is_complex:
        pytest.skip("torch does not pickle the dtypes in which complex moments are kept; torch.save does")

    def only(step, name):
        return (step + (name in "ab")) % 2 == 0

    params, optimizer = made(moments, dtype)
    train(params, optimizer, 0, 7, only)
    expected = image(params, optimizer)
    params, optimizer = made(moments, dtype)
    train(params, optimizer, 0, 3, only)
    assert sorted({int(own["step"]) for own in optimizer.state.values()}) == [1, 2]
    if way == "file":
        again, other = made(moments, dtype, {name: param.detach() for name, param in params.items()})
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        go = copy.deepcopy if way == "copy" else lambda both: pickle.loads(pickle.dumps(both))
        again, other = go((params, optimizer))
    train(again, other, 3, 7, only)
    assert_same_bits(image(again, other), expected)


@pytest.mark.parametrize("way", ["file", "pickle", "copy", "arrays"])
@pytest.mark.parametrize("moments", ALL)
def test_remainders_resumed_bit_for_bit(moments, way):
    params, optimizer = made(moments, torch.bfloat16, master_weights="remainder")
    train(params, optimizer, 0, 3)
    kept = {name: param.detach().clone() for name, param in params.items()}
    if way == "file":
        saved = through_a_file(optimizer.state_dict())
        others, other = made(moments, torch.bfloat16, start=kept, master_weights="remainder")
        other.load_state_dict(saved)
    elif way == "arrays":
        others, other = made(moments, torch.bfloat16, start=kept, master_weights="remainder")
        other.load_state_dict(optimizer.state_dict())
    else:
        other = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
        others = dict(zip(params, other.param_groups[0]["params"], strict=True))
    train(params, optimizer, 3, 6)
    train(others, other, 3, 6)
    assert_same_bits(image(others, other), image(params, optimizer))


@pytest.mark.parametrize("kinds", [(True, "remainder"), ("remainder", True)])
def test_masters_become_remainders_and_back(kinds):
    """The numbers stay: of 16 bits and a remainder, those of a float32; of a tie, but for its last bit."""
    params, optimizer = made("float32", torch.bfloat16, master_weights=kinds[0])
    train(params, optimizer, 0, 3)
    kept = {name: param.detach().clone() for name, param in params.items()}
    others, other = made("float32", torch.bfloat16, start=kept, master_weights=kinds[1])
    other.load_state_dict(optimizer.state_dict())
    for name, param in params.items():
        one, two = optimizer.state[param]["master"], other.state[others[name]]["master"]
        masters, remainders = (one, two) if kinds[0] is True else (two, one)
        assert (masters.dtype, remainders.dtype) == (torch.float32, torch.int16)
        bits = (kept[name].view(torch.int16).to(torch.int64) << 16) + remainders.to(torch.int64)
        difference = (bits & 0xFFFFFFFF) - (masters.view(torch.int32).to(torch.int64) & 0xFFFFFFFF)
        assert difference.abs().max() <= 1


def numbers(params, optimizer):
    """The moments in float32, by loading them into an optimizer that keeps them so."""
    own, wide = made("float32", start={name: param.detach() for name, param in params.items()})
    wide.load_state_dict(optimizer.state_dict())
    return {name: {key: wide.state[param][key] for key in ("exp_avg", "exp_avg_sq")} for name, param in own.items()}


@every_dtype
@pytest.mark.parametrize("then", ALL)
@pytest.mark.parametrize("first", ALL)
def test_loaded_into_other_moments(first, then, dtype):
    """As numbers, to the nearest that the other one has; nothing of the first is left."""
    params, optimizer = made(first, dtype)
    train(params, optimizer, 0, 3)
    again, other = made(then, dtype, {name: param.detach() for name, param in params.items()})
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    fresh, model = made(then, dtype)
    train(fresh, model, 0, 1)
    for name in params:
        own = other.state[again[name]]
        assert own.keys() == model.state[fresh[name]].keys()
        assert own["step"] == 3
    if dtype != torch.complex64:
        # half of what a number of 8 or 4 bits is apart, and of the smallest ones in 8 bits
        relative, least = {"float32": (0, 0), "bfloat16": (2**-8, 0), "8bit": (2**-4, 2**-18)}[then]
        before, after = numbers(params, optimizer), numbers(again, other)
        for name in LARGE:
            for key in ("exp_avg", "exp_avg_sq"):
                one, two = before[name][key], after[name][key]
                allowed = 1.001 * relative * one.abs() + least * one.abs().max()
                assert ((one - two).abs() <= allowed).all()
    train(again, other, 3, 4)


@both_moments
def test_exchanged_with_torch(moments):
    """By way of an optimizer of float32; and of 16 bits at once."""
    params, optimizer = made(moments)
    train(params, optimizer, 0, 3)
    own, wide = made("float32", start={name: param.detach() for name, param in params.items()})
    wide.load_state_dict(optimizer.state_dict())
    theirs = torch.optim.AdamW(own.values(), lr=0.01, weight_decay=0.1)
    theirs.load_state_dict(wide.state_dict())
    assert theirs.state[own["a"]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    train(own, theirs, 3, 5)
    direct = torch.optim.AdamW(own.values())
    direct.load_state_dict(optimizer.state_dict())
    if moments == "bfloat16":
        assert_same_bits(direct.state[own["d"]]["exp_avg"], optimizer.state[params["d"]]["exp_avg"].float())
    else:
        with pytest.raises(KeyError, match="exp_avg"):  # no codes that are taken for numbers
            direct.step()
    back, other = made(moments, start={name: param.detach() for name, param in own.items()})
    other.load_state_dict(theirs.state_dict())
    train(back, other, 5, 6)
    assert other.state[back["a"]]["step"] == 6


@both_moments
def test_what_is_written_counts(moments):
    params, optimizer = made(moments)
    train(params, optimizer, 0, 2)
    own = optimizer.state[params["d"]]
    key = "exp_avg" if moments == "bfloat16" else "exp_avg_code"
    with torch.no_grad():
        own[key].zero_()
    other = copy.deepcopy((params, optimizer))
    other[1].state[other[0]["d"]][key] = torch.zeros_like(own[key])
    train(params, optimizer, 2, 4)
    train(*other, 2, 4)
    assert_same_bits(image(params, optimizer), image(*other))


@both_moments
def test_from_an_optimizer_of_arrays(moments):
    keras_way = adamw_numba.AdamW(0.01, moments=moments, seed=9)
    params = {name: torch.nn.Parameter(value) for name, value in values(0).items()}
    optimizer = AdamW.from_adamw(keras_way, params.items())
    train(params, optimizer, 0, 3)
    arrays = values(0)
    keras_way.build(arrays)
    for step in range(3):
        keras_way.apply(values(1 + step))
    assert all(torch.equal(params[name], arrays[name]) for name in arrays)


def test_groups_and_late_ones():
    """Of groups, and of parameters that are added later, each by its own name."""
    params, optimizer = made("8bit")
    train(params, optimizer, 0, 2)
    late = torch.nn.Parameter(torch.ones(512))
    optimizer.add_param_group({"params": [("late", late)], "betas": (0.8, 0.99)})
    late.grad = torch.ones(512)
    train(params, optimizer, 2, 3)
    assert (optimizer.state[late]["step"], optimizer.state[late]["iteration"]) == (1, 3)
    moved = {name: state["exp_avg_scale"].dtype for name, state in ((n, optimizer.state[params[n]]) for n in LARGE)}
    assert set(moved.values()) == {torch.float32}
    assert len(np.unique(optimizer.state[late]["exp_avg_sq_code"].numpy())) > 1  # rounded up and down


def loaded(change, moments="8bit"):
    def act():
        params, optimizer = made(moments)
        train(params, optimizer, 0, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved["state"][0])
        before = image(params, optimizer)
        try:
            optimizer.load_state_dict(saved)
        finally:
            assert_same_bits(image(params, optimizer), before)

    return act


def stepped(dtype):
    def act():
        param = torch.nn.Parameter(torch.ones(300, dtype=dtype))
        param.grad = torch.ones_like(param)
        AdamW([("w", param)], moments="bfloat16").step()

    return act


def one_of(**options):
    return lambda: AdamW([torch.nn.Parameter(torch.ones(2))], **options)


MISTAKES = {
    "moments": (one_of(moments="4bit"), ValueError, ["`moments`", "'8bit'", "'4bit'"]),
    "moments of a wrong type": (one_of(moments=torch.bfloat16), ValueError, ["`moments`", "'bfloat16'", "torch.bfloat16"]),
    "seed": (one_of(seed=-1), ValueError, ["`seed`", "from 0 to 4294967295", "-1"]),
    "seed of a wrong type": (one_of(seed=None), ValueError, ["`seed`", "None"]),
    "moments of a group": (
        lambda: AdamW([{"params": [torch.nn.Parameter(torch.ones(2))], "moments": "8bit"}]),
        ValueError,
        ["`moments` is '8bit' in a group", "argument of the optimizer"],
    ),
    "64 bits": (stepped(torch.float64), ValueError, ["moments='bfloat16'", "'w'", "float64", "16 or 32"]),
    "no scale": (loaded(lambda own: own.pop("exp_avg_scale")), ValueError, ["parameter 'a' lacks ['exp_avg_scale']"]),
    "no code of the second": (loaded(lambda own: own.pop("exp_avg_sq_code")), ValueError, ["lacks ['exp_avg_sq_code']"]),
    "scale of another shape": (loaded(lambda own: own.update(exp_avg_scale=torch.ones(4))), ValueError, ["'a': 'exp_avg_scale'", "(4,)", "(3,)"]),
    "negative scales": (loaded(lambda own: own["exp_avg_sq_scale"].mul_(-1)), ValueError, ["'a': 'exp_avg_sq_scale'", "holds -", "powers of two"]),
    "other scales": (loaded(lambda own: own["exp_avg_scale"].mul_(3)), ValueError, ["'a': 'exp_avg_scale'", "powers of two"]),
    **{
        f"{key} {value!r}": (loaded(lambda own, key=key, value=value: own.update({key: value})), kind, [f"'a': {key!r} is", text])
        for key in ("iteration", "step", "micro_steps")
        for value, kind, text in [
            (-1, ValueError, "-1"),
            (2.5, ValueError, "2.5"),
            (float("nan"), ValueError, "nan"),
            (2**70, ValueError, "e+21"),
            (10**400, TypeError, "1000"),
            ("q", TypeError, "'q'"),
            (None, TypeError, "None"),
            (torch.tensor([1, 2]), TypeError, "Tensor of shape"),
        ]
    },
    "codes that are numbers": (loaded(lambda own: own.update(exp_avg_code=torch.ones(12, 64))), TypeError, ["'exp_avg_code'", "unsigned integers"]),
    "code that is none": (loaded(lambda own: own.update(exp_avg_code=[1])), TypeError, ["'exp_avg_code' is [1]"]),
    "codes of another shape": (loaded(lambda own: own.update(exp_avg_code=torch.ones(5, dtype=torch.uint16))), ValueError, ["'exp_avg_code'"]),
    "numbers of another shape": (
        loaded(lambda own: (own.pop("exp_avg_code"), own.update(exp_avg=torch.ones(5), exp_avg_sq=torch.ones(12, 64)))),
        ValueError,
        ["'a': 'exp_avg'", "(5,)", "(12, 64)"],
    ),
    "numbers that are none": (
        loaded(lambda own: (own.pop("exp_avg_code"), own.update(exp_avg=[1.0], exp_avg_sq=torch.ones(12, 64)))),
        TypeError,
        ["'a': 'exp_avg'", "[1.0]", "expected a tensor"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case):
    act, kind, expected = MISTAKES[case]
    with pytest.raises(kind) as caught:
        act()
    for part in expected:
        assert part in str(caught.value)
