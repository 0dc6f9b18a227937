"""Several arrays, and those of torch and JAX, in the compiled loop: as in the ordinary one."""

import numpy as np
import pytest
from helpers.libraries import jax, jnp, torch

from adamw_numba import Checkpoints, minimize, multistart, schedules
from adamw_numba.minimizer import compiled_loop as loops
from adamw_numba.minimizer.run import Run

SHAPES = {"w": (2, 3), "deep": {"b": (3,), "s": ()}}
TARGET = {"w": np.linspace(-1, 2, 6).reshape(2, 3), "deep": {"b": np.linspace(0, 1, 3), "s": np.asarray(0.5)}}


@pytest.fixture
def advanced(monkeypatch):
    """How often the compiled loop is entered."""
    calls, advance = [], loops.Loop.advance
    monkeypatch.setattr(loops.Loop, "advance", lambda self, most: (calls.append(most), advance(self, most))[1])
    return calls


def mapped(function, *trees):
    if isinstance(trees[0], dict):
        return {key: mapped(function, *(tree[key] for tree in trees)) for key in trees[0]}
    return function(*trees)


def leaves_of(tree):
    return [leaf for child in tree.values() for leaf in leaves_of(child)] if isinstance(tree, dict) else [tree]


def start_of(library, dtype="float64"):
    made = mapped(lambda target: np.full(target.shape, 1.5, dtype), TARGET)
    if library == "torch":
        return mapped(torch.tensor, made)
    if library == "mixed":
        return made | {"w": torch.tensor(made["w"])}
    if library == "jax":
        return mapped(jnp.asarray, made)
    return made


def like(target, x):
    return torch.tensor(target, dtype=x.dtype) if torch_is(x) else target.astype(np.asarray(x).dtype)


def torch_is(x):
    return type(x).__module__.startswith("torch")


def both(x):
    """Fourth powers, so that no gradient is exact; what it is given is overwritten, where that is possible."""
    away = mapped(lambda target, leaf: leaf - like(target, leaf), TARGET, x)
    value = sum(float((leaf**4).sum()) for leaf in leaves_of(away))
    for leaf in leaves_of(x):
        if isinstance(leaf, np.ndarray) or torch_is(leaf):
            leaf[...] = 7
    return value, mapped(lambda leaf: 4 * leaf**3, away)


def value_alone(x):
    return both(mapped(lambda leaf: leaf.clone() if torch_is(leaf) else leaf.copy(), x))[0]


def of_torch(x):
    return sum(
        ((leaf - like(target, leaf)) ** 4).sum() for target, leaf in zip(*map(leaves_of, (TARGET, x)), strict=True)
    )


OPTIONS = {
    "plain": {},
    "bounds": {"bounds": {"w": (-0.5, 1.0), "deep": {"b": (0.25, None)}}},
    "bounds and units": {"bounds": {"w": (-0.5, 1.0)}, "x_scale": 0.7},
    "units": {"x_scale": {"w": np.asarray(0.5), "deep": {"b": np.asarray(2.0), "s": np.asarray(3.0)}}},
    "auto": {"learning_rate": "auto", "maxiter": 200},
    "stages": {"learning_rate": "auto", "maxiter": 4000, "gtol": 1e-3},
    "averages": {"use_ema": True, "ema_overwrite_frequency": 7, "amsgrad": True, "weight_decay": 0.1},
    "clip by value": {"clipvalue": 0.5},
    "schedule": {"learning_rate": schedules.CosineDecay(0.1, 60)},
    "tolerances": {"xtol": 1e-2, "ftol": 1e-6, "gtol": 1e-2, "maxiter": 500},
    "callbacks": {"callback": lambda intermediate_result: None, "callback_every": 16, "return_best": False},
}  # fmt: skip


def assert_equal(one, other):
    for key in ("fun", "nit", "nfev", "njev", "status", "message", "fun_last"):
        assert one[key] == other[key], key
    for key in ("x", "x_last", "jac", *(["x_average"] if "x_average" in one else [])):
        for ours, theirs in zip(leaves_of(one[key]), leaves_of(other[key]), strict=True):
            assert (type(ours), ours.shape, ours.dtype) == (type(theirs), theirs.shape, theirs.dtype)
            np.testing.assert_array_equal(ours, theirs, err_msg=key)
    for key in one.history.keys() - {"time"}:
        np.testing.assert_array_equal(one.history[key], other.history[key], err_msg=key)
    assert one.state.keys() == other.state.keys()
    for name, array in one.state.items():
        np.testing.assert_array_equal(array, other.state[name], err_msg=name)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("library", "dtype"), [("numpy", "float64"), ("torch", "float64"), ("mixed", "float32")])
def test_same_bits_as_the_ordinary_loop(library, dtype, options, advanced):
    x0 = start_of(library, dtype)
    keywords = {"jac": True, "learning_rate": 0.05, "maxiter": 60, "gtol": None} | OPTIONS[options]
    found = minimize(both, x0, **keywords)
    assert advanced
    assert_equal(found, minimize(both, x0, **keywords, compiled=False))


@pytest.mark.parametrize("jac", [None, "3-point", "torch"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_whatever_finds_the_gradient(jac, library, advanced):
    if library == "torch" and jac != "torch":
        pytest.skip("finite differences need NumPy arrays")
    if jac == "torch":
        pytest.importorskip("torch")
    fun = of_torch if jac == "torch" else value_alone
    keywords = {"jac": jac, "learning_rate": 0.05, "maxiter": 20, "gtol": None}
    found = minimize(fun, start_of(library), **keywords)
    assert advanced
    assert_equal(found, minimize(fun, start_of(library), **keywords, compiled=False))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS)
def test_arrays_of_jax(options, dtype, advanced):
    """Rounded otherwise than by JAX's own operations, which the ordinary loop uses."""
    with jax.enable_x64(dtype == "float64"):
        x0 = start_of("jax", dtype)
        keywords = {"jac": True, "learning_rate": 0.05, "maxiter": 60, "gtol": None} | OPTIONS[options]
        keywords |= {} if keywords["maxiter"] < 1000 else {"maxiter": 300}
        found = minimize(both, x0, **keywords)
        assert advanced
        ordinary = minimize(both, x0, **keywords, compiled=False)
        for key in ("x", "x_last", "jac", *(["x_average"] if "x_average" in found else [])):
            for ours, theirs in zip(leaves_of(found[key]), leaves_of(ordinary[key]), strict=True):
                assert isinstance(ours, jax.Array)
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
                tolerance = 1e-4 if dtype == "float32" else 1e-10
                np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=key)


@pytest.mark.parametrize(
    "case",
    [
        "one of float32, one of float64",
        "a norm of several arrays",
        "16 bits",
    ],
)
def test_what_stays_in_the_ordinary_loop(case, advanced):
    x0 = start_of("numpy")
    options = {}
    if case == "16 bits":
        x0 = mapped(lambda leaf: leaf.astype(np.float16), x0)
    elif case == "a norm of several arrays":
        options = {"clipnorm": 0.1}
    else:
        x0["w"] = x0["w"].astype(np.float32)
    minimize(both, x0, jac=True, learning_rate=0.05, maxiter=5, gtol=None, **options)
    assert not advanced


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_arrays_that_were_kept_do_not_change(library):
    kept = []

    def fun(x):
        kept.append((x, mapped(lambda leaf: np.asarray(leaf).copy(), x)))
        away = mapped(lambda target, leaf: leaf - like(target, leaf), TARGET, x)
        return sum(float((leaf**2).sum()) for leaf in leaves_of(away)), mapped(lambda leaf: 2 * leaf, away)

    x0 = start_of(library, "float32")
    minimize(fun, x0, jac=True, learning_rate=0.05, maxiter=30, gtol=None)
    assert len(kept) == 31
    for given, copy in kept:
        mapped(np.testing.assert_array_equal, given, copy)
    mapped(lambda leaf: np.testing.assert_array_equal(leaf, np.float32(1.5)), x0)


@pytest.mark.parametrize("nth", [1, 2, 20])
def test_what_the_objective_raises(nth):
    calls = []

    def fun(x):
        calls.append(1)
        if len(calls) == nth:
            raise ZeroDivisionError("on purpose")
        return both(x)

    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        minimize(fun, start_of("torch"), jac=True, learning_rate=0.05, maxiter=60, gtol=None)
    result = caught.value.intermediate_result
    assert result.nfev == nth - 1
    if nth > 1:
        expected = minimize(both, start_of("torch"), jac=True, learning_rate=0.05, maxiter=nth - 2 or 1, gtol=None)
        if nth > 2:
            for ours, theirs in zip(leaves_of(result.x), leaves_of(expected.x), strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda g: g | {"w": g["w"][:1]}, r"the gradient of 'w' has shape \(1, 3\)"),
        (lambda g: {"w": g["w"]}, "lacks"),
        (lambda g: g | {"w": g["w"].astype(complex)}, "complex"),
        (lambda g: g | {"w": "text"}, "text"),
        (lambda g: leaves_of(g)[:2], "2 arrays"),
    ],
)
def test_gradients_that_do_not_fit(wrong, match):
    calls = []

    def fun(x):
        calls.append(1)
        value, gradient = both(x)
        return value, gradient if len(calls) < 5 else wrong(gradient)

    with pytest.raises((TypeError, ValueError), match=match) as caught:
        minimize(fun, start_of("numpy"), jac=True, learning_rate=0.05, maxiter=60, gtol=None)
    assert caught.value.intermediate_result.nit == 4


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_run_goes_on_after_it_was_saved(library, tmp_path):
    keywords = {"jac": True, "learning_rate": 0.05, "gtol": None}
    saved = Checkpoints(tmp_path, every=7)
    minimize(both, start_of(library), maxiter=20, checkpoint=saved, **keywords)
    resumed = minimize(both, start_of(library), maxiter=45, checkpoint=saved, **keywords)
    straight = minimize(both, start_of(library), maxiter=45, **keywords)
    for ours, theirs in zip(leaves_of(resumed.x), leaves_of(straight.x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_many_starts_of_several_arrays():
    starts = [start_of("numpy"), mapped(lambda leaf: -leaf, start_of("numpy"))]
    best = multistart(both, starts, jac=True, learning_rate=0.05, maxiter=40, gtol=None)
    alone = [minimize(both, x0, jac=True, learning_rate=0.05, maxiter=40, gtol=None) for x0 in starts]
    assert best.fun == min(result.fun for result in alone)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("nth", [1, 3])
def test_an_interrupt_while_arrays_are_brought_home(nth, library, tmp_path, monkeypatch):
    """What is counted and what the arrays hold belong together, also for those who go on from it."""
    options = {"jac": True, "learning_rate": 0.05, "gtol": None, "maxiter": 400}
    put, calls = Run.put, []

    def interrupted(self, role, values):
        calls.append(role)
        if calls.count("momentum") == nth and role == "momentum":
            raise KeyboardInterrupt
        put(self, role, values)

    whole = minimize(both, start_of(library, "float32"), **options)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "put", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            minimize(both, start_of(library, "float32"), checkpoint=tmp_path / "run.npz", **options)
    found = caught.value.intermediate_result
    assert 0 < found.nit < 400
    assert found.fun_last == pytest.approx(both(mapped(np.array, mapped(np.asarray, found.x_last)))[0], rel=1e-5)
    resumed = minimize(both, start_of(library, "float32"), checkpoint=tmp_path / "run.npz", **options)
    for ours, theirs in zip(leaves_of(resumed.x_last), leaves_of(whole.x_last), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_gradients_in_half_precision():
    def fun(x):
        return float((x**2).sum()), (2 * x).bfloat16()

    found, ordinary = (
        minimize(fun, torch.ones(3), jac=True, learning_rate=0.05, maxiter=20, compiled=compiled)
        for compiled in (True, False)
    )
    np.testing.assert_array_equal(found.x, ordinary.x)


def half_square(x):
    return float((x**2).sum()) / 2, x


def test_jax_without_its_compiler():
    with jax.disable_jit():
        found = minimize(half_square, jnp.ones(3), jac=True, learning_rate=0.05, maxiter=20)
    expected = minimize(half_square, np.ones(3, np.float32), jac=True, learning_rate=0.05, maxiter=20)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-5)


def test_jax_may_donate_its_arrays():
    donating = jax.jit(lambda x: ((x**2).sum(), 2 * x), donate_argnums=0)
    for compiled in (True, False):
        x0 = jnp.ones(3)
        result = minimize(donating, x0, jac=True, learning_rate=0.05, maxiter=20, compiled=compiled)
        assert result.fun < 3
        assert not x0.is_deleted()


def test_torch_with_another_default_device():
    x0 = {"a": torch.ones(2)}
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        result = minimize(
            lambda x: (float((x["a"] ** 2).sum()), {"a": 2 * x["a"]}),
            x0,
            jac=True,
            learning_rate=0.05,
            maxiter=20,
        )
    finally:
        torch.set_default_device(before)
    assert result.fun < 2
