"""Whatever is passed, however large: the error is short enough to read, and says what to do."""

import numpy as np
import pytest
import torch

from adamw_numba import AdamW, LossScaleOptimizer, minimize, schedules

MOST = 2_000  # characters

NAMES = [f"encoder/layer_{i}/attention/kernel" for i in range(2_000)]
TEXT = 100_000 * "x"
PARAMETERS = [torch.nn.Parameter(torch.ones(50, 40)) for _ in range(160)]
MODULE = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(200)])
HUGE = {f"key_{i}": list(range(100)) for i in range(1_000)}


class Series:
    """What pandas and Polars look like."""

    def __init__(self, count):
        self.shape, self.dtype, self.index = (count,), "float64", range(count)

    def __repr__(self):
        return f"Series({[0.0] * self.shape[0]})"

    def __iter__(self):
        return iter([0.0] * self.shape[0])

    def keys(self):
        return self.index

    def to_numpy(self):
        return np.zeros(self.shape)


class KerasVariable:
    """What Keras's variables look like, on any backend."""

    path, value, shape, dtype = "dense/kernel", np.ones(3), (100, 100), "float32"

    def assign(self, value): ...

    def __repr__(self):
        return f"<Variable path=dense/kernel, value={[0.0] * 10_000}>"


class KerasModel:
    trainable_variables = (KerasVariable(),)

    def __call__(self, x): ...

    def __repr__(self):
        return f"<Model {TEXT}>"


def many(value=1.0):
    return {name: np.full(1, value) for name in NAMES}


def built(variables=None, **options):
    optimizer = AdamW(**options)
    optimizer.build([np.ones(2)] if variables is None else variables)
    return optimizer


def excluded(patterns):
    AdamW().exclude_from_weight_decay(var_names=patterns)


BUILD, RATE = "Arrays go to `build`; the first argument is the learning rate", "learning_rate"
KERAS = "(v.path, v.value) for v in model.trainable_variables"

# what is done -> what the error says besides
CASES = {
    # The first argument of torch's optimizers is the parameters.
    "parameters first": (lambda: AdamW(PARAMETERS), [BUILD]),
    "an iterator of parameters first": (lambda: AdamW(MODULE.parameters()), [BUILD]),
    "a module first": (lambda: AdamW(MODULE), [BUILD]),
    "a Keras model first": (lambda: AdamW(KerasModel()), [BUILD]),
    "an array first": (lambda: AdamW(np.ones((300, 300))), [BUILD]),
    "groups first": (lambda: AdamW([{"params": PARAMETERS, "lr": 0.1}]), [BUILD]),
    "a rate of text": (lambda: AdamW(TEXT), ["learning_rate"]),
    "a huge rate": (lambda: AdamW(10**100_000), ["learning_rate"]),
    "a rate assigned": (lambda: setattr(AdamW(), "learning_rate", PARAMETERS), [BUILD]),
    "a decay": (lambda: AdamW(weight_decay=PARAMETERS), ["weight_decay"]),
    "a rate that returns an array": (lambda: built(learning_rate=lambda: HUGE).apply([np.ones(2)]), ["learning_rate"]),
    "unknown arguments": (lambda: AdamW(**HUGE), ["not recognized"]),
    "an unknown argument": (lambda: AdamW(params=PARAMETERS), ["build(params)"]),
    **{
        f"hyperparameter {name}": (lambda name=name: AdamW(**{name: HUGE}), [f"`{name}`"])
        for name in ("beta_1", "epsilon", "amsgrad", "clipnorm", "ema_overwrite_frequency", "nonfinite", "threads")
    },
    "a name": (lambda: AdamW(name=HUGE), ["`name`"]),
    "an attribute": (lambda: setattr(AdamW(), TEXT, 1), ["attribute"]),
    # What is built.
    "text": (lambda: AdamW().build(TEXT), ["variables", "expected an array"]),
    "bytes": (lambda: AdamW().build(bytes(100_000)), ["variables", "expected an array"]),
    "a list of text": (lambda: AdamW().build([TEXT]), ["variables at '0'", "expected an array"]),
    "a set": (lambda: AdamW().build(set(range(100_000))), ["no order"]),
    "a module": (lambda: AdamW().build(MODULE), ["named_parameters()"]),
    "a Keras variable": (lambda: AdamW().build([KerasVariable()]), ["`value`", KERAS]),
    "a Keras model": (lambda: AdamW().build(KerasModel()), [KERAS]),
    "a series": (lambda: AdamW().build(Series(100_000)), ["to_numpy()"]),
    "a list of series": (lambda: AdamW().build({"a": Series(100_000)}), ["'a'", "to_numpy()"]),
    "a long name": (lambda: AdamW().build({TEXT: np.ones(3, int)}), ["variable 'xxx", "int64"]),
    "a long name, twice": (lambda: AdamW().build([(TEXT, np.ones(3))] * 2), ["more than once"]),
    "a long name of text": (lambda: AdamW().build({TEXT: {TEXT: "text"}}), ["'text'"]),
    "long names that overlap": (lambda: AdamW().build({TEXT: (a := np.ones(3)), f"{TEXT}y": a[1:]}), ["share memory"]),
    "a structured dtype": (lambda: AdamW().build([np.ones(3, [(f"field_{i}", "f4") for i in range(5_000)])]), ["dtype"]),
    "other variables": (lambda: built(many()).build([np.ones(3)]), ["Unknown variable"]),
    "a long pattern": (lambda: excluded([30_000 * "("]), ["regular expression"]),
    "a pattern in place of a list": (lambda: excluded(TEXT), ["list of strings"]),
    "patterns that are none": (lambda: excluded([HUGE] * 1000), ["list of strings"]),
    # Gradients.
    "other names": (lambda: built(many()).apply({f"{name}_": np.ones(1) for name in NAMES}), ["lacks", "unknown"]),
    "one name is missing": (lambda: built(many()).apply({n: np.ones(1) for n in NAMES[1:]}), ["lacks ['encoder/layer_0"]),
    "too few": (lambda: built(many()).apply([np.ones(1)]), ["one-to-one", "1 arrays", "2000"]),
    "text as gradients": (lambda: built().apply(TEXT), ["grads", "expected an array"]),
    "a long name of a gradient": (lambda: built({TEXT: np.ones(2)}).apply({TEXT: np.ones(3)}), ["shape (3,)"]),
    "a series as gradient": (lambda: built().apply([Series(100_000)]), ["grads", "to_numpy()"]),
    "a module as gradient": (lambda: built().apply([MODULE]), ["grads", "named_parameters"]),
    "many are not finite": (lambda: built(many(), nonfinite="raise").apply(many(np.nan)), ["not finite"]),
    "pairs": (lambda: built().apply_gradients(HUGE), ["(gradient, variable) pairs"]),
    "pairs of text": (lambda: built().apply_gradients([TEXT]), ["(gradient, variable) pairs"]),
    "an update of one": (lambda: built().update_step(HUGE, np.ones(2), 0.1), ["Unknown variable"]),
    "an unknown loss": (lambda: built().stateless_apply([], [np.ones(2)], many()), ["trainable_variables"]),
    # The state.
    "too many weights": (lambda: built(many()).set_weights([np.ones(1)] * 5_000), ["5000 arrays", "4002"]),
    "weights of another shape": (lambda: built().set_weights([np.ones([1] * 60)] * 4), ["shape"]),
    "weights of text": (lambda: built().set_weights([TEXT] * 4), ["'iteration'"]),
    "a store": (lambda: built(many()).load_own_variables({str(i): np.ones(1) for i in range(3_000)}), ["'4001'"]),
    "another store": (lambda: built().load_own_variables({TEXT: np.ones(1)}), ["'0' to '3'"]),
    "an added name": (lambda: built(many()).add_variable((), name=TEXT + "/"), ["`name`"]),
    "an initializer": (lambda: built().add_variable((), initializer=HUGE), ["`initializer`"]),
    "a config": (lambda: AdamW.from_config(HUGE), ["not recognized"]),
    "a config of a schedule": (
        lambda: AdamW.from_config({"learning_rate": {"class_name": TEXT, "config": HUGE}}), ["schedule"],
    ),
    "a schedule": (lambda: schedules.deserialize({"class_name": "CosineDecay", "config": [HUGE]}), ["expected a dict"]),
    "boundaries": (lambda: schedules.PiecewiseConstantDecay(list(range(9_000)), [0.1]), ["1 less"]),
    "boundaries that fall": (
        lambda: schedules.PiecewiseConstantDecay(list(range(9_000))[::-1], [0.1] * 9_001), ["strictly"],
    ),
    "a payload": (lambda: built().save({}, extra=HUGE | {"a": MODULE}), ["extra['a']"]),
    "a mapping to load": (lambda: AdamW.load(HUGE), ["manifest.json"]),
    "a start": (lambda: minimize(lambda x: 1.0, HUGE), ["x0 at 'key_0/0'", "np.asarray"]),
    "an objective that returns text": (lambda: minimize(lambda x: TEXT, np.ones(3), jac=True), ["`fun` returned"]),
    "an initial scale": (lambda: LossScaleOptimizer(AdamW(), initial_scale=HUGE), ["`initial_scale`"]),
    "no optimizer to wrap": (lambda: LossScaleOptimizer(PARAMETERS), ["inner_optimizer"]),
    "unknown arguments of a wrapper": (lambda: LossScaleOptimizer(AdamW(), **HUGE), ["does not support"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_length(case):
    act, words = CASES[case]
    with pytest.raises((TypeError, ValueError, FloatingPointError, AttributeError)) as raised:
        act()
    text = str(raised.value)
    for word in words:
        assert word in text, text[:MOST]
    assert len(text) <= MOST


def test_a_warning_about_gradients_that_are_missing():
    with pytest.warns(UserWarning, match="Gradients do not exist") as warned:
        built(many()).apply({name: np.ones(1) if name == NAMES[0] else None for name in NAMES})
    assert all(len(str(each.message)) <= MOST for each in warned)
