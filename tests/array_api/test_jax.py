"""`stateless_apply` as JAX programs use it: compiled once, on several devices, under every transformation."""

import dataclasses
from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from adamw_numba import AdamW, LossScaleOptimizer, minimize

jax = pytest.importorskip("jax")
jnp, P = jax.numpy, jax.sharding.PartitionSpec
OPTIONS = {
    "plain": {},
    "everything": {
        "amsgrad": True,
        "use_ema": True,
        "global_clipnorm": 1.0,
        "gradient_accumulation_steps": 2,
        "nonfinite": "skip",
    },
    "accumulated": {"gradient_accumulation_steps": 2},
    "a decay that is a function": {"weight_decay": lambda step: 0.01},
}


class Layer(NamedTuple):
    kernel: Any
    bias: Any = None


@jax.tree_util.register_pytree_node_class
class Module:
    """A container that only JAX knows how to take apart, and that says nothing of its keys."""

    def __init__(self, *parts):
        self.parts = parts

    def tree_flatten(self):
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)


@jax.tree_util.register_pytree_with_keys_class
class Param:
    """A container of one array, which acts as that array, as the variables of flax do."""

    def __init__(self, value):
        self.value = value

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("value"), self.value)], None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)

    def __array_namespace__(self, api_version=None):
        return jnp

    def __getattr__(self, name):
        return getattr(vars(self)["value"], name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    first: Any
    second: Any
    name: str = dataclasses.field(default="mine", metadata={"static": True})


def arrays():
    return jnp.arange(8.0).reshape(4, 2) / 4, jnp.ones(2)


# Containers by what they are made of, and the names of the arrays in the order of the state
CONTAINERS = {
    "an array": (lambda w, b: w, ["0"]),
    "dict": (lambda w, b: {"w": w, "b": b}, ["b", "w"]),
    "OrderedDict": (lambda w, b: OrderedDict(w=w, b=b), ["w", "b"]),
    "tuple": (lambda w, b: (w, b), ["0", "1"]),
    "named tuple": (lambda w, b: Layer(w, b), ["kernel", "bias"]),
    "None": (lambda w, b: {"w": w, "rest": None, "layers": [Layer(b)]}, ["layers/0/kernel", "w"]),
    "class": (lambda w, b: Module(w, {"b": b}), ["0", "1/b"]),
    "what acts as an array": (lambda w, b: {"w": Param(w), "b": [Param(b)]}, ["b/0/value", "w/value"]),
    "dataclass": (lambda w, b: Model(Module(w, None), b), ["first/0", "second"]),
}


def loss(params):
    return sum(jnp.sum((leaf - 2) ** 2) for leaf in jax.tree.leaves(params))


def step_of(optimizer):
    def step(params, state):
        return optimizer.stateless_apply(state, jax.grad(loss)(params), params)

    return step


def reference(leaves, steps, **options):
    """The same steps of NumPy arrays, by the compiled kernels."""
    leaves = [np.array(leaf) for leaf in leaves]
    optimizer = AdamW(0.1, **options)
    optimizer.build(leaves)
    for _ in range(steps):
        optimizer.apply([2 * (leaf - 2) for leaf in leaves])
    return leaves


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_inside_a_scan(name):
    make, names = CONTAINERS[name]
    params = make(*arrays())
    optimizer = AdamW(0.1)
    optimizer.build(params)
    assert [n.removeprefix("momentum/") for n in optimizer.variable_names if n.startswith("momentum/")] == names
    step = step_of(optimizer)
    (new, _), _ = jax.lax.scan(lambda carry, _: (step(*carry), None), (params, optimizer.variables), None, length=5)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert_close(jax.tree.leaves(new), reference(jax.tree.leaves(params), 5))


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_in_minimize(name):
    params = CONTAINERS[name][0](*arrays())
    result = minimize(loss, params, jac="jax", learning_rate=0.1, maxiter=4)
    assert jax.tree.structure(result.x) == jax.tree.structure(params)
    assert float(result.fun) < float(loss(params))


@pytest.mark.parametrize("name", CONTAINERS)
def test_gradients_through_steps(name):
    """The loss after three steps, differentiated with respect to where they start, as finite differences have it."""
    make = CONTAINERS[name][0]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), make(*arrays()))
        optimizer = AdamW(0.1)
        optimizer.build(params)
        step = step_of(optimizer)

        def after(params):
            state = optimizer.variables
            for _ in range(3):
                params, state = step(params, state)
            return loss(params)

        gradient = jax.grad(after)(params)
        assert jax.tree.structure(gradient) == jax.tree.structure(params)
        direction = jax.tree.map(
            lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params
        )
        there, back = (jax.tree.map(lambda p, d, h=h: p + h * d, params, direction) for h in (1e-6, -1e-6))
        slope = (after(there) - after(back)) / 2e-6
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-6)


@pytest.mark.parametrize("name", CONTAINERS)
def test_many_at_once(name):
    """`vmap` over both the arrays and their state: each row as if it were alone."""
    params = CONTAINERS[name][0](*arrays())
    optimizer = AdamW(0.1)
    optimizer.build(params)
    rows = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1, leaf * 3]), params)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), optimizer.variables)
    step = jax.jit(jax.vmap(step_of(optimizer)))
    for _ in range(4):
        rows, state = step(rows, state)
    assert jax.tree.structure(rows) == jax.tree.structure(params)
    for k, change in enumerate([lambda leaf: leaf, lambda leaf: leaf + 1, lambda leaf: leaf * 3]):
        own = [leaf[k] for leaf in jax.tree.leaves(rows)]
        assert_close(own, reference(map(change, jax.tree.leaves(params)), 4))


# Compiled once


def placed(params, where):
    devices = jax.devices()
    if where == "anywhere":
        return params
    if where == "a device":
        return jax.device_put(params, devices[1])
    # The specs as JAX writes them itself, for those of what a step gives back are compared with them.
    if where == "divided by types":
        mesh, specs = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Explicit,)), {"w": P("x", None), "b": P(None)}
    else:
        mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
        specs = {"w": P("x") if where == "divided" else P(), "b": P()}
    return {key: jax.device_put(params[key], jax.sharding.NamedSharding(mesh, specs[key])) for key in params}


@pytest.mark.parametrize("where", ["anywhere", "a device", "divided", "divided by types", "copied to all"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_compiled_once(name, where):
    w, b = arrays()
    params = placed({"w": w, "b": b}, where)
    optimizer = AdamW(0.1, **OPTIONS[name])
    optimizer.build(params)
    step, state = jax.jit(step_of(optimizer)), optimizer.variables
    for key in params:
        for kind in ("momentum", "velocity"):
            own = state[optimizer.variable_names.index(f"{kind}/{key}")]
            assert (own.sharding, own.committed) == (params[key].sharding, params[key].committed)
    before = params
    for _ in range(4):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert params["w"].sharding == before["w"].sharding
    assert_close([params["w"], params["b"]], reference([before["w"], before["b"]], 4, **OPTIONS[name]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_of_16_bits_is_compiled_once(dtype):
    params = [leaf.astype(dtype) for leaf in arrays()]
    optimizer = AdamW(0.1)
    optimizer.build(params)
    step, state = jax.jit(step_of(optimizer)), optimizer.variables
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1


def test_a_step_with_a_loss_scale_is_compiled_once():
    params = list(arrays())
    optimizer = LossScaleOptimizer(AdamW(0.1), initial_scale=8.0)
    optimizer.build(params)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: optimizer.scale_loss(loss(p), state))(params)
        return optimizer.stateless_apply(state, gradients, params)

    before, state = params, optimizer.variables
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert_close(params, reference(before, 3))


def test_arrays_that_are_moved_to_another_device():
    """The state was not moved, and is not bound to the device where it was made."""
    params = list(arrays())
    optimizer = AdamW(0.1)
    optimizer.build(params)
    step = jax.jit(step_of(optimizer))
    moved, state = jax.device_put(params, jax.devices()[2]), optimizer.variables
    for _ in range(3):
        moved, state = step(moved, state)
    assert {leaf.device for leaf in moved + state} == {jax.devices()[2]}
    assert_close(moved, reference(params, 3))


def test_in_the_middle_of_a_run_all_is_moved():
    params = list(arrays())
    optimizer = AdamW(0.1)
    optimizer.build(params)
    step = jax.jit(step_of(optimizer))
    moved = step(params, optimizer.variables)
    for device in jax.devices()[1:3]:
        moved = step(*jax.device_put(moved, device))
    assert_close(moved[0], reference(params, 3))


@pytest.mark.parametrize("name", OPTIONS)
def test_built_under_a_trace(name):
    """The state has the same order, shapes and values as that of arrays, and may be traced again."""
    w, b = arrays()
    params = {"w": w, "b": b}
    optimizer = AdamW(0.1, **OPTIONS[name])

    def init(params):
        optimizer.build(params)
        return optimizer.variables

    shapes = jax.eval_shape(init, params)
    state = jax.jit(init)(params)
    assert [(leaf.shape, leaf.dtype) for leaf in shapes] == [(leaf.shape, leaf.dtype) for leaf in state]
    eager = AdamW(0.1, **OPTIONS[name])
    eager.build(params)
    assert optimizer.variable_names == eager.variable_names
    for one, other in zip(state, eager.variables, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)
    step = jax.jit(step_of(optimizer))
    for _ in range(4):
        params, state = step(params, state)
    assert_close([params["w"], params["b"]], reference([w, b], 4, **OPTIONS[name]))


def test_the_state_is_divided_where_it_is_made():
    w, b = arrays()
    params = placed({"w": w, "b": b}, "divided")
    optimizer = AdamW(0.1)

    def init(params):
        optimizer.build(params)
        return optimizer.variables

    state = jax.jit(init)(params)
    named = dict(zip(optimizer.variable_names, state, strict=True))
    new, _ = jax.jit(step_of(optimizer))(params, state)
    assert named["momentum/w"].shape == (4, 2)
    assert_close([new["w"], new["b"]], reference([w, b], 1))


def test_donated_buffers():
    params = list(arrays())
    optimizer = AdamW(0.1)
    optimizer.build(params)
    step = jax.jit(step_of(optimizer), donate_argnums=(0, 1))
    start, state = [np.array(leaf) for leaf in params], optimizer.variables
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert optimizer.variables[2].is_deleted()
    assert_close(params, reference(start, 3))
    optimizer.set_weights(state)
    assert optimizer.iterations == 3
    np.testing.assert_array_equal(optimizer.variables[2], state[2])


def test_each_device_steps_by_itself():
    """`shard_map`: gradients are averaged by the program, and every device takes the same step."""
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
    w, b = arrays()
    optimizer = AdamW(0.1, global_clipnorm=1.0)
    optimizer.build([w, b])
    data = jnp.arange(8.0)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=(P(), P()))
    def step(params, state, data):
        def local(params):
            return jnp.mean(data) * loss(params)

        # Outside of the gradient the parameters vary from device to device, so that each has a gradient of its own.
        gradients = jax.grad(local)(jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "x", to="varying"), params))
        return optimizer.stateless_apply(state, jax.lax.pmean(gradients, "x"), params)

    params, state = [w, b], optimizer.variables
    for _ in range(3):
        params, state = step(params, state, data)
    scaled = [np.array(w), np.array(b)]
    expected = AdamW(0.1, global_clipnorm=1.0)
    expected.build(scaled)
    for _ in range(3):
        expected.apply([3.5 * 2 * (leaf - 2) for leaf in scaled])
    assert_close(params, scaled)


# What goes wrong


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w, b: {"w": w}, "lacks .'b'"),
        (lambda w, b: {"w": w, "b": b, "c": b}, "'c'"),
        (lambda w, b: {"w": b, "b": b}, "'w'.*shape"),
        (lambda w, b: {"w": np.asarray(w), "b": "b"}, "'b'.*type str"),
    ],
    ids=["missing", "unknown", "shape", "text"],
)
def test_wrong_trees_name_the_path(spoil, message):
    w, b = arrays()
    optimizer = AdamW(0.1)
    optimizer.build({"w": w, "b": b})
    for arguments in ((spoil(w, b), {"w": w, "b": b}), ({"w": w, "b": b}, spoil(w, b))):
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.stateless_apply(optimizer.variables, *arguments)


def test_the_order_of_another_librarys_state_is_the_users():
    """What torch has saved goes by position: the order of a dict as it was written, not the sorted one of JAX."""
    torch = pytest.importorskip("torch")
    from adamw_numba.interop import from_torch

    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(2))]
    theirs = torch.optim.AdamW(params)
    for k, param in enumerate(params):
        param.grad = torch.full((2,), k + 1.0)
    theirs.step()
    optimizer = from_torch(theirs.state_dict(), {"w": jnp.ones(2), "b": jnp.zeros(2)})
    np.testing.assert_allclose(optimizer.state["momentum/w"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(optimizer.state["momentum/b"], 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"global_clipnorm": 1.0}, {"nonfinite": "skip"}, {"global_clipnorm": 1.0, "nonfinite": "skip"}, {"clipnorm": 1.0}],
    ids=str,
)
def test_compiled_code_grows_with_the_number_of_variables(options):
    """XLA repeats a chain of scalars wherever it is used: what all norms lead to must not be repeated for each variable."""

    def size(count):
        params = {f"w{i}": jnp.ones(3) for i in range(count)}
        optimizer = AdamW(0.1, **options)
        optimizer.build(params)
        step = jax.jit(optimizer.stateless_apply)
        return len(step.lower(optimizer.variables, params, params).compile().as_text())

    assert size(80) < 5 * size(20)
