"""A step that is taken like the last one, without being prepared anew, has the same bits as one that is."""

import copy
from collections import OrderedDict, UserDict, defaultdict, namedtuple

import numpy as np
import pytest
from helpers import libraries
from helpers.libraries import torch

from adamw_numba import AdamW, coefficients, schedules
from adamw_numba.arrays import table
from adamw_numba.arrays.tree import flatten
from adamw_numba.cpu import plan
from adamw_numba.step import workspace

OPTIONS = {
    "plain": {},
    "everything": {"amsgrad": True, "use_ema": True, "clipvalue": 0.5, "loss_scale_factor": 8.0},
    "overwrite": {"use_ema": True, "ema_overwrite_frequency": 2},
    "schedules": {
        "learning_rate": schedules.CosineDecay(0.1, 9),
        "weight_decay": lambda step: 0.01 * step,
    },
    "no momentum": {"beta_1": 0.0, "beta_2": 0.0},
    "clip": {"clipnorm": 0.5},
    "global clip": {"global_clipnorm": 0.5, "loss_scale_factor": 3.0},
    "skip": {"nonfinite": "skip", "global_clipnorm": 0.5},
    "accumulation": {"gradient_accumulation_steps": 2},
}


def restart(optimizer, gradients):
    weights = [np.array(libraries.look(a)) for a in optimizer.variables]
    weights[0][...] = 0
    optimizer.set_weights(weights)


def without_one(optimizer, gradients):
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, gradients[1]])


def refused(optimizer, gradients):
    with pytest.raises(ValueError, match="has shape"):
        optimizer.apply(gradients[::-1])


def interrupted(optimizer, gradients):
    """A step stops after the work has been laid out for other strides, which the next step finds."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(coefficients.Recipes, "at", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        optimizer.apply([strided(gradients[0]), gradients[1]])
    gradients[0] = strided(gradients[0])


def strided(array):
    return np.asfortranarray(array) if isinstance(array, np.ndarray) else array.T.contiguous().T


EVENTS = {
    "nothing": lambda o, g: None,
    "another rate": lambda o, g: setattr(o, "learning_rate", 0.03),
    "another decay": lambda o, g: setattr(o, "weight_decay", 0.2),
    "another beta": lambda o, g: setattr(o, "beta_2", 0.9),
    "another epsilon": lambda o, g: setattr(o, "epsilon", 0.1),
    "another momentum": lambda o, g: setattr(o, "ema_momentum", 0.5),
    "another loss scale": lambda o, g: setattr(o, "loss_scale_factor", 2.0),
    "one thread": lambda o, g: setattr(o, "threads", 1),
    "a clip and back": lambda o, g: [setattr(o, "global_clipnorm", 0.1), o.apply(g), setattr(o, "global_clipnorm", None)],
    "raise": lambda o, g: setattr(o, "nonfinite", "raise"),
    "restart": restart,
    "without one": without_one,
    "Adam alone": lambda o, g: o.update_step(g[0], o.trainable_variables[0], 0.1),
    "gradients of another dtype": lambda o, g: o.apply([libraries.numpy(libraries.look(a), "float64") if isinstance(a, np.ndarray) else a.double() for a in g]),
    "a refused step": refused,
    "an interrupt": interrupted,
    "a gradient that is not finite": lambda o, g: o.apply([g[0] * np.inf, g[1]]),
}  # fmt: skip


def trained(options, event, make, anew):
    random = np.random.default_rng(0)
    optimizer = AdamW(**{"learning_rate": 0.1} | options)
    optimizer.build([make(random.normal(size=shape), "float32") for shape in ((3, 5), (7,))])
    for number in range(8):
        gradients = [make(random.normal(size=shape), "float32") for shape in ((3, 5), (7,))]
        if number == 5:
            event(optimizer, gradients)
        if anew:
            optimizer.threads = optimizer.threads  # forgets the last step
        optimizer.apply(gradients)
    return [libraries.look(a) for a in [*optimizer.trainable_variables, *optimizer.variables]], optimizer.last_step


CASES = [(o, "nothing") for o in OPTIONS] + [
    (o, e) for o in ("plain", "everything", "clip", "skip") for e in EVENTS if e != "nothing"
]
CASES = [case for case in CASES if case[1] != "a clip and back" or case[0] == "plain"]  # others clip otherwise


@pytest.mark.parametrize(("options", "event"), CASES)
@pytest.mark.parametrize("make", [libraries.numpy, libraries.parameter])
def test_bits(options, event, make):
    results = [trained(OPTIONS[options], EVENTS[event], make, anew) for anew in (False, True)]
    assert results[0][1] == results[1][1]
    for one, other in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_array_equal(one, other)


SIDE_EFFECTS = {
    "another beta": lambda o, step: setattr(o, "beta_1", 0.5 + 0.04 * step),
    "another clip": lambda o, step: setattr(o, "global_clipnorm", 0.1 * (1 + step)),
    "another loss scale": lambda o, step: setattr(o, "loss_scale_factor", 1.0 + step),
    "Adam alone": lambda o, step: o.update_step(np.ones(3), o.trainable_variables[0], 0.1),
    "skipping": lambda o, step: setattr(o, "nonfinite", "skip"),
}


@pytest.mark.parametrize("when", [[1], [3, 4, 5, 6]])
@pytest.mark.parametrize("effect", SIDE_EFFECTS)
def test_a_rate_with_a_side_effect(effect, when):
    """The same bits as of steps that are prepared anew, whether that step was prepared or not."""

    def trained(anew):
        def rate(step):
            called.append(step)
            if step in when:
                SIDE_EFFECTS[effect](optimizer, step)
            return 0.01

        called = []
        optimizer = AdamW(rate, global_clipnorm=None if effect == "skipping" else 0.1, loss_scale_factor=2.0)
        optimizer.build([np.ones(3)])
        for number in range(7):
            if anew:
                optimizer.threads = optimizer.threads
            optimizer.apply([np.array([1.0, 2.0, np.inf if effect == "skipping" and number == 5 else number])])
        assert len(called) == 7
        assert optimizer.skipped_steps == (effect == "skipping")
        return optimizer.trainable_variables + optimizer.variables

    for one, other in zip(trained(False), trained(True), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["coefficients", "step_size", "log"])
def test_a_hyperparameter_that_changes_while_a_step_is_prepared(name, monkeypatch):
    """By a signal's handler, say: it holds from the next step on, at the latest."""
    optimizer, original = AdamW(0.1), getattr(coefficients, name)
    optimizer.build([np.ones(3)])
    optimizer.apply([np.ones(3)])
    optimizer.beta_2 = 0.9  # so that the next step is worked out from the beginning

    def changing(*arguments):
        result = original(*arguments)
        optimizer.epsilon, optimizer.beta_1 = 1e6, 0.5
        return result

    with monkeypatch.context() as patch:
        patch.setattr(coefficients, name, changing)
        optimizer.apply([np.ones(3)])
    assert optimizer.epsilon == 1e6
    moments = [np.array(a) for a in optimizer.trainable_variables + optimizer.variables]
    twin = AdamW(0.1, epsilon=1e6, beta_1=0.5, beta_2=0.9)
    twin.build([moments[0]])
    twin.set_weights(moments[1:])
    for chosen in (optimizer, twin):
        chosen.apply([np.ones(3)])
    np.testing.assert_array_equal(optimizer.trainable_variables[0], twin.trainable_variables[0])


def test_a_lazy_gradient_after_an_interrupt(monkeypatch):
    """What torch alone knows of a tensor is asked for even if a step has stopped while that was being noted."""
    variable = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW(0.1)
    optimizer.build([variable])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(table, "Tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        optimizer.apply([torch.ones(4)])
    for _ in range(3):
        optimizer.apply([torch.ones(4)])
    before = optimizer.state["momentum/0"].clone()
    optimizer.apply([torch._neg_view(torch.ones(4))])
    assert (optimizer.state["momentum/0"] < before).all()


Layer = namedtuple("Layer", "w")
FORMS = {
    "a dict": lambda a, b: {"a": a, "b": b},
    "nested": lambda a, b: {"x": {"a": a}, "y": [b]},
    "a tuple": lambda a, b: (a, b),
    "layers": lambda a, b: [(a,), (b,)],
    "OrderedDict": lambda a, b: OrderedDict(a=a, b=b),
    "pairs": lambda a, b: [("a", a), ("b", b)],
    "layers that are OrderedDicts": lambda a, b: [OrderedDict(w=a), OrderedDict(w=b)],
    "layers that are named": lambda a, b: [Layer(a), Layer(b)],
    "layers of another kind": lambda a, b: [UserDict(w=a), UserDict(w=b)],
    "numbers as keys": lambda a, b: {0: a, 1: b},
    "numbers as keys, downwards": lambda a, b: {1: a, 0: b},
    "digits as keys, downwards": lambda a, b: {"1": a, "0": b},
    "digits as names, downwards": lambda a, b: [("1", a), ("0", b)],
    "another mapping, downwards": lambda a, b: UserDict({"1": a, "0": b}),
    "iterators": lambda a, b: {"x": iter([a]), "y": iter([b])},
}
OTHERS = {
    "another order": lambda g: {key: g[key] for key in reversed(g)} if isinstance(g, dict) else g,
    "pairs in another order": lambda g: [(str(key), g[key]) for key in reversed(g)] if isinstance(g, dict) else g,
    "a list": lambda g: flatten(g)[1],
    "a defaultdict": lambda g: defaultdict(list, g) if isinstance(g, dict) else g,
    "none": lambda g: g,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", OTHERS)
def test_containers(form, other):
    """Gradients in containers: the same bits as in a list, and as of a container that comes for the first time."""
    random = np.random.default_rng(0)
    variables = [np.ones(2), np.ones(3)]
    optimizer, twin = AdamW(0.1), AdamW(0.1)
    optimizer.build(FORMS[form](*variables))
    twin.build([v.copy() for v in variables])
    for number in range(7):
        a, b = random.normal(size=2), random.normal(size=3)
        given = FORMS[form](a, b)
        optimizer.apply(OTHERS[other](given) if number % 3 == 2 else given)
        twin.apply([a, b])
    for one, expected in zip(variables, twin.trainable_variables, strict=True):
        np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("form", FORMS)
def test_containers_beside_variables(form):
    """The same where the variables are given, and of a step without side effects."""
    a, b = np.ones(2), np.ones(3)
    grads, twins = (np.array([1.0, -2.0]), np.full(3, 0.5)), (a.copy(), b.copy())
    optimizer, twin = AdamW(0.1), AdamW(0.1)
    optimizer.build(FORMS[form](a, b))
    twin.build(twins)
    new, _ = optimizer.stateless_apply(optimizer.variables, FORMS[form](*grads), FORMS[form](a, b))
    for _ in range(3):
        optimizer.apply(FORMS[form](*grads), FORMS[form](a, b))
        twin.apply(grads)
    for one, expected in zip((a, b), twins, strict=True):
        np.testing.assert_array_equal(one, expected)
    once, twins = AdamW(0.1), (np.ones(2), np.ones(3))
    once.build(twins)
    once.apply(grads)
    for one, expected in zip(flatten(new)[1], twins, strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-14)


def test_keys_that_a_trace_sorts():
    jax = pytest.importorskip("jax")
    optimizer = AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["^0$"])
    variables, grads = ({1: jax.numpy.ones(2), 0: jax.numpy.ones(2)} for _ in range(2))
    optimizer.build(variables)
    eager, traced = (
        step(optimizer.variables, grads, variables)[0]
        for step in (optimizer.stateless_apply, jax.jit(optimizer.stateless_apply))
    )
    for key in variables:
        np.testing.assert_allclose(eager[key], traced[key], rtol=1e-6)
    assert eager[1][0] < eager[0][0]


def test_nesting_beyond_what_can_be_remembered():
    """A container too deep for its form to be kept or copied is taken as any other."""
    variable = np.ones(2)
    nested, grads = variable, np.ones(2)
    for _ in range(200):
        nested, grads = [nested], [grads]
    optimizer = AdamW(0.1)
    optimizer.build(nested)
    for _ in range(3):
        optimizer.apply(grads)
    assert copy.deepcopy(optimizer).iterations == 3


@pytest.mark.parametrize("empty", [{}, (), [], OrderedDict(), iter(())])
def test_no_gradients_at_all(empty):
    """Nothing happens, as in Keras; a container that was known stays known."""
    variables = {"a": np.ones(2)}
    optimizer = AdamW(0.1)
    optimizer.build(variables)
    for gradients in (empty, {"a": np.ones(2)}, empty, {"a": np.ones(2)}):
        optimizer.apply(gradients)
    assert optimizer.iterations == 2


REFUSED = {
    "a key more": (lambda g: g | {"c": np.ones(2)}, "unknown"),
    "another key": (lambda g: {"a": g["a"], "c": g["b"]}, "lacks"),
    "a key less": (lambda g: {"a": g["a"]}, "lacks|one-to-one"),
    "a dict for a leaf": (lambda g: {"a": g["a"], "b": {"c": g["b"]}}, "lacks"),
    "another shape": (lambda g: {"a": g["b"], "b": g["a"]}, "has shape"),
    "a number": (lambda g: {"a": g["a"], "b": "text"}, "expected an array"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_containers_are_refused(case):
    """As by an optimizer that has not seen the container before; and the next good one is taken."""
    change, message = REFUSED[case]
    variables = {"a": np.ones(2), "b": np.ones(3)}
    optimizer = AdamW(0.1)
    optimizer.build(variables)
    given = {"a": np.ones(2), "b": np.ones(3)}
    for _ in range(3):
        optimizer.apply(given)
    before = variables["a"].copy()
    for chosen in (optimizer, copy.deepcopy(optimizer)):
        chosen.engine.form = optimizer.engine.form if chosen is optimizer else None
        with pytest.raises((ValueError, TypeError), match=message):
            chosen.apply(change(given))
    np.testing.assert_array_equal(variables["a"], before)
    optimizer.apply(given)
    assert optimizer.iterations == 4


@pytest.mark.parametrize("options", ["plain", "clip", "global clip", "skip"])
@pytest.mark.parametrize("make", [libraries.numpy, libraries.parameter])
def test_which_steps_are_looked_through(make, options, monkeypatch):
    """Of steady steps the first alone; copies begin anew; a torch graph notices every step."""
    counted = []
    begin = workspace.Workspace.begin
    monkeypatch.setattr(workspace.Workspace, "begin", lambda *a: counted.append(1) or begin(*a))
    variable, gradient = make(np.ones(3), "float32"), make(np.ones(3), "float32")
    optimizer = AdamW(0.1, **OPTIONS[options])
    optimizer.build([variable])
    for _ in range(5):
        optimizer.apply([gradient])
    assert len(counted) == 1
    nested = {"0": gradient}
    for _ in range(3):
        optimizer.apply(nested)
    assert len(counted) == 2
    if isinstance(variable, torch.Tensor):
        stale = (variable**2).sum()
        optimizer.apply([gradient])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()
    copied = copy.deepcopy(optimizer)
    copied.apply([gradient])
    assert len(counted) == 3
    assert not np.array_equal(*(libraries.look(o.trainable_variables[0]) for o in (optimizer, copied)))


@pytest.mark.parametrize("options", ["plain", "clip", "global clip", "skip"])
def test_an_interrupt_while_work_is_laid_out(options, monkeypatch):
    """For gradients of other strides: the next step lays it out again, and does not trust half of it."""
    results = []
    for stops in (False, True):
        variable = np.ones(3)
        optimizer = AdamW(0.1, **OPTIONS[options])
        optimizer.build([variable])
        optimizer.apply([np.arange(3.0)])
        given = [np.arange(6.0)[::2]]
        if stops:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(plan, "chunks_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                optimizer.apply(given)
        for _ in range(3):
            optimizer.apply(given)
        results.append([variable.tobytes(), *(array.tobytes() for array in optimizer.variables)])
    assert results[0] == results[1]


def test_a_counter_that_cannot_be_written_leaves_versions_alone():
    """torch is told of a change only if there is one."""
    variable = torch.ones(3)
    optimizer = AdamW(0.1)
    optimizer.build([variable])
    optimizer.apply([torch.ones(3)])
    version = variable._version
    optimizer.state["iteration"].flags.writeable = False
    with pytest.raises(ValueError, match="iteration"):
        optimizer.apply([torch.ones(3)])
    assert variable._version == version
