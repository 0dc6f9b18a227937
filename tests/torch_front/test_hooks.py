"""What runs around a step: closures, hooks of one optimizer and of all, torch's profiler."""

import pytest
import torch
from helpers.twins import KINDS, Twins, assert_same_bits, parameters, tensors
from torch.optim import optimizer as of_all

both_kinds = pytest.mark.parametrize("kind", KINDS, ids=["ours", "theirs"])


def ready(kind, **options):
    """An optimizer of two parameters that have gradients."""
    params = parameters(tensors(1, (2, 3), (4,)))
    for parameter, gradient in zip(params, tensors(2, (2, 3), (4,)), strict=True):
        parameter.grad = gradient
    return kind(params, lr=0.1, **options), params


def steps_of(optimizer, params):
    return [int(optimizer.state[each]["step"]) if each in optimizer.state else 0 for each in params]


# Closures


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_a_closure(context):
    """It runs with gradients enabled, once, before the step, and its result is handed on."""
    twins = Twins(tensors(1, (2, 3), (4,)), lr=0.1)
    ran = []

    def take(optimizer):
        params = optimizer.param_groups[0]["params"]

        def closure():
            ran.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = sum(parameter.square().sum() for parameter in params)
            loss.backward()
            return loss.item()

        with context():
            return optimizer.step(closure)

    for _ in range(5):
        losses = [take(optimizer) for optimizer, _ in twins.both]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        twins.steps += 1
        twins.compare()
    assert ran == [True] * 10
    assert losses[0] < 10


@both_kinds
@pytest.mark.parametrize("result", [None, 1.5, "any", torch.tensor(2.0), (1, 2)], ids=str)
def test_what_a_closure_returns(kind, result):
    optimizer, params = ready(kind)
    assert optimizer.step(lambda: result) is result
    assert optimizer.step(closure=lambda: result) is result
    assert optimizer.step(None) is None
    assert optimizer.step() is None
    assert steps_of(optimizer, params) == [4, 4]


@both_kinds
@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_is_as_before(kind, enabled):
    optimizer, _ = ready(kind)
    with torch.set_grad_enabled(enabled):
        optimizer.step()
        assert torch.is_grad_enabled() == enabled
        optimizer.step(torch.is_grad_enabled)
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert torch.is_grad_enabled() == enabled


@both_kinds
def test_a_closure_that_raises(kind):
    optimizer, params = ready(kind)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_same_bits(params, parameters(tensors(1, (2, 3), (4,))))
    assert steps_of(optimizer, params) == [0, 0]
    optimizer.step()
    assert steps_of(optimizer, params) == [1, 1]


@both_kinds
def test_a_closure_that_is_none(kind):
    optimizer, _ = ready(kind)
    with pytest.raises(TypeError):
        optimizer.step(3)
    with pytest.raises(TypeError):
        optimizer.step(other=None)


@both_kinds
def test_a_closure_changes_the_optimizer(kind):
    """The step sees the groups and the gradients as the closure leaves them."""
    optimizer, params = ready(kind)
    added = parameters(tensors(5, (3,)))[0]

    def closure():
        optimizer.param_groups[0]["lr"] = 0.0
        added.grad = torch.ones_like(added)
        optimizer.add_param_group({"params": added, "lr": 0.5})

    optimizer.step(closure)
    assert_same_bits(params, parameters(tensors(1, (2, 3), (4,))))
    assert not torch.equal(added, tensors(5, (3,))[0])


@both_kinds
def test_results_do_not_require_gradients(kind):
    """A step is nothing that autograd records."""
    optimizer, params = ready(kind)
    optimizer.step()
    for parameter in params:
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert not any(value.requires_grad for value in optimizer.state[parameter].values())


def test_autograd_notices_that_a_parameter_changed():
    """A graph that needs the old values refuses to run backward, as after a step of torch's optimizer."""
    for kind in KINDS:
        optimizer, params = ready(kind)
        loss = (params[0] ** 3).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Hooks around a step


def logging(log, name):
    def hook(optimizer, args, kwargs):
        (params,) = [group["params"] for group in optimizer.param_groups[:1]]
        log.append((name, steps_of(optimizer, params)[0], len(args), sorted(kwargs)))

    return hook


def around_a_step(kind):
    optimizer, _ = ready(kind)
    log = []
    handles = [
        optimizer.register_step_post_hook(logging(log, "post 1")),
        of_all.register_optimizer_step_post_hook(logging(log, "post of all")),
        optimizer.register_step_pre_hook(logging(log, "pre 1")),
        of_all.register_optimizer_step_pre_hook(logging(log, "pre of all")),
        optimizer.register_step_pre_hook(logging(log, "pre 2")),
        optimizer.register_step_post_hook(logging(log, "post 2")),
    ]
    try:
        optimizer.step()
        optimizer.step(lambda: log.append("closure"))
        optimizer.step()
        while handles:
            handles.pop().remove()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    before = len(log)
    optimizer.step()
    assert len(log) == before > 20
    return log


def test_order_of_hooks_around_a_step():
    """Before the step those of all optimizers come first, after it last; and each sees the arguments."""
    ours, theirs = map(around_a_step, KINDS)
    assert [entry[0] for entry in ours[:6]] == ["pre of all", "pre 1", "pre 2", "post 1", "post 2", "post of all"]
    assert ours == theirs


@both_kinds
def test_a_hook_of_all_is_called_with_each_optimizer(kind):
    found, pairs = [], [ready(kind) for _ in range(2)]
    handle = of_all.register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: found.append(optimizer))
    try:
        for optimizer, _ in pairs:
            optimizer.step()
    finally:
        handle.remove()
    pairs[0][0].step()
    assert [id(each) for each in found] == [id(optimizer) for optimizer, _ in pairs]


@both_kinds
def test_a_hook_changes_the_arguments(kind):
    """Of which the first is the optimizer."""
    optimizer, params = ready(kind)
    calls = []

    def hook(opt, args, kwargs):
        return (*args, lambda: calls.append(1) or 7), kwargs

    handle = optimizer.register_step_pre_hook(hook)
    assert optimizer.step() == 7
    handle.remove()
    assert optimizer.step() is None
    assert calls == [1]
    assert steps_of(optimizer, params) == [2, 2]


@both_kinds
@pytest.mark.parametrize("result", [3, ((),), (1, 2, 3), "ab"], ids=str)
def test_a_hook_that_returns_nonsense(kind, result):
    optimizer, params = ready(kind)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: result)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    assert steps_of(optimizer, params) == [0, 0]


@both_kinds
def test_hooks_that_raise(kind):
    """Before the step: none is taken. After it: it was taken."""
    optimizer, params = ready(kind)

    def fail(opt, args, kwargs):
        raise ArithmeticError("no")

    for register, expected in (
        (optimizer.register_step_pre_hook, [1, 1]),
        (optimizer.register_step_post_hook, [3, 3]),
    ):
        optimizer.step()
        handle = register(fail)
        with pytest.raises(ArithmeticError):
            optimizer.step()
        handle.remove()
        assert steps_of(optimizer, params) == expected


def test_hooks_change_groups_and_gradients():
    """A hook before the step halves the gradients and sets the rate; the step goes by both."""
    twins = Twins(tensors(1, (2, 3), (4,)), lr=0.1)

    def hook(optimizer, args, kwargs):
        optimizer.param_groups[0]["lr"] *= 0.9
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = parameter.grad / 2

    for optimizer, _ in twins.both:
        optimizer.register_step_pre_hook(hook)
    for k in range(5):
        twins.give(tensors(10 + k, (2, 3), (4,)))
        for optimizer, _ in twins.both:
            optimizer.step()
        twins.compare()
    assert twins.our.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**5)


@both_kinds
def test_hooks_see_no_gradient_mode_of_the_step(kind):
    """They run as the caller of the step does."""
    optimizer, _ = ready(kind)
    modes = []
    optimizer.register_step_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    optimizer.register_step_post_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    optimizer.step()
    with torch.no_grad():
        optimizer.step()
    assert modes == [True, True, False, False]


@both_kinds
def test_a_hook_takes_a_step_of_another_optimizer(kind):
    (optimizer, params), (other, others) = ready(kind), ready(kind)
    optimizer.register_step_post_hook(lambda *_: other.step())
    optimizer.step()
    optimizer.step()
    assert steps_of(optimizer, params) == steps_of(other, others) == [2, 2]
    assert_same_bits([each.data for each in params], [each.data for each in others])


# Hooks around state dicts


def around_state_dicts(kind):
    optimizer, _ = ready(kind)
    optimizer.step()
    log = []

    def saved(opt, state_dict):
        log.append(("saved", sorted(state_dict)))
        return {**state_dict, "note": "mine"}

    def loading(opt, state_dict):
        log.append(("loading", sorted(state_dict), opt.param_groups[0]["lr"]))
        state_dict = {key: value for key, value in state_dict.items() if key != "note"}
        state_dict["param_groups"] = [{**group, "lr": 0.7} for group in state_dict["param_groups"]]
        return state_dict

    handles = [
        optimizer.register_state_dict_pre_hook(lambda opt: log.append("saving 1")),
        optimizer.register_state_dict_pre_hook(lambda opt: log.append("saving 0"), prepend=True),
        optimizer.register_state_dict_post_hook(saved),
        optimizer.register_state_dict_post_hook(lambda opt, state_dict: log.append(("saved 2", sorted(state_dict)))),
        optimizer.register_state_dict_post_hook(lambda opt, state_dict: log.append("saved 0"), prepend=True),
        optimizer.register_load_state_dict_pre_hook(loading),
        optimizer.register_load_state_dict_pre_hook(lambda opt, state_dict: log.append("loading 0"), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda opt: log.append(("loaded", opt.param_groups[0]["lr"]))),
        optimizer.register_load_state_dict_post_hook(lambda opt: log.append("loaded 0"), prepend=True),
    ]
    state_dict = optimizer.state_dict()
    given = dict(state_dict)
    optimizer.load_state_dict(state_dict)
    assert state_dict == given
    optimizer.step()
    while handles:
        handles.pop().remove()
        log.append(len(handles))
        optimizer.load_state_dict({key: value for key, value in optimizer.state_dict().items() if key != "note"})
    return log


def test_hooks_around_state_dicts():
    ours, theirs = map(around_state_dicts, KINDS)
    assert ours == theirs
    assert ours[:5] == [
        "saving 0",
        "saving 1",
        "saved 0",
        ("saved", ["param_groups", "state"]),
        ("saved 2", ["note", "param_groups", "state"]),
    ]
    assert ("loaded", 0.7) in ours


@both_kinds
def test_a_hook_changes_the_state_that_is_loaded(kind):
    """As someone does whose parameters come in another order."""
    optimizer, params = ready(kind)
    optimizer.step()
    other = kind(params[::-1], lr=0.1)

    def swap(opt, state_dict):
        state_dict["state"] = {1 - key: value for key, value in state_dict["state"].items()}

    other.register_load_state_dict_pre_hook(swap)
    other.load_state_dict(optimizer.state_dict())
    for parameter in params:
        assert_same_bits(dict(other.state[parameter]), dict(optimizer.state[parameter]))


@both_kinds
def test_hooks_on_state_dicts_that_raise(kind):
    optimizer, params = ready(kind)
    optimizer.step()
    state_dict = optimizer.state_dict()

    def fail(*_):
        raise ArithmeticError("no")

    for register, call in (
        (optimizer.register_state_dict_pre_hook, optimizer.state_dict),
        (optimizer.register_state_dict_post_hook, optimizer.state_dict),
        (optimizer.register_load_state_dict_pre_hook, lambda: optimizer.load_state_dict(state_dict)),
        (optimizer.register_load_state_dict_post_hook, lambda: optimizer.load_state_dict(state_dict)),
    ):
        handle = register(fail)
        with pytest.raises(ArithmeticError):
            call()
        handle.remove()
    optimizer.step()
    assert steps_of(optimizer, params) == [2, 2]


# The profiler


@both_kinds
def test_the_profiler_shows_each_step(kind):
    optimizer, _ = ready(kind)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            optimizer.step()
        optimizer.zero_grad()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#AdamW.step"] == 3
    assert counts["Optimizer.zero_grad#AdamW.zero_grad"] == 1
    optimizer.step()


@both_kinds
def test_a_subclass_has_its_own_record(kind):
    class Named(kind):
        pass

    optimizer, _ = ready(Named)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#Named.step" in {event.key for event in profile.key_averages()}


def around_a_step_of_its_own(kind):
    log = []

    class Logging(kind):
        def step(self, closure=None):
            log.append("own")
            return super().step(closure)

    optimizer, params = ready(Logging)
    optimizer.register_step_pre_hook(lambda *_: log.append("before"))
    optimizer.register_step_post_hook(lambda *_: log.append("after"))
    optimizer.step()
    assert steps_of(optimizer, params) == [1, 1]
    return log


def test_a_subclass_with_a_step_of_its_own():
    """Hooks run around both steps, as torch has it."""
    ours, theirs = map(around_a_step_of_its_own, KINDS)
    assert ours == theirs == ["before", "own", "before", "after", "after"]
