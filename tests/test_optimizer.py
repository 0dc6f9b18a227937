"""The surface of Keras: methods, attributes, config, positions of the state, and what the library adds to it."""

import copy
import inspect
import pickle
import re

import array_api_strict
import numpy as np
import pytest
from helpers import libraries
from helpers.libraries import jnp, keras, torch

from adamw_numba import AdamW, LossScaleOptimizer, schedules

METHODS = [
    "add_variable",
    "add_variable_from_reference",
    "apply",
    "apply_gradients",
    "assign",
    "assign_add",
    "assign_sub",
    "build",
    "exclude_from_weight_decay",
    "finalize_variable_values",
    "from_config",
    "get_config",
    "load_own_variables",
    "save_own_variables",
    "scale_loss",
    "set_weights",
    "stateless_apply",
    "update_step",
]
FULL = {
    "learning_rate": 0.05, "amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2, "global_clipnorm": 1.0,
}  # fmt: skip


def values(seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=s).astype(np.float32) for s in [(3, 4), (4,), ()]]


def trained(steps=3, **options):
    arrays = values()
    optimizer = AdamW(**options)
    optimizer.build({"layer": {"kernel": arrays[0], "bias": arrays[1]}, "scale": arrays[2]})
    for k in range(steps):
        optimizer.apply(values(k + 1))
    return arrays, optimizer


@pytest.mark.parametrize("name", METHODS)
def test_signatures(name):
    ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (AdamW, keras.optimizers.AdamW))
    if name == "build":  # `variables` in Keras's base class and documentation, `var_list` in its Adam
        assert list(ours.parameters) == ["self", "variables", "comm", "replicated", "pieces"]
        return
    assert list(ours.parameters) == list(theirs.parameters)
    for parameter in theirs.parameters.values():
        assert ours.parameters[parameter.name].default == parameter.default


def test_constructor():
    ours = inspect.signature(AdamW).parameters
    theirs = inspect.signature(keras.optimizers.AdamW).parameters
    shared = [name for name in theirs if name not in ("name", "kwargs")]
    assert list(ours)[: len(shared)] == shared
    assert all(ours[name].default == theirs[name].default for name in shared)
    optimizer = AdamW()
    for name in list(ours)[:-1]:
        assert getattr(optimizer, name) == ours[name].default
    with pytest.warns(UserWarning, match="`decay` is no longer supported"):
        AdamW(decay=0.1)


@pytest.mark.parametrize("options", [{}, FULL, {"learning_rate": schedules.CosineDecay(0.1, 10)}], ids=str)
def test_config_goes_to_keras_and_back(options):
    optimizer = AdamW(**options)
    config = optimizer.get_config()
    reference = keras.optimizers.AdamW.from_config(copy.deepcopy(config))
    theirs = reference.get_config()
    assert list(config) == list(theirs)
    assert config | {"learning_rate": 0} == theirs | {"learning_rate": 0}
    again = AdamW.from_config(theirs)
    assert again.get_config() == theirs
    assert AdamW.from_config(config).get_config() == config
    extra = AdamW(nonfinite="skip", threads=2, master_weights=False).get_config()
    assert {k: extra[k] for k in ("nonfinite", "threads", "master_weights")} == {
        "nonfinite": "skip", "threads": 2, "master_weights": False,
    }  # fmt: skip


def keras_twin(steps=3, **options):
    variables = [keras.Variable(v) for v in values()]
    optimizer = keras.optimizers.AdamW(**options)
    optimizer.build(variables)
    for k in range(steps):
        optimizer.apply([torch.tensor(g) for g in values(k + 1)], variables)
    return variables, optimizer


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"use_ema": True}, {"gradient_accumulation_steps": 2},
                                     {"learning_rate": schedules.CosineDecay(0.1, 10)}], ids=str)  # fmt: skip
def test_positions_of_the_state(options):
    """What real Keras saves is loaded, what is saved real Keras loads, and both go on to the same numbers."""
    theirs_options = dict(options)
    if "learning_rate" in options:
        theirs_options["learning_rate"] = keras.optimizers.schedules.CosineDecay(0.1, 10)
    reference_variables, reference = keras_twin(**theirs_options)
    arrays, optimizer = trained(0, **options)
    store = {}
    for k, variable in enumerate(reference.variables):
        store[str(k)] = variable.value.detach().numpy()
    optimizer.load_own_variables(store)
    for array, variable in zip(arrays, reference_variables, strict=True):
        array[...] = variable.value.detach().numpy()
    optimizer.apply(values(9))
    reference.apply([torch.tensor(g) for g in values(9)], reference_variables)
    for array, variable in zip(arrays, reference_variables, strict=True):
        np.testing.assert_allclose(array, variable.value.detach().numpy(), rtol=1e-5, atol=2e-6)

    ours = {}
    optimizer.save_own_variables(ours)
    assert len(ours) == len(reference.variables)
    reference.load_own_variables(ours)
    optimizer.apply(values(10))
    reference.apply([torch.tensor(g) for g in values(10)], reference_variables)
    for array, variable in zip(arrays, reference_variables, strict=True):
        np.testing.assert_allclose(array, variable.value.detach().numpy(), rtol=1e-5, atol=2e-6)


def test_names_and_positions():
    _, optimizer = trained(**FULL)
    names = ["layer/kernel", "layer/bias", "scale"]
    expected = ["iteration", "learning_rate"]
    expected += [f"average/{n}" for n in names] + [f"gradient_accumulator/{n}" for n in names]
    expected += [f"{slot}/{n}" for n in names for slot in ("momentum", "velocity")]
    expected += [f"velocity_hat/{n}" for n in names]
    assert optimizer.variable_names == expected
    assert list(optimizer.state) == expected
    assert all(a is b for a, b in zip(optimizer.variables, optimizer.state.values(), strict=True))
    assert optimizer.variables[0].dtype == np.int64
    assert int(optimizer.variables[0]) == 3
    assert optimizer.iterations == 1


def copies(optimizer, arrays):
    store = {}
    optimizer.save_own_variables(store)
    loaded_arrays = [a.copy() for a in arrays]
    loaded = AdamW.from_config(optimizer.get_config())
    loaded.exclude_from_weight_decay(var_names=["bias"])
    loaded.build({"layer": {"kernel": loaded_arrays[0], "bias": loaded_arrays[1]}, "scale": loaded_arrays[2]})
    loaded.load_own_variables(store)
    yield loaded_arrays, loaded
    set_arrays = [a.copy() for a in arrays]
    other = AdamW.from_config(optimizer.get_config())
    other.exclude_from_weight_decay(var_list=[set_arrays[1]])
    other.build({"layer": {"kernel": set_arrays[0], "bias": set_arrays[1]}, "scale": set_arrays[2]})
    other.set_weights(optimizer.variables)
    yield set_arrays, other
    yield copy.deepcopy((arrays, optimizer))
    yield pickle.loads(pickle.dumps((arrays, optimizer)))


@pytest.mark.parametrize("steps", [2, 3])
def test_copies_go_on_bit_for_bit(steps):
    """Also from the middle of an accumulation window, and with what is excluded from decay."""
    arrays = values()
    optimizer = AdamW(weight_decay=0.5, ema_overwrite_frequency=2, **FULL)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    optimizer.build({"layer": {"kernel": arrays[0], "bias": arrays[1]}, "scale": arrays[2]})
    for k in range(steps):
        optimizer.apply(values(k + 1))
    made = list(copies(optimizer, arrays))
    for k in range(steps, steps + 4):
        optimizer.apply(values(k + 1))
        for _, other in made:
            other.apply(values(k + 1))
    for other_arrays, other in made:
        for one, two in zip([*arrays, *optimizer.variables], [*other_arrays, *other.variables], strict=True):
            np.testing.assert_array_equal(one, two)
            assert one is not two


def test_before_build():
    for optimizer in (copy.deepcopy(AdamW(0.1)), pickle.loads(pickle.dumps(AdamW(0.1)))):
        optimizer.build([array := np.ones(2)])
        optimizer.apply([np.ones(2)])
        assert array[0] < 1
    assert repr(AdamW()) == "AdamW(name='adamw', built=False)"


def test_repr():
    _, optimizer = trained()
    expected = (
        "AdamW(name='adamw', arrays=3, parameters=17, dtypes='float32', devices='cpu', step=3, state_bytes="
        f"{8 + 8 + 2 * 17 * 4})"
    )
    assert repr(optimizer) == expected


@pytest.mark.parametrize("make", [libraries.numpy, libraries.to_torch, libraries.parameter, libraries.strict])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averaged_block(make, dtype):
    if make is libraries.strict and dtype == "bfloat16":
        pytest.skip("the Array API has no bfloat16")
    variables = [make(v, dtype) for v in values()]
    optimizer = AdamW(0.1, use_ema=True, ema_momentum=0.5)
    optimizer.build(variables)
    for k in range(3):
        optimizer.apply([make(v, dtype) for v in values(k)])
    raw = [libraries.look(v) for v in variables]
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        for variable, average, before in zip(variables, optimizer.averages, raw, strict=True):
            np.testing.assert_allclose(libraries.look(variable).astype("f4"), libraries.look(average), rtol=0.01)
            assert (libraries.look(variable) != before).any()
        with pytest.raises(RuntimeError, match="averaged"):
            optimizer.apply([make(v, dtype) for v in values()])
        with pytest.raises(RuntimeError, match="averaged"), optimizer.averaged():
            pass
        raise ZeroDivisionError
    for variable, before in zip(variables, raw, strict=True):
        np.testing.assert_array_equal(libraries.look(variable), before)
    optimizer.apply([make(v, dtype) for v in values()])
    optimizer.finalize_variable_values(variables[:2])
    for variable, average in zip(variables[:2], optimizer.averages, strict=False):
        np.testing.assert_allclose(libraries.look(variable).astype("f4"), libraries.look(average), rtol=0.01)


def test_exclusion_from_weight_decay():
    arrays = {
        "block": {"bias": np.ones(2), "kernel": np.ones(2)},
        "norm": {"scale": np.ones(2)},
        "bias_free": np.ones(2),
    }
    for patterns, expected in {
        "^bias$": {"block/bias"},
        "bias": {"block/bias", "bias_free"},
        "norm/": {"norm/scale"},
        "^block": {"block/bias", "block/kernel"},
    }.items():
        optimizer = AdamW(0.1, weight_decay=1.0)
        optimizer.exclude_from_weight_decay(var_names=["something else"])
        optimizer.exclude_from_weight_decay(var_names=[patterns])
        tree = copy.deepcopy(arrays)
        optimizer.build(tree)
        optimizer.apply(
            {
                "block": {"bias": np.zeros(2), "kernel": np.zeros(2)},
                "norm": {"scale": np.zeros(2)},
                "bias_free": np.zeros(2),
            }
        )
        flat = {"block/bias": tree["block"]["bias"], "block/kernel": tree["block"]["kernel"],
                "norm/scale": tree["norm"]["scale"], "bias_free": tree["bias_free"]}  # fmt: skip
        assert {name for name, array in flat.items() if array[0] == 1} == expected


# What is asked for -> what the warning names, and what it does not.
WITHOUT_A_MATCH = {
    "a pattern": ({"var_names": ["biass"]}, ["'biass'"], []),
    "an array": ({"var_list": [np.ones(2)]}, ["number 0 of `var_list`"], []),
    "one of two patterns": ({"var_names": ["LayerNorm", "bias"]}, ["'LayerNorm'"], ["['LayerNorm', 'bias']"]),
    "two of three": ({"var_names": ["LayerNorm", "bias", "gamma$"]}, ["'LayerNorm'", "'gamma$'"], ["'LayerNorm', 'bias'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_A_MATCH)
def test_an_exclusion_that_matches_nothing_warns(case):
    asked, named, left_out = WITHOUT_A_MATCH[case]
    optimizer = AdamW()
    optimizer.exclude_from_weight_decay(**asked)
    with pytest.warns(UserWarning, match="matches none") as caught:
        optimizer.build({"bias": np.ones(2)})
    (message,) = (str(warning.message) for warning in caught)
    assert caught[0].filename == __file__  # it points at the caller's line
    assert all(text in message for text in named)
    assert not any(text in message for text in left_out)
    optimizer = AdamW()
    optimizer.exclude_from_weight_decay(var_names=(name for name in ["bias"]))
    optimizer.build({"bias": (bias := np.ones(2))})
    optimizer.apply({"bias": np.zeros(2)})
    assert (bias == 1).all()


def test_names_in_the_place_of_arrays():
    with pytest.raises(TypeError, match=r"`var_list` holds names.*`var_names=\['bias'\]`"):
        AdamW().exclude_from_weight_decay(["bias"])


def test_before_the_first_update_averages_are_the_variables():
    arrays, optimizer = trained(1, **FULL)
    before = arrays[0].copy()
    with optimizer.averaged():
        np.testing.assert_array_equal(arrays[0], before)
    optimizer.finalize_variable_values(arrays)
    np.testing.assert_array_equal(arrays[0], before)


def test_what_is_refused_inside_the_averaged_block():
    arrays, optimizer = trained(3, use_ema=True)
    with optimizer.averaged():
        for act in (
            lambda: pickle.dumps(optimizer),
            lambda: copy.deepcopy(optimizer),
            lambda: optimizer.update_step(arrays[0], arrays[0], 0.1),
        ):
            with pytest.raises(RuntimeError, match="averaged"):
                act()
    with pytest.raises(TypeError, match="deepcopy"):
        copy.copy(optimizer)
    arrays[1].flags.writeable = False
    with pytest.raises(ValueError, match="'layer/bias' is read-only"), optimizer.averaged():
        pass
    arrays[1].flags.writeable = True
    optimizer.apply(values())


@pytest.mark.parametrize("optimizer", [AdamW(), LossScaleOptimizer(AdamW())], ids=repr)
def test_attributes_that_do_not_exist(optimizer):
    with pytest.raises(AttributeError, match=r"leraning_rate"):
        optimizer.leraning_rate = 0.1
    with pytest.raises(AttributeError, match=r"lr"):
        optimizer.lr = 0.1


def test_functions_in_a_config():
    config = AdamW(halve, weight_decay=halve).get_config()
    assert AdamW.from_config(config, {"halve": halve}).learning_rate == 0.5
    with pytest.raises(ValueError, match="halve"):
        AdamW.from_config(config)


def halve(step):
    return 0.5 / (1 + step)


def test_apply_builds_and_takes_some_of_the_variables():
    a, b = np.ones(2), np.ones(3)
    optimizer = AdamW(0.1)
    assert optimizer.apply_gradients(zip([np.ones(2), np.ones(3)], [a, b], strict=True)) == 1
    optimizer.apply([np.ones(3)], [b])
    assert optimizer.iterations == 2
    assert a[0] > b[0]
    with pytest.warns(UserWarning, match=re.escape("['0']")):
        optimizer.apply([None, np.ones(3)], [a, b])
    optimizer.apply([])
    assert optimizer.iterations == 3


def test_update_step_is_adam_alone():
    reference_variables, reference = keras_twin(weight_decay=0.1, use_ema=True, clipvalue=0.01)
    arrays, optimizer = trained(weight_decay=0.1, use_ema=True, clipvalue=0.01)
    g = values(7)[0]
    before = optimizer.averages[0].copy()
    optimizer.update_step(g, arrays[0], 0.25)
    reference.update_step(torch.tensor(g), reference_variables[0], 0.25)
    np.testing.assert_allclose(arrays[0], reference_variables[0].value.detach().numpy(), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(optimizer.averages[0], before)
    assert optimizer.iterations == 3


def test_learning_rate_can_change_its_kind():
    _, optimizer = trained()
    assert optimizer.learning_rate == 0.001
    optimizer.learning_rate = 0.1
    assert float(optimizer.variables[1]) == 0.1
    optimizer.learning_rate = schedules.ExponentialDecay(0.4, 3, 0.5)
    assert optimizer.learning_rate == pytest.approx(0.2)
    assert optimizer.variable_names[1] == "momentum/layer/kernel"
    optimizer.learning_rate = 0.05
    assert optimizer.variable_names[1] == "learning_rate"
    assert optimizer.learning_rate == 0.05
    optimizer.variables[1][...] = 0.07
    assert optimizer.learning_rate == 0.07


def test_hyperparameters_act_when_they_change():
    """Each assignment at run time is what the next step uses."""
    changes = {"beta_1": 0.1, "beta_2": 0.5, "epsilon": 0.1, "clipvalue": 0.01, "weight_decay": 0.5,
               "loss_scale_factor": 8.0, "learning_rate": 0.3}  # fmt: skip
    plain, _ = trained(4)
    for name, value in changes.items():
        arrays, optimizer = trained(3)
        setattr(optimizer, name, value)
        optimizer.apply(values(4))
        assert (arrays[0] != plain[0]).any(), name


def test_variables_of_one_s_own():
    optimizer = AdamW()
    early = optimizer.add_variable((2,), name="early")
    arrays = [np.ones((2, 2), np.float32)]
    optimizer.build(arrays)
    late = optimizer.add_variable_from_reference(arrays[0], "late", initializer="ones")
    drawn = optimizer.add_variable((3,), lambda shape, dtype: np.full(shape, 7, dtype), "float64", name="drawn")
    assert optimizer.variable_names == [
        "iteration", "learning_rate", "early", "momentum/0", "velocity/0", "0_late", "drawn",
    ]  # fmt: skip
    optimizer.assign(early, np.array([1.0, 2.0]))
    optimizer.assign_add(late, np.ones((2, 2), np.float32))
    optimizer.assign_sub(drawn, np.ones(3))
    store = {}
    optimizer.save_own_variables(store)
    assert store["2"].tolist() == [1, 2]
    assert store["5"].tolist() == [[2, 2], [2, 2]]
    assert store["6"].tolist() == [6, 6, 6]
    with pytest.raises(ValueError, match="shape"):
        optimizer.assign(early, np.ones(3))
    with pytest.raises(TypeError, match="immutable"):
        optimizer.assign(jnp.ones(2), np.ones(2))


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "dtype"])
def test_state_that_does_not_fit(wrong):
    _, optimizer = trained()
    store = {}
    optimizer.save_own_variables(store)
    if wrong == "missing":
        del store["3"]
    if wrong == "extra":
        store["99"] = np.zeros(1)
    if wrong == "shape":
        store["7"] = np.zeros(2, np.float32)
    if wrong == "dtype":
        store["7"] = np.zeros((), np.complex64)
    before = [libraries.look(v) for v in optimizer.variables]
    with pytest.raises(ValueError, match=r"velocity/scale|keys"):
        optimizer.load_own_variables(store)
    for one, two in zip(before, optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, two)


def test_state_of_immutable_arrays():
    optimizer = AdamW(0.1)
    optimizer.build({"w": jnp.ones(3)})
    variables, state = optimizer.stateless_apply(optimizer.variables, {"w": jnp.ones(3)}, {"w": jnp.ones(3)})
    assert optimizer.iterations == 0
    optimizer.set_weights(state)
    assert optimizer.iterations == 1
    np.testing.assert_array_equal(optimizer.state["momentum/w"], state[2])
    again, _ = optimizer.stateless_apply(optimizer.variables, [("w", jnp.ones(3))], variables)
    assert isinstance(again, dict)
    assert float(again["w"][0]) == pytest.approx(0.7992, abs=1e-3)


def test_moving_state_between_libraries():
    steps = [values(k + 1) for k in range(4)]
    expected, _ = trained(4, amsgrad=True)
    for make in (libraries.to_torch, libraries.strict):
        arrays, optimizer = trained(2, amsgrad=True)
        moved = [make(a, "float32") for a in arrays]
        other = AdamW.from_config(optimizer.get_config())
        other.build({"layer": {"kernel": moved[0], "bias": moved[1]}, "scale": moved[2]})
        other.set_weights(optimizer.variables)
        for g in steps[2:]:
            other.apply([make(a, "float32") for a in g])
        for one, two in zip(moved, expected, strict=True):
            np.testing.assert_allclose(libraries.look(one), two, rtol=1e-6)


def test_other_mutable_namespaces_keep_their_device():
    device = array_api_strict.Device("device1")
    variable = array_api_strict.ones((3,), device=device)
    optimizer = AdamW(0.1, amsgrad=True, use_ema=True, clipvalue=1.0, global_clipnorm=None)
    optimizer.build([variable])
    optimizer.apply([array_api_strict.ones((3,), device=device)])
    assert variable.device == device
    assert all(slot.device == device for slot in optimizer.variables[2:])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, LossScaleOptimizer], ids=["alone", "loss scale"])
def test_every_protocol_of_pickle(protocol, wrap):
    optimizer = wrap(AdamW(0.1))
    optimizer.build([np.ones(3)])
    optimizer.apply([np.arange(3.0)])
    copied = pickle.loads(pickle.dumps(optimizer, protocol))
    assert copied.last_step == optimizer.last_step
    for one, other in zip(copied.variables, optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, other)
