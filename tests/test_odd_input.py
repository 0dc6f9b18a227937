"""What nobody should do to an optimizer, and what happens then: an error, or the right thing, and never a crash."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import time

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adamw_numba import AdamW, LossScaleOptimizer


def built(variables, **options):
    optimizer = AdamW(0.1, **options)
    optimizer.build(variables)
    return optimizer


def stepped(kind):
    variable, gradient = (np.ones(6), np.ones(6)) if kind == "numpy" else (torch.ones(6), torch.ones(6))
    optimizer = built([variable])
    optimizer.apply([gradient])
    return variable, gradient, optimizer, optimizer.state["momentum/0"]


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


def test_the_list_of_gradients_changes_while_a_step_runs():
    variable = np.zeros(3_000_000, np.float32)
    optimizer = built([variable], threads=1, global_clipnorm=1.0)
    given = [np.ones(3_000_000, np.float32)]
    optimizer.apply(given)

    def clear_once_begun(before):
        while variable[0] == before:
            time.sleep(0)
        given.clear()

    for _ in range(20):
        thread = threading.Thread(target=clear_once_begun, args=(variable[0].item(),))
        thread.start()
        optimizer.apply(given)
        thread.join()
        given.append(np.ones(3_000_000, np.float32))
    assert optimizer.iterations == 21


FIRST_STEP = """
import os, signal, threading, numpy as np
from adamw_numba import AdamW
n = 3_000_000
a, b = np.zeros(10, np.float32), np.zeros(n)
optimizer = AdamW(0.1, weight_decay=0.0)
optimizer.build([a, b])
def watch():
    while a[0] == 0:
        pass
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=watch, daemon=True).start()
try:
    optimizer.apply([np.ones(10, np.float32), np.ones(n)])
    while True:
        pass
except KeyboardInterrupt:
    pass
print(optimizer.iterations, int(np.count_nonzero(a)), int(np.count_nonzero(b)))
"""


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_an_interrupt_in_the_first_step_of_a_process(cache, tmp_path):
    """Nothing is compiled, or loaded, between the first array and the last."""
    environment = os.environ | ({"NUMBA_CACHE_DIR": str(tmp_path)} if cache == "cold" else {})
    for _ in range(1 if cache == "cold" else 4):
        done = subprocess.run([sys.executable, "-c", FIRST_STEP], capture_output=True, text=True, env=environment)
        assert done.stdout.split() in (["0", "0", "0"], ["1", "10", "3000000"]), done.stdout + done.stderr


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


def test_a_rate_that_steps():
    variable = np.ones(3)
    optimizer = AdamW(
        lambda step: optimizer.apply([np.ones(3)]) or 0.1 if step == 1 and optimizer.iterations == 1 else 0.1
    )
    optimizer.build([variable])
    optimizer.apply([np.ones(3)])
    with pytest.raises((RuntimeError, RecursionError)):
        optimizer.apply([np.ones(3)])


def test_numbers_at_the_ends():
    """Norms of numbers whose squares do not fit; an epsilon that float32 lacks."""
    for value in (1.7e308, 1e-200):
        variable = np.ones(4)
        optimizer = built([variable, other := np.ones(1)], global_clipnorm=1e-250, nonfinite="raise")
        optimizer.apply([np.full(4, value), np.full(1, value)])
        assert np.isfinite(variable).all()
        assert np.isfinite(other).all()
        assert optimizer.last_step.gradient_norm >= value
    variable = np.ones(2, np.float32)
    built([variable], epsilon=1e-60).apply([np.zeros(2, np.float32)])
    assert np.isfinite(variable).all()
    strict = array_api_strict.ones(2)
    built([strict, array_api_strict.ones(2)], global_clipnorm=1.0).apply([array_api_strict.ones(2) * 1e200] * 2)
    np.testing.assert_allclose(np.asarray(strict), 0.8996, rtol=1e-4)
    for jit in (jax.jit, lambda f: f):
        optimizer = built([jnp.ones(1), jnp.ones(1)], global_clipnorm=1.0, nonfinite="skip")
        for value, expected in ((3e37, 0.8996), (3e38, 0.9996)):  # the last one is clipped to what XLA takes for 0
            gradients = [jnp.full(1, value), jnp.full(1, value)]
            new, state = jit(optimizer.stateless_apply)(optimizer.variables, gradients, [jnp.ones(1)] * 2)
            assert int(state[0]) == 1
            np.testing.assert_allclose(np.asarray(new[0]), expected, rtol=1e-4)


STATELESS = {
    "state of another shape": (lambda s: [*s[:2], np.zeros((2, 3)), s[3]], None, None, ValueError),
    "state of integers": (lambda s: [*s[:2], np.zeros(3, int), s[3]], None, None, TypeError),
    "state with a hole": (lambda s: [*s[:2], None, s[3]], None, None, TypeError),
    "too short a state": (lambda s: s[:3], None, None, ValueError),
    "gradient of another shape": (None, np.ones((1, 3)), None, ValueError),
    "complex gradient": (None, np.ones(3, complex), None, TypeError),
    "integer gradient": (None, np.ones(3, int), None, TypeError),
    "gradient of torch": (None, torch.ones(3), None, TypeError),
    "variable of another shape": (None, np.ones(4), np.ones(4), ValueError),
}


@pytest.mark.parametrize("case", STATELESS)
def test_stateless_apply(case):
    change, gradient, variable, error = STATELESS[case]
    optimizer = built([np.ones(3)])
    state = change(optimizer.variables) if change else optimizer.variables
    with pytest.raises(error):
        optimizer.stateless_apply(
            state, [np.ones(3) if gradient is None else gradient], [np.ones(3) if variable is None else variable]
        )


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"gradient_accumulation_steps": 2}, {}], ids=str)
def test_stateless_results_are_not_the_arguments(options):
    variable = np.ones(3)
    optimizer = built([variable], **options)
    new, state = optimizer.stateless_apply(
        optimizer.variables, [np.full(3, np.nan if "nonfinite" in options else 1.0)], [variable]
    )
    frozen = [np.array(a) for a in [*new, *state]]
    optimizer.apply([np.ones(3)])
    optimizer.apply([np.ones(3)])
    for one, two in zip([*new, *state], frozen, strict=True):
        np.testing.assert_array_equal(one, two)


def test_stateless_results_carry_no_graph():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = built([parameter], use_ema=True)
    gradient = torch.ones(3, requires_grad=True) * 2
    new, state = optimizer.stateless_apply(optimizer.variables, [gradient], [parameter])
    assert not any(getattr(array, "requires_grad", False) for array in [*new, *state])


def test_names_that_are_taken():
    optimizer = built([np.ones(2)])
    for name in ("iteration", "learning_rate", "momentum/0", "a/b", 3):
        with pytest.raises(ValueError, match="`name`"):
            optimizer.add_variable((), name=name)
    nested = built(tree := {"dense": {"kernel": np.ones(2)}})
    nested.add_variable_from_reference(tree["dense"]["kernel"], "extra")
    nested.add_variable((2,), dtype="int8")
    nested.add_variable((2,))
    assert "dense_kernel_extra" in nested.variable_names
    assert repr(nested)


@pytest.mark.parametrize(("index", "value"), [(0, -1), (0, 2**63 - 1), (1, -1.0), (1, np.nan)])
def test_counters_that_make_no_sense(index, value):
    optimizer = built([np.ones(2)])
    weights = [np.array(a) for a in optimizer.variables]
    weights[index] = np.array(value)
    with pytest.raises(ValueError, match=r"iteration|learning_rate"):
        optimizer.set_weights(weights)


def test_set_weights_into_read_only_state_writes_nothing():
    _, _, optimizer, _ = stepped("numpy")
    before = [np.array(a) for a in optimizer.variables]
    optimizer.variables[-1].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        optimizer.set_weights([a * 0 for a in before])
    for one, two in zip(optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(one, two)


def test_an_array_elsewhere_that_cannot_be_written():
    frozen = np.ones(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="'1' cannot be written"):
        built([array_api_strict.ones(3), array_api_strict.asarray(frozen, copy=False)])


def test_scale_loss_under_a_trace():
    optimizer = LossScaleOptimizer(AdamW(0.1), initial_scale=4.0, dynamic_growth_steps=2)
    optimizer.build([jnp.ones(3)])
    with pytest.raises(ValueError, match="optimizer_variables"):
        jax.jit(optimizer.scale_loss)(1.0)

    @jax.jit
    def step(p, state):
        g = jax.grad(lambda p: optimizer.scale_loss(p.sum(), state))(p)
        return optimizer.stateless_apply(state, [g], [p])

    p, state = jnp.ones(3), optimizer.variables
    for _ in range(6):
        (p,), state = step(p, state)
    assert float(state[3]) == 32
    np.testing.assert_allclose(np.asarray(state[6]), 1 - 0.9**6, rtol=1e-5)


def test_no_gradients_leave_the_scale_alone():
    optimizer = LossScaleOptimizer(AdamW(), initial_scale=8.0)
    optimizer.build([np.ones(2)])
    _, state = optimizer.stateless_apply(optimizer.variables, [], [np.ones(2)])
    assert float(state[3]) == 8


def test_copies_and_saves_while_another_thread_steps():
    size = 300_000
    for wrap in (lambda o: o, LossScaleOptimizer):
        optimizer = wrap(AdamW(1.0, weight_decay=0.0, beta_1=0.0, beta_2=0.0, epsilon=1e-30))
        variables = [np.zeros(size), np.zeros(size)]
        optimizer.build(variables)
        stop = threading.Event()

        def go(optimizer=optimizer, stop=stop):
            while not stop.is_set():
                optimizer.apply([np.full(size, float(optimizer.iterations + 1))] * 2)

        thread = threading.Thread(target=go)
        thread.start()
        for _ in range(5):
            copied = copy.deepcopy(optimizer)
            store = {}
            optimizer.save_own_variables(store)
            moments = [array for array in store.values() if array.shape == (size,)][::2]
            assert all((m == m[0]).all() and m[0] == moments[0][0] for m in moments)
            inner = getattr(copied, "inner_optimizer", copied)
            assert all((v == -inner.iterations).all() for v in inner.trainable_variables)
        stop.set()
        thread.join()


def test_subclasses_have_attributes_of_their_own():
    class Scaled(LossScaleOptimizer):
        def __init__(self, inner):
            super().__init__(inner)
            self.history = []

    class Counted(AdamW):
        def __init__(self):
            super().__init__()
            self.history = []

    assert Scaled(Counted()).history == Counted().history == []
    with pytest.raises(AttributeError, match="LossScaleOptimizer"):
        _ = LossScaleOptimizer(AdamW()).what


def test_variables_of_one_s_own_are_not_taken_for_counters():
    optimizer = AdamW()
    optimizer.add_variable((3,), name="step_counter")
    optimizer.add_variable((), lambda shape, dtype: np.full(shape, -1, dtype), name="dynamic_scale")
    optimizer.build([np.ones(2)])
    store = {}
    optimizer.save_own_variables(store)
    optimizer.load_own_variables(store)
    assert float(optimizer.state["dynamic_scale"]) == -1


@pytest.mark.parametrize("index", [2, 3])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_loss_scale_that_cannot_be_written(index, elsewhere):
    variables = [np.ones(2), array_api_strict.ones(2)][: 1 + elsewhere]
    optimizer = LossScaleOptimizer(AdamW(0.1))
    optimizer.build(variables)
    optimizer.variables[index].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        optimizer.apply([np.ones(2), array_api_strict.ones(2)][: 1 + elsewhere])
    assert variables[0].tolist() == [1, 1]
    assert optimizer.iterations == 0


def test_a_loss_scale_of_zero():
    optimizer = LossScaleOptimizer(AdamW())
    optimizer.build([np.ones(2)])
    weights = [np.array(a) for a in optimizer.variables]
    weights[3][...] = 0
    for act in (
        lambda: optimizer.set_weights(weights),
        lambda: optimizer.stateless_apply(weights, [np.ones(2)], [np.ones(2)]),
        lambda: (optimizer.inner_optimizer.assign(optimizer.variables[3], 0.0), optimizer.apply([np.ones(2)])),
    ):
        with pytest.raises(ValueError, match="dynamic_scale"):
            act()


def test_scalars_stay_arrays_in_stateless_apply():
    optimizer = built([np.ones(())], use_ema=True)
    new, state = optimizer.stateless_apply(optimizer.variables, [np.ones(())], [np.ones(())])
    assert all(isinstance(array, np.ndarray) for array in [*new, *state])


@pytest.mark.parametrize("wrap", [lambda o: o, LossScaleOptimizer])
def test_pickles_over_read_only_memory(wrap):
    variable = np.ones(3)
    optimizer = wrap(AdamW(0.1, use_ema=True))
    optimizer.build([variable])
    optimizer.apply([np.ones(3)])
    buffers = []
    data = pickle.dumps(optimizer, protocol=5, buffer_callback=buffers.append)
    other = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])
    for each in (optimizer, other):
        each.apply([np.ones(3)])
    np.testing.assert_array_equal(other.trainable_variables[0], variable)
    together = copy.deepcopy({"optimizer": optimizer, "slot": optimizer.variables[-1]})
    assert together["slot"] is together["optimizer"].variables[-1]
