"""State exchanged with real Keras, torch and optax: both go on to the same numbers."""

import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch

from adamw_numba import AdamW, LossScaleOptimizer, arrays, interop

SHAPES = [(3, 2), (2,), (2, 4), (4,)]
KERAS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "average": {"use_ema": True, "ema_momentum": 0.9},
    "accumulation": {"gradient_accumulation_steps": 3},
    "all": {"amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2, "global_clipnorm": 0.5},
    "schedule": {"learning_rate": keras.optimizers.schedules.CosineDecay(0.1, 10)},
}


def gradients_of(step, shapes=SHAPES):
    random = np.random.default_rng(step)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def model_of(options, dtype="float32", scaled=False):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, dtype=dtype), keras.layers.Dense(4, dtype=dtype)]
    )
    optimizer = keras.optimizers.AdamW(**{"learning_rate": 0.1} | options)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)
    model.compile(optimizer=optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    return model


def keras_steps(model, first, last):
    for step in range(first, last):
        variables = model.trainable_variables
        model.optimizer.apply(
            [torch.tensor(g).to(v.value.dtype) for g, v in zip(gradients_of(step), variables, strict=True)]
        )


def ours_steps(optimizer, variables, first, last):
    for step in range(first, last):
        optimizer.apply([g.astype(v.dtype) for g, v in zip(gradients_of(step), variables, strict=True)])


def values(model):
    return [v.value.detach().float().numpy().copy() for v in model.trainable_variables]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("form", ["keras file", "weights", "object"])
@pytest.mark.parametrize("options", KERAS.values(), ids=KERAS)
def test_from_keras_and_on(options, form, scaled, tmp_path):
    model = model_of(options, scaled=scaled)
    keras_steps(model, 0, 4)
    variables = values(model)
    config = None
    if form == "keras file":
        source = tmp_path / "model.keras"
        model.save(source)
    elif form == "weights":
        source, config = tmp_path / "model.weights.h5", model.optimizer.get_config()
        model.save_weights(source)
    else:
        source = model.optimizer
    optimizer = interop.from_keras(source, variables, config)
    assert isinstance(optimizer, LossScaleOptimizer) == scaled
    ours_steps(optimizer, variables, 4, 9)
    keras_steps(model, 4, 9)
    # Averages: ours move once per update, Keras's on every micro-step, which the variables do not see.
    for ours, theirs in zip(variables, values(model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", KERAS.values(), ids=KERAS)
def test_to_keras_and_on(options, tmp_path):
    model = model_of(options)
    keras_steps(model, 0, 4)
    model.save_weights(tmp_path / "before.weights.h5")
    variables = values(model)
    optimizer = interop.from_keras(model.optimizer, variables)
    ours_steps(optimizer, variables, 4, 7)
    fresh = {}
    for form in ("file", "object", "mapping"):
        other = model_of(options)
        if form == "file":
            interop.to_keras(optimizer, tmp_path / "after.weights.h5", template=tmp_path / "before.weights.h5")
            other.load_weights(tmp_path / "after.weights.h5")
        elif form == "object":
            interop.to_keras(optimizer, other.optimizer)
        else:
            store = {}
            interop.to_keras(optimizer, store)
            other.optimizer.load_own_variables(store)
        for variable, value in zip(other.trainable_variables, variables, strict=True):
            variable.assign(value)
        assert int(other.optimizer._iterations) == 7
        keras_steps(other, 7, 10)
        fresh[form] = values(other)
    ours_steps(optimizer, variables, 7, 10)
    for theirs in fresh.values():
        for ours, value in zip(variables, theirs, strict=True):
            np.testing.assert_allclose(ours, value, rtol=0, atol=2e-5)


def test_bfloat16_of_keras(tmp_path):
    model = model_of({"beta_2": 0.9}, "bfloat16")
    keras_steps(model, 0, 3)
    model.save(tmp_path / "m.keras")
    variables = [torch.tensor(v).to(torch.bfloat16) for v in values(model)]
    optimizer = interop.from_keras(tmp_path / "m.keras", variables)
    for index, variable in enumerate(model.optimizer.variables[2:]):
        np.testing.assert_array_equal(optimizer.variables[2 + index].numpy(), variable.value.detach().float().numpy())
    store = {}
    interop.to_keras(optimizer, store)
    assert len(store) == len(model.optimizer.variables)
    optimizer.apply([torch.tensor(g).to(torch.bfloat16) for g in gradients_of(3)])
    with pytest.raises(ValueError, match=r"bfloat16.*no exact conversion"):
        interop.to_keras(optimizer, store)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("before", [0, 5])
def test_torch_both_ways(amsgrad, excluded, dtype, before):
    """From torch, one step each; back into torch, one step each."""
    start = [torch.tensor(g).to(dtype) for g in gradients_of(99)]
    tensors = [torch.nn.Parameter(t.clone()) for t in start]
    groups = (
        [{"params": tensors}]
        if not excluded
        else [{"params": tensors[:3]}, {"params": tensors[3:], "weight_decay": 0.0}]
    )

    def steps(optimizer, parameters, first, last):
        for step in range(first, last):
            for parameter, g in zip(parameters, gradients_of(step), strict=True):
                parameter.grad = torch.tensor(g * 1e-4).to(dtype)  # so small that epsilon counts
            optimizer.step()

    theirs = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1, amsgrad=amsgrad)
    steps(theirs, tensors, 0, before)
    variables = [t.detach().clone() for t in tensors]
    ours = interop.from_torch(theirs.state_dict(), variables)
    ours.apply([torch.tensor(g * 1e-4).to(dtype) for g in gradients_of(before)])
    steps(theirs, tensors, before, before + 1)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for one, other in zip(variables, tensors, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=tolerance)
    copies = [torch.nn.Parameter(v.clone()) for v in variables]
    groups = [{"params": copies}] if not excluded else [{"params": copies[:3]}, {"params": copies[3:]}]
    again = torch.optim.AdamW(groups)
    again.load_state_dict(interop.to_torch(ours))
    steps(again, copies, before + 1, before + 2)
    ours.apply([torch.tensor(g * 1e-4).to(dtype) for g in gradients_of(before + 1)])
    for one, other in zip(variables, copies, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=tolerance)


# Adam of torch that is AdamW without decay: the class, its options, more of the groups
WITHOUT_DECAY = {
    "Adam": (torch.optim.Adam, {}, [{}]),
    "Adam with AMSGrad": (torch.optim.Adam, {"amsgrad": True}, [{}]),
    "Adam, decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}, [{}]),
    "Adam, groups": (torch.optim.Adam, {}, [{}, {"weight_decay": 0.0}]),
    "Adam, the decay decoupled in one group": (
        torch.optim.Adam,
        {},
        [{"decoupled_weight_decay": True, "weight_decay": 0.1}, {}],
    ),
    "Adam, for each": (torch.optim.Adam, {"foreach": True}, [{}]),
    "a rate in a tensor": (torch.optim.Adam, {"lr": torch.tensor(0.1, dtype=torch.float64), "foreach": False}, [{}]),
    "rates in tensors": (
        torch.optim.AdamW,
        {"lr": torch.tensor(0.1, dtype=torch.float64), "weight_decay": 0.0, "foreach": False},
        [{}, {"lr": torch.tensor(0.1, dtype=torch.float64)}],
    ),
    "betas in tensors": (
        torch.optim.Adam,
        {"betas": (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64)), "foreach": False},
        [{}],
    ),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.0}, [{}]),
    "a group without parameters": (torch.optim.Adam, {}, [{}, {"params": [], "lr": 0.7, "weight_decay": 0.3}]),
}


@pytest.mark.parametrize("case", WITHOUT_DECAY)
def test_from_adam_of_torch(case):
    """Its state goes on in ours as in its own."""
    kind, options, groups = WITHOUT_DECAY[case]
    tensors = [torch.nn.Parameter(torch.tensor(g).double()) for g in gradients_of(99)]
    half = len(tensors) // 2 if len(groups) > 1 and "params" not in groups[1] else len(tensors)
    parts = [tensors[:half], tensors[half:]]
    theirs = kind(
        [{"params": part} | more for part, more in zip(parts, groups, strict=False)],
        **{"lr": 0.1, "eps": 1e-5} | options,
    )

    def step(number):
        for tensor, g in zip(tensors, gradients_of(number), strict=True):
            tensor.grad = torch.tensor(g).double()
        theirs.step()

    for number in range(4):
        step(number)
    variables = [tensor.detach().clone() for tensor in tensors]
    ours = interop.from_torch(theirs.state_dict(), variables)
    step(4)
    ours.apply([torch.tensor(g).double() for g in gradients_of(4)])
    for one, other in zip(variables, tensors, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-12)
    again = interop.from_torch(theirs.state_dict(), variables)
    assert again.iterations == 5
    assert again.weight_decay == max(float(group["weight_decay"]) for group in theirs.param_groups if group["params"])


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_optax_both_ways(schedule, nested):
    def tree(leaves):
        return {"a": {"x": leaves[0], "y": leaves[1]}, "b": leaves[2:]} if nested else leaves

    start = tree([jnp.asarray(g) for g in gradients_of(99)])
    rate = optax.constant_schedule(0.1) if schedule else 0.1
    transformation = optax.chain(optax.adamw(rate, b1=0.8, b2=0.99, eps=1e-5, weight_decay=0.1))
    state, parameters = transformation.init(start), start
    for step in range(4):
        given = tree([jnp.asarray(g * 1e-4) for g in gradients_of(step)])
        updates, state = transformation.update(given, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    ours = interop.from_optax(state, parameters, eps=1e-5, learning_rate=0.1, beta_1=0.8, beta_2=0.99, weight_decay=0.1)
    assert ours.iterations == 4
    given = tree([jnp.asarray(g * 1e-4) for g in gradients_of(4)])
    mine, own = ours.stateless_apply(ours.variables, given, parameters)
    updates, state = transformation.update(given, state, parameters)
    parameters = optax.apply_updates(parameters, updates)
    for one, other in zip(flat(mine), flat(parameters), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
    ours.set_weights(own)
    back = interop.to_optax(ours, transformation.init(start))
    transformation = optax.chain(optax.adamw(rate, b1=0.8, b2=0.99, eps=ours.epsilon, weight_decay=0.1))
    given = tree([jnp.asarray(g * 1e-4) for g in gradients_of(5)])
    updates, after = transformation.update(given, back, mine)
    mine_again, _ = ours.stateless_apply(ours.variables, given, mine)
    for one, other in zip(flat(mine_again), flat(optax.apply_updates(mine, updates)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
    assert {int(leaf) for leaf in flat_counts(after)} == {6}


def flat(tree):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def flat_counts(tree):
    import jax

    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.int32]


def built(**options):
    optimizer = AdamW(**options)
    optimizer.build([np.ones(3)])
    return optimizer


def group(**changes):
    return {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "amsgrad": False,
        "params": [0],
    } | changes


def of_groups(*groups, state=()):
    return {"state": dict(state), "param_groups": list(groups)}


W = np.ones(3, np.float32)


def moments(**changes):
    return {"step": 1.0, "exp_avg": W, "exp_avg_sq": W} | changes


def from_adam(**changes):
    adam, *others = optax.adamw(0.1).init({"a": jnp.ones(3)})
    return interop.from_optax((adam._replace(**changes), *others), learning_rate=0.1)


def built_named(*names):
    optimizer = AdamW()
    optimizer.build({name: np.ones(3) for name in names})
    return optimizer


def built_thirds():
    optimizer = built()
    optimizer.apply([np.full(3, 1 / 3)])
    return optimizer


def keras_of(shape, cls=keras.optimizers.AdamW):
    optimizer = cls()
    optimizer.build([keras.Variable(np.ones(shape, np.float32))])
    return optimizer


def test_counts_of_optax_follow():
    parameters = [jnp.ones(3)]
    optimizer = AdamW()
    optimizer.build([W.copy()])
    for _ in range(5):
        optimizer.apply([W])
    injected = optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1.0, 0.0, 10))
    state = interop.to_optax(optimizer, injected.init(parameters))
    assert (int(state.count), int(state.inner_state[0].count)) == (5, 5)
    _, state = injected.update(parameters, state, parameters)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.5)
    several = interop.to_optax(optimizer, optax.MultiSteps(optax.adamw(0.1), 4).init(parameters))
    assert (int(several.gradient_step), int(several.inner_opt_state[0].count)) == (5, 5)


NO_CONVERSION = {
    "average": (lambda: interop.to_torch(built(use_ema=True)), ["use_ema", "leave_out"]),
    "clip": (lambda: interop.to_torch(built(clipnorm=1.0)), ["clipnorm"]),
    "AMSGrad of optax": (
        lambda: interop.to_optax(built(amsgrad=True), optax.adamw(0.1).init([jnp.ones(3)])),
        ["amsgrad", "bias correction"],
    ),
    "AMSGrad from optax": (
        lambda: interop.from_optax(optax.amsgrad(0.1).init([jnp.ones(3)]), learning_rate=0.1),
        ["AMSGrad", "bias correction"],
    ),
    "no Adam": (lambda: interop.from_optax(optax.sgd(0.1).init([jnp.ones(3)]), learning_rate=0.1), ["0 states"]),
    "rate": (lambda: interop.from_optax(optax.adamw(0.1).init([jnp.ones(3)])), ["learning_rate"]),
    "eps_root": (lambda: interop.from_optax((), learning_rate=0.1, eps_root=1e-8), ["eps_root"]),
    "maximize in one group": (
        lambda: interop.from_torch(of_groups(group(), group(maximize=True, params=[1]))),
        ["maximize"],
    ),
    "amsgrad in one group": (
        lambda: interop.from_torch(of_groups(group(), group(amsgrad=True, params=[1]))),
        ["amsgrad"],
    ),
    "coupled": (lambda: interop.from_torch(of_groups(group(decoupled_weight_decay=False))), ["coupled", "0.1"]),
    "coupled in one group": (
        lambda: interop.from_torch(of_groups(group(weight_decay=0), group(decoupled_weight_decay=False, params=[1]))),
        ["coupled", "0.1"],
    ),
    "other numbers of parameters": (
        lambda: interop.from_torch(of_groups(group(params=[0, 1])), [np.ones(3)]),
        ["2 parameters", "1"],
    ),
    "no parameters": (lambda: interop.from_torch(of_groups(group(params=[]))), ["parameters"]),
    "steps": (
        lambda: interop.from_torch(of_groups(group(params=[0, 1]), state={0: moments(step=3.0)}.items())),
        ["parameter 1 after 0, parameter 0 after 3 steps"],
    ),
    **{
        f"torch: {name}": ((lambda given=given: interop.from_torch(given)), words)
        for name, given, words in [
            ("half a step", of_groups(group(), state={0: moments(step=1.5)}.items()), ["step", "1.5"]),
            ("negative step", of_groups(group(), state={0: moments(step=-5.0)}.items()), ["step", "-5"]),
            ("infinite step", of_groups(group(), state={0: moments(step=np.inf)}.items()), ["step", "inf"]),
            ("huge step", of_groups(group(), state={0: moments(step=1e30)}.items()), ["step", "1e+30"]),
            ("twice", of_groups(group(params=[0, 0])), ["[0, 0]", "once"]),
            ("squares", of_groups(group(), state={0: moments(exp_avg_sq=-np.ones(3))}.items()), ["exp_avg_sq", "-1"]),
            ("no groups", of_groups(), ["param_groups"]),
            ("SGD", of_groups({"params": [0], "lr": 0.1}), ["betas", "torch.optim.AdamW"]),
            ("no squares", of_groups(group(), state={0: {"step": 1.0, "exp_avg": W}}.items()), ["lacks", "exp_avg_sq"]),
            ("codes", of_groups(group(), state={0: {"step": 1.0, "exp_avg_code": W}}.items()), ["8 bits", "float32"]),
            ("nothing", {}, ["state_dict", "param_groups"]),
        ]
    },
    "negative count": (lambda: from_adam(count=-3), ["count", "-3"]),
    "other names": (lambda: from_adam(nu={"b": W}), ["mu", "nu", "'b'"]),
    "inside a window": (
        lambda: interop.from_optax(
            optax.MultiSteps(optax.adamw(0.1), 4).init({"a": W})._replace(mini_step=2), learning_rate=0.1
        ),
        ["mini_step 2"],
    ),
    "shape of optax": (lambda: interop.to_optax(built(), optax.adamw(0.1).init([jnp.ones(1)])), ["(1,)", "(3,)"]),
    "names of optax": (
        lambda: interop.to_optax(built_named("z", "a"), optax.adamw(0.1).init({"a": jnp.ones(3), "y": jnp.ones(3)})),
        ["'y'", "'z'"],
    ),
    "rounded for optax": (lambda: interop.to_optax(built_thirds(), optax.adamw(0.1).init([jnp.ones(3)])), ["float32"]),
    "counter of optax": (
        lambda: interop.to_optax(built(), (optax.adamw(0.1).init([jnp.ones(3)]), optax.ema(0.9).init([jnp.ones(3)]))),
        ["EmaState", "count"],
    ),
    "rounded for Keras": (lambda: interop.to_keras(built_thirds(), keras_of((3,))), ["float32", "momentum"]),
    "shape of Keras": (lambda: interop.to_keras(built(), keras_of((1,))), ["(1,)", "(3,)"]),
    "class of Keras": (lambda: interop.to_keras(built(), keras_of((3,), keras.optimizers.Lamb)), ["Lamb", "AdamW"]),
    "class from Keras": (lambda: interop.from_keras(keras_of((3,), keras.optimizers.Lamb)), ["Lamb", "AdamW"]),
    "no config": (lambda: interop.from_keras({"0": np.int32(0)}), ["config"]),
    "count": (
        lambda: interop.from_keras({"0": np.int32(0), "1": np.float32(0)}, config=AdamW().get_config()),
        ["2 arrays"],
    ),
    "template": (lambda: interop.to_keras(built(), "x.weights.h5", template=__file__), [__file__, "signature"]),
    "keras suffix": (lambda: interop.to_keras(built(), "x.h5"), [".weights.h5"]),
}


@pytest.mark.parametrize(("act", "words"), NO_CONVERSION.values(), ids=NO_CONVERSION)
def test_no_exact_conversion(act, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are the match
        act()
    for word in words:
        assert word in str(caught.value)


# Whatever is passed, however large, the message is short
TEXT = 100_000 * "x"
HUGE = {f"key_{i}": list(range(100)) for i in range(1_000)}
NUMBERS = list(range(5_000))
PARAMETERS = {f"encoder/layer_{i}/kernel": np.ones(1) for i in NUMBERS}


def adam_of(names):
    return optax.adamw(0.1).init({name: jnp.ones(1) for name in names})


def of_names(mu, nu):
    adam, *others = optax.adamw(0.1).init({"a": jnp.ones(1)})
    return (adam._replace(mu=dict.fromkeys(mu, W), nu=dict.fromkeys(nu, W)), *others)


def built_on(variables):
    optimizer = AdamW()
    optimizer.build(variables)
    return optimizer


LONG = {
    "a config": lambda: interop.from_keras({"0": np.int32(0)}, config=HUGE),
    "no config": lambda: interop.from_keras(dict.fromkeys(map(str, NUMBERS), np.ones((300, 300)))),
    "keys": lambda: interop.from_keras(dict.fromkeys(PARAMETERS, W), config=AdamW().get_config()),
    "a long key": lambda: interop.from_keras({TEXT: W}, config=AdamW().get_config()),
    "a path": lambda: interop.from_keras(TEXT),
    "a target": lambda: interop.to_keras(built(), TEXT),
    "a template": lambda: interop.to_keras(built(), {}, template=TEXT),
    "no mapping": lambda: interop.from_torch(TEXT),
    "a list": lambda: interop.from_torch(NUMBERS),
    "parameters twice": lambda: interop.from_torch(of_groups(group(params=NUMBERS * 2))),
    "many counts": lambda: interop.from_torch(
        of_groups(group(params=NUMBERS), state={n: moments(step=float(n)) for n in NUMBERS}.items())
    ),
    "many decays": lambda: interop.from_torch(of_groups(*[group(params=[n], weight_decay=n / 9) for n in NUMBERS])),
    "rates of a long text": lambda: interop.from_torch(of_groups(group(), group(lr=TEXT))),
    "other variables": lambda: interop.from_torch(
        of_groups(group(params=NUMBERS), state=dict.fromkeys(NUMBERS, moments()).items()), PARAMETERS | {"a": W}
    ),
    "an option": lambda: interop.from_torch(of_groups(group()), **{TEXT: 1}),
    "eps_root": lambda: interop.from_optax((), learning_rate=0.1, eps_root=HUGE),
    "names of mu and nu": lambda: interop.from_optax(of_names(PARAMETERS, HUGE), learning_rate=0.1),
    "long names": lambda: interop.from_optax(of_names([TEXT], [TEXT + "y"]), learning_rate=0.1),
    "names of optax": lambda: interop.to_optax(built_on(PARAMETERS), adam_of(["a", "b", TEXT])),
    "a name of optax": lambda: interop.to_optax(built_on({TEXT: np.ones(3)}), adam_of([TEXT])),
    "no optimizer": lambda: interop.to_torch(TEXT),
}


@pytest.mark.parametrize("case", LONG)
def test_messages_are_short(case):
    with pytest.raises((ValueError, TypeError)) as caught:
        LONG[case]()
    assert 20 < len(str(caught.value)) <= 2_000


def test_left_out_on_purpose():
    state = interop.to_torch(built(clipnorm=1.0, use_ema=True), leave_out=["clipnorm", "use_ema"])
    assert state["param_groups"][0]["lr"] == 0.001
    with pytest.raises(ValueError, match="window"):
        optimizer = built(gradient_accumulation_steps=2)
        optimizer.apply([np.ones(3)])
        interop.to_torch(optimizer, ["gradient_accumulation_steps"])
    assert arrays.SLOT["bfloat16"] == "float32"


def test_variables_of_torch_may_be_a_generator():
    """Also before torch's first step, when there is no state to take."""
    module = torch.nn.Linear(2, 1)
    state = torch.optim.AdamW(module.parameters()).state_dict()
    assert interop.from_torch(state, module.named_parameters()).engine.workspace.names == ["weight", "bias"]
