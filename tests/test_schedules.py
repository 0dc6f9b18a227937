"""The six schedules: Keras's numbers, errors and JSON."""

import json
from fractions import Fraction

import array_api_strict
import numpy as np
import pytest
from helpers.libraries import jax, keras, torch

from adamw_numba import AdamW, schedules
from adamw_numba.hyperparameters.table import Rate

CASES = [
    ("ExponentialDecay", {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.9}),
    ("ExponentialDecay", {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.9, "staircase": True}),
    ("PiecewiseConstantDecay", {"boundaries": [10, 20], "values": [1.0, 0.5, 0.1]}),
    ("PolynomialDecay", {"initial_learning_rate": 0.1, "decay_steps": 10}),
    ("PolynomialDecay", {"initial_learning_rate": 0.1, "decay_steps": 10, "end_learning_rate": 0.01, "power": 2.0, "cycle": True}),
    ("InverseTimeDecay", {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5}),
    ("InverseTimeDecay", {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5, "staircase": True}),
    ("CosineDecay", {"initial_learning_rate": 0.1, "decay_steps": 20, "alpha": 0.1}),
    ("CosineDecay", {"initial_learning_rate": 0.0, "decay_steps": 20, "warmup_target": 0.2, "warmup_steps": 5, "name": "c"}),
    ("CosineDecay", {"initial_learning_rate": 0.1, "decay_steps": 20, "warmup_target": 0.2, "warmup_steps": 0}),
    ("CosineDecayRestarts", {"initial_learning_rate": 0.1, "first_decay_steps": 10}),
    ("CosineDecayRestarts", {"initial_learning_rate": 0.1, "first_decay_steps": 10, "t_mul": 1.0, "m_mul": 0.5, "alpha": 0.1}),
    ("CosineDecayRestarts", {"initial_learning_rate": 0.1, "first_decay_steps": 7, "t_mul": 1.5, "m_mul": 0.5, "alpha": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_keras(name, arguments):
    ours, theirs = getattr(schedules, name)(**arguments), getattr(keras.optimizers.schedules, name)(**arguments)
    for step in range(80):
        assert ours(step) == pytest.approx(float(theirs(step)), rel=1e-5, abs=1e-7)
        assert ours(np.int64(step)) == ours(step)
    assert ours.get_config() == theirs.get_config()
    serialized = keras.optimizers.schedules.serialize(theirs)
    assert schedules.serialize(ours) == serialized
    assert schedules.deserialize(serialized) == ours
    again = keras.optimizers.schedules.deserialize(schedules.serialize(ours))
    assert again.get_config() == theirs.get_config()


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_in_an_array_namespace(name, arguments):
    schedule = getattr(schedules, name)(**arguments)
    traced = jax.jit(schedule)
    for step in range(0, 50, 7):
        assert float(schedule(array_api_strict.asarray(step))) == pytest.approx(schedule(step), rel=1e-13, abs=1e-15)
        assert float(schedule(torch.tensor(step))) == pytest.approx(schedule(step), rel=1e-5, abs=1e-8)
        assert float(traced(step)) == pytest.approx(schedule(step), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("t_mul", "first"), [(2.0, 1000), (3.0, 10), (1.5, 4), (1.0, 7), (1.1, 1000)])
def test_restarts_at_exact_boundaries(t_mul, first):
    """At the first step of each period the rate is the highest, at the one before near its lowest."""
    schedule = schedules.CosineDecayRestarts(0.1, first, t_mul)
    start, length, exact = Fraction(0), Fraction(first), 0
    for _ in range(12):
        if start.denominator == 1:
            exact += 1
            assert schedule(int(start)) == pytest.approx(0.1)
            if start > 0 and length > 100:
                assert schedule(int(start) - 1) < 0.001
        start += length
        length *= Fraction(str(t_mul))
    assert exact > 3


def test_restarts_that_get_shorter_end_at_the_lowest_rate():
    schedule = schedules.CosineDecayRestarts(0.1, 10, t_mul=0.5, alpha=0.2)
    assert schedule(25) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("ExponentialDecay", (0.1, 0, 0.9), "`decay_steps` must be > 0"),
        ("PolynomialDecay", (0.1, -1), "`decay_steps` must be > 0"),
        ("InverseTimeDecay", (0.1, 0, 0.9), "`decay_steps` must be > 0"),
        ("CosineDecay", (0.1, 0), "`decay_steps` must be > 0"),
        ("CosineDecayRestarts", (0.1, 0), "`first_decay_steps` must be > 0"),
        ("CosineDecayRestarts", (0.1, 10, 0.0), "`t_mul` must be > 0"),
        ("PiecewiseConstantDecay", ([1, 2], [0.1, 0.2]), "should be 1 less"),
        ("PiecewiseConstantDecay", ([2, 1], [0.1, 0.2, 0.3]), "increase"),
        ("PiecewiseConstantDecay", ([1], [0.1, "a"]), "finite"),
        ("ExponentialDecay", ("0.1", 10, 0.9), "`initial_learning_rate` must be a finite number"),
        ("CosineDecay", (float("nan"), 10), "`initial_learning_rate`"),
    ],
)
def test_errors(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        getattr(schedules, name)(*arguments)


MANY = list(range(10_000))


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.PiecewiseConstantDecay(MANY, MANY),
        lambda: schedules.PiecewiseConstantDecay(MANY[::-1], [0.1, *MANY]),
        lambda: schedules.ExponentialDecay(MANY, 10, 0.9),
        lambda: schedules.deserialize({"class_name": "x" * 10_000, "config": {}}),
        lambda: schedules.deserialize({"class_name": "CosineDecay", "config": MANY}),
        lambda: schedules.deserialize({"class_name": "function", "config": "f"}, {str(i): abs for i in MANY}),
    ],
)
def test_errors_are_short(make):
    with pytest.raises(ValueError, match=r"Received|expected|increase") as raised:
        make()
    assert len(str(raised.value)) < 700


def test_integers_are_floats():
    """Keras computes an integer initial rate in integers: 1, 0, 0, ..."""
    assert schedules.ExponentialDecay(1, 10, 0.5)(5) == pytest.approx(0.5**0.5)


class Halved(schedules.LearningRateSchedule):
    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start * 0.5**step

    def get_config(self):
        return {"start": self.start}


RATES = {
    "float": (0.1, [0.1, 0.1, 0.1]),
    "integer": (1, [1, 1, 1]),
    "NumPy scalar": (np.float32(0.5), [0.5, 0.5, 0.5]),
    "schedule": (schedules.PiecewiseConstantDecay([0, 1], [0.3, 0.2, 0.1]), [0.3, 0.2, 0.1]),
    "schedule of one's own": (Halved(0.4), [0.4, 0.2, 0.1]),
    "schedule of Keras": (keras.optimizers.schedules.ExponentialDecay(0.4, 1, 0.5), [0.4, 0.2, 0.1]),
    "callable of the step": (lambda step: 0.1 * (step + 1), [0.1, 0.2, 0.3]),
    "callable of nothing": (lambda: 0.25, [0.25, 0.25, 0.25]),
    "callable with a default": (lambda step=7: 0.1 * step, [0.7, 0.7, 0.7]),
}


@pytest.mark.parametrize("case", RATES)
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_whatever_can_be_a_rate(case, name):
    rate, expected = RATES[case]
    found = []
    for k in range(3):
        variable = np.full(3, 100.0)
        optimizer = AdamW(**{"learning_rate": 0.1, "weight_decay": 0.0} | {name: rate})
        optimizer.build([variable])
        for _ in range(k):
            optimizer.apply([np.zeros(3)])
        before = variable[0]
        optimizer.apply([np.zeros(3) if name == "weight_decay" else np.ones(3)])
        if name == "weight_decay":
            found.append((1 - variable[0] / before) / 0.1)
        else:
            assert optimizer.last_step.learning_rate == pytest.approx(expected[k])
            found.append(optimizer.last_step.learning_rate)
    assert found == pytest.approx(expected)


def test_schedule_counts_micro_steps():
    """As in Keras: the schedule sees calls of `apply`, the bias correction sees updates."""
    seen = []
    optimizer = AdamW(lambda step: seen.append(step) or 0.1, gradient_accumulation_steps=3)
    optimizer.build([np.ones(2)])
    for _ in range(7):
        optimizer.apply([np.ones(2)])
    assert seen == list(range(7))
    assert optimizer.iterations == 2


def test_config_of_schedules():
    optimizer = AdamW(Halved(0.4), schedules.CosineDecay(0.1, 10))
    config = optimizer.get_config()
    assert config["learning_rate"]["class_name"] == "Halved"
    with pytest.raises(ValueError, match="Halved"):
        AdamW.from_config(config)
    again = AdamW.from_config(config, {"Halved": Halved})
    assert again.learning_rate == 0.4
    assert again.weight_decay == schedules.CosineDecay(0.1, 10)
    assert config["learning_rate"]["class_name"] == "Halved"


def test_a_schedule_times_a_number():
    rate = schedules.CosineDecay(0.1, 100)
    decay = schedules.scaled(rate, 0.5)
    assert [decay(step) for step in (0, 30, 100)] == [0.5 * rate(step) for step in (0, 30, 100)]
    again = schedules.deserialize(json.loads(json.dumps(schedules.serialize(decay))))
    assert again == decay
    assert again(30) == decay(30)
    assert schedules.scaled(lambda: 0.25, 2)(7) == 0.5
    nested = schedules.scaled(decay, 3)
    assert schedules.deserialize(schedules.serialize(nested)) == nested
    assert AdamW.from_config(AdamW(rate, weight_decay=decay).get_config()).weight_decay == decay
    with pytest.raises(ValueError, match="Unknown function"):
        schedules.deserialize(schedules.serialize(schedules.scaled(by_hand, 2)))
    found = schedules.deserialize(schedules.serialize(schedules.scaled(by_hand, 2)), {"by_hand": by_hand})
    assert found(3) == 2 * by_hand(3)


def by_hand(step):
    return 0.1 / (1 + step)


@pytest.mark.parametrize(
    ("schedule", "factor"), [(0.1, 1), (schedules.CosineDecay, 1), (by_hand, -1), (by_hand, "x"), (by_hand, np.inf)]
)
def test_what_cannot_be_scaled(schedule, factor):
    with pytest.raises((TypeError, ValueError), match=r"`(schedule|factor)`"):
        schedules.scaled(schedule, factor)


def test_which_rates_follow_from_the_step_alone():
    rates = {
        schedules.CosineDecay(0.1, 100): True,
        schedules.scaled(schedules.CosineDecay(0.1, 100), 2): True,
        schedules.scaled(by_hand, 2): False,
        by_hand: False,
    }
    for rate, expected in rates.items():
        assert Rate("learning_rate", rate).is_schedule == expected
