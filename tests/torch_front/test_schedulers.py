"""Every scheduler of torch, which reads and writes the groups of an optimizer: in lockstep with torch's own."""

import copy
import inspect
import warnings

import pytest
import torch
from helpers.twins import AdamW, Twins, parameters, tensors
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

SHAPES = [(4, 3), (5,), ()]
STEPS = 50

# Made for an optimizer of two groups
MAKERS = {
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda k: 0.95**k),
    "LambdaLR of each group": lambda optimizer: schedulers.LambdaLR(
        optimizer, [lambda k: 0.95**k, lambda k: 1 / (k + 1)]
    ),
    "MultiplicativeLR": lambda optimizer: schedulers.MultiplicativeLR(optimizer, lambda k: 0.9 if k % 3 else 1.1),
    "StepLR": lambda optimizer: schedulers.StepLR(optimizer, step_size=7, gamma=0.5),
    "MultiStepLR": lambda optimizer: schedulers.MultiStepLR(optimizer, milestones=[3, 20, 21], gamma=0.3),
    "ConstantLR": lambda optimizer: schedulers.ConstantLR(optimizer, factor=0.25, total_iters=10),
    "LinearLR": lambda optimizer: schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=20),
    "ExponentialLR": lambda optimizer: schedulers.ExponentialLR(optimizer, gamma=0.9),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [
            schedulers.LinearLR(optimizer, start_factor=0.01, total_iters=10),
            schedulers.CosineAnnealingLR(optimizer, T_max=40),
        ],
        milestones=[10],
    ),
    "PolynomialLR": lambda optimizer: schedulers.PolynomialLR(optimizer, total_iters=30, power=2.0),
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=1e-3),
    "CosineAnnealingLR to zero and back": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=10),
    "ChainedScheduler": lambda optimizer: schedulers.ChainedScheduler(
        [
            schedulers.ConstantLR(optimizer, factor=0.1, total_iters=5),
            schedulers.ExponentialLR(optimizer, gamma=0.9),
        ]
    ),
    "ReduceLROnPlateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=3, cooldown=2),
    "CyclicLR": lambda optimizer: schedulers.CyclicLR(optimizer, base_lr=0.001, max_lr=0.1, step_size_up=7),
    "CyclicLR of each group": lambda optimizer: schedulers.CyclicLR(
        optimizer, base_lr=[0.001, 0.01], max_lr=[0.1, 0.2], step_size_up=4, mode="triangular2", base_momentum=0.5
    ),
    "CyclicLR without momentum": lambda optimizer: schedulers.CyclicLR(
        optimizer, base_lr=0.001, max_lr=0.1, mode="exp_range", gamma=0.99, step_size_up=9, cycle_momentum=False
    ),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, T_0=8, T_mult=2),
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1),
    "OneCycleLR of each group": lambda optimizer: schedulers.OneCycleLR(
        optimizer, max_lr=[0.1, 0.2], total_steps=STEPS + 1, three_phase=True, anneal_strategy="linear"
    ),
    "OneCycleLR without momentum": lambda optimizer: schedulers.OneCycleLR(
        optimizer, max_lr=0.1, epochs=5, steps_per_epoch=STEPS // 5 + 1, cycle_momentum=False
    ),
    "SWALR": lambda optimizer: SWALR(optimizer, swa_lr=0.2, anneal_epochs=20),
}


def test_all_of_torchs_schedulers_are_there():
    known = {
        name
        for name, value in vars(schedulers).items()
        if inspect.isclass(value) and issubclass(value, schedulers.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= set(MAKERS)


def two_groups(params):
    return [{"params": params[:1], "lr": 0.1}, {"params": params[1:]}]


def two_groups_of_tensor_rates(params):
    rates = [torch.tensor(rate, dtype=torch.float64) for rate in (0.1, 0.05)]
    return [{"params": params[:1], "lr": rates[0]}, {"params": params[1:], "lr": rates[1]}]


def warnings_of(call, *arguments):
    """What it warns of, and its result."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call(*arguments)
    return [(each.category, str(each.message)) for each in found], result


def scheduled(twins, make):
    """A scheduler for each of both, and a step with it."""
    (ours, mine), (theirs, other) = (warnings_of(make, optimizer) for optimizer, _ in twins.both)
    assert ours == theirs
    scheduler_of = {id(twins.our): mine, id(twins.their): other}

    def take(optimizer):
        scheduler = scheduler_of[id(optimizer)]
        loss = [max(1.0, 3.0 - 0.2 * twins.steps)] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []
        return warnings_of(optimizer.step)[0] + warnings_of(scheduler.step, *loss)[0]

    return mine, other, take


def run(twins, take, steps):
    for _ in range(steps):
        twins.give(tensors(100 + twins.steps, *SHAPES, dtype=twins.theirs[0].dtype))
        twins.go(take)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("arrange", [two_groups, two_groups_of_tensor_rates])
@pytest.mark.parametrize("name", MAKERS)
def test_in_lockstep(name, arrange, dtype):
    twins = Twins(tensors(1, *SHAPES, dtype=dtype), arrange, lr=0.05)
    mine, other, take = scheduled(twins, MAKERS[name])
    seen = {float(twins.our.param_groups[0]["lr"])}
    for _ in range(STEPS // 10):
        run(twins, take, 10)
        seen.add(float(twins.our.param_groups[0]["lr"]))
        assert mine.get_last_lr() == other.get_last_lr()
    assert len(seen) > 1


@pytest.mark.parametrize("name", MAKERS)
def test_resumed(name):
    """Optimizer and scheduler go on from their state dicts, in new objects."""
    twins = Twins(tensors(1, *SHAPES), two_groups, lr=0.05)
    mine, other, take = scheduled(twins, MAKERS[name])
    run(twins, take, 20)
    saved = [copy.deepcopy(each.state_dict()) for each in (twins.our, twins.their, mine, other)]
    twins.our, twins.their = (
        kind(two_groups(params), lr=0.05)
        for kind, (_, params) in zip((AdamW, torch.optim.AdamW), twins.both, strict=True)
    )
    mine, other, take = scheduled(twins, MAKERS[name])
    for each, state_dict in zip((twins.our, twins.their, mine, other), saved, strict=True):
        each.load_state_dict(state_dict)
    run(twins, take, 20)


def test_the_order_of_calls():
    """A scheduler that is called before the first step warns once of each optimizer, and of none called after it."""
    for make in (AdamW, torch.optim.AdamW):
        optimizer = make(parameters(tensors(1, (3,))), lr=0.1)
        scheduler = schedulers.StepLR(optimizer, 3)
        found, _ = warnings_of(scheduler.step)
        assert ["before `optimizer.step()`" in message for _, message in found] == [True]
        optimizer = make(parameters(tensors(1, (3,))), lr=0.1)
        scheduler = schedulers.StepLR(optimizer, 3)
        assert warnings_of(optimizer.step)[0] == warnings_of(scheduler.step)[0] == []


def test_two_schedulers_of_one_optimizer():
    twins = Twins(tensors(1, *SHAPES), two_groups, lr=0.05)
    pairs = {
        id(optimizer): (schedulers.StepLR(optimizer, 4), schedulers.ExponentialLR(optimizer, 0.9))
        for optimizer, _ in twins.both
    }

    def take(optimizer):
        return [warnings_of(call)[0] for call in (optimizer.step, *(each.step for each in pairs[id(optimizer)]))]

    run(twins, take, 12)


def test_a_scheduler_and_a_closure():
    """A scheduler wraps `step`; closures and results go through it."""
    optimizer = AdamW(parameters(tensors(1, (3,))), lr=0.1)
    schedulers.StepLR(optimizer, 3)
    assert optimizer.step(lambda: 7) == 7
    assert optimizer.step(closure=lambda: 8) == 8


def test_a_copy_of_an_optimizer_that_has_a_scheduler():
    """The copy has none, and leaves the first one alone."""
    twins = Twins(tensors(1, *SHAPES), two_groups, lr=0.05)
    _, _, take = scheduled(twins, MAKERS["StepLR"])
    run(twins, take, 5)
    copied, rates = copy.deepcopy(twins.our), [group["lr"] for group in twins.our.param_groups]
    for parameter in (each for group in copied.param_groups for each in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    for _ in range(10):
        copied.step()
    assert [group["lr"] for group in copied.param_groups] == rates
    run(twins, take, 5)


def test_weight_decay_by_hand_at_each_step():
    """As whoever writes a schedule of the decay does."""
    twins = Twins(tensors(1, *SHAPES), two_groups, lr=0.05)

    def take(optimizer):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.3 / (twins.steps + 1)
        return optimizer.step()

    run(twins, take, 20)
