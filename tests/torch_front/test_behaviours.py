"""Groups, learning rates as tensors, layouts, gradients in turns: whatever torch.optim.AdamW allows between two steps."""

import copy

import pytest
import torch
from helpers.twins import AdamW, Twins, parameters, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = [(4, 3), (5,), (), (2, 3)]
DTYPES = [torch.float64, torch.float32]

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(seed, dtype=torch.float64):
    return tensors(seed, *SHAPES, dtype=dtype)


def groups_of(*options):
    """Each parameter in a group of its own, with the options of the same place."""

    def arrange(params):
        return [{"params": [each], **copy.deepcopy(mine)} for each, mine in zip(params, options, strict=True)]

    return arrange


def run(twins, steps=20, seed=100):
    dtypes = [parameter.dtype for parameter in twins.theirs]
    for k in range(steps):
        found = tensors(seed + k, *[parameter.shape for parameter in twins.theirs])
        twins.step([gradient.to(dtype) for gradient, dtype in zip(found, dtypes, strict=True)])
    assert max(twins.way[index] for index in range(len(dtypes))) > 0.001
    return twins


# Options of the four groups
GROUPS = {
    "lr": [{"lr": 0.1}, {"lr": 0.01}, {}, {"lr": 0.0}],
    "betas": [{"betas": (0.5, 0.9)}, {}, {"betas": (0.0, 0.999)}, {"betas": (0.9, 0.0)}],
    "eps": [{"eps": 1e-3}, {"eps": 1.0}, {}, {"eps": 0.0}],
    "weight_decay": [{"weight_decay": 0.0}, {"weight_decay": 1.0}, {}, {"weight_decay": 3}],
    "amsgrad": [{"amsgrad": True}, {"amsgrad": False}, {}, {"amsgrad": True}],
    "maximize": [{"maximize": True}, {}, {"maximize": False}, {}],
    "ways of torch": [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}],
    "tensor lr": [{"lr": torch.tensor(0.1)}, {"lr": torch.tensor([0.01])}, {}, {"lr": torch.tensor(0.5).double()}],
    "tensor betas": [{"betas": (torch.tensor(0.5), torch.tensor(0.9))}, {}, {}, {}],
    "all": [
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 1.0, "amsgrad": True, "maximize": True},
        {},
        {"lr": 0.3, "weight_decay": 0.0},
        {"amsgrad": True, "lr": 0.05},
    ],
}


@both_dtypes
@pytest.mark.parametrize("name", GROUPS)
def test_options_of_groups(name, dtype):
    coarse = name.startswith("tensor")
    run(Twins(random(1, dtype), groups_of(*GROUPS[name]), lr=0.02, weight_decay=0.1, coarse=coarse))


def test_keys_of_the_groups_are_torchs():
    twins = Twins(random(1), groups_of({}, {"lr": 1.0}, {"note": "mine"}, {}))
    for ours, theirs in twins.groups():
        assert theirs.keys() <= ours.keys()
    assert twins.our.param_groups[2]["note"] == "mine"
    assert twins.our.defaults.items() >= twins.their.defaults.items()
    run(twins, 2)


def test_a_group_may_be_empty():
    run(Twins(random(1), lambda params: [{"params": []}, {"params": params, "lr": 0.1}]))


def test_parameters_of_a_set_or_a_generator():
    single = tensors(1, (3,))
    run(Twins(single, set))
    run(Twins(random(1), iter))
    run(Twins(random(1), lambda params: [{"params": (each for each in params)}]))
    run(Twins(single, lambda params: [{"params": params[0]}]))


# What is written into a group between two steps
CHANGES = {
    "lr": {"lr": 0.3},
    "lr of zero": {"lr": 0},
    "lr becomes a tensor": {"lr": torch.tensor(0.3)},
    "betas": {"betas": (0.5, 0.9)},
    "a list of betas": {"betas": [0.5, 0.9]},
    "eps": {"eps": 0.5},
    "weight_decay": {"weight_decay": 0.7},
    "weight_decay of zero": {"weight_decay": 0},
    "maximize": {"maximize": True},
    "amsgrad off": {"amsgrad": False},
    "foreach": {"foreach": True},
    "an unknown key": {"color": "red"},
}


@both_dtypes
@pytest.mark.parametrize("name", CHANGES)
def test_changed_by_hand(name, dtype):
    """One group of two changes after three steps, and changes back after three more."""
    arrange, coarse = lambda p: [{"params": p[:2]}, {"params": p[2:]}], name == "lr becomes a tensor"
    twins = run(Twins(random(1, dtype), arrange, lr=0.02, amsgrad=True, coarse=coarse), 3)
    old = {key: twins.their.param_groups[1][key] for key in CHANGES[name] if key != "color"}
    for optimizer, _ in twins.both:
        optimizer.param_groups[1].update(copy.deepcopy(CHANGES[name]))
    run(twins, 3, seed=200)
    for optimizer, _ in twins.both:
        optimizer.param_groups[1].update(old)
    run(twins, 3, seed=300)


def test_amsgrad_switched_on_too_late():
    """There is no maximum so far: torch raises, ours starts one."""
    twins = run(Twins(random(1), lr=0.1), 2)
    for optimizer, _ in twins.both:
        optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        twins.their.step()
    for slots in twins.their.state.values():
        slots["max_exp_avg_sq"] = torch.zeros_like(slots["exp_avg_sq"])
    run(twins, 3, seed=100)


def test_a_parameter_moved_to_another_group():
    """So that the parameters of all groups, in order, are the same as before."""
    twins = run(Twins(random(1), groups_of({}, {"lr": 0.1, "amsgrad": True}, {}, {}), lr=0.02), 3)
    for optimizer, params in twins.both:
        optimizer.param_groups[0]["params"] = params[:2]
        optimizer.param_groups[1]["params"] = []
        optimizer.state[params[1]].setdefault("max_exp_avg_sq", torch.zeros_like(params[1]))
    run(twins, 3, seed=200)


def test_a_group_replaced_or_removed():
    twins = run(Twins(random(1), groups_of({}, {"lr": 0.1}, {}, {}), lr=0.02), 3)
    for optimizer, _ in twins.both:
        optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.5}
    run(twins, 3, seed=200)
    for optimizer, _ in twins.both:
        del optimizer.param_groups[3]
    run(twins, 3, seed=300)
    assert twins.their.state[twins.theirs[3]]["step"] == 6
    for optimizer, _ in twins.both:
        optimizer.param_groups = optimizer.param_groups[::-1]
    run(twins, 3, seed=400)


def test_without_groups_nothing_is_done():
    twins = run(Twins(random(1), lr=0.02), 3)
    for optimizer, _ in twins.both:
        optimizer.param_groups = []
    run(twins, 2, seed=200)


@both_dtypes
@pytest.mark.parametrize("kind", ["list", "tensors"])
def test_betas_written_in_place(kind, dtype):
    twins = run(Twins(random(1, dtype), lr=0.02, betas=(0.5, 0.99)), 3)
    groups = [group for pair in twins.groups() for group in pair]
    betas = [torch.tensor(beta, dtype=torch.float64) if kind == "tensors" else beta for beta in (0.5, 0.99)]
    for group in groups:
        group["betas"] = betas[:]
    run(twins, 2, seed=200)
    for group in groups:
        if kind == "tensors":
            betas[0].fill_(0.75)
        else:
            group["betas"][0] = 0.75
    run(twins, 3, seed=300)


def test_parameters_moved_between_groups_by_hand():
    twins = run(Twins(random(1), lambda p: [{"params": p[:2]}, {"params": p[2:], "lr": 0.1}], lr=0.02), 3)
    for optimizer, _ in twins.both:
        optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    run(twins, 3, seed=200)


@both_dtypes
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
@pytest.mark.parametrize("lr_dtype", DTYPES, ids=str)
def test_lr_written_in_place(shape, lr_dtype, dtype):
    coarse = lr_dtype == torch.float32
    twins = Twins(random(1, dtype), lr=torch.full(shape, 0.1, dtype=lr_dtype), coarse=coarse)
    for k in range(10):
        run(twins, 1, seed=100 + k)
        for group in (group for pair in twins.groups() for group in pair):
            group["lr"].fill_(0.1 / (k + 2))
    assert all(group["lr"].shape == shape for group in twins.our.param_groups)


def test_groups_share_the_lr_given():
    rate = torch.tensor(0.1)
    optimizer = AdamW([{"params": each} for each in parameters(random(1))], lr=rate)
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    assert optimizer.defaults["lr"] is rate


# Makes a parameter of a dense tensor of a shape
LAYOUTS = {
    "dense": (lambda tensor: tensor, (3, 4)),
    "every other": (lambda tensor: tensor[..., ::2], (3, 8)),
    "transposed": (lambda tensor: tensor.T, (3, 4)),
    "three axes, permuted": (lambda tensor: tensor.permute(1, 2, 0), (2, 3, 4)),
    "inside of a larger one": (lambda tensor: tensor[1:3, 1:3], (4, 4)),
    "strided, one axis": (lambda tensor: tensor[1::3], (36,)),
    "a column": (lambda tensor: tensor[:, :1], (4, 3)),
    "no axes": (lambda tensor: tensor, ()),
    "no axes, inside": (lambda tensor: tensor[2], (4,)),
    "empty": (lambda tensor: tensor, (0,)),
    "empty, two axes": (lambda tensor: tensor, (3, 0)),
    "one element": (lambda tensor: tensor, (1, 1, 1)),
    "channels last": (lambda tensor: tensor.to(memory_format=torch.channels_last), (2, 3, 4, 5)),
    "channels last, 3d": (lambda tensor: tensor.to(memory_format=torch.channels_last_3d), (2, 3, 2, 3, 2)),
}


def axes_reversed(gradient):
    axes = tuple(range(gradient.ndim))[::-1]
    return gradient.permute(axes).contiguous().permute(axes)


def every_other(gradient):
    return torch.stack([gradient, gradient], dim=-1)[..., 0]


def expanded(gradient):
    return gradient.sum().expand(gradient.shape)


def expanded_along_an_axis(gradient):
    return gradient[..., :1].expand(gradient.shape) if gradient.numel() > 1 else gradient


def lazily_negated(gradient):
    return torch.view_as_complex(torch.stack([gradient, gradient], dim=-1)).conj().imag


def second_half(gradient):
    return torch.stack([gradient, gradient])[1]


def channels_last(gradient):
    return gradient.to(memory_format=torch.channels_last) if gradient.ndim == 4 else gradient


GRADIENTS = [
    torch.clone,
    axes_reversed,
    every_other,
    expanded,
    expanded_along_an_axis,
    lazily_negated,
    second_half,
    channels_last,
]


@both_dtypes
@pytest.mark.parametrize("of_gradient", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, of_gradient, dtype):
    make, shape = LAYOUTS[layout]
    start = make(tensors(1, shape, dtype=dtype)[0])
    twins = Twins([start], lr=0.02, amsgrad=True)
    assert twins.ours[0].stride() == start.stride()
    for k in range(4):
        (values,) = tensors(10 + k, start.shape, dtype=dtype)
        twins.step([of_gradient(values)])
    for name, slot in twins.their.state[twins.theirs[0]].items():
        assert twins.our.state[twins.ours[0]][name].is_contiguous() == slot.is_contiguous()


@both_dtypes
def test_gradients_change_their_layout(dtype):
    (start,) = tensors(1, (3, 4), dtype=dtype)
    twins = Twins([start], lr=0.02)
    for k, of_gradient in enumerate(GRADIENTS * 2):
        twins.step([of_gradient(tensors(10 + k, (3, 4), dtype=dtype)[0])])


def test_parameters_of_one_memory():
    """Rows of one matrix, each a parameter."""
    memory = [torch.ones(4, 3, dtype=torch.float64) for _ in range(2)]
    ours, theirs = ([torch.nn.Parameter(row) for row in each] for each in memory)
    optimizers = [AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)]
    for k in range(5):
        for index, gradient in enumerate(tensors(k, *[(3,)] * 4)):
            ours[index].grad, theirs[index].grad = gradient, gradient
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(*memory, rtol=0, atol=1e-12)
    assert (memory[0] != 1).all()


def test_dtypes_in_one_group():
    starts = [torch.randn(5, dtype=torch.float64), torch.randn(5), torch.randn(2, 2, dtype=torch.complex64)]
    twins = Twins(starts, lr=0.1)
    for k in range(10):
        found = tensors(k, (5,), (5,), (2, 2))
        twins.step([gradient.to(start.dtype) for gradient, start in zip(found, starts, strict=True)])


# Which of the four parameters have a gradient at each step
TURNS = {
    "one after the other": ["1000", "0100", "0010", "0001"] * 3,
    "one stops": ["1111", "1111", "1111", "0111", "0111", "0111"],
    "one comes late": ["0111", "0111", "0111", "1111", "1111"],
    "one never": ["0111"] * 6,
    "none at first": ["0000", "0000", "1111", "1111"],
    "none in between": ["1111", "0000", "0000", "1111"],
    "two halves": ["1100", "0011"] * 4,
    "one alone": ["0010"] * 5,
    "ever more": ["1000", "1100", "1110", "1111"],
    "ever fewer": ["1111", "1110", "1100", "1000", "0000"],
}


def take_turns(twins, pattern):
    dtype = twins.theirs[0].dtype
    for k, present in enumerate(pattern):
        gradients = random(100 + k, dtype)
        twins.step([gradient if int(mark) else None for gradient, mark in zip(gradients, present, strict=True)])
    for index in range(len(SHAPES)):
        count = sum(int(present[index]) for present in pattern)
        state = twins.our.state.get(twins.ours[index])
        if count:
            assert state["step"] == count
        else:
            assert state is None


@both_dtypes
@pytest.mark.parametrize("name", TURNS)
def test_gradients_in_turns(name, dtype):
    take_turns(Twins(random(1, dtype), lr=0.05, amsgrad=True), TURNS[name])


@both_dtypes
@pytest.mark.parametrize("name", TURNS)
def test_gradients_in_turns_in_groups(name, dtype):
    take_turns(Twins(random(1, dtype), groups_of(*GROUPS["all"])), TURNS[name])


@given(st.lists(st.text("01", min_size=4, max_size=4), min_size=30, max_size=30))
@settings(max_examples=12)
def test_gradients_in_any_turns(pattern):
    take_turns(Twins(random(1), lambda p: [{"params": p[:3]}, {"params": p[3:], "lr": 0.2}], lr=0.05), pattern)


def test_a_parameter_without_gradients_stays():
    twins = Twins(random(1), lr=0.1)
    old = twins.ours[1].detach().clone()
    for k in range(3):
        twins.step([None if index == 1 else gradient for index, gradient in enumerate(random(10 + k))])
    assert torch.equal(twins.ours[1], old)
    assert len(twins.our.state) == 3


@both_dtypes
def test_zeros_count(dtype):
    """After zero_grad(set_to_none=False) there are gradients, of zeros: the average goes on moving the parameters."""
    twins = run(Twins(random(1, dtype), lr=0.1, amsgrad=True), 3)
    for _ in range(5):
        for optimizer, params in twins.both:
            gradients = [parameter.grad for parameter in params]
            optimizer.zero_grad(set_to_none=False)
            assert all(parameter.grad is gradient for parameter, gradient in zip(params, gradients, strict=True))
            assert not any(gradient.any() for gradient in gradients)
        twins.go()
    assert all(twins.our.state[parameter]["step"] == 8 for parameter in twins.ours)


def test_zero_grad_forgets():
    twins = run(Twins(random(1), lr=0.1), 3)
    old = copy.deepcopy(twins.ours)
    for optimizer, params in twins.both:
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in params)
    twins.go()
    assert all(torch.equal(*pair) for pair in zip(old, twins.ours, strict=True))
    assert all(twins.our.state[parameter]["step"] == 3 for parameter in twins.ours)


@both_dtypes
def test_zeros_at_first(dtype):
    twins = Twins(random(1, dtype), lr=0.1)
    twins.step([torch.zeros_like(each) for each in random(1, dtype)])
    run(twins, 3)


@both_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_goes_through(value, dtype):
    twins = run(Twins(random(1, dtype), lr=0.1, amsgrad=True), 2)
    gradients = random(7, dtype)
    gradients[0][1, 2] = value
    for each in (gradients, random(8, dtype), random(9, dtype)):
        twins.give(each)
        for optimizer, _ in twins.both:
            optimizer.step()
        for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
            assert torch.equal(ours.isfinite(), theirs.isfinite())
            for name, slot in twins.their.state[theirs].items():
                assert torch.equal(twins.our.state[ours][name].isfinite(), slot.isfinite())


@both_dtypes
@pytest.mark.parametrize("amsgrad", [False, True])
def test_eps_of_zero(amsgrad, dtype):
    """torch allows it, and divides 0 by 0 where a gradient was always zero; ours leaves such elements to the decay."""
    run(Twins(random(1, dtype), lr=0.01, eps=0.0, amsgrad=amsgrad), 5)
    twins = Twins(random(1, dtype), lr=0.01, eps=0.0, amsgrad=amsgrad)
    gradients = random(2, dtype)
    gradients[0][1] = 0
    twins.give(gradients)
    for optimizer, _ in twins.both:
        optimizer.step()
    assert twins.theirs[0][1].isnan().all()
    for ours, theirs in zip(twins.ours, twins.theirs, strict=True):
        torch.testing.assert_close(ours[theirs.isfinite()], theirs[theirs.isfinite()], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(twins.ours[0][1], random(1, dtype)[0][1] * (1 - 0.01 * 0.01))


@both_dtypes
def test_groups_added_later(dtype):
    twins = Twins(random(1, dtype)[:1], lr=0.1)
    for k, (start, options) in enumerate(
        zip(random(1, dtype)[1:], [{}, {"lr": 0.3, "amsgrad": True}, {"betas": (0.5, 0.9)}], strict=True)
    ):
        run(twins, 3, seed=100 * k)
        for optimizer, params in twins.both:
            params.extend(parameters([start]))
            optimizer.add_param_group({"params": params[-1:], **options})
    run(twins, 3, seed=500)
    assert [int(twins.our.state[each]["step"]) for each in twins.ours] == [12, 9, 6, 3]


def test_an_added_group_is_the_dict_given():
    twins = run(Twins(random(1)[:1]), 2)
    for optimizer, _ in twins.both:
        group = {"params": parameters(tensors(2, (3,)))[0], "lr": 0.5}
        optimizer.add_param_group(group)
        assert optimizer.param_groups[1] is group
        assert isinstance(group["params"], list)


def test_requires_grad_toggled():
    """Only gradients matter: a frozen parameter that still has one is moved, and one without is not."""
    twins = run(Twins(random(1), lr=0.1), 3)
    for _, params in twins.both:
        params[0].requires_grad_(False)
    run(twins, 3, seed=200)
    for optimizer, params in twins.both:
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in params).backward()
        assert params[0].grad is None
    twins.go()
    for optimizer, params in twins.both:
        params[0].requires_grad_(True)
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in params).backward()
    twins.go()
    assert [int(twins.our.state[each]["step"]) for each in twins.ours] == [7, 8, 8, 8]


def test_plain_tensors():
    """Tensors that do not require gradients may have them."""
    ours, theirs = (tensors(1, (3,))[0] for _ in range(2))
    optimizers = [AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)]
    for _ in range(3):
        ours.grad, theirs.grad = (tensors(2, (3,))[0] for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# What a user does to a parameter between two steps
def other_data(parameter, value):
    parameter.data = value.clone()


def other_layout(parameter, value):
    parameter.data = torch.stack([value, value], -1)[..., 0]


def written(parameter, value):
    parameter.data.copy_(value)


def written_without_gradients(parameter, value):
    with torch.no_grad():
        parameter.mul_(0.5).add_(value)


def resized(parameter, value):
    parameter.data = parameter.data.clone()
    parameter.data.set_(value.clone())


def same_values(parameter, value):
    parameter.data = parameter.data.clone()


def into_a_flat_buffer(parameter, value):
    flat = torch.cat([parameter.data.flatten(), value.flatten()])
    parameter.data = flat[: parameter.numel()].view(parameter.shape)


def other_gradient_object(parameter, value):
    parameter.grad = value.clone()


def same_gradient_object(parameter, value):
    parameter.grad.copy_(value)


def accumulated(parameter, value):
    parameter.grad += value


def data_of_the_gradient(parameter, value):
    parameter.grad.data = value.clone()


def moved_away_and_back(parameter, value):
    old = parameter.data
    parameter.data = value.clone()
    parameter.data = old


DEEDS = [
    other_data,
    other_layout,
    written,
    written_without_gradients,
    resized,
    same_values,
    into_a_flat_buffer,
    other_gradient_object,
    same_gradient_object,
    accumulated,
    data_of_the_gradient,
    moved_away_and_back,
]


@both_dtypes
@pytest.mark.parametrize("do", DEEDS)
def test_in_between(do, dtype):
    twins = run(Twins(random(1, dtype), lr=0.05), 3)
    for k in range(3):
        for _, params in twins.both:
            for index in range(k + 1):
                do(params[index], random(50 + k, dtype)[index])
        twins.go()
    run(twins, 3, seed=200)


@both_dtypes
def test_training_a_network(dtype):
    """Gradients by autograd, tied weights, a part frozen at first."""

    def network():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)
        ).to(dtype)
        model[4].weight = model[0].weight
        return model

    models = [network(), network()]
    optimizers = [
        AdamW(models[0].parameters(), lr=0.01),
        torch.optim.AdamW(models[1].parameters(), lr=0.01),
    ]
    data, target = tensors(3, (16, 6), (16, 8), dtype=dtype)
    for k in range(30):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model[3].requires_grad_(k >= 10)
            optimizer.zero_grad()
            loss = (model(data) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-10 if dtype == torch.float64 else 1e-4)
    assert losses[0] < 1.5


def test_many_parameters():
    shapes = [(k % 7 + 1, k % 5 + 1) for k in range(300)]
    twins = Twins(tensors(1, *shapes), lr=0.01)
    for k in range(3):
        twins.step([None if (index + k) % 4 == 0 else each for index, each in enumerate(tensors(10 + k, *shapes))])
    assert len(twins.our.state) == 300


def test_a_large_parameter():
    run(Twins(tensors(1, (70_000,), (3,), dtype=torch.float32), lr=0.01, amsgrad=True), 5)
