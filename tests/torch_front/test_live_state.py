"""The state of each parameter is live, as torch's is: what is written into it, or put in its place, counts."""

import copy
from collections import defaultdict

import pytest
import torch
from helpers.twins import (
    AdamW,
    Twins,
    assert_same_bits,
    both_dtypes,
    both_kinds,
    parameters,
    random,
    run,
    tensors,
    train,
    two_groups,
)


def written(state, value):
    state["exp_avg"].copy_(value)


def zeroed(state, value):
    state["exp_avg_sq"].zero_()


def scaled(state, value):
    state["exp_avg_sq"].mul_(3)
    state["exp_avg"].add_(value, alpha=0.1)


def maximum_forgotten(state, value):
    state["max_exp_avg_sq"].zero_()


def begun_again(state, value):
    state["step"].zero_()


def counted_further(state, value):
    state["step"] += 10


def step_filled(state, value):
    state["step"].fill_(7)


def step_replaced(state, value):
    state["step"] = torch.tensor(5.0)


def replaced(state, value):
    state["exp_avg"] = value.clone()


def all_replaced(state, value):
    state.update(exp_avg=value.clone(), exp_avg_sq=value.square(), max_exp_avg_sq=2 * value.square())


def replaced_by_another_layout(state, value):
    state["exp_avg"] = torch.stack([value, value], dim=-1)[..., 0]


def data_replaced(state, value):
    state["exp_avg"].data = value.clone()


def emptied(state, value):
    state.clear()


def copied(state, value):
    for key in list(state):
        state[key] = state[key].clone()


def noted(state, value):
    state["note"] = "mine"


WRITES = [
    written,
    zeroed,
    scaled,
    maximum_forgotten,
    begun_again,
    counted_further,
    step_filled,
    step_replaced,
    replaced,
    all_replaced,
    replaced_by_another_layout,
    data_replaced,
    emptied,
    copied,
    noted,
]


@both_dtypes
@pytest.mark.parametrize("which", [[0], [1, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_writes_count(write, which, dtype):
    twins = run(Twins(random(1, dtype), two_groups, lr=0.05, amsgrad=True))
    for k in range(2):
        for optimizer, params in twins.both:
            for index in which:
                write(optimizer.state[params[index]], random(50 + k, dtype)[index])
        twins.compare()
        run(twins, 2, seed=200 + 10 * k)


@pytest.mark.parametrize("write", [written, counted_further, replaced])
def test_writes_by_way_of_a_reference(write):
    """The dict of a parameter that was taken before some steps is still the live one."""
    twins = run(Twins(random(1), lr=0.05, amsgrad=True), 1)
    states = [optimizer.state[params[1]] for optimizer, params in twins.both]
    run(twins, 2, seed=200)
    for state in states:
        write(state, random(50)[1])
    run(twins, 2, seed=300)
    assert states[0] is twins.our.state[twins.ours[1]]


def test_references_stay_live():
    """So do tensors, also when another parameter gets its state later, or a group is added."""
    twins = Twins(random(1), lr=0.05, amsgrad=True)
    twins.step([random(2)[0], None, None])
    held = [dict(optimizer.state[params[0]]) for optimizer, params in twins.both]
    twins.step([random(3)[0], random(3)[1], None])
    for optimizer, params in twins.both:
        params.extend(parameters([torch.ones(3, dtype=torch.float64)]))
        optimizer.add_param_group({"params": params[-1]})
    twins.step([*random(4), torch.ones(3, dtype=torch.float64)])
    twins.step([random(5)[0], None, random(5)[2], None])
    for (optimizer, params), tensors_held in zip(twins.both, held, strict=True):
        for name, value in tensors_held.items():
            assert torch.equal(optimizer.state[params[0]][name], value), name
        assert tensors_held["step"] == 4
        tensors_held["exp_avg"].zero_()
        tensors_held["step"].fill_(9)
    twins.step([random(6)[0], None, None, None])
    assert twins.our.state[twins.ours[0]]["step"] == 10


# What is done to the whole state
def cleared(optimizer, params):
    optimizer.state.clear()


def assigned(optimizer, params):
    optimizer.state = defaultdict(dict)


def one_deleted(optimizer, params):
    del optimizer.state[params[1]]


def one_popped(optimizer, params):
    optimizer.state.pop(params[0])


def one_assigned(optimizer, params):
    optimizer.state[params[1]] = copy.deepcopy(optimizer.state[params[1]])


def one_emptied(optimizer, params):
    optimizer.state[params[1]] = {}


def swapped(optimizer, params):
    first, second = optimizer.state.pop(params[0]), optimizer.state.pop(params[1])
    optimizer.state[params[0]], optimizer.state[params[1]] = second, first


def all_copied(optimizer, params):
    state = defaultdict(dict)
    for parameter, own in optimizer.state.items():
        state[parameter] = {key: value.clone() for key, value in own.items()}
    optimizer.state = state


def of_others(optimizer, params):
    optimizer.state[torch.nn.Parameter(torch.ones(2))] = {"step": torch.tensor(3.0)}
    optimizer.state["note"] = "mine"


@both_dtypes
@pytest.mark.parametrize(
    "do", [cleared, assigned, one_deleted, one_popped, one_assigned, one_emptied, all_copied, of_others]
)
def test_the_whole_state(do, dtype):
    twins = run(Twins(random(1, dtype), two_groups, lr=0.05))
    for k in range(2):
        for optimizer, params in twins.both:
            do(optimizer, params)
        assert len(twins.our.state) == len(twins.their.state)
        run(twins, 2, seed=200 + 10 * k)


def test_states_exchanged_between_two_parameters():
    twins = Twins(tensors(1, (3,), (3,)), lr=0.05)
    twins.step(tensors(2, (3,), (3,)))
    twins.step([tensors(3, (3,))[0], None])
    for optimizer, params in twins.both:
        swapped(optimizer, params)
    twins.step(tensors(4, (3,), (3,)))
    assert [int(twins.our.state[parameter]["step"]) for parameter in twins.ours] == [2, 3]


def test_a_state_set_by_hand_before_the_first_step():
    twins = Twins(random(1), lr=0.05, amsgrad=True)
    for optimizer, params in twins.both:
        optimizer.state[params[1]].update(
            step=torch.tensor(20.0),
            exp_avg=random(2)[1],
            exp_avg_sq=random(2)[1].square(),
            max_exp_avg_sq=random(2)[1].square(),
        )
    run(twins)
    assert [int(twins.our.state[parameter]["step"]) for parameter in twins.ours] == [3, 23, 3]


def test_looking_makes_an_empty_state():
    """As torch's defaultdict does; it is filled at the first gradient."""
    twins = Twins(random(1), lr=0.05)
    for optimizer, params in twins.both:
        assert len(optimizer.state) == 0
        assert optimizer.state[params[0]] == {}
        assert len(optimizer.state) == 1
    run(twins)
    assert list(twins.our.state) == twins.ours
    assert [list(own) for own in twins.our.state.values()] == [list(own) for own in twins.their.state.values()]


@both_kinds
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_state_that_lacks_something(kind, key):
    optimizer = kind(parameters(random(1)), lr=0.1)
    params = train(optimizer, 2)
    values = copy.deepcopy(params)
    taken = optimizer.state[params[0]].pop(key)
    with pytest.raises((KeyError, ValueError)):
        optimizer.step()
    assert_same_bits(params, values)
    optimizer.state[params[0]][key] = taken
    optimizer.step()
    assert [int(optimizer.state[parameter]["step"]) for parameter in params] == [3, 3, 3]


@both_kinds
def test_steps_follow_the_default_dtype(kind):
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = kind(parameters(random(1)))
        params = train(optimizer, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    train(optimizer, 2)
    assert all(optimizer.state[parameter]["step"] == 4 for parameter in params)
    assert {optimizer.state[parameter]["step"].dtype for parameter in params} == {torch.float64}


# What is done to a tensor of the state, whose shape stays as it is
SPOILED = {
    "another stride": lambda slot: setattr(slot, "data", torch.zeros(64 * slot.numel(), dtype=slot.dtype)[::64]),
    "another dtype": lambda slot: setattr(slot, "data", torch.zeros(slot.shape, dtype=torch.float16)),
    "one element for all": lambda slot: setattr(slot, "data", torch.zeros(1, dtype=slot.dtype).expand(slot.shape)),
}


@pytest.mark.parametrize("again", ["a count written", "amsgrad"])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("name", SPOILED)
def test_a_state_that_lies_otherwise_is_copied(name, key, again):
    """The kernels would write beyond its end, or read its elements in another order."""
    params = parameters(tensors(1, (1000,)))
    optimizer, gradient = AdamW(params, lr=0.1), tensors(2, (1000,))[0]
    params[0].grad = gradient
    optimizer.step()
    SPOILED[name](optimizer.state[params[0]][key])
    expected = params[0].detach().clone().requires_grad_()
    expected.grad = gradient
    reference = torch.optim.AdamW([expected], lr=0.1, amsgrad=again == "amsgrad")
    loaded = copy.deepcopy(optimizer.state_dict()["state"][0])
    loaded = {each: slot if each == "step" else slot.double().contiguous() for each, slot in loaded.items()}
    reference.state[expected] = loaded | {"max_exp_avg_sq": torch.zeros(1000, dtype=torch.float64)}
    if again == "amsgrad":
        optimizer.param_groups[0]["amsgrad"] = True
    else:
        optimizer.state[params[0]]["step"].fill_(3)
        reference.state[expected]["step"].fill_(3)
    for _ in range(3):
        optimizer.step()
        reference.step()
    torch.testing.assert_close(params[0], expected, rtol=1e-12, atol=1e-12)
    for each in ("exp_avg", "exp_avg_sq"):
        ours, theirs = optimizer.state[params[0]][each], reference.state[expected][each]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_state_whose_storage_was_shrunk_is_refused():
    params = parameters(tensors(1, (1000,)))
    optimizer = AdamW(params, lr=0.1)
    params[0].grad = tensors(2, (1000,))[0]
    optimizer.step()
    optimizer.state[params[0]]["exp_avg"].untyped_storage().resize_(400)
    optimizer.state[params[0]]["step"].fill_(3)
    values = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"'exp_avg'.*its storage holds 400 bytes"):
        optimizer.step()
    assert torch.equal(params[0], values)


@pytest.mark.parametrize("again", ["replaced", "amsgrad"])
def test_a_parameter_that_is_laid_out_anew_before_its_state(again):
    """What the state keeps is laid out as the parameter was, and what is new as it is now."""
    twins = run_square(Twins(tensors(1, (3, 3)), lr=0.1))
    for optimizer, (param,) in twins.both:
        param.data = param.data.mT.contiguous().mT
        if again == "amsgrad":
            optimizer.param_groups[0]["amsgrad"] = True
            optimizer.state[param]["max_exp_avg_sq"] = torch.zeros_like(param)
        else:
            optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].clone()
    run_square(twins, seed=200)


def run_square(twins, seed=100):
    for k in range(3):
        twins.step(tensors(seed + k, (3, 3)))
    return twins
