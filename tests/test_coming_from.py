"""docs/coming_from.md: the code there and the code here, run side by side."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.libraries import jax
from test_groups import tensorflow_addons

from adamw_numba import AdamW, schedules

PAGE = Path(__file__).parents[1] / "docs" / "coming_from.md"
START = np.linspace(-2, 3, 7)
# Keras computes its scalars in float32: 2e-5 of the way, of 20 steps of 0.1.
TOLERANCE = {"Keras": 4e-5, "torch": 1e-12, "optax": 1e-11, "A pasted NumPy Adam": 1e-12}


def blocks():
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
    return {each.split("\n", 1)[0]: re.findall(r"```py\n(.*?)```", each, re.S) for each in sections}


def result_of(code, name):
    namespace = {"start": START.copy()}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace[name]


@pytest.mark.parametrize("section", TOLERANCE)
def test_both_end_at_the_same_numbers(section):
    library = {"Keras": "keras", "A pasted NumPy Adam": "numpy"}.get(section, section)
    pytest.importorskip(library)
    there, here = blocks()[section]
    if section == "optax":
        with jax.enable_x64(True):
            theirs, ours = result_of(there, "theirs"), result_of(here, "ours")
    else:
        theirs, ours = result_of(there, "theirs"), result_of(here, "ours")
    assert np.abs(np.asarray(theirs) - START).max() > 0.5
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=TOLERANCE[section])


@pytest.mark.parametrize(("name", "excluded"), [("kernel", set()), ("bias", {0})])
def test_tensorflow_addons(name, excluded):
    """It does not install any more: its arithmetic is in test_groups.py."""
    _, here = blocks()["TensorFlow Addons"]
    expected = tensorflow_addons([START], lambda t, x: [2 * (x[0] - 1)], 20, lambda t: 0.1, lambda t: 0.01, excluded)
    np.testing.assert_allclose(result_of(here, "ours")[name], expected[0], rtol=0, atol=1e-12)


def test_tensorflow_addons_by_the_convention_of_keras():
    ours = [START.copy()]
    optimizer = AdamW(learning_rate=0.1, weight_decay=0.01 / 0.1)
    optimizer.build(ours)
    for _ in range(20):
        optimizer.apply([2 * (ours[0] - 1)])
    expected = tensorflow_addons([START], lambda t, x: [2 * (x[0] - 1)], 20, lambda t: 0.1, lambda t: 0.01, set())
    np.testing.assert_allclose(ours[0], expected[0], rtol=0, atol=1e-12)


def test_every_section_has_its_code():
    assert {name for name, found in blocks().items() if found} == {*TOLERANCE, "TensorFlow Addons"}


def test_a_scheduler_of_torch():
    torch = pytest.importorskip("torch")
    theirs, ours = torch.nn.Parameter(torch.tensor(START)), START.copy()
    adam = torch.optim.AdamW([theirs], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=20)
    optimizer = AdamW.like_torch(lr=schedules.CosineDecay(0.1, 20))
    optimizer.build([ours])
    for _ in range(20):
        theirs.grad = 2 * (theirs.detach() - 1)
        adam.step()
        scheduler.step()
        optimizer.apply([2 * (ours - 1)])
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-12)


def table():
    """The table of defaults and conventions: the cells of each row, by the call in it."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `AdamW")]
    return {re.search(r"AdamW[.\w]*", cells[0])[0]: cells[1:] for cells in rows}


def by_keras(gradient, **options):
    keras = pytest.importorskip("keras")
    variable = keras.Variable(np.ones(1), dtype="float64")
    keras.optimizers.AdamW(**options).apply([keras.ops.convert_to_tensor(gradient)], [variable])
    return keras.ops.convert_to_numpy(variable.value)


def by_torch(gradient, **options):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    parameter.grad = torch.tensor(gradient)
    torch.optim.AdamW([parameter], **options).step()
    return parameter.detach().numpy()


def by_optax(gradient, **options):
    optax = pytest.importorskip("optax")
    with jax.enable_x64(True):
        ones = jax.numpy.ones(1)
        transformation = optax.adamw(0.001, **options)
        updates, _ = transformation.update(jax.numpy.asarray(gradient), transformation.init(ones), ones)
        return np.asarray(optax.apply_updates(ones, updates))


def by_tensorflow_addons(gradient, weight_decay):
    ones, rates = [np.ones(1)], (lambda t: 0.001, lambda t: weight_decay)
    return tensorflow_addons(ones, lambda t, x: [gradient], 1, *rates, set())[0]


OTHERS = {
    "AdamW": (by_keras, "keras.optimizers.AdamW"),
    "AdamW.like_torch": (by_torch, "torch.optim.AdamW"),
    "AdamW.like_optax": (by_optax, "optax.adamw"),
    "AdamW.like_tfa": (by_tensorflow_addons, None),
}


@pytest.mark.parametrize("call", OTHERS)
def test_the_table_has_the_defaults_of_each(call):
    rate, betas, epsilon, _, decay, *_ = table()[call]
    expected = {
        "learning_rate": rate,
        "lr": rate,
        "betas": betas,
        "epsilon": epsilon,
        "eps": epsilon,
        "weight_decay": decay,
    }
    expected |= dict(zip(("beta_1", "beta_2"), betas.split(", "), strict=True))
    expected |= dict(zip(("b1", "b2"), betas.split(", "), strict=True))
    makers = [getattr(AdamW, call.partition(".")[2], AdamW)]
    if OTHERS[call][1]:
        library, _, path = OTHERS[call][1].partition(".")
        found = pytest.importorskip(library)
        for part in path.split("."):
            found = getattr(found, part)
        makers.append(found)
    for maker in makers:
        seen = 0
        for name, parameter in inspect.signature(maker).parameters.items():
            if name in expected:
                text, value = expected[name], parameter.default
                value = "required" if value is parameter.empty else value
                read = text if text == "required" else tuple(map(float, text.split(", ")))
                assert (value if isinstance(value, (str, tuple)) else (value,)) == read, (maker, name)
                seen += 1
        assert seen >= 4


@pytest.mark.parametrize("call", OTHERS)
def test_the_table_tells_what_each_does(call):
    """One step of 0.001 with no gradient shows the decay; one with a gradient of epsilon, where that is added."""
    _, _, epsilon, place, _, multiplied, _ = table()[call]
    raw = {"the root of the raw second moment": True, "the root of the corrected one": False}[place]
    shrunk = {"yes": 0.5 * 0.001, "**no**": 0.5}[multiplied]
    moved = 0.001 * (0.001**0.5 / (0.001**0.5 + 1) if raw else 0.5)
    for gradient, decay, expected in [(0.0, 0.5, 1 - shrunk), (float(epsilon), 0.0, 1 - moved)]:
        theirs = OTHERS[call][0](np.full(1, gradient), weight_decay=decay)
        ours = [np.ones(1)]
        required = {"learning_rate": 0.001} if call == "AdamW.like_optax" else {}  # the default of the others
        optimizer = getattr(AdamW, call.partition(".")[2], AdamW)(weight_decay=decay, **required)
        optimizer.build(ours)
        optimizer.apply([np.full(1, gradient)])
        for value in (theirs, ours[0]):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4 * (1 - expected))  # Keras: float32
