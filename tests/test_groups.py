"""Groups: hyperparameters per variable, beside torch's groups, optax's transformations and a textbook."""

import copy
import json
import pickle
import re
import warnings

import numpy as np
import pytest
from helpers.libraries import jax, jnp, optax, torch
from helpers.oracle import Oracle
from numpy.testing import assert_allclose, assert_array_equal

from adamw_numba import AdamW, LossScaleOptimizer, interop, schedules
from adamw_numba.__main__ import main

SHAPES = [(3, 2), (5,), (1,), (2, 2), (4,), (), (7,), (2,), (3,), (6,)]


def arrays_of(seed, dtype="float64", count=None):
    random = np.random.default_rng(seed)
    return [np.asarray(random.standard_normal(shape)).astype(dtype) for shape in SHAPES[:count]]


def own_of(k):
    return {
        "learning_rate": 0.01 * (1 + k),
        "weight_decay": 0.1 * k,
        "beta_1": 0.95 - 0.05 * k,
        "beta_2": 0.999 - 0.01 * k,
        "epsilon": 1e-8 * 10**k,
    }


def grouped(optimizer, variables, count, own=own_of):
    """Every `count`-th variable in one group; the first group is the common one."""
    for k in range(1, count):
        optimizer.override(var_list=variables[k::count], **own(k))
    optimizer.build(variables)
    return optimizer


# Beside other libraries


@pytest.mark.parametrize("count", [2, 5, 10])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_groups_of_torch(library, dtype, count):
    """100 steps; rates are changed by hand and by a schedule in mid-run."""
    start = arrays_of(0, dtype)
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in start]
    names = {"learning_rate": "lr", "weight_decay": "weight_decay", "epsilon": "eps"}
    given = [
        {names[key]: value for key, value in own_of(k).items() if key in names}
        | {"betas": (own_of(k)["beta_1"], own_of(k)["beta_2"]), "params": theirs[k::count]}
        for k in range(count)
    ]
    reference = torch.optim.AdamW(given)
    ours = [x.copy() if library == "numpy" else torch.tensor(x) for x in start]
    optimizer = grouped(AdamW(**own_of(0), epsilon_mode="corrected"), ours, count)
    assert [len(group.names) for group in optimizer.groups] == [len(theirs[k::count]) for k in range(count)]
    for step in range(100):
        if step == 30:
            reference.param_groups[1]["lr"] = optimizer.groups[1].learning_rate = 0.003
        if step == 60:
            optimizer.groups[0].learning_rate = schedules.ExponentialDecay(0.02, 10, 0.5)
        if step >= 60:
            reference.param_groups[0]["lr"] = 0.02 * 0.5 ** (step / 10)
        gradients = arrays_of(1 + step, dtype)
        for parameter, g in zip(theirs, gradients, strict=True):
            parameter.grad = torch.tensor(g)
        reference.step()
        optimizer.apply([g if library == "numpy" else torch.tensor(g) for g in gradients])
    tolerance = 1e-12 if dtype == "float64" else 2e-6
    for one, other in zip(ours, theirs, strict=True):
        assert_allclose(one, other.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stateless", [False, True])
def test_multi_transform_of_optax(stateless, dtype):
    count = 3
    with jax.enable_x64(dtype == "float64"):
        start = {str(i): jnp.asarray(x) for i, x in enumerate(arrays_of(0, dtype, 6))}
        labels = {name: f"group {int(name) % count}" for name in start}
        each = {}
        for k in range(count):
            own = own_of(k)
            rate = own["learning_rate"]
            if k == 1:  # optax's own schedules count in float32

                def rate(count, first=own["learning_rate"]):
                    return first * 0.7 ** (jnp.asarray(count, dtype) / 20)

            each[f"group {k}"] = optax.adamw(
                rate, own["beta_1"], own["beta_2"], own["epsilon"], weight_decay=own["weight_decay"]
            )
        transformation = optax.multi_transform(each, labels)
        theirs, state = start, transformation.init(start)
        ours = {name: np.array(x) for name, x in start.items()}
        optimizer = AdamW(**own_of(0), epsilon_mode="corrected")
        for k in range(1, count):
            own = own_of(k)
            if k == 1:
                own["learning_rate"] = schedules.ExponentialDecay(own["learning_rate"], 20, 0.7)
            optimizer.override(var_names=[f"^{i}$" for i in range(k, 6, count)], **own)
        optimizer.build(start if stateless else ours)
        step_of = jax.jit(optimizer.stateless_apply)
        mine, own_state = start, optimizer.variables
        for step in range(60):
            gradients = {str(i): g for i, g in enumerate(arrays_of(1 + step, dtype, 6))}
            updates, state = transformation.update(gradients, state, theirs)
            theirs = optax.apply_updates(theirs, updates)
            if stateless:
                mine, own_state = step_of(own_state, {k: jnp.asarray(g) for k, g in gradients.items()}, mine)
            else:
                optimizer.apply(gradients)
        found = mine if stateless else ours
        tolerance = 1e-11 if dtype == "float64" else 2e-5 * 60 * 0.03
        for name in start:
            assert_allclose(found[name], theirs[name], rtol=0, atol=tolerance, err_msg=name)


# Beside the textbook


def random_options(random):
    """Options for all, and what groups have for themselves."""

    def choose(*values):
        return values[random.integers(len(values))]

    common = {
        "learning_rate": choose(0.01, schedules.CosineDecay(0.05, 9)),
        "weight_decay": choose(0.0, 0.1, schedules.InverseTimeDecay(0.2, 3, 0.5)),
        "beta_1": choose(0.0, 0.9),
        "beta_2": choose(0.9, 0.999),
        "epsilon": choose(1e-7, 1e-2),
        "amsgrad": choose(False, True),
        "use_ema": choose(False, True),
        "ema_momentum": 0.8,
        "ema_overwrite_frequency": choose(None, 3),
        "loss_scale_factor": choose(None, 4.0),
        "gradient_accumulation_steps": choose(None, 2),
        "decouple_lr": choose(False, True),
        "maximize": choose(False, True),
        "nesterov": choose(False, True),
        "epsilon_mode": choose("hat", "corrected"),
    }
    clip = choose(None, "clipnorm", "clipvalue", "global_clipnorm")
    if clip:
        common[clip] = 0.5
    groups = []
    for _ in range(random.integers(1, 4)):
        own = {}
        for key, values in {
            "learning_rate": (0.02, schedules.ExponentialDecay(0.03, 4, 0.7), lambda: 0.04),
            "learning_rate_multiplier": (0.1, 3.0),
            "weight_decay": (0.0, 0.3),
            "beta_1": (0.5, 0.8),
            "beta_2": (0.95,),
            "epsilon": (1e-3,),
        }.items():
            if random.random() < 0.5:
                own[key] = choose(*values)
        if clip != "global_clipnorm" and random.random() < 0.6:
            own[choose("clipnorm", "clipvalue")] = choose(None, 0.3)
        groups.append(own or {"weight_decay": 0.05})
    return common, groups


def oracle_of(common, groups, variables):
    """What is changed by a group replaces the common kind of clip."""
    own = [{}] + [dict(group) for group in groups]
    for each in own:
        clips = {key: each[key] for key in ("clipnorm", "clipvalue") if key in each}
        if any(value is not None for value in clips.values()):
            each |= {key: None for key in ("clipnorm", "clipvalue") if key not in clips}
    oracle = Oracle(**common, own={i: own[i % len(own)] for i in range(len(variables))})
    oracle.build(variables)
    return oracle


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict", "jax.jit"])
def test_random_combinations(library, seed):
    import array_api_strict

    common, groups = random_options(np.random.default_rng(seed))
    start = arrays_of(0, count=6)
    convert = {"numpy": np.array, "torch": torch.tensor, "array_api_strict": array_api_strict.asarray}
    with jax.enable_x64(True):
        make = convert.get(library, jnp.asarray)
        variables = [make(x.copy()) for x in start]
        optimizer = AdamW(**common)
        for k, own in enumerate(groups, 1):
            optimizer.override(var_names=[f"^{i}$" for i in range(k, 6, len(groups) + 1)], **own)
        optimizer.build(variables)
        oracle = oracle_of(common, groups, start)
        state, step_of = optimizer.variables, jax.jit(optimizer.stateless_apply)
        for step in range(8):
            gradients = arrays_of(1 + step, count=6)
            oracle.step(gradients)
            if library == "jax.jit":
                variables, state = step_of(state, [make(g) for g in gradients], variables)
            else:
                optimizer.apply([make(g) for g in gradients])
        for ours, theirs in zip(variables, oracle.variables, strict=True):
            assert_allclose(np.asarray(ours), theirs, rtol=1e-9, atol=1e-9)


# Other conventions by name


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True, "maximize": True}, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}]
)
def test_like_torch(options):
    start = arrays_of(0)
    theirs = [torch.nn.Parameter(torch.tensor(x)) for x in start]
    reference = torch.optim.AdamW(theirs, lr=0.05, foreach=False, **options)
    optimizer = AdamW.like_torch(lr=0.05, foreach=False, **options)
    ours = [x.copy() for x in start]
    optimizer.build(ours)
    for step in range(30):
        for parameter, g in zip(theirs, arrays_of(1 + step), strict=True):
            parameter.grad = torch.tensor(g)
        reference.step()
        optimizer.apply(arrays_of(1 + step))
    for one, other in zip(ours, theirs, strict=True):
        assert_allclose(one, other.detach().numpy(), rtol=1e-12, atol=1e-12)


MASK = {"a": {"kernel": True, "bias": False}, "b": False}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"mask": MASK, "weight_decay": 0.3},
        {"b1": 0.8, "b2": 0.9, "eps": 1e-2, "nesterov": True},
    ],
)
def test_like_optax(options):
    with jax.enable_x64(True):
        a, b, c = arrays_of(0, count=3)
        theirs = jax.tree.map(jnp.asarray, {"a": {"kernel": a, "bias": b}, "b": c})
        transformation = optax.adamw(0.05, **options)
        state = transformation.init(theirs)
        optimizer = AdamW.like_optax(0.05, **options)
        ours = {"a": {"kernel": a.copy(), "bias": b.copy()}, "b": c.copy()}
        optimizer.build(ours)
        for step in range(30):
            a, b, c = arrays_of(1 + step, count=3)
            gradients = {"a": {"kernel": a, "bias": b}, "b": c}
            updates, state = transformation.update(gradients, state, theirs)
            theirs = optax.apply_updates(theirs, updates)
            optimizer.apply(gradients)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert_allclose(one, other, rtol=1e-11, atol=1e-11)


def test_a_mask_of_optax_is_of_whole_paths():
    optimizer = AdamW.like_optax(
        0.1, mask={"b": False, "x": {"b": True, "y": {"a": False, "b": np.False_}}, "z": False}
    )
    names = ["b", "x/b", "x/y/a", "x/y/b", "x/y/bb", "z/1", "zz"]
    optimizer.build([(name, np.ones(1)) for name in names])
    assert optimizer.groups[1].names == ("b", "x/y/a", "x/y/b", "z/1")
    optimizer = AdamW.like_optax(0.1, mask={"b": False})
    optimizer.override(var_names=["x"], beta_1=0.5)
    again = AdamW.from_config(json.loads(json.dumps(optimizer.get_config())))
    for each in (optimizer, again):
        each.build([(name, np.ones(1)) for name in names[:2]])
        assert [group.weight_decay for group in each.groups] == [1e-4, 0.0, 1e-4]


def tensorflow_addons(variables, gradients_of, steps, rate, decay, excluded, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """Its arithmetic: the decay first, from the value before the update, by itself; then TensorFlow's Adam."""
    found, moments = [x.copy() for x in variables], [(np.zeros_like(x), np.zeros_like(x)) for x in variables]
    for t in range(1, steps + 1):
        for k, g in enumerate(gradients_of(t, found)):
            m, v = moments[k]
            m = m + (g - m) * (1 - beta_1)
            v = v + (g * g - v) * (1 - beta_2)
            moments[k] = m, v
            if k not in excluded:
                found[k] = found[k] - decay(t - 1) * found[k]
            alpha = rate(t - 1) * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
            found[k] = found[k] - alpha * m / (np.sqrt(v) + epsilon)
    return found


@pytest.mark.parametrize("scheduled", [False, True])
def test_like_tensorflow_addons(scheduled):
    start = arrays_of(0, count=4)
    shape = schedules.PiecewiseConstantDecay([10, 30], [1.0, 0.1, 0.01])
    rate, decay = (schedules.scaled(shape, factor) for factor in (0.1, 0.02)) if scheduled else (0.1, 0.02)
    optimizer = AdamW.like_tfa(decay, rate, exclude_from_weight_decay=["bias", "^layer/2$"])
    ours = {"layer": {str(i): x.copy() for i, x in enumerate(start[:3])}, "bias": start[3].copy()}
    optimizer.build(ours)
    for t in range(1, 51):
        gradients = arrays_of(t, count=4)
        optimizer.apply({"layer": {str(i): g for i, g in enumerate(gradients[:3])}, "bias": gradients[3]})
    functions = (rate, decay) if scheduled else (lambda step: 0.1, lambda step: 0.02)
    expected = tensorflow_addons(start, lambda t, x: arrays_of(t, count=4), 50, *functions, excluded={2, 3})
    for one, other in zip([*ours["layer"].values(), ours["bias"]], expected, strict=True):
        assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdamW.like_torch([np.ones(2)], lr=0.1), "`like_torch`.*`build`"),
        (lambda: AdamW.like_torch(lr=np.ones(2)), "`learning_rate`"),
        (lambda: AdamW.like_torch(epsilon_mode="hat"), "`epsilon_mode` is what `like_torch` decides"),
        (lambda: AdamW.like_tfa(0.1, decouple_lr=False), "`decouple_lr` is what `like_tfa` decides"),
        (lambda: AdamW.like_torch(betas=0.9), "`betas`.*pair"),
        (lambda: AdamW.like_torch(momentum=0.9), "momentum"),
        (lambda: AdamW.like_optax(0.1, eps_root=1e-8), "`eps_root`.*expected 0"),
        (lambda: AdamW.like_optax(0.1, mu_dtype="float16"), "`mu_dtype`"),
        (lambda: AdamW.like_optax(0.1, mask=lambda tree: tree), "`mask`.*returns"),
        (lambda: AdamW.like_optax(0.1, mask={"a": 1}), "`mask`.*booleans"),
        (lambda: AdamW.like_tfa(0.1, exclude_from_weight_decay="bias"), "list of strings"),
        (lambda: AdamW(epsilon_mode="raw"), "`epsilon_mode`.*'hat', 'corrected'"),
        (lambda: AdamW(nesterov=1), "`nesterov`"),
    ],
)
def test_calls_of_others_that_mean_nothing_here(make, words):
    with pytest.raises((TypeError, ValueError), match=words):
        make()


# Freezing


@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict"])
def test_frozen_and_thawed(library):
    """Later it is trained like an optimizer that begins then; meanwhile nothing of it moves, and it has no state."""
    import array_api_strict

    make = {"numpy": np.array, "torch": torch.tensor, "array_api_strict": array_api_strict.asarray}[library]
    start = arrays_of(0, count=4)
    variables = {str(i): make(x.copy()) for i, x in enumerate(start)}
    optimizer = AdamW(0.1, use_ema=True, amsgrad=True)
    optimizer.override(var_names=["^[02]$"], trainable=False, beta_1=0.8)
    optimizer.build(variables)
    others = AdamW(0.1, use_ema=True, amsgrad=True)
    others_variables = {name: make(start[int(name)].copy()) for name in "13"}
    others.build(others_variables)

    def step(with_frozen):
        gradients = {str(i): make(g) for i, g in enumerate(arrays_of(step_number[0], count=4))}
        step_number[0] += 1
        others.apply({name: gradients[name] for name in "13"})
        optimizer.apply(gradients | ({} if with_frozen else {"0": None, "2": None}))
        return gradients

    step_number = [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(5):
            step(with_frozen=k % 2 == 0)
    for i in (0, 2):
        assert_array_equal(np.asarray(variables[str(i)]), start[i])
    assert not [name for name in optimizer.variable_names if name.endswith(("/0", "/2"))]
    optimizer.group_of("0").trainable = True
    late = AdamW(0.1, beta_1=0.8, use_ema=True, amsgrad=True)
    late_variables = {name: make(start[int(name)].copy()) for name in "02"}
    late.build(late_variables)
    for _ in range(5):
        gradients = step(with_frozen=True)
        late.apply({name: gradients[name] for name in "02"})
    for name, expected in (others_variables | late_variables).items():
        assert_array_equal(np.asarray(variables[name]), np.asarray(expected), err_msg=name)
    averages = dict(zip(["1", "3", "0", "2"], [*others.averages, *late.averages], strict=True))
    for name in variables:
        assert_array_equal(np.asarray(optimizer.state[f"average/{name}"]), np.asarray(averages[name]))
    optimizer.group_of("0").trainable = False
    before = np.array(np.asarray(variables["0"]))
    step(with_frozen=True)
    assert_array_equal(np.asarray(variables["0"]), before)
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply({"0": make(start[0]), "1": None, "2": None, "3": None})


def test_gradients_of_the_trainable_alone():
    results = []
    for given in ("all", "by name", "by position"):
        variables = {name: np.ones(2) for name in "abc"}
        optimizer = AdamW(0.1)
        optimizer.override(var_names=["b"], trainable=False)
        optimizer.build(variables)
        g = {"a": np.array([1.0, 2.0]), "b": np.ones(2), "c": np.array([-1.0, 3.0])}
        for _ in range(3):
            if given == "by name":
                optimizer.apply({"c": g["c"], "a": g["a"]})
            else:
                optimizer.apply(g if given == "all" else [g["a"], g["c"]])
        results.append(np.concatenate(list(variables.values())))
        with pytest.raises(ValueError, match="grads"):
            optimizer.apply({"a": g["a"]})
        with pytest.raises(ValueError, match="grads"):
            optimizer.apply({"a": g["a"], "d": g["c"]})
    assert_array_equal(results[0], results[1])
    assert_array_equal(results[0], results[2])


def test_something_has_to_be_trainable():
    optimizer = AdamW()
    optimizer.override(var_names=["."], trainable=False)
    with pytest.raises(ValueError, match="no variable is trainable"):
        optimizer.build({"a": np.ones(2)})
    assert not optimizer.built
    optimizer = AdamW()
    optimizer.override(var_names=["."], beta_1=0.5)
    optimizer.build({"a": np.ones(2)})
    with pytest.raises(ValueError, match="no variable is trainable"):
        optimizer.groups[1].trainable = False
    assert optimizer.groups[1].trainable
    optimizer.apply({"a": np.ones(2)})


def test_frozen_variables_of_a_pure_function():
    start = {"a": jnp.ones(2), "b": jnp.ones(3)}
    optimizer = AdamW(0.1, global_clipnorm=0.5)
    optimizer.override(var_names=["a"], trainable=False)
    optimizer.build(start)
    gradients = {"a": jnp.full(2, 100.0), "b": jnp.ones(3)}
    new, _ = jax.jit(optimizer.stateless_apply)(optimizer.variables, gradients, start)
    alone = AdamW(0.1, global_clipnorm=0.5)
    alone.build({"b": jnp.ones(3)})
    expected, _ = alone.stateless_apply(alone.variables, {"b": gradients["b"]}, {"b": start["b"]})
    assert_array_equal(new["a"], start["a"])
    assert_allclose(new["b"], expected["b"], rtol=1e-6)


def test_averages_where_some_are_frozen():
    variables = {"a": np.ones(2), "b": np.ones(3)}
    optimizer = AdamW(0.1, use_ema=True)
    optimizer.override(var_names=["a"], trainable=False)
    optimizer.build(variables)
    gradients = {"a": np.ones(2), "b": np.ones(3)}
    optimizer.apply(gradients)
    with optimizer.averaged():
        assert_array_equal(variables["a"], 1)
        with pytest.raises(RuntimeError, match="averaged"):
            optimizer.groups[1].trainable = True
    optimizer.groups[1].trainable = True
    with optimizer.averaged():  # it has no average before its first update
        assert_array_equal(variables["a"], 1)
    optimizer.apply(gradients)
    with optimizer.averaged():
        assert_array_equal(variables["a"], optimizer.state["average/a"])


def test_the_state_of_what_is_frozen_now():
    store, whole = {}, AdamW()
    whole.build({"a": np.ones(2), "b": np.ones(3)})
    whole.save(store)
    optimizer = AdamW()
    optimizer.override(var_names=["a"], trainable=False)
    optimizer.build({"a": np.ones(2), "b": np.ones(3)})
    with pytest.raises(ValueError, match=r"state of \['a'\], which are not trainable"):
        optimizer.restore(store)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_what_is_frozen_may_not_change_with_the_rest(library):
    whole = np.ones(5) if library == "numpy" else torch.ones(5)
    optimizer = AdamW()
    optimizer.override(var_names=["a"], trainable=False)
    with pytest.raises(ValueError, match=r"'a' and 'b' share memory.*not trainable"):
        optimizer.build({"a": whole[:3], "b": whole[2:]})
    optimizer.build({"a": whole[:3], "b": whole[3:]})


def test_what_was_frozen_when_it_was_saved():
    store, frozen = {}, AdamW()
    frozen.override(var_names=["a"], trainable=False)
    frozen.build({"a": np.ones(2), "b": np.ones(3)})
    frozen.save(store)
    optimizer = AdamW()
    optimizer.build({"a": np.ones(2), "b": np.ones(3)})
    with pytest.raises(ValueError, match=r"no state of 'a', which was not trainable.*trainable=False"):
        optimizer.restore(store)


def test_groups_of_torch_come_back_in_their_order():
    """Also where the first of them has no decay, and all have the same size."""
    layers = [torch.nn.Parameter(torch.tensor(x)) for x in (arrays_of(0)[0], arrays_of(1)[0], arrays_of(2)[0])]
    theirs = torch.optim.AdamW(
        [
            {"params": layers[:1], "weight_decay": 0.0, "lr": 0.1},
            {"params": layers[1:2], "lr": 0.2},
            {"params": layers[2:], "lr": 0.3, "betas": (0.8, 0.9)},
        ]
    )
    for parameter, g in zip(layers, arrays_of(3, count=3), strict=True):
        parameter.grad = torch.ones_like(parameter) * float(g.ravel()[0])
    theirs.step()
    expected = copy.deepcopy(theirs.state_dict())
    theirs.load_state_dict(interop.to_torch(interop.from_torch(theirs.state_dict(), layers)))
    for key in ("lr", "weight_decay", "betas", "params"):
        found = [group[key] for group in theirs.state_dict()["param_groups"]]
        assert found == [group[key] for group in expected["param_groups"]]
    for number, own in theirs.state_dict()["state"].items():
        assert_array_equal(own["exp_avg"], expected["state"][number]["exp_avg"])


# What is refused, and leaves all as it was


def built(**options):
    optimizer = AdamW(0.1, **options)
    optimizer.override(var_names=["^a$"], weight_decay=0.5)
    optimizer.build({"a": np.ones(2), "b": np.ones(3)})
    return optimizer


def setting(name, value):
    return lambda optimizer: setattr(optimizer.group_of("a"), name, value)


REFUSED = {
    "a rate below 0": (setting("learning_rate", -1.0), r"group of \['a'\].*`learning_rate`.*-1"),
    "a rate that is a tensor": (setting("learning_rate", np.ones(2)), r"group of \['a'\].*shape \(2,\)"),
    "a multiplier": (setting("learning_rate_multiplier", np.inf), "`learning_rate_multiplier`.*finite"),
    "beta": (setting("beta_2", 1.0), r"`beta_2`.*\[0, 1\)"),
    "epsilon": (setting("epsilon", 0), "`epsilon`.*> 0"),
    "trainable": (setting("trainable", 1), "`trainable`.*True or False"),
    "a clip of text": (setting("clipnorm", "x"), "`clipnorm`"),
    "no such attribute": (setting("lr", 0.1), "'lr'.*learning_rate"),
    "names": (setting("names", ("c",)), "'names'"),
    "an override after build": (
        lambda o: o.override(var_names=["b"], beta_1=0.5),
        "before the optimizer is built.*groups",
    ),
    "an exclusion after build": (
        lambda o: o.exclude_from_weight_decay(var_names=["b"]),
        "before the optimizer is built",
    ),
    "the common group frozen": (lambda o: setattr(o.groups[0], "trainable", False), "common group"),
    "an array for a name": (lambda o: o.group_of(np.ones(2)), "no variable"),
    "a name that is not there": (lambda o: o.group_of("c"), r"no variable 'c'.*\['a', 'b'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    act, words = REFUSED[case]
    optimizer = built()
    before = json.dumps(optimizer.get_config())
    with pytest.raises((TypeError, ValueError, KeyError, AttributeError), match=words):
        act(optimizer)
    assert json.dumps(optimizer.get_config()) == before
    assert optimizer.group_of("a").weight_decay == 0.5


OVERRIDES = {
    "nothing": ({"var_names": ["a"]}, "gives no hyperparameter"),
    "for nobody": ({"beta_1": 0.5}, "for no variables"),
    "for an empty list": ({"var_names": [], "beta_1": 0.5}, "for no variables"),
    "names as arrays": ({"var_list": ["a"], "beta_1": 0.5}, "`var_names"),
    "no expression": ({"var_names": ["("], "beta_1": 0.5}, "regular expression"),
    "a text": ({"var_names": "bias", "beta_1": 0.5}, "list of strings"),
    "out of range": ({"var_names": ["a"], "weight_decay": -1}, "`weight_decay`"),
    "two clips": ({"var_names": ["a"], "clipnorm": 1.0, "clipvalue": 1.0}, "Only one"),
    "a rate that is a list": ({"var_names": ["a"], "learning_rate": [0.1]}, "`learning_rate`"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides_that_are_refused(case):
    given, words = OVERRIDES[case]
    optimizer = AdamW()
    with pytest.raises((TypeError, ValueError), match=words):
        optimizer.override(**given)
    assert optimizer.hyper.overrides == []


def test_a_clip_of_all_gradients_excludes_those_of_groups():
    optimizer = AdamW(global_clipnorm=1.0)
    with pytest.raises(ValueError, match="`global_clipnorm` clips all"):
        optimizer.override(var_names=["a"], clipnorm=1.0)
    optimizer.override(var_names=["a"], clipnorm=None)
    optimizer = AdamW()
    optimizer.override(var_names=["a"], clipvalue=1.0)
    with pytest.raises(ValueError, match="a group clips by itself"):
        optimizer.global_clipnorm = 1.0
    optimizer.build({"a": np.ones(2), "b": np.ones(2)})
    with pytest.raises(ValueError, match="a group clips by itself"):
        optimizer.global_clipnorm = 1.0
    optimizer.groups[1].clipvalue = None
    optimizer.global_clipnorm = 1.0


def test_the_last_kind_of_clip_holds():
    optimizer = AdamW(clipvalue=0.9)
    optimizer.override(var_names=["[ab]"], clipnorm=1.0)
    optimizer.override(var_names=["b"], clipvalue=0.5)
    optimizer.override(var_names=["c"], clipvalue=None)
    optimizer.build({name: np.ones(2) for name in "abcd"})
    clips = {name: (optimizer.group_of(name).clipnorm, optimizer.group_of(name).clipvalue) for name in "abcd"}
    assert clips == {"a": (1.0, None), "b": (None, 0.5), "c": (None, None), "d": (None, 0.9)}
    optimizer.group_of("a").clipvalue = 0.25
    assert (optimizer.group_of("a").clipnorm, optimizer.group_of("a").clipvalue) == (None, 0.25)
    again = AdamW.from_config(optimizer.get_config())
    again.build({name: np.ones(2) for name in "abcd"})
    assert (again.group_of("a").clipnorm, again.group_of("a").clipvalue) == (None, 0.25)


def test_the_command_line_tells_of_groups(tmp_path, capsys):
    optimizer, _ = changed_by_hand()
    optimizer.save(tmp_path / "state.npz")
    assert main(["inspect", str(tmp_path / "state.npz")]) == 0
    assert "group of ['a']: {" in capsys.readouterr().out


def test_what_matches_nothing_is_warned_of_by_name():
    optimizer = AdamW()
    optimizer.override(var_names=["bias", "nowhere"], var_list=[np.ones(2)], weight_decay=0.1)
    with pytest.warns(
        UserWarning, match=re.escape("override: each of ['number 0 of `var_list`', 'nowhere'] matches none")
    ):
        optimizer.build({"bias": np.ones(2)})


# What groups are


def test_groups_in_the_order_of_their_first_variables():
    optimizer = AdamW(0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.override(var_names=["^head"], learning_rate_multiplier=10.0)
    optimizer.override(var_names=["scale", "bias"], beta_1=0.5)
    optimizer.override(var_names=["scale"], beta_1=0.6, weight_decay=0)
    names = ["body/bias", "body/kernel", "body/scale", "head/bias", "head/kernel"]
    optimizer.build([(name, np.ones(2)) for name in names])
    found = [
        (group.names, group.weight_decay, group.beta_1, group.learning_rate_multiplier) for group in optimizer.groups
    ]
    assert found == [
        (("body/kernel",), 0.004, 0.9, 1.0),
        (("body/bias",), 0.0, 0.5, 1.0),
        (("body/scale",), 0.0, 0.6, 1.0),
        (("head/bias",), 0.0, 0.5, 10.0),
        (("head/kernel",), 0.004, 0.9, 10.0),
    ]
    assert optimizer.group_of("head/bias") is optimizer.groups[3]
    optimizer.learning_rate = 0.2
    optimizer.apply([np.ones(2)] * 5)
    assert optimizer.last_step.learning_rates == (0.2, 0.2, 0.2, 2.0, 2.0)
    assert "learning_rates='0.2, 0.2, 0.2, 2, 2'" in repr(optimizer)
    optimizer.groups[0].weight_decay = 0.3
    assert (optimizer.weight_decay, optimizer.groups[4].weight_decay) == (0.3, 0.3)


def test_the_common_group_may_be_empty():
    optimizer = AdamW()
    optimizer.override(var_names=["."], clipnorm=1.0)
    optimizer.build([np.ones(2)])
    assert [group.names for group in optimizer.groups] == [(), ("0",)]
    assert (optimizer.groups[1].clipnorm, optimizer.groups[0].clipnorm) == (1.0, None)


def test_update_step_has_the_hyperparameters_of_the_group():
    """Adam alone for one variable."""
    variables = [np.ones(3), np.ones(3)]
    optimizer = AdamW(0.1)
    optimizer.override(var_list=variables[1:], beta_1=0.5, beta_2=0.8, epsilon=0.1)
    optimizer.build(variables)
    alone = np.ones(3)
    expected = AdamW(0.1, weight_decay=0, beta_1=0.5, beta_2=0.8, epsilon=0.1)
    expected.build([alone])
    g = np.array([1.0, -2.0, 0.1])
    optimizer.update_step(g, variables[1], 0.1)
    expected.apply([g])
    assert_array_equal(variables[1], alone)


# Saving


def changed_by_hand(make_store=None):
    variables = {"a": arrays_of(0)[0], "b": arrays_of(0)[1], "c": arrays_of(0)[3], "d": arrays_of(0)[6]}
    optimizer = AdamW(schedules.CosineDecay(0.1, 50), amsgrad=True)
    optimizer.exclude_from_weight_decay(var_names=["b"])
    optimizer.override(var_names=["a"], learning_rate=schedules.scaled(schedules.CosineDecay(0.1, 30), 2), beta_1=0.7)
    optimizer.override(var_list=[variables["c"]], trainable=False)
    optimizer.override(var_names=["d"], trainable=False, clipnorm=0.5)
    optimizer.build(variables)
    for step in range(4):
        optimizer.apply(gradients_at(step))
    optimizer.group_of("c").trainable = True
    optimizer.group_of("b").weight_decay = 0.01
    optimizer.group_of("a").learning_rate_multiplier = 0.5
    for step in range(4, 7):
        optimizer.apply(gradients_at(step))
    return optimizer, variables


def gradients_at(step):
    each = arrays_of(10 + step)
    return {"a": each[0], "b": each[1], "c": each[3], "d": each[6]}


def goes_on_alike(one, its, other, others):
    for step in range(7, 12):
        one.apply(gradients_at(step))
        other.apply(gradients_at(step))
    for name in its:
        assert_array_equal(its[name], others[name], err_msg=name)
    assert one.variable_names == other.variable_names
    for ours, theirs in zip(one.variables, other.variables, strict=True):
        assert_array_equal(ours, theirs)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "h5", "zarr", "zarr.zip", "mapping"])
def test_saved_and_loaded(suffix, tmp_path):
    optimizer, variables = changed_by_hand()
    target = {} if suffix == "mapping" else tmp_path / f"state.{suffix}"
    optimizer.save(target)
    copies = {name: x.copy() for name, x in variables.items()}
    loaded = AdamW.load(target, copies)
    assert [group.names for group in loaded.groups] == [group.names for group in optimizer.groups]
    assert [group.started for group in loaded.groups] == [group.started for group in optimizer.groups]
    goes_on_alike(optimizer, variables, loaded, copies)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(copied):
    optimizer, variables = changed_by_hand()
    other = copied(optimizer)
    copies = dict(zip(variables, other.trainable_variables, strict=True))
    for name, x in copies.items():
        assert x is not variables[name]
    assert all(v is copies[n] for group in other.groups for n, v in zip(group.names, group.variables, strict=True))
    goes_on_alike(optimizer, variables, other, copies)
    other.groups[1].weight_decay = 0.7
    assert optimizer.groups[1].weight_decay != 0.7


def test_restored_and_warned_of():
    optimizer, variables = changed_by_hand()
    store = {}
    optimizer.save(store)
    again, copies = changed_by_hand()
    for step in range(20, 23):
        again.apply(gradients_at(step))
    for name, x in variables.items():
        copies[name][...] = x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.restore(store)
    goes_on_alike(optimizer, variables, again, copies)
    again.group_of("b").weight_decay = 0.9
    with pytest.warns(UserWarning, match=r"\['b'\] have .*0\.9.* and had .*0\.01"):
        again.restore(store)


def own_values(optimizer):
    """What each group has for itself; schedules are equal by what they hold."""
    return [
        (group.names, {key: getattr(value, "function", value) for key, value in (group.own or {}).items()})
        for group in optimizer.groups
    ]


def test_groups_of_torch_are_saved():
    """They were given by positions, arrays of `var_list` by themselves, and some of these were none of the variables."""
    layers = [torch.nn.Parameter(torch.tensor(x)) for x in arrays_of(0, count=2)]
    theirs = torch.optim.AdamW([{"params": layers[:1], "lr": 0.1}, {"params": layers[1:], "lr": 0.2}])
    for parameter, g in zip(layers, arrays_of(1, count=2), strict=True):
        parameter.grad = torch.tensor(g)
    theirs.step()
    start = [x.detach().clone() for x in layers]
    optimizer, store = interop.from_torch(theirs.state_dict(), start), {}
    optimizer.save(store)
    copies = [x.clone() for x in start]
    loaded = AdamW.load(store, copies)
    assert own_values(loaded) == own_values(optimizer)
    for each in (optimizer, loaded):
        each.apply([torch.tensor(g) for g in arrays_of(2, count=2)])
    for ours, others in zip(start, copies, strict=True):
        assert_array_equal(ours, others)
    again = pickle.loads(pickle.dumps(loaded))
    assert again.get_config() == loaded.get_config()


def test_arrays_that_are_none_of_the_variables():
    variables = {"a": np.ones(2), "b": np.ones(3)}
    optimizer, store = AdamW(), {}
    optimizer.override(var_list=[np.ones(2)], beta_1=0.5)
    optimizer.override(var_list=[variables["b"]], beta_1=0.6)
    with pytest.raises(ValueError, match="not known before `build`"):
        optimizer.get_config()
    with pytest.warns(UserWarning, match="number 0 of `var_list`"):
        optimizer.build(variables)
    assert optimizer.get_config()["overrides"] == [{"names": ["b"], "beta_1": 0.6}]
    optimizer.save(store)
    assert AdamW.load(store, variables).group_of("b").beta_1 == 0.6


def test_a_config_makes_the_same_groups():
    optimizer, variables = changed_by_hand()
    config = json.loads(json.dumps(optimizer.get_config()))
    other = AdamW.from_config(config)
    other.build({name: x.copy() for name, x in variables.items()})
    assert own_values(other) == own_values(optimizer)
    assert json.loads(json.dumps(other.get_config()))["overrides"] == config["overrides"]


def test_without_groups_a_config_is_keras_and_a_file_of_the_first_version():
    optimizer = AdamW()
    optimizer.exclude_from_weight_decay(var_names=["b"])
    optimizer.build({"a": np.ones(2), "b": np.ones(2)})
    assert "overrides" not in optimizer.get_config()
    store = {}
    optimizer.save(store)
    document = json.loads(bytes(next(np.asarray(value) for key, value in store.items() if "manifest" in key.lower())))
    assert document["version"] == 1
    assert "groups" not in document


def test_a_loss_scale_around_groups():
    variables = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}
    optimizer = LossScaleOptimizer(AdamW(0.1), initial_scale=4.0)
    optimizer.inner_optimizer.override(var_names=["a"], learning_rate_multiplier=0.5)
    optimizer.build(variables)
    gradients = {"a": np.full(2, 4, np.float32), "b": np.full(3, 4, np.float32)}
    optimizer.apply(gradients)
    store = {}
    optimizer.save(store)
    copies = {name: x.copy() for name, x in variables.items()}
    loaded = LossScaleOptimizer.load(store, copies)
    optimizer.apply(gradients)
    loaded.apply(gradients)
    assert_array_equal(variables["a"], copies["a"])
    assert float(1 - variables["a"][0]) == pytest.approx(float(1 - variables["b"][0]) / 2, rel=1e-2)
