"""Trees of the optax front: every container of JAX, states that lie as parameters lie, and what is refused."""

import copy
import inspect
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers.jax_runs import assert_same, gradients_at, one_step, params_of, trained

from adamw_numba.optax import adamw

EVERYTHING = {
    "amsgrad": True,
    "use_ema": True,
    "global_clipnorm": 1.0,
    "gradient_accumulation_steps": 2,
    "nonfinite": "skip",
}


class Pair(NamedTuple):
    w: Any
    b: Any


@jax.tree_util.register_pytree_with_keys_class
class Layer:
    """A node that somebody has registered, with a part that is no leaf."""

    def __init__(self, w, b, name):
        self.w, self.b, self.name = w, b, name

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("w"), self.w), (jax.tree_util.GetAttrKey("b"), self.b)), self.name

    @classmethod
    def tree_unflatten(cls, name, children):
        return cls(*children, name)


@jax.tree_util.register_dataclass
@dataclass
class Fields:
    w: Any
    b: Any


TREES = {
    "array": lambda: jnp.ones(3),
    "dict": lambda: {"b": jnp.ones(2), "a": jnp.zeros(3)},
    "OrderedDict": lambda: OrderedDict(b=jnp.ones(2), a=jnp.zeros(3)),
    "list": lambda: [jnp.ones(2), [jnp.zeros(3)]],
    "tuple": lambda: (jnp.ones(2), (jnp.zeros(3),)),
    "named tuple": lambda: Pair(jnp.ones((2, 3)), Pair(jnp.zeros(3), jnp.ones(()))),
    "None": lambda: {"a": None, "b": jnp.ones(3), "c": (None, jnp.zeros(2))},
    "class": lambda: Layer(jnp.ones((2, 3)), {"x": jnp.zeros(3)}, "layer"),
    "dataclass": lambda: Fields(w=jnp.ones((2, 3)), b=[jnp.zeros(3)]),
    "masked": lambda: {"a": optax.MaskedNode(), "b": jnp.ones(3)},
    "empty array": lambda: {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)},
    "nothing": dict,
    "NumPy": lambda: {"a": np.ones(3, "float32"), "b": np.zeros((), "float32")},
}


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("name", TREES)
def test_containers_keep_their_type(name, options):
    """Inside a scan, which refuses anything else, and as optax has them."""
    params = TREES[name]()
    transformation = adamw(0.1, **options)
    state = transformation.init(params)

    def body(carry, step):
        return one_step(transformation, *carry, step), None

    (new, after), _ = jax.lax.scan(body, (jax.tree.map(jnp.asarray, params), state), jnp.arange(4.0))
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for field in ("mu", "nu", *(("nu_max", "average", "accumulator") if options else ())):
        assert jax.tree.structure(getattr(after, field)) == jax.tree.structure(params)
    assert int(after.count) == (2 if options else 4)
    if not options:
        assert_same(new, trained(optax.adamw(0.1), jax.tree.map(jnp.asarray, params), steps=4)[0], params)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_jitted_step_is_compiled_once(options):
    params, transformation = params_of("float32"), adamw(0.1, **options)
    state = transformation.init(params)
    step = jax.jit(partial(one_step, transformation), donate_argnums=(0, 1))
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1


def test_init_under_a_trace():
    params, transformation = params_of("float32"), adamw(0.1, **EVERYTHING)
    state = transformation.init(params)
    shapes = jax.eval_shape(transformation.init, params)
    jitted = jax.jit(transformation.init)(params)
    assert jax.tree.structure(state) == jax.tree.structure(shapes) == jax.tree.structure(jitted)
    for one, other, third in zip(*map(jax.tree.leaves, (state, shapes, jitted)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(one, third)


def test_parameters_with_no_gradient_stay():
    """None, and what is not trained: integers, whose derivative JAX calls float0."""
    params = {"a": jnp.ones(3), "frozen": jnp.ones(2), "count": jnp.arange(3)}
    transformation = adamw(0.1, use_ema=True, global_clipnorm=1.0)
    state = transformation.init(params)
    float0 = np.zeros(3, jax.dtypes.float0)
    updates, state = transformation.update({"a": jnp.ones(3), "frozen": None, "count": float0}, state, params)
    new = optax.apply_updates(params, updates)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert new["count"].dtype == params["count"].dtype
    np.testing.assert_array_equal(new["frozen"], params["frozen"])
    np.testing.assert_array_equal(new["count"], params["count"])
    assert float(new["a"][0]) < 1
    np.testing.assert_array_equal(state.mu["frozen"], 0)


def test_optax_finds_its_way_in_the_state():
    params = params_of("float32")
    transformation = optax.chain(optax.clip(1.0), adamw(0.1, use_ema=True))
    _, state = trained(transformation, params, steps=3)
    assert int(optax.tree.get(state, "count")) == 3
    doubled = optax.tree.map_params(transformation, lambda leaf: leaf * 2, state)
    assert_same(doubled[1].mu, jax.tree.map(lambda leaf: leaf * 2, state[1].mu), params)
    assert int(optax.tree.get(doubled, "count")) == 3
    assert int(optax.tree.get(optax.tree.set(state, count=jnp.int32(7)), "count")) == 7


def test_the_arguments_are_those_of_optax():
    """Names, order and defaults, and ours behind them by keyword."""
    ours, theirs = (inspect.signature(function).parameters.values() for function in (adamw, optax.adamw))
    shown = [(p.name, p.kind, p.default) for p in theirs]
    assert [(p.name, p.kind, p.default) for p in ours][: len(shown)] == shown
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours)[len(shown) :])


def test_it_can_be_copied_and_pickled():
    params, transformation = params_of("float32"), adamw(0.1, global_clipnorm=1.0)
    expected, _ = trained(transformation, params)
    for other in (copy.deepcopy(transformation), pickle.loads(pickle.dumps(transformation))):
        assert_same(trained(other, params)[0], expected, params)


def without(params, key):
    return {name: value for name, value in params.items() if name != key}


def updated(change_grads=None, change_params=None, change_state=None, loss_scale=1.0, **options):
    def act():
        params = params_of("float32")
        transformation = adamw(0.1, **options)
        state, grads = transformation.init(params), gradients_at(params, 0.0)
        state = change_state(state) if change_state else state
        grads = change_grads(grads) if change_grads else grads
        params = change_params(params) if change_params else params
        transformation.update(grads, state, params, loss_scale=loss_scale)

    return act


def with_b(value):
    """Another leaf at layer/b."""
    return lambda tree: tree | {"layer": tree["layer"] | {"b": value}}


# What is done, the error, and what its message says
MISTAKES = {
    "params missing": (lambda: adamw(0.1).update(1.0, adamw(0.1).init(1.0)), ValueError, ["`params` is missing"]),
    "gradient missing": (updated(lambda g: without(g, "layer")), ValueError, ["the gradients lack", "layer/b", "layer/w"]),
    "gradient too many": (updated(lambda g: g | {"more": jnp.ones(2)}), ValueError, ["the gradients have", "more"]),
    "other container": (updated(lambda g: OrderedDict(g)), ValueError, ["the gradients", "otherwise"]),
    "shape of a gradient": (updated(with_b(jnp.ones(5))), ValueError, ["gradients at 'layer/b'", "(5,)", "(4,)"]),
    "complex gradient": (updated(with_b(jnp.ones(4, "complex64"))), TypeError, ["'layer/b'", "complex64", "float32"]),
    "integer gradient": (updated(with_b(jnp.ones(4, "int32"))), TypeError, ["'layer/b'", "int32"]),
    "gradient of torch": (updated(with_b(torch.ones(4))), TypeError, ["gradients at 'layer/b'", "torch", "JAX"]),
    "parameter of torch": (lambda: adamw(0.1).init({"a": [torch.ones(2)]}), TypeError, ["`params` at 'a/0'", "torch"]),
    "text": (lambda: adamw(0.1).init({"a": "b"}), TypeError, ["`params` at 'a'", "'b'"]),
    "integers with a gradient": (
        updated(None, with_b(jnp.ones(4, "int32"))),
        TypeError,
        ["`params` at 'layer/b'", "int32", "None"],
    ),
    "state of optax": (
        updated(change_state=lambda _: optax.adamw(0.1).init(params_of("float32"))),
        TypeError,
        ["`state` is a tuple", "AdamWState"],
    ),
    "state of other options": (
        updated(change_state=lambda s: s._replace(nu_max=None), amsgrad=True),
        ValueError,
        ["`state` lacks 'nu_max'"],
    ),
    "state of an option that is not set": (
        updated(change_state=lambda s: s._replace(nu_max=s.nu)),
        ValueError,
        ["`state` has 'nu_max'"],
    ),
    "state without a count": (
        updated(change_state=lambda s: s._replace(skipped=None), nonfinite="skip"),
        ValueError,
        ["`state` lacks 'skipped'"],
    ),
    "loss scale of 0": (updated(loss_scale=0.0), ValueError, ["`loss_scale`", "0.0"]),
    "loss scale of NaN": (updated(loss_scale=float("nan")), ValueError, ["`loss_scale`", "nan"]),
    "text as loss scale": (updated(loss_scale="large"), ValueError, ["`loss_scale`", "'large'"]),
    "several loss scales": (updated(loss_scale=jnp.ones(2)), ValueError, ["`loss_scale`", "(2,)"]),
    "state of another shape": (
        updated(change_state=lambda s: s._replace(mu=with_b(jnp.ones(3))(s.mu))),
        ValueError,
        ["`state`: mu at 'layer/b'", "(3,)", "(4,)"],
    ),
    "state of another tree": (
        updated(change_state=lambda s: s._replace(nu=without(s.nu, "scale"))),
        ValueError,
        ["`state`: nu lack", "scale"],
    ),
    "mask of another tree": (updated(mask={"layer": True}), ValueError, ["`mask` does not fit"]),
    "mask of numbers": (updated(mask={"layer": {"w": 1.0, "b": True}, "scale": True}), TypeError, ["`mask`", "1.0", "'layer/w'"]),
    "learning rate": (lambda: adamw(-1.0), ValueError, ["learning_rate", "-1.0"]),
    "rate of many numbers": (lambda: adamw(jnp.ones(2)), ValueError, ["`learning_rate`", "(2,)"]),
    "b1": (lambda: adamw(0.1, b1=1.0), ValueError, ["`b1`", "1.0"]),
    "b2": (lambda: adamw(0.1, b2=-0.5), ValueError, ["`b2`", "-0.5"]),
    "eps": (lambda: adamw(0.1, eps=-1.0), ValueError, ["`eps`", "-1.0"]),
    "eps_root": (lambda: adamw(0.1, eps_root="a"), ValueError, ["`eps_root`", "'a'"]),
    "mu_dtype": (lambda: adamw(0.1, mu_dtype="int32"), ValueError, ["`mu_dtype`", "int32"]),
    "mu_dtype that is none": (lambda: adamw(0.1, mu_dtype="real"), TypeError, ["`mu_dtype`", "'real'", "expected a dtype"]),
    "two clips": (lambda: adamw(0.1, clipnorm=1.0, clipvalue=1.0), ValueError, ["Only one of"]),
    "nonfinite": (lambda: adamw(0.1, nonfinite="ignore"), ValueError, ["`nonfinite`", "'ignore'"]),
    "window": (lambda: adamw(0.1, gradient_accumulation_steps=1), ValueError, ["`gradient_accumulation_steps`", "2"]),
    "unknown argument": (lambda: adamw(0.1, momentum=1.0), TypeError, ["momentum"]),
    "integer that is injected": (
        lambda: optax.inject_hyperparams(adamw)(0.1, gradient_accumulation_steps=2).init(jnp.ones(2)),
        TypeError,
        ["`gradient_accumulation_steps`", "static_args"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case):
    act, kind, expected = MISTAKES[case]
    with pytest.raises(kind) as caught:
        act()
    for part in expected:
        assert part in str(caught.value)
