"""torch.amp.GradScaler: overflows are skipped, and the scale goes as with torch's own optimizer."""

import copy

import pytest
import torch
from helpers.twins import AdamW, Twins, assert_same_bits, parameters, state_copy, tensors

SHAPES = [(4, 3), (5,), ()]
NAN, INF = float("nan"), float("inf")

# The steps at which a gradient is not finite
OVERFLOWS = {
    "none": {},
    "one": {4: INF},
    "the first": {0: INF, 1: NAN},
    "some in a row": {3: INF, 4: -INF, 5: NAN, 12: NAN},
    "often": dict.fromkeys(range(0, 20, 2), INF),
    "always": dict.fromkeys(range(20), INF),
}


def scaler_of(**options):
    return torch.amp.GradScaler(**{"device": "cpu", "init_scale": 2.0**10, "growth_interval": 3} | options)


def as_it_is(scaler, optimizer):
    """The scaler unscales when it takes the step."""


def unscaled(scaler, optimizer):
    scaler.unscale_(optimizer)


def clipped(scaler, optimizer):
    scaler.unscale_(optimizer)
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(params, 0.5)


def changed(scaler, optimizer):
    scaler.unscale_(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = parameter.grad * 0.5


def give_scaled(scaler, params, gradients):
    """Gradients of a scaled loss, by autograd; none where the gradient given is None."""
    for parameter in params:
        parameter.grad = None
    pairs = [pair for pair in zip(params, gradients, strict=True) if pair[1] is not None]
    scaler.scale(sum((parameter * gradient).sum() for parameter, gradient in pairs)).backward()


class Scaled:
    """Twins, each with a scaler of its own; where ours is fused, it unscales and skips in the step itself."""

    def __init__(self, twins, fused=False, **options):
        self.twins = twins
        twins.our.defaults["fused"] = fused
        self.scalers = {id(optimizer): scaler_of(**options) for optimizer, _ in twins.both}

    def step(self, gradients, prepare):
        for optimizer, params in self.twins.both:
            give_scaled(self.scalers[id(optimizer)], params, gradients)

        def take(optimizer):
            scaler = self.scalers[id(optimizer)]
            prepare(scaler, optimizer)
            result = scaler.step(optimizer)
            scaler.update()
            return result, scaler.get_scale(), scaler.state_dict()

        self.twins.follow(take)
        for optimizer, _ in self.twins.both:
            assert not hasattr(optimizer, "grad_scale")
            assert not hasattr(optimizer, "found_inf")


def with_overflow(gradients, value):
    if value is not None:
        gradients[1][2] = value
    return gradients


def two_groups(params):
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.1, "amsgrad": True}]


FUSED = pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])


@FUSED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("prepare", [as_it_is, unscaled, clipped, changed])
@pytest.mark.parametrize("name", OVERFLOWS)
def test_in_lockstep(name, prepare, dtype, fused):
    overflows = OVERFLOWS[name]
    twins = Twins(tensors(1, *SHAPES, dtype=dtype), two_groups, lr=0.02)
    scaled = Scaled(twins, fused)
    for k in range(20):
        before = copy.deepcopy(twins.ours), state_copy(twins.our)
        scaled.step(with_overflow(tensors(100 + k, *SHAPES, dtype=dtype), overflows.get(k)), prepare)
        if k in overflows:
            assert_same_bits([each.data for each in twins.ours], [each.data for each in before[0]])
            assert_same_bits(state_copy(twins.our), before[1])
    count = 20 - len(overflows)
    for parameter in twins.ours:
        assert twins.our.state[parameter]["step"] == count if count else parameter not in twins.our.state
    assert scaled.scalers[id(twins.our)].get_scale() != 2.0**10


@FUSED
@pytest.mark.parametrize("prepare", [as_it_is, unscaled])
def test_gradients_in_turns(prepare, fused):
    twins = Twins(tensors(1, *SHAPES), two_groups, lr=0.02)
    scaled = Scaled(twins, fused)
    for k, present in enumerate(["101", "110", "010", "011", "111", "010", "001"]):
        gradients = with_overflow(tensors(100 + k, *SHAPES), INF if k in (1, 4) else None)
        scaled.step([each if int(mark) else None for each, mark in zip(gradients, present, strict=True)], prepare)
    assert [int(twins.our.state[parameter]["step"]) for parameter in twins.ours] == [1, 3, 3]


@FUSED
def test_the_scale_is_no_power_of_two(fused):
    """So that unscaling rounds: within the tolerance of each dtype."""
    twins = Twins(tensors(1, *SHAPES, dtype=torch.float32), two_groups, lr=0.02)
    scaled = Scaled(twins, fused, init_scale=1000.7, growth_factor=1.3, backoff_factor=0.7)
    for k in range(20):
        scaled.step(with_overflow(tensors(100 + k, *SHAPES, dtype=torch.float32), INF if k == 9 else None), as_it_is)


def test_a_scaler_that_is_not_enabled():
    twins = Twins(tensors(1, *SHAPES), two_groups, lr=0.02)
    scaled = Scaled(twins, enabled=False)
    for k in range(5):
        scaled.step(tensors(100 + k, *SHAPES), as_it_is)
    assert all(twins.our.state[parameter]["step"] == 5 for parameter in twins.ours)


def test_one_scaler_of_two_optimizers():
    """An overflow in one of them skips the step of that one alone, and lowers the scale of both."""
    pairs = [Twins(tensors(seed, *SHAPES), two_groups, lr=0.02) for seed in (1, 2)]
    scalers = [scaler_of(), scaler_of()]
    for k in range(12):
        for which, scaler in enumerate(scalers):
            for index, twins in enumerate(pairs):
                value = INF if k % 4 == 1 and index == 0 else None
                give_scaled(scaler, twins.both[which][1], with_overflow(tensors(10 * k + index, *SHAPES), value))
        for twins in pairs:
            twins.follow(lambda optimizer, twins=twins: scalers[optimizer is twins.their].step(optimizer))
        for scaler in scalers:
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
    steps = [{int(twins.our.state[parameter]["step"]) for parameter in twins.ours} for twins in pairs]
    assert steps == [{9}, {12}]


def test_steps_with_and_without_a_scaler():
    twins = Twins(tensors(1, *SHAPES), two_groups, lr=0.02)
    scaled = Scaled(twins)
    for k in range(9):
        if k % 3 == 1:
            twins.step(tensors(100 + k, *SHAPES))
        else:
            scaled.step(with_overflow(tensors(100 + k, *SHAPES), INF if k == 5 else None), as_it_is)
    assert all(twins.our.state[parameter]["step"] == 8 for parameter in twins.ours)


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW], ids=["ours", "theirs"])
def test_mistakes(kind):
    params = parameters(tensors(1, *SHAPES))
    optimizer, scaler = kind(params, lr=0.02), scaler_of()
    give_scaled(scaler, params, tensors(2, *SHAPES))
    with pytest.raises(RuntimeError, match="Closure use"):
        scaler.step(optimizer, closure=lambda: 1.0)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    assert all(optimizer.state[parameter]["step"] == 1 for parameter in params)


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW], ids=["ours", "theirs"])
def test_no_gradients_at_all(kind):
    """The scaler has nothing to look at, and says so."""
    params = parameters(tensors(1, *SHAPES))
    optimizer, scaler = kind(params, lr=0.02), scaler_of()
    scaler.scale(torch.ones(()))
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)
        scaler.update()
    assert len(optimizer.state) == 0
    give_scaled(scaler, params, tensors(2, *SHAPES))
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW], ids=["ours", "theirs"])
def test_a_step_that_fails_under_a_scaler(kind):
    """Whatever the scaler had given the optimizer for that step does not spoil the next one."""
    params = parameters(tensors(1, *SHAPES))
    optimizer, scaler = kind(params, lr=0.02, weight_decay=0.0), scaler_of()
    give_scaled(scaler, params, tensors(2, *SHAPES))

    def fail(*_):
        raise ArithmeticError("no")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        scaler.step(optimizer)
    handle.remove()
    expected = parameters(params)
    reference = kind(expected, lr=0.02, weight_decay=0.0)
    for parameter, other, gradient in zip(params, expected, tensors(3, *SHAPES), strict=True):
        parameter.grad, other.grad = gradient, gradient.clone()
    optimizer.step()
    reference.step()
    assert_same_bits([each.data for each in params], [each.data for each in expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    """As a float32 run of torch, rounded. torch does not unscale gradients of float16; a fused step does."""
    ours, theirs = parameters(tensors(1, *SHAPES, dtype=dtype)), parameters(tensors(1, *SHAPES, dtype=dtype))
    for parameter in theirs:
        parameter.data = parameter.data.float()
    optimizer, reference = AdamW(ours, lr=0.003, fused=True), torch.optim.AdamW(theirs, lr=0.003)
    scalers = scaler_of(init_scale=16.0), scaler_of(init_scale=16.0)
    for k in range(12):
        gradients = with_overflow(tensors(100 + k, *SHAPES, dtype=dtype), INF if k in (3, 4) else None)
        for mine, other, gradient in zip(ours, theirs, gradients, strict=True):
            mine.grad, other.grad = gradient * scalers[0].get_scale(), gradient.float() * scalers[1].get_scale()
        for scaler, each in zip(scalers, (optimizer, reference), strict=True):
            scaler.scale(torch.ones(()))
            scaler.step(each)
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
    for mine, other in zip(ours, theirs, strict=True):
        expected = other.detach().to(dtype).float()
        torch.testing.assert_close(mine.detach().float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert optimizer.state[mine]["step"] == 10
