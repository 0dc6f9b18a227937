"""torch's own database of inputs for its optimizers: what its AdamW is tested with, ours is."""

import copy

import pytest
import torch
from helpers.twins import AdamW, Twins, complex_tensors, parameters, tensors

pytest.importorskip("expecttest")  # torch's own tests need it
from torch.testing._internal import common_optimizers

SHAPES = [(5, 3), (7,), (), (2, 3, 4), (0,), (301,)]
DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]


def inputs(dtype=torch.float32):
    return common_optimizers.optim_inputs_func_adamw("cpu", dtype)


def random(seed, dtype):
    make = complex_tensors if dtype.is_complex else tensors
    return make(seed, *SHAPES, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", range(len(inputs())), ids=[each.desc for each in inputs()])
def test_inputs(row, dtype):
    twins = Twins(random(1, dtype), **inputs(dtype)[row].kwargs)
    for k in range(20):
        twins.step(random(10 + k, dtype))
    assert twins.way[0] > 0.005


# Rows that the database has for other devices, and options that it leaves to each test
MORE = {
    "tensor lr of float64": {"lr": torch.tensor(0.01).double()},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "tensor lr and betas": {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
    "betas of other shapes": {"betas": (torch.tensor([[[0.9]]]), torch.tensor([[0.99]]))},
    "tensor betas of float64": {"betas": (torch.tensor(0.9).double(), torch.tensor(0.99).double())},
    "foreach": {"foreach": True},
    "no foreach": {"foreach": False, "amsgrad": True},
    "fused": {"fused": True},
    "fused, all options": {"fused": True, "amsgrad": True, "maximize": True, "weight_decay": 0.1},
    "no fused": {"fused": False},
    "a list of betas": {"betas": [0.8, 0.99]},
    "no momentum": {"betas": (0.0, 0.99)},
    "no second moment": {"betas": (0.9, 0.0)},
    "no weight decay": {"weight_decay": 0},
    "lr of zero": {"lr": 0},
    "integers": {"lr": 1, "weight_decay": 1},
    "a large epsilon": {"eps": 1},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MORE)
def test_more_inputs(name, dtype):
    given = [value for option in MORE[name].values() for value in (option if isinstance(option, tuple) else [option])]
    coarse = any(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in given)
    twins = Twins(random(1, dtype), **MORE[name], coarse=coarse)
    for k in range(20):
        twins.step(random(10 + k, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_positional_arguments(dtype):
    twins = Twins(random(1, dtype), lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, amsgrad=True)
    ours = parameters(random(1, dtype))
    optimizer = AdamW(ours, 0.01, (0.8, 0.99), 1e-6, 0.1, True)
    for k in range(5):
        twins.step(random(10 + k, dtype))
        for parameter, gradient in zip(ours, random(10 + k, dtype), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter, other in zip(ours, twins.ours, strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", range(len(inputs())), ids=[each.desc for each in inputs()])
def test_inputs_in_16_bits(row, dtype):
    """As a run in float32 whose results are rounded: within a unit in the last place of 16 bits."""
    options = inputs(dtype)[row].kwargs
    ours = parameters(random(1, dtype))
    theirs = parameters(tensor.float() for tensor in random(1, dtype))
    our, their = AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for k in range(20):
        for mine, other, gradient in zip(ours, theirs, random(10 + k, dtype), strict=True):
            mine.grad, other.grad = gradient, gradient.float()
        our.step()
        their.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.dtype == dtype
            expected = other.detach().to(dtype).float()
            torch.testing.assert_close(mine.detach().float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


# Rows about combinations that torch's own ways of stepping cannot do; ours has only one way, which can.
NOT_OURS = {
    "betas must be either both floats or both Tensors",
    "lr as Tensor doesn't work with foreach & not capturable",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}


def errors():
    found = common_optimizers.optim_error_inputs_func_adamw("cpu", torch.float32)
    return [pytest.param(each, id=each.optimizer_error_input.desc) for each in found]


@pytest.mark.parametrize("row", errors())
def test_errors(row):
    """A warning is an error here."""
    given = row.optimizer_error_input
    params = parameters(tensors(0, 3)) if given.params is None else given.params
    with pytest.raises(row.error_type, match=row.error_regex):
        torch.optim.AdamW(copy.deepcopy(params), **given.kwargs)
    if given.desc in NOT_OURS:
        AdamW(params, **given.kwargs).step()
    else:
        with pytest.raises(row.error_type):
            AdamW(params, **given.kwargs)


def test_rows_that_are_not_ours_exist():
    assert {each.values[0].optimizer_error_input.desc for each in errors()} >= NOT_OURS
