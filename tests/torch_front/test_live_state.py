"""The state of each parameter is live, as torch's is: what is written into it, or put in its place, counts."""

import copy
from collections import defaultdict

import pytest
import torch
from helpers.twins import (
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
