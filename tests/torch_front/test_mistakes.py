"""Mistakes that torch.optim.AdamW refuses: ours raises the same type of error, and nothing is changed."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.twins import AdamW, Twins, assert_same_bits, parameters, state_copy, tensors

NAN = math.nan


def fresh():
    return parameters(tensors(1, (2, 3), (4,)))


def used_generator():
    generator = iter(fresh())
    list(generator)
    return generator


def groups_with_one_parameter():
    first, second = fresh()
    return [{"params": [first]}, {"params": [second, first]}]


# What is given as `params`, made anew for each optimizer
PARAMS = {
    "a tensor": lambda: fresh()[0],
    "nothing": list,
    "an empty generator": lambda: iter(()),
    "a generator that was used already": used_generator,
    "none": lambda: None,
    "a module": lambda: torch.nn.Linear(2, 2),
    "a number": lambda: 1.0,
    "one parameter twice": lambda: fresh()[:1] * 2,
    "one parameter in two groups": groups_with_one_parameter,
    "a NumPy array": lambda: [np.ones(3)],
    "a parameter and a NumPy array": lambda: [*fresh(), np.ones(3)],
    "a list in the list": lambda: [fresh()],
    "none in the list": lambda: [*fresh(), None],
    "a text": lambda: "weight",
    "a dict": lambda: {"params": fresh()},
    "a state dict": lambda: torch.nn.Linear(2, 2).state_dict(),
    "not a leaf": lambda: [2 * fresh()[0]],
    "a set in a group": lambda: [{"params": set(fresh())}],
    "a group without parameters": lambda: [{"lr": 0.1}],
    "a group without the word": lambda: [{"params": fresh()}, {"parameters": fresh()}],
    "a group with a NumPy array": lambda: [{"params": [np.ones(3)]}],
    "groups and parameters": lambda: [{"params": fresh()[:1]}, fresh()[1]],
    "named and unnamed": lambda: [("w", fresh()[0]), fresh()[1]],
    "unnamed and named": lambda: [fresh()[0], ("w", fresh()[1])],
    "named and unnamed groups": lambda: [{"params": [("w", fresh()[0])]}, {"params": [fresh()[1]]}],
    "a named array": lambda: [("w", np.ones(3))],
}
# What else is given
OPTIONS = {
    "unknown": {"color": "red"},
    "negative lr": {"lr": -1.0},
    "lr of nan": {"lr": NAN},
    "lr of two elements": {"lr": torch.tensor([0.1, 0.2])},
    "negative tensor lr": {"lr": torch.tensor(-0.1)},
    "lr is a text": {"lr": "0.1"},
    "lr is none": {"lr": None},
    "beta of one": {"betas": (1.0, 0.999)},
    "second beta of one": {"betas": (0.9, 1.0)},
    "negative beta": {"betas": (-0.1, 0.999)},
    "negative second beta": {"betas": (0.9, -0.1)},
    "beta of nan": {"betas": (NAN, 0.999)},
    "second beta of nan": {"betas": (0.9, NAN)},
    "betas is a number": {"betas": 0.9},
    "negative eps": {"eps": -1e-8},
    "eps of nan": {"eps": NAN},
    "eps is none": {"eps": None},
    "negative weight_decay": {"weight_decay": -0.01},
    "weight_decay of nan": {"weight_decay": NAN},
    "weight_decay is none": {"weight_decay": None},
}


def error_of(call):
    try:
        call()
    except Exception as error:
        return type(error)
    raise AssertionError("no error")


@pytest.mark.parametrize("name", PARAMS)
def test_params(name):
    expected = error_of(lambda: torch.optim.AdamW(PARAMS[name]()))
    assert error_of(lambda: AdamW(PARAMS[name]())) is expected


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    params = fresh()
    expected = error_of(lambda: torch.optim.AdamW(params, **OPTIONS[name]))
    found = error_of(lambda: AdamW(params, **OPTIONS[name]))
    assert found is expected or (found, expected) == (ValueError, TypeError)  # no number at all
    assert_same_bits(params, fresh())


def test_no_params_at_all():
    assert error_of(AdamW) is error_of(torch.optim.AdamW) is TypeError


def test_options_by_position_after_the_star():
    """From `maximize` on there are keywords alone."""
    for kind in (AdamW, torch.optim.AdamW):
        with pytest.raises(TypeError):
            kind(fresh(), 0.1, (0.9, 0.99), 1e-8, 0.01, False, True)


def test_differentiable():
    with pytest.raises(ValueError, match="differentiable"):
        AdamW(fresh(), differentiable=True)


# Groups that are added to an optimizer whose parameters have no names
ADDED = {
    "a list": lambda params: params,
    "a tensor": lambda params: params[0],
    "no parameters": lambda params: {"lr": 0.1},
    "a parameter that is there": lambda params: {"params": params[:1]},
    "one that is there, and another": lambda params: {"params": [*fresh(), params[1]]},
    "a NumPy array": lambda params: {"params": [np.ones(3)]},
    "a name": lambda params: {"params": [("w", fresh()[0])]},
    "not a leaf": lambda params: {"params": [2 * params[0]]},
    "a set": lambda params: {"params": set(fresh())},
    "none": lambda params: {"params": None},
    "one twice": lambda params: {"params": fresh()[:1] * 2},
}


@pytest.mark.parametrize("name", ADDED)
def test_added_groups(name):
    twins = Twins(fresh(), lr=0.1)
    twins.step(tensors(2, (2, 3), (4,)))
    values, state = copy.deepcopy(twins.ours), state_copy(twins.our)
    expected = error_of(lambda: twins.their.add_param_group(ADDED[name](twins.theirs)))
    assert error_of(lambda: twins.our.add_param_group(ADDED[name](twins.ours))) is expected
    assert len(twins.our.param_groups) == 1
    assert_same_bits(twins.ours, values)
    assert_same_bits(state_copy(twins.our), state)
    twins.step(tensors(3, (2, 3), (4,)))


# Gradients that a step refuses, made for the second of two parameters
def sparse(parameter):
    parameter.grad = torch.eye(4, dtype=torch.float64)[0].to_sparse()


def of_another_shape(parameter):
    parameter.grad = torch.ones_like(parameter)
    parameter.grad.data = torch.ones(3, dtype=torch.float64)


def of_a_parameter_that_was_replaced(parameter):
    parameter.grad = torch.ones_like(parameter)
    parameter.data = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("spoil", [sparse, of_another_shape, of_a_parameter_that_was_replaced])
def test_gradients(spoil, steps):
    params = fresh()
    optimizer, reference = AdamW(params, lr=0.1), torch.optim.AdamW(fresh())
    for k in range(steps):
        for parameter, gradient in zip(params, tensors(k, (2, 3), (4,)), strict=True):
            parameter.grad = gradient
        optimizer.step()
    others = reference.param_groups[0]["params"]
    for first, second in (params, others):
        first.grad = torch.ones_like(first)
        spoil(second)
    values, state = copy.deepcopy([each.data for each in params]), state_copy(optimizer)
    assert error_of(reference.step) is RuntimeError
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            optimizer.step()
        assert_same_bits([each.data for each in params], values)
        assert_same_bits([each or None for each in state_copy(optimizer)], state)
    params[1].data = tensors(5, (4,))[0]
    params[1].grad = None
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == steps + 1


@pytest.mark.parametrize("steps", [0, 2])
def test_sparse_gradients_are_refused(steps):
    """With a TypeError, as everywhere else here; torch's is a RuntimeError."""
    twins = Twins(fresh(), lr=0.1)
    for k in range(steps):
        twins.step(tensors(k, (2, 3), (4,)))
    for optimizer, params in twins.both:
        sparse(params[1])
        with pytest.raises((RuntimeError, TypeError), match="sparse"):
            optimizer.step()


def test_an_error_names_the_parameter():
    params = fresh()
    optimizer = AdamW([("layer.weight", params[0]), ("layer.bias", params[1])])
    params[0].grad = torch.ones_like(params[0])
    sparse(params[1])
    with pytest.raises(Exception, match=r"layer\.bias"):
        optimizer.step()
    assert_same_bits(params, fresh())


# What is written into a group by hand, of which torch says at the next step whatever its code comes across first
SPOILED = {
    "lr is a text": {"lr": "fast"},
    "lr is none": {"lr": None},
    "betas of one": {"betas": (0.9,)},
    "betas of three": {"betas": (0.9, 0.9, 0.9)},
    "betas is none": {"betas": None},
    "betas of texts": {"betas": ("a", "b")},
    "eps is a text": {"eps": "small"},
    "weight_decay is none": {"weight_decay": None},
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_groups(name):
    """The step is refused, changes nothing, and can be taken once the group is repaired."""
    twins = Twins(fresh(), lr=0.1)
    twins.step(tensors(2, (2, 3), (4,)))
    values, state, old = copy.deepcopy(twins.ours), state_copy(twins.our), dict(twins.our.param_groups[0])
    twins.our.param_groups[0].update(SPOILED[name])
    with pytest.raises((TypeError, ValueError)):
        twins.our.step()
    assert_same_bits(twins.ours, values)
    assert_same_bits(state_copy(twins.our), state)
    twins.our.param_groups[0].update(old)
    twins.step(tensors(3, (2, 3), (4,)))


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"])
def test_keys_removed(key):
    twins = Twins(fresh(), lr=0.1)
    twins.step(tensors(2, (2, 3), (4,)))
    values = copy.deepcopy(twins.ours)
    for optimizer, _ in twins.both:
        value = optimizer.param_groups[0].pop(key)
        with pytest.raises(KeyError, match=key):
            optimizer.step()
        optimizer.param_groups[0][key] = value
    assert_same_bits(twins.ours, values)
    twins.our.step()
    assert all(twins.our.state[parameter]["step"] == 2 for parameter in twins.ours)


# Named parameters


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()


def train(network, optimizer, steps):
    for k in range(steps):
        optimizer.zero_grad()
        network(tensors(k, (5, 3))[0]).square().sum().backward()
        optimizer.step()


def by_layer(network):
    return [{"params": list(network[k].named_parameters(f"layer{k}")), "lr": 0.1 / (k + 1)} for k in (0, 2)]


@pytest.mark.parametrize("named", [lambda network: network.named_parameters(), by_layer], ids=["one group", "two"])
def test_named_parameters(named):
    networks = [model(), model()]
    optimizers = [kind(named(each), lr=0.1) for kind, each in zip((AdamW, torch.optim.AdamW), networks, strict=True)]
    for network, optimizer in zip(networks, optimizers, strict=True):
        train(network, optimizer, 5)
    for ours, theirs in zip(*(each.parameters() for each in networks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    names = [[group["param_names"] for group in optimizer.param_groups] for optimizer in optimizers]
    assert names[0] == names[1]
    saved = [[group["param_names"] for group in optimizer.state_dict()["param_groups"]] for optimizer in optimizers]
    assert saved[0] == names[1]


def test_names_of_a_loaded_state_dict_win():
    """As in torch: they replace those that are there, and their absence leaves these."""
    for kind in (AdamW, torch.optim.AdamW):
        network = model()
        optimizer, unnamed = kind(network.named_parameters()), kind(model().parameters())
        saved = optimizer.state_dict()
        saved["param_groups"][0]["param_names"] = ["a", "b", "c", "d"]
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c", "d"]
        optimizer.load_state_dict(unnamed.state_dict())
        assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c", "d"]
        unnamed.load_state_dict(saved)
        assert unnamed.param_groups[0]["param_names"] == ["a", "b", "c", "d"]
        train(network, optimizer, 1)


def test_a_named_group_added():
    network = model()
    optimizer = AdamW(network[0].named_parameters("first"), lr=0.1)
    train(network, optimizer, 2)
    with pytest.raises(ValueError, match="name"):
        optimizer.add_param_group({"params": network[2].parameters()})
    optimizer.add_param_group({"params": network[2].named_parameters("last")})
    train(network, optimizer, 2)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["first.weight", "first.bias"],
        ["last.weight", "last.bias"],
    ]
    assert [int(optimizer.state[each]["step"]) for each in network.parameters()] == [4, 4, 2, 2]


def test_two_parameters_may_have_one_name():
    """torch asks for names, not for different ones."""
    twins = Twins(fresh(), lambda params: [("w", each) for each in params], lr=0.1)
    for k in range(3):
        twins.step(tensors(k, (2, 3), (4,)))
    assert twins.our.param_groups[0]["param_names"] == ["w", "w"]


def test_repr_is_torchs():
    lines = [repr(Twins(fresh(), lr=0.1).both[k][0]).splitlines() for k in (0, 1)]
    assert lines[0][0] == lines[1][0] == "AdamW ("
    assert set(lines[1]) <= set(lines[0])
