"""Parameters of 16 bits have a state of float32, which survives saving and copying."""

import copy

import pytest
import torch
from helpers.twins import WAYS, AdamW, assert_same_bits, parameters, state_copy, tensors, through_pickle, train
from test_live_state import counted_further, emptied, replaced, scaled, written, zeroed

SHAPES = [(4, 3), (5,), ()]
sixteen_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def random(seed, dtype=torch.float64):
    return tensors(seed, *SHAPES, dtype=dtype)


def two_groups(params):
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.02, "betas": (0.8, 0.99)}]


@sixteen_bits
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle])
def test_16_bits_copied(way, dtype):
    optimizer = AdamW(two_groups(parameters(random(1, dtype))), lr=0.003, amsgrad=True)
    train(optimizer, 5)
    other = way(optimizer)
    others = train(other, 20, seed=200)
    params = train(optimizer, 20, seed=200)
    assert_same_bits([each.data for each in others], [each.data for each in params])
    assert_same_bits(state_copy(other), state_copy(optimizer))


@sixteen_bits
@pytest.mark.parametrize("way", WAYS)
def test_16_bits_resumed_bit_for_bit(way, dtype):
    """The state is float32, and stays it when it is loaded."""
    optimizer = AdamW(two_groups(parameters(random(1, dtype))), lr=0.003, amsgrad=True)
    params = train(optimizer, 5)
    other = AdamW(two_groups(parameters(params)), lr=1.0)
    other.load_state_dict(WAYS[way](optimizer.state_dict()))
    assert_same_bits(state_copy(other), state_copy(optimizer))
    assert all(optimizer.state[parameter]["exp_avg"].dtype == torch.float32 for parameter in params)
    others = train(other, 20, seed=200)
    train(optimizer, 20, seed=200)
    assert_same_bits([each.data for each in others], [each.data for each in params])
    assert_same_bits(state_copy(other), state_copy(optimizer))


@sixteen_bits
@pytest.mark.parametrize("write", [written, zeroed, scaled, counted_further, replaced, emptied])
def test_16_bits_written(write, dtype):
    """As the same is done to a float32 run of torch, rounded at the end."""
    ours, theirs = parameters(random(1, dtype)), parameters(each.float() for each in random(1, dtype))
    optimizers = AdamW(ours, lr=0.003), torch.optim.AdamW(theirs, lr=0.003)
    for k in range(10):
        if k == 5:
            for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
                for parameter, value in zip(params, random(50, torch.float32), strict=True):
                    write(optimizer.state[parameter], value)
        for mine, other, gradient in zip(ours, theirs, random(100 + k, dtype), strict=True):
            mine.grad, other.grad = gradient, gradient.float()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        expected = other.detach().to(dtype).float()
        torch.testing.assert_close(mine.detach().float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@sixteen_bits
def test_16_bits_from_torch(dtype):
    """Torch's state of 16 bits becomes ours of float32, with the same values."""
    theirs = torch.optim.AdamW(parameters(random(1, dtype)), lr=0.003, eps=0.01)
    params = train(theirs, 5)
    ours = AdamW(parameters(params), lr=1.0)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    others = ours.param_groups[0]["params"]
    for mine, other in zip(others, params, strict=True):
        assert ours.state[mine]["step"] == 5
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(ours.state[mine][name], theirs.state[other][name].float())
    wide = torch.optim.AdamW(parameters(each.detach().float() for each in params), lr=1.0)
    wide.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for k in range(5):
        for mine, other, gradient in zip(others, wide.param_groups[0]["params"], random(100 + k, dtype), strict=True):
            mine.grad, other.grad = gradient, gradient.float()
        ours.step()
        wide.step()
    for mine, other in zip(others, wide.param_groups[0]["params"], strict=True):
        expected = other.detach().to(dtype).float()
        torch.testing.assert_close(mine.detach().float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@sixteen_bits
def test_16_bits_to_torch(dtype):
    """Torch rounds our state to the parameters' 16 bits, as it does with its own."""
    ours = AdamW(parameters(random(1, dtype)), lr=0.003, eps=0.01)
    params = train(ours, 5)
    theirs = torch.optim.AdamW(parameters(params), lr=1.0)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    others = train(theirs, 3, seed=200)
    train(ours, 3, seed=200)
    for mine, other in zip(params, others, strict=True):
        assert theirs.state[other]["exp_avg"].dtype == dtype
        assert theirs.state[other]["step"] == 8
        way = 3 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine.detach().float(), other.detach().float(), rtol=way, atol=0.003 * way * 30)


@sixteen_bits
def test_16_bits_written_by_the_owner(dtype):
    """A parameter that is written starts from there."""
    optimizer = AdamW(parameters(random(1, dtype)), lr=0.003, weight_decay=0.0)
    params = train(optimizer, 3)
    with torch.no_grad():
        params[0].fill_(8.0)
    params[1].data = torch.full((5,), 16.0, dtype=dtype)
    train(optimizer, 1)
    torch.testing.assert_close(params[0].detach().float(), torch.full((4, 3), 8.0), rtol=0.01, atol=0)
    torch.testing.assert_close(params[1].detach().float(), torch.full((5,), 16.0), rtol=0.01, atol=0)
