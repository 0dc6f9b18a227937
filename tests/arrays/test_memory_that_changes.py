"""Variables, gradients and state whose memory moves, shrinks, or is taken away between steps."""

import gc
import weakref

import numpy as np
import pytest
import torch
from helpers.training import built, stepped, train

from adamw_numba import AdamW


def rebind_slot(v, g, o, m):
    m.data = torch.zeros(3)


def freeze_slot(v, g, o, m):
    m.flags.writeable = False


def reshape_slot(v, g, o, m):
    m.shape = (3, 2)


def free_variable(v, g, o, m):
    v.untyped_storage().resize_(0)


def free_gradient(v, g, o, m):
    g.untyped_storage().resize_(0)


def shrink_gradient(v, g, o, m):
    g.untyped_storage().resize_(8)


def end_of_counting(v, g, o, m):
    o.variables[0][...] = 2**62


def freeze_counter(v, g, o, m):
    o.variables[0].flags.writeable = False


def free_slot(v, g, o, m):
    m.untyped_storage().resize_(0)


def shrink_slot(v, g, o, m):
    m.untyped_storage().resize_(8)


def move_past_the_end(v, g, o, m):
    large = torch.ones(12)
    end = large[6:]
    large.untyped_storage().resize_(24)
    v.data = end


def gradient_past_the_end(v, g, o, m):
    large = torch.ones(12)
    end = large[6:]
    large.untyped_storage().resize_(24)
    g.data = end


CHANGES = {
    "numpy": [freeze_slot, reshape_slot, end_of_counting, freeze_counter],
    "torch": [
        rebind_slot,
        free_variable,
        free_gradient,
        shrink_gradient,
        free_slot,
        shrink_slot,
        move_past_the_end,
        gradient_past_the_end,
    ],
}


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind, changes in CHANGES.items() for change in changes]
)
def test_memory_that_is_taken_away(kind, change):
    variable, gradient, optimizer, momentum = stepped(kind)
    before = variable.clone() if kind == "torch" else variable.copy()
    change(variable, gradient, optimizer, momentum)
    with pytest.raises(ValueError, match=r"momentum of '0'|variable '0'|gradient of '0'|iteration"):
        optimizer.apply([gradient])
    if change not in (free_variable, move_past_the_end):
        assert (variable == before).all()


def test_state_of_torch_that_moves_is_followed():
    _, gradient, optimizer, momentum = stepped("torch")
    momentum.data = torch.full((6,), 5.0)
    optimizer.apply([gradient])
    np.testing.assert_allclose(momentum.numpy(), 4.6)


@pytest.mark.parametrize("kind", ["fake", "functional", "zero"])
def test_tensors_without_memory(kind):
    optimizer = built([torch.ones(4)])
    if kind == "fake":
        with pytest.raises(TypeError, match="gradient of '0'"):
            torch.func.vmap(lambda g: optimizer.apply([g]))(torch.ones(3, 4))
    elif kind == "functional":
        with pytest.raises((TypeError, ValueError), match="gradient of '0'"):
            torch.func.functionalize(lambda g: optimizer.apply([g * 1.0]))(torch.ones(4))
    else:
        with pytest.raises((TypeError, ValueError), match="gradient of '0'"):
            optimizer.apply([torch._efficientzerotensor((4,))])
    assert optimizer.iterations == 0


def test_overlap_that_comes_later():
    base = torch.zeros(20)
    one, two = base[:10], base[10:]
    optimizer = built([one, two])
    optimizer.apply([torch.ones(10)] * 2)
    one.as_strided_((10,), (2,))
    with pytest.raises(ValueError, match="share memory"):
        optimizer.apply([torch.ones(10)] * 2)


def test_ranges_are_those_of_now():
    parameter = torch.nn.Parameter(torch.ones(4))
    first = parameter.data
    optimizer = built([parameter])
    optimizer.apply([torch.ones(4)])
    parameter.data = torch.ones(4)
    with pytest.raises(ValueError, match="shape"):
        optimizer.apply([torch.ones(5)])
    parameter.data = first
    with pytest.raises(ValueError, match="shares memory"):
        optimizer.apply([parameter.data[:]])


def test_variables_that_move():
    """The same tensor, in other memory: found at the next step, and nothing written where it was."""
    parameter, array = torch.nn.Parameter(torch.ones(4)), np.ones(4)
    optimizer = AdamW(0.1, weight_decay=0.0)
    optimizer.build([parameter, array])
    optimizer.apply([torch.ones(4), np.ones(4)])
    old = parameter.data
    parameter.data = torch.full((4,), 5.0)
    optimizer.apply([torch.ones(4), np.ones(4)])
    np.testing.assert_allclose(parameter.detach().numpy(), 4.9, rtol=1e-5)
    np.testing.assert_allclose(old.numpy(), 0.9, rtol=1e-5)
    with pytest.raises(ValueError, match="shares memory with variable '0'"):
        optimizer.apply([parameter.data[:], np.ones(4)])


def test_no_gradient_is_kept_alive():
    variable = np.ones(1000, np.float32)
    optimizer = AdamW()
    optimizer.build([variable])
    for dtype in (np.float32, np.float64):
        gradient = np.ones(1000, dtype)
        reference = weakref.ref(gradient)
        optimizer.apply([gradient])
        del gradient
        gc.collect()
        assert reference() is None


def test_gradients_at_changing_addresses():
    random = np.random.default_rng(0)
    variable, expected = np.ones(100), np.ones(100)
    steps = [random.normal(size=100) for _ in range(50)]
    pool = np.zeros((7, 100))
    optimizer = AdamW(0.05)
    optimizer.build([variable])
    for k, g in enumerate(steps):
        pool[k % 7] = g
        optimizer.apply([pool[k % 7]])
    train([expected], [[g] for g in steps])
    np.testing.assert_array_equal(variable, expected)


@pytest.mark.parametrize("which", ["variable", "gradient", "momentum"])
def test_memory_that_shrinks_at_its_place(which):
    """As an allocator gives it that is asked twice: an address alone tells nothing."""
    variable, gradient = torch.ones(100_000), torch.ones(100_000)
    optimizer = built([variable])
    optimizer.apply([gradient])
    _, _, momentum, *_ = optimizer.variables
    optimizer.apply([gradient])
    tensor = {"variable": variable, "gradient": gradient, "momentum": momentum}[which]
    where, storage = tensor.data_ptr(), tensor.untyped_storage()
    for size in range(399_000, 398_000, -8):
        storage.resize_(size)
        if tensor.data_ptr() == where:
            break
    else:
        pytest.skip("the allocator did not give the same address again")
    left = size - tensor.storage_offset() * tensor.itemsize  # slots begin further on: see `zeros_beside`
    with pytest.raises(ValueError, match=rf"{which}.*its storage holds {left} bytes"):
        optimizer.apply([gradient])
    assert optimizer.iterations == 2
