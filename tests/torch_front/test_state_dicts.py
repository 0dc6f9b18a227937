"""State dicts, exchanged with torch.optim.AdamW at any time and in both directions; copies of optimizers."""

import copy

import pytest
import torch
from helpers.twins import (
    KINDS,
    WAYS,
    AdamW,
    Twins,
    assert_same_bits,
    both_dtypes,
    both_kinds,
    parameters,
    random,
    run,
    state_copy,
    tensors,
    through_pickle,
    train,
    two_groups,
)
from torch.distributed.checkpoint import state_dict as distributed


def test_a_state_dict_is_torchs():
    twins = run(Twins(random(1), two_groups, lr=0.05, amsgrad=True))
    ours, theirs = (optimizer.state_dict() for optimizer, _ in twins.both)
    assert ours.keys() == theirs.keys()
    assert list(ours["state"]) == list(theirs["state"]) == [0, 1, 2]
    for index in range(3):
        assert list(ours["state"][index]) == list(theirs["state"][index])
    assert [group["params"] for group in ours["param_groups"]] == [[0], [1, 2]]
    for mine, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {key: mine[key] for key in other} == other


@both_kinds
def test_a_state_dict_holds_the_live_tensors(kind):
    """No copies: whoever wants those makes them, as with torch's."""
    optimizer = kind(parameters(random(1)), lr=0.1)
    params = train(optimizer, 2)
    saved = optimizer.state_dict()["state"]
    train(optimizer, 2, seed=200)
    for index, parameter in enumerate(params):
        assert saved[index]["step"] == 4
        for name, value in saved[index].items():
            assert torch.equal(optimizer.state[parameter][name], value)


@both_dtypes
@pytest.mark.parametrize("steps", range(7))
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("way", WAYS)
def test_exchanged_with_torch(way, amsgrad, steps, dtype):
    """After any number of steps, each goes on with the state of the other."""
    twins = run(Twins(random(1, dtype), two_groups, lr=0.05, amsgrad=amsgrad), steps)
    ours, theirs = (WAYS[way](optimizer.state_dict()) for optimizer, _ in twins.both)
    for optimizer, _ in twins.both:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group.update(lr=1.0, betas=(0.1, 0.2), amsgrad=False)
    twins.our.load_state_dict(theirs)
    twins.their.load_state_dict(ours)
    twins.compare()
    run(twins, 3, seed=200)
    assert all(twins.our.state[parameter]["step"] == steps + 3 for parameter in twins.ours)


@both_dtypes
@pytest.mark.parametrize("pattern", [["100", "110", "000"], ["011", "010"], ["001"] * 4], ids=str)
def test_exchanged_with_torch_in_turns(pattern, dtype):
    """Parameters have counts of their own, and some have no state."""
    twins = Twins(random(1, dtype), two_groups, lr=0.05)
    for k, present in enumerate(pattern):
        gradients = random(100 + k, dtype)
        twins.step([gradient if int(mark) else None for gradient, mark in zip(gradients, present, strict=True)])
    ours, theirs = (copy.deepcopy(optimizer.state_dict()) for optimizer, _ in twins.both)
    twins.our, twins.their = (
        kind(two_groups(params), lr=1.0) for kind, (_, params) in zip(KINDS, twins.both, strict=True)
    )
    twins.our.load_state_dict(theirs)
    twins.their.load_state_dict(ours)
    twins.compare()
    run(twins, 2, seed=200)


@both_kinds
@pytest.mark.parametrize("way", WAYS)
def test_resumed_bit_for_bit(way, kind):
    optimizer = kind(two_groups(parameters(random(1))), lr=0.05, amsgrad=True)
    params = train(optimizer, 4)
    other = kind(two_groups(parameters(params)), lr=1.0)
    other.load_state_dict(WAYS[way](optimizer.state_dict()))
    others = train(other, 4, seed=200)
    train(optimizer, 4, seed=200)
    assert_same_bits([each.data for each in others], [each.data for each in params])
    assert_same_bits(state_copy(other), state_copy(optimizer))


def test_loaded_tensors_are_copies():
    """What is loaded is not written to by later steps."""
    optimizer = AdamW(parameters(random(1)), lr=0.05)
    train(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other = AdamW(parameters(random(1)), lr=0.05)
    other.load_state_dict(saved)
    train(other, 2)
    assert_same_bits(saved, kept)


@both_kinds
def test_loaded_where_steps_were_taken(kind):
    """What was there before is gone."""
    first, second = (kind(parameters(random(1)), lr=0.05, amsgrad=True) for _ in range(2))
    train(first, 3)
    params = train(second, 5, seed=200)
    for parameter, start in zip(params, first.param_groups[0]["params"], strict=True):
        parameter.data.copy_(start.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same_bits(state_copy(second), state_copy(first))
    train(first, 3, seed=300)
    train(second, 3, seed=300)
    assert_same_bits([each.data for each in params], [each.data for each in first.param_groups[0]["params"]])


@both_kinds
def test_loaded_from_one_that_took_no_step(kind):
    optimizer = kind(parameters(random(1)), lr=0.05)
    fresh = copy.deepcopy(optimizer.state_dict())
    params = train(optimizer, 3)
    optimizer.load_state_dict(fresh)
    assert len(optimizer.state) == 0
    train(optimizer, 1)
    assert all(optimizer.state[parameter]["step"] == 1 for parameter in params)


@both_kinds
def test_loaded_groups_win(kind):
    """Also with keys that no optimizer knows, such as those of schedulers."""
    optimizer = kind(two_groups(parameters(random(1))), lr=0.05)
    train(optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(lr=0.5, initial_lr=0.7, color="red")
    other = kind(two_groups(parameters(random(1))), lr=0.1, weight_decay=0.3, maximize=True)
    other.load_state_dict(saved)
    for group, expected in zip(other.param_groups, saved["param_groups"], strict=True):
        assert {key: group[key] for key in expected if key != "params"} == {
            key: value for key, value in expected.items() if key != "params"
        }
    assert other.param_groups[0]["color"] == "red"
    assert saved["param_groups"][0]["params"] == [0]


def test_a_group_is_added_and_then_loaded():
    twins = run(Twins(random(1), lr=0.05))
    for optimizer, params in twins.both:
        params.extend(parameters([torch.ones(3, dtype=torch.float64)]))
        optimizer.add_param_group({"params": params[-1], "lr": 0.3})
    twins.step([*random(5), torch.ones(3, dtype=torch.float64)])
    for optimizer, params in twins.both:
        other = type(optimizer)(params[:3], lr=1.0)
        other.add_param_group({"params": params[3]})
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if optimizer is twins.our:
            ours = other
    twins.our, twins.their = ours, other
    twins.step([*random(6), torch.ones(3, dtype=torch.float64)])
    assert twins.our.param_groups[1]["lr"] == 0.3


MISFITS = {
    "fewer groups": lambda params: [{"params": params}],
    "more groups": lambda params: [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:]}],
    "other sizes": lambda params: [{"params": params[:2]}, {"params": params[2:]}],
    "fewer parameters": lambda params: [{"params": params[:1]}, {"params": params[1:2]}],
}


@both_kinds
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", MISFITS)
def test_a_state_dict_of_other_groups(name, steps, kind):
    """Is refused, and nothing is changed."""
    saved = kind(MISFITS[name](parameters(random(1))), lr=0.3).state_dict()
    optimizer = kind(two_groups(parameters(random(1))), lr=0.05)
    params = train(optimizer, steps)
    values, state, groups = (
        copy.deepcopy(params),
        state_copy(optimizer),
        [dict(each) for each in optimizer.param_groups],
    )
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(saved)
    assert_same_bits(params, values)
    assert_same_bits(state_copy(optimizer), state)
    for group, expected in zip(optimizer.param_groups, groups, strict=True):
        assert {**group, "params": None} == {**expected, "params": None}
    train(optimizer, 1)


@both_kinds
@pytest.mark.parametrize("lacking", ["state", "param_groups"])
def test_half_a_state_dict(lacking, kind):
    optimizer = kind(parameters(random(1)))
    train(optimizer, 1)
    saved = optimizer.state_dict()
    del saved[lacking]
    with pytest.raises(KeyError, match=lacking):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_a_state_of_another_shape(key, steps):
    """Is refused when it is loaded, and not only at the next step; nothing is changed."""
    source = AdamW(parameters(random(1)), lr=0.05, amsgrad=True)
    train(source, 1)
    saved = copy.deepcopy(source.state_dict())
    saved["state"][1][key] = torch.ones(7, dtype=torch.float64)
    saved["param_groups"][0]["lr"] = 0.7
    optimizer = AdamW(parameters(random(1)), lr=0.05, amsgrad=True)
    params = train(optimizer, steps)
    values, state = copy.deepcopy(params), state_copy(optimizer)
    with pytest.raises(ValueError, match=key):
        optimizer.load_state_dict(saved)
    assert_same_bits(params, values)
    assert_same_bits(state_copy(optimizer), state)
    assert optimizer.param_groups[0]["lr"] == 0.05
    train(optimizer, 1)
    assert all(optimizer.state[parameter]["step"] == steps + 1 for parameter in params)


def test_state_dicts_of_older_versions_of_torch():
    """Steps were numbers, and groups lacked what was not yet invented."""
    twins = run(Twins(random(1), lr=0.05))
    for optimizer, _ in twins.both:
        saved = copy.deepcopy(twins.their.state_dict())
        for own in saved["state"].values():
            own["step"] = int(own["step"])
        for key in (
            "maximize",
            "foreach",
            "capturable",
            "differentiable",
            "fused",
            "amsgrad",
            "decoupled_weight_decay",
        ):
            del saved["param_groups"][0][key]
        optimizer.load_state_dict(saved)
    run(twins, 3, seed=200)


def test_the_state_of_an_adam_of_torch():
    """Weight decay stays decoupled, as when torch's AdamW loads it."""
    params = parameters(random(1))
    adam = torch.optim.Adam(params, lr=0.05, weight_decay=0.1)
    train(adam, 3)
    twins = Twins([each.detach() for each in params], lr=1.0)
    for optimizer, _ in twins.both:
        optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    run(twins, 3, seed=200)


@both_kinds
def test_notes_of_others_are_saved(kind):
    optimizer = kind(parameters(random(1)), lr=0.05)
    params = train(optimizer, 2)
    optimizer.state[params[0]]["note"] = {"of": [1, 2]}
    optimizer.state["all"] = 7
    other = kind(parameters(random(1)), lr=0.05)
    other.load_state_dict(through_pickle(optimizer.state_dict()))
    others = train(other, 1)
    assert other.state[others[0]]["note"] == {"of": [1, 2]}
    assert other.state["all"] == 7


# Copies of the optimizer itself


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()


def fit(model, optimizer, steps, seed):
    for k in range(steps):
        optimizer.zero_grad()
        model(tensors(seed + k, (5, 3))[0]).square().sum().backward()
        optimizer.step()
    return [each.data for each in model.parameters()]


@both_kinds
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_copied_with_the_model(named, way, steps, kind):
    model = network()
    optimizer = kind(model.named_parameters() if named else model.parameters(), lr=0.05, amsgrad=True)
    fit(model, optimizer, steps, 100)
    other_model, other = way((model, optimizer))
    assert type(other) is kind
    assert all(
        one is another for one, another in zip(other.param_groups[0]["params"], other_model.parameters(), strict=True)
    )
    values = copy.deepcopy([each.data for each in model.parameters()])
    state = state_copy(optimizer)
    results = fit(other_model, other, 3, 200)
    assert_same_bits([each.data for each in model.parameters()], values)
    assert_same_bits(state_copy(optimizer), state)
    assert_same_bits(results, fit(model, optimizer, 3, 200))
    assert_same_bits(state_copy(other), state_copy(optimizer))
    other.add_param_group({"params": [("more", torch.ones(2)) if named else torch.ones(2)]})
    assert len(optimizer.param_groups) == 1


@both_kinds
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle])
def test_copied_alone(way, kind):
    """Its parameters are copied with it, and it keeps options and groups, but no hooks."""
    optimizer = kind(two_groups(parameters(random(1))), lr=0.05, weight_decay=0.3, maximize=True)
    params = train(optimizer, 2)
    optimizer.param_groups[0]["color"] = "red"
    handle = optimizer.register_step_post_hook(print)
    other = way(optimizer)
    handle.remove()
    others = train(other, 3, seed=200)
    assert not any(one is another for one, another in zip(others, params, strict=True))
    assert other.defaults == optimizer.defaults
    assert other.param_groups[0]["color"] == "red"
    assert not other._optimizer_step_post_hooks
    train(optimizer, 3, seed=200)
    assert_same_bits([each.data for each in others], [each.data for each in params])


@both_kinds
def test_a_copy_keeps_what_is_written_into_the_state(kind):
    optimizer = kind(parameters(random(1)), lr=0.05)
    params = train(optimizer, 2)
    optimizer.state[params[0]]["step"].fill_(30)
    optimizer.state[params[1]]["exp_avg"] = random(9)[1]
    other = copy.deepcopy(optimizer)
    others = train(other, 1)
    train(optimizer, 1)
    assert_same_bits([each.data for each in others], [each.data for each in params])
    assert other.state[others[0]]["step"] == 31


@both_kinds
def test_torchs_own_tools_for_checkpoints(kind):
    """torch.distributed.checkpoint names the state by the model's parameters, and takes a step to have one at all."""
    models = network(), network()
    first, second = (kind(model.parameters(), lr=rate) for model, rate in zip(models, (0.05, 1.0), strict=True))
    fit(models[0], first, 3, 100)
    first.zero_grad()
    models[1].load_state_dict(models[0].state_dict())
    saved = copy.deepcopy(distributed.get_optimizer_state_dict(models[0], first))
    assert saved["state"]["0.weight"]["step"] == 3
    distributed.set_optimizer_state_dict(models[1], second, optim_state_dict=saved)
    assert_same_bits(fit(models[1], second, 3, 200), fit(models[0], first, 3, 200))
    assert_same_bits(state_copy(second), state_copy(first))
