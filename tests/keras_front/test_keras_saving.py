"""An optimizer as JSON, in ``.keras`` files, as a copy and as a pickle."""

import copy
import io
import json
import pickle

import keras
import numpy as np
import pytest
from helpers.keras_runs import (
    BOTH,
    IS_TORCH,
    Journey,
    fit,
    gradients_of,
    look,
    looked,
    model_of,
    same,
    under,
    variables_of,
)

import adamw_numba
from adamw_numba.keras import AdamW

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
CONFIGS = {
    "plain": {},
    "Keras's": {"amsgrad": True, "use_ema": True, "ema_overwrite_frequency": 7, "clipnorm": 1.0, "name": "mine"},
    "ours": {"nonfinite": "skip", "threads": 1, "master_weights": False, "nesterov": True, "epsilon_mode": "corrected"},
    "schedule": {"learning_rate": SCHEDULE},
    "decay schedule": {"weight_decay": adamw_numba.schedules.CosineDecay(0.1, 10), "decouple_lr": True},
}


def stepped(optimizer, variables, first=0, last=3):
    for step in range(first, last):
        optimizer.apply(gradients_of(step), variables)
    return optimizer


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case):
    """Through JSON and Keras's own functions, an optimizer of this class with the same arguments, and the same steps."""
    optimizer = AdamW(**CONFIGS[case])
    document = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    assert (document["module"], document["registered_name"]) == ("adamw_numba.keras", "adamw_numba>AdamW")
    for other in (keras.optimizers.deserialize(copy.deepcopy(document)), keras.optimizers.get(copy.deepcopy(document))):
        assert type(other) is AdamW
        assert other.get_config() == optimizer.get_config()
    one, two = variables_of(), variables_of()
    stepped(AdamW.from_config(optimizer.get_config()), one)
    stepped(optimizer, two)
    same(one, two)


def test_a_config_of_keras():
    """Has the same keys, and makes one of ours; that of ours, without what Keras lacks, one of Keras."""
    ours, theirs = AdamW(0.25, clipvalue=2.0, name="a"), keras.optimizers.AdamW(0.25, clipvalue=2.0, name="a")
    assert ours.get_config() == theirs.get_config()
    assert AdamW.from_config(theirs.get_config()).clipvalue == 2.0
    assert keras.optimizers.AdamW.from_config(ours.get_config()).clipvalue == 2.0


def test_overrides_and_exclusions_are_saved():
    """By path: Keras itself forgets what is excluded."""
    variables, optimizer = variables_of(), AdamW(0.1, weight_decay=9.0)
    optimizer.exclude_from_weight_decay([variables[0]], ["v2"])
    optimizer.override(var_names=["v1"], learning_rate_multiplier=0.5)
    early = AdamW.from_config(optimizer.get_config())
    stepped(optimizer, variables)
    late = AdamW.from_config(json.loads(json.dumps(optimizer.get_config())))
    for other in (early, late):
        others = variables_of()
        stepped(other, others)
        same(others, variables)


@pytest.mark.parametrize("custom_objects", [None, {"AdamW": AdamW}])
@pytest.mark.parametrize("policy", ["float32", "bfloat16", "mixed_float16"])
def test_files(policy, custom_objects, tmp_path):
    model = model_of(AdamW(0.01, amsgrad=True, nonfinite="skip"), policy)
    fit(model, 1)
    model.save(tmp_path / "model.keras")
    with under(policy):  # which no file of Keras's says of the model itself
        loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=custom_objects)
    same(loaded.optimizer.variables, model.optimizer.variables)
    assert fit(loaded, 1) == fit(model, 1)
    same(loaded.optimizer.variables, model.optimizer.variables)


def test_weights_files(tmp_path):
    """The state alone; also before the optimizer is built, where Keras's own would lose it."""
    model = model_of(AdamW(0.01))
    fit(model, 1)
    model.save_weights(tmp_path / "a.weights.h5")
    other = model_of(AdamW(0.01))
    other.load_weights(tmp_path / "a.weights.h5")
    assert int(other.optimizer.iterations) == 45
    assert fit(other, 1) == fit(model, 1)


@pytest.mark.parametrize("ours_first", [False, True])
def test_files_of_the_one_go_on_with_the_other(ours_first, tmp_path):
    """A file of Keras's AdamW, read with `custom_objects`; and the state of ours by Keras's own optimizer."""
    first, second = BOTH if ours_first else BOTH[::-1]
    variables, others = variables_of(), variables_of()
    optimizer, store = stepped(first(0.1), variables), {}
    optimizer.save_own_variables(store)
    other = second(0.1)
    other.build(others)
    other.load_own_variables(store)
    for variable, value in zip(others, looked(variables), strict=True):
        variable.assign(value)
    journey = Journey(others)
    stepped(optimizer, variables, 3, 4)
    stepped(other, others, 3, 4)
    journey.go(others)
    journey.assert_close(variables, others)
    if IS_TORCH and not ours_first:  # on JAX, Keras looks for what is its own among its own classes alone
        model = model_of(keras.optimizers.AdamW(0.01))
        fit(model, 1)
        model.save(tmp_path / "theirs.keras")
        loaded = keras.saving.load_model(tmp_path / "theirs.keras", custom_objects={"AdamW": AdamW})
        assert type(loaded.optimizer) is AdamW
        same(loaded.optimizer.variables, model.optimizer.variables)


def test_state_from_interop():
    """`adamw_numba.interop` takes ours for one of Keras, in both directions."""
    variables = variables_of()
    optimizer = stepped(AdamW(0.1, amsgrad=True), variables)
    plain = adamw_numba.interop.from_keras(optimizer, looked(variables))
    same(plain.variables, optimizer.variables)
    other = AdamW(0.1, amsgrad=True)
    other.build(variables_of())
    adamw_numba.interop.to_keras(plain, other)
    same(other.variables, optimizer.variables)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["copy", "pickle"]
)
def test_copies(copied):
    """A copy has no variables yet: it takes the state when it is built, and goes on from there."""
    variables = variables_of()
    optimizer = stepped(AdamW(0.1, use_ema=True, nesterov=True), variables)
    other = copied(optimizer)
    others = [keras.Variable(value, name=f"v{k}") for k, value in enumerate(looked(variables))]
    assert int(other.iterations) == 3
    for each, own in ((optimizer, variables), (other, others)):
        each.learning_rate = 0.05
        stepped(each, own, 3, 5)
    same(other.variables, optimizer.variables)
    same(others, variables)


def test_a_copied_model():
    model = model_of(AdamW(0.01))
    fit(model, 1)
    other = pickle.loads(pickle.dumps(model))
    assert fit(other, 1) == fit(model, 1)


def test_a_state_that_does_not_fit():
    """As in Keras: it is skipped, with a warning."""
    store = {}
    stepped(AdamW(amsgrad=True), variables_of()).save_own_variables(store)
    optimizer, variables = AdamW(), variables_of()
    optimizer.load_own_variables(store)
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        optimizer.build(variables)
    assert not look(optimizer.variables[2]).any()
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        optimizer.load_own_variables(store)


def test_keras_archives_hold_names():
    """What `Model.save` writes of the optimizer is Keras's own layout."""
    model = model_of(AdamW(0.01))
    fit(model, 1)
    buffer = io.BytesIO()
    np.savez(buffer, **{v.path: look(v) for v in model.optimizer.variables})
    assert len({v.path for v in model.optimizer.variables}) == len(model.optimizer.variables) == 14
