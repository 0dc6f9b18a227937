"""Options that torch's AdamW lacks, through the front: beside torch with the usual calls around it, or `AdamW` itself."""

import copy

import numpy as np
import pytest
import torch
from helpers.twins import AdamW, parameters, tensors

import adamw_numba

SHAPES = [(4, 3), (5,), ()]


def give(params, gradients):
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = None if gradient is None else gradient.clone()


def assert_same(ours, theirs, tolerance=1e-12):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=tolerance, atol=tolerance)


def clip_all(params):
    torch.nn.utils.clip_grad_norm_(params, 0.5, error_if_nonfinite=False)


def clip_each(params):
    for param in params:
        torch.nn.utils.clip_grad_norm_([param], 0.5)


def clip_values(params):
    torch.nn.utils.clip_grad_value_(params, 0.5)


def unscale(params):
    for param in params:
        param.grad /= 8.0


CLIPS = {
    "global_clipnorm": ({"global_clipnorm": 0.5}, clip_all),
    "clipnorm": ({"clipnorm": 0.5}, clip_each),
    "clipvalue": ({"clipvalue": 0.5}, clip_values),
    "loss_scale_factor": ({"loss_scale_factor": 8.0}, unscale),
}


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_clips(name, amsgrad):
    options, call = CLIPS[name]
    ours, theirs = (parameters(tensors(1, *SHAPES)) for _ in range(2))
    optimizer = AdamW(ours, lr=0.1, amsgrad=amsgrad, **options)
    reference = torch.optim.AdamW(theirs, lr=0.1, amsgrad=amsgrad)
    for step in range(20):
        for params in (ours, theirs):
            give(params, tensors(100 + step, *SHAPES))
        call(theirs)
        optimizer.step()
        reference.step()
    # torch adds 1e-6 to the norm
    assert_same(ours, theirs, 1e-5 if "norm" in name else 1e-12)


def test_clips_of_groups():
    """Given in a group, written by hand, and taken away."""
    ours, theirs = (parameters(tensors(1, *SHAPES)) for _ in range(2))
    optimizer = AdamW([{"params": ours[:1], "clipvalue": 0.2}, {"params": ours[1:]}], lr=0.1, clipvalue=0.5)
    reference = torch.optim.AdamW(theirs, lr=0.1)
    limits = [0.2, 0.5]
    for step in range(9):
        if step == 3:
            optimizer.param_groups[0]["clipvalue"] = limits[0] = 0.7
        if step == 6:
            optimizer.param_groups[1]["clipvalue"], limits[1] = None, np.inf
        for params in (ours, theirs):
            give(params, tensors(100 + step, *SHAPES))
        torch.nn.utils.clip_grad_value_(theirs[:1], limits[0])
        torch.nn.utils.clip_grad_value_(theirs[1:], limits[1])
        optimizer.step()
        reference.step()
    assert_same(ours, theirs)


def test_a_clip_of_a_group_beside_that_of_all():
    params = parameters(tensors(1, *SHAPES))
    with pytest.raises(ValueError, match="global_clipnorm"):
        AdamW([{"params": params, "clipvalue": 0.1}], global_clipnorm=1.0)


@pytest.mark.parametrize(
    "option", [{"nonfinite": "raise"}, {"global_clipnorm": 1.0}, {"use_ema": True}, {"gradient_accumulation_steps": 2}]
)
def test_an_option_of_all_groups_in_one(option):
    """Refused, rather than ignored; ZeRO puts the optimizer's own into every group."""
    params = parameters(tensors(1, *SHAPES))
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` is .* in a group"):
        AdamW([{"params": params, **option}])
    optimizer = AdamW([{"params": params[:1], **option}], **option)
    with pytest.raises(ValueError, match="in a group"):
        optimizer.add_param_group({"params": params[1:], "threads": 1})
    assert len(optimizer.param_groups) == 1


def test_parameters_appended_without_names():
    params = parameters(tensors(1, *SHAPES))
    optimizer = AdamW([("a", params[0]), ("b", params[1])])
    optimizer.param_groups[0]["params"].append(params[2])
    give(params, tensors(2, *SHAPES))
    optimizer.step()
    assert all(optimizer.state[param]["step"] == 1 for param in params)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_averages(momentum):
    params = parameters(tensors(1, *SHAPES))
    optimizer = AdamW(params, lr=0.1, use_ema=True, ema_momentum=momentum)
    with optimizer.averaged():
        assert_same(params, parameters(tensors(1, *SHAPES)))
    averages = None
    for step in range(6):
        give(params, tensors(100 + step, *SHAPES))
        optimizer.step()
        now = [param.detach().clone() for param in params]
        pairs = zip(averages or now, now, strict=True)
        averages = [average * momentum + value * (1 - momentum) for average, value in pairs]
    assert_same([optimizer.state[param]["average"] for param in params], averages)
    with optimizer.averaged():
        assert_same(params, averages)
        with pytest.raises(RuntimeError, match="averaged"):
            optimizer.step()
    assert_same(params, now)
    given = [torch.full_like(param, 5.0) for param in params]
    for param, average in zip(params, given, strict=True):
        optimizer.state[param]["average"] = average
    with optimizer.averaged():
        assert_same(params, given)
    assert_same(params, now)


@pytest.mark.parametrize("at", range(7))
def test_accumulation_is_resumed(at):
    """Also in the middle of a window: the mean of three gradients, as one step of torch."""
    ours, theirs = (parameters(tensors(1, *SHAPES)) for _ in range(2))
    optimizer, reference = AdamW(ours, lr=0.1, gradient_accumulation_steps=3), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(9):
        if step == at:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = AdamW(ours, lr=0.5, gradient_accumulation_steps=3)
            optimizer.load_state_dict(saved)
        give(ours, tensors(100 + step, *SHAPES))
        optimizer.step()
        if step % 3 == 2:
            sums = zip(*(tensors(100 + k, *SHAPES) for k in range(step - 2, step + 1)), strict=True)
            give(theirs, [sum(each) / 3 for each in sums])
            reference.step()
        assert_same(ours, theirs)
    assert [int(optimizer.state[param]["step"]) for param in ours] == [3, 3, 3]


def test_steps_that_are_not_finite():
    ours, theirs = (parameters(tensors(1, *SHAPES)) for _ in range(2))
    optimizer, reference = AdamW(ours, lr=0.1, nonfinite="skip"), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(8):
        gradients = tensors(100 + step, *SHAPES)
        is_finite = step not in (0, 3, 4)
        if not is_finite:
            gradients[1][2] = np.nan
        give(ours, gradients)
        optimizer.step()
        assert optimizer.last_step.applied is is_finite
        if is_finite:
            give(theirs, gradients)
            reference.step()
    assert_same(ours, theirs)
    assert optimizer.skipped_steps == 3
    assert all(optimizer.state[param]["step"] == 5 for param in ours)


def test_steps_that_raise():
    params = parameters(tensors(1, *SHAPES))
    optimizer = AdamW([(name, param) for name, param in zip("abc", params, strict=True)], nonfinite="raise")
    gradients = tensors(2, *SHAPES)
    gradients[1][0] = np.inf
    give(params, gradients)
    with pytest.raises(FloatingPointError, match="'b'"):
        optimizer.step()
    assert_same(params, tensors(1, *SHAPES), 0)


# Ours the Keras way, and what is done to it before it is handed over
KERAS_WAYS = {
    "plain": ({}, lambda optimizer: None),
    "everything": (
        {"amsgrad": True, "use_ema": True, "global_clipnorm": 0.5, "loss_scale_factor": 4.0},
        lambda optimizer: None,
    ),
    "conventions": ({"decouple_lr": True, "maximize": True, "nesterov": True}, lambda optimizer: None),
    "groups": (
        {"clipnorm": 0.5},
        lambda optimizer: (
            optimizer.exclude_from_weight_decay(var_names=["bias"]),
            optimizer.override(var_names=["scale"], learning_rate_multiplier=0.1, beta_1=0.5, clipvalue=0.1),
        ),
    ),
}


@pytest.mark.parametrize("name", KERAS_WAYS)
def test_from_adamw(name):
    """The very bits of `AdamW.apply`, with Keras's epsilon."""
    options, prepare = KERAS_WAYS[name]
    ours, theirs = (parameters(tensors(1, *SHAPES, dtype=torch.float32)) for _ in range(2))
    names = ["layer/kernel", "layer/bias", "scale"]
    made = [adamw_numba.AdamW(0.01, 0.02, **options) for _ in range(2)]
    for each in made:
        prepare(each)
    front = AdamW.from_adamw(made[0], zip(names, ours, strict=True))
    made[1].build(list(zip(names, theirs, strict=True)))
    for step in range(12):
        gradients = tensors(100 + step, *SHAPES, dtype=torch.float32)
        give(ours, gradients)
        front.step()
        made[1].apply(gradients)
    assert_same(ours, theirs, 0)
    assert not made[0].built
    copied = copy.deepcopy(front)
    both = [[param for group in each.param_groups for param in group["params"]] for each in (front, copied)]
    for param, twin in zip(*both, strict=True):
        twin.grad = param.grad.clone()
    for optimizer in (front, copied):
        optimizer.step()
    assert_same(*both, 0)


def schedule(optimizer):
    optimizer.learning_rate = adamw_numba.schedules.CosineDecay(0.1, 10)


REFUSED = {
    "no AdamW": (lambda params: torch.optim.AdamW(params), TypeError, "adamw_numba.AdamW"),
    "built": (lambda params: built(params), ValueError, "built already"),
    "a schedule": (lambda params: prepared(schedule), ValueError, "LambdaLR"),
    "frozen": (
        lambda params: prepared(lambda o: o.override(var_names=["1"], trainable=False)),
        ValueError,
        "trainable",
    ),
    "a misspelt pattern": (
        lambda params: prepared(lambda o: o.override(var_names=["x"], beta_1=0.5)),
        ValueError,
        "'x'",
    ),
}


def built(params):
    optimizer = adamw_numba.AdamW()
    optimizer.build(params)
    return optimizer


def prepared(prepare):
    optimizer = adamw_numba.AdamW()
    prepare(optimizer)
    return optimizer


@pytest.mark.parametrize("name", REFUSED)
def test_from_adamw_refuses(name):
    make, kind, message = REFUSED[name]
    params = parameters(tensors(1, *SHAPES))
    with pytest.raises(kind, match=message):
        AdamW.from_adamw(make(params), params)


def test_without_torch_the_error_names_the_extra(monkeypatch):
    import importlib
    import sys

    for name in [name for name in sys.modules if name == "torch" or name.startswith("adamw_numba.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"adamw-numba\[torch\]"):
        importlib.import_module("adamw_numba.torch")
