"""A step that is taken like the last one, without being prepared anew, has the same bits as one that is."""

import copy

import libraries
import numpy as np
import pytest
import torch

from adamw_numba import AdamW, schedules, step

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
        patch.setattr(step, "numbers_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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
}


@pytest.mark.parametrize("effect", SIDE_EFFECTS)
def test_a_rate_with_a_side_effect(effect):
    """The same bits as of steps that are prepared anew."""

    def trained(anew):
        def rate(step):
            if step >= 3:
                SIDE_EFFECTS[effect](optimizer, step)
            return 0.01

        optimizer = AdamW(rate, global_clipnorm=0.1, loss_scale_factor=2.0)
        optimizer.build([np.ones(3)])
        for number in range(6):
            if anew:
                optimizer.threads = optimizer.threads
            optimizer.apply([np.array([1.0, 2.0, number])])
        return optimizer.trainable_variables + optimizer.variables

    for one, other in zip(trained(False), trained(True), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options", ["plain", "clip", "global clip", "skip"])
@pytest.mark.parametrize("make", [libraries.numpy, libraries.parameter])
def test_which_steps_are_prepared(make, options, monkeypatch):
    """Of steady steps the first two alone; copies begin anew; a torch graph notices every step."""
    counted = []
    prepare = step.prepare
    monkeypatch.setattr(step, "prepare", lambda *a: counted.append(1) or prepare(*a))
    variable, gradient = make(np.ones(3), "float32"), make(np.ones(3), "float32")
    optimizer = AdamW(0.1, **OPTIONS[options])
    optimizer.build([variable])
    for _ in range(5):
        optimizer.apply([gradient])
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
