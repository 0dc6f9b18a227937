"""Inside `torch.compile`: a call of the optimizer ends a graph, and does what it does outside."""

import subprocess
import sys

import pytest
import torch

from adamw_numba import AdamW, LossScaleOptimizer

# Of torch's own: its compiler looks whether a loss has a gradient.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameters():
    return [torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)), torch.nn.Parameter(torch.ones(3))]


def loss_of(weights, x):
    return ((x @ weights[0] + weights[1]) ** 2).sum()


def gradients(weights, x):
    loss = loss_of(weights, x)
    loss.backward()
    result = [w.grad for w in weights]
    for w in weights:
        w.grad = None
    return loss.detach(), result


def plain(optimizer, weights, x):
    loss, grads = gradients(weights, x)
    optimizer.apply(grads)
    return loss * 2


def building(optimizer, weights, x):
    loss, grads = gradients(weights, x)
    optimizer.apply(grads, weights)
    return loss * 2


def building_first(optimizer, weights, x):
    optimizer.build(weights)
    return plain(optimizer, weights, x)


def pairs(optimizer, weights, x):
    loss, grads = gradients(weights, x)
    optimizer.apply_gradients(zip(grads, weights, strict=True))
    return loss * 2


def one_by_one(optimizer, weights, x):
    loss, grads = gradients(weights, x)
    for g, w in zip(grads, weights, strict=True):
        optimizer.update_step(g, w, 0.01)
    return loss * 2


def saving(optimizer, weights, x):
    store = {}
    optimizer.save(store)
    optimizer.restore(store)
    return plain(optimizer, weights, x)


def averaging(optimizer, weights, x):
    loss = plain(optimizer, weights, x)
    with optimizer.averaged():
        return loss + loss_of(weights, x).detach()


def scaling(optimizer, weights, x):
    optimizer.scale_loss(loss_of(weights, x)).backward()
    optimizer.apply([w.grad for w in weights])
    for w in weights:
        w.grad = None
    return loss_of(weights, x).detach() * 2


# What is compiled, and whether the optimizer is built before.
STEPS = {
    plain: True,
    building: False,
    building_first: False,
    pairs: True,
    one_by_one: True,
    saving: True,
    averaging: True,
    scaling: True,
}


def taken(step, wrap, make):
    weights, optimizer = parameters(), make()
    if STEPS[step]:
        optimizer.build(weights)
    run, losses = wrap(step), []
    for number in range(4):
        losses.append(run(optimizer, weights, torch.full((1, 2), 1.0 + number)).item())
    return losses, [w.detach().clone() for w in weights], optimizer


def compiled(step):
    return torch.compile(step, backend="eager")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_the_first_step_and_later_ones(step):
    def make():
        optimizer = AdamW(0.01, use_ema=step is averaging)
        return (
            LossScaleOptimizer(optimizer, initial_scale=4.0, dynamic_growth_steps=2) if step is scaling else optimizer
        )

    expected_losses, expected, other = taken(step, lambda step: step, make)
    losses, found, optimizer = taken(step, compiled, make)
    assert losses == expected_losses
    assert all(map(torch.equal, found, expected))
    assert optimizer.iterations == other.iterations == (0 if step is one_by_one else 4)


def test_one_break_and_whole_graphs_around_it():
    """Nothing of the optimizer is traced or guarded: as many graphs as around any other function that is not."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    def work(optimizer, weights, grads):
        grads = [g * 2 for g in grads]
        optimizer.apply(grads)
        return weights[0] + 1

    weights, optimizer = parameters(), AdamW(0.01)
    optimizer.build(weights)
    run = torch.compile(work, backend=backend)
    for _ in range(3):
        run(optimizer, weights, [torch.ones_like(w) for w in weights])
        assert len(graphs) == 2
    assert optimizer.iterations == 3


def test_with_ahead_of_time_autograd():
    expected_losses, expected, _ = taken(plain, lambda step: step, lambda: AdamW(0.01))
    losses, found, _ = taken(plain, lambda step: torch.compile(step, backend="aot_eager"), lambda: AdamW(0.01))
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(found, expected)


def test_nothing_is_imported_for_it():
    """Neither torch by the package, nor torch's compiler, which takes seconds, by an optimizer."""
    code = (
        "import sys, adamw_numba; assert 'torch' not in sys.modules; adamw_numba.AdamW(); "
        "assert 'torch' not in sys.modules; import torch; w = torch.ones(3); o = adamw_numba.AdamW(); o.build([w]); "
        "o.apply([w + 1]); assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
