"""`adamw_numba.njit.step`, `coefficients` and `update`: the bits of `AdamW.apply`, from users' own compiled code."""

import itertools

import numpy as np
import pytest
from numba import njit, prange
from numba.core.errors import TypingError

from adamw_numba import AdamW
from adamw_numba import coefficients as common
from adamw_numba.njit import coefficients, step, update, update_amsgrad

STEPS = 6
# Options of AdamW, and those of `step` that say the same.
OPTIONS = {
    "defaults": ({}, {}),
    "no decay": ({"weight_decay": 0.0}, {"weight_decay": 0}),
    "betas": ({"beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-3}, {"beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-3}),
    "amsgrad": ({"amsgrad": True}, {}),
    "clip": ({"clipvalue": 0.5}, {"clipvalue": 0.5}),
    "nesterov": ({"nesterov": True}, {"nesterov": True}),
    "corrected": ({"epsilon_mode": "corrected"}, {"epsilon_mode": "corrected"}),
    "decoupled": ({"decouple_lr": True}, {"decouple_lr": True}),
    "maximize": ({"maximize": True}, {"scale": -1.0}),
    "loss scale": ({"loss_scale_factor": 1024.0}, {"scale": 1 / 1024}),
    "tiny scale": ({"loss_scale_factor": 2.0**120}, {"scale": 2.0**-120}),
    "all": (
        {"amsgrad": True, "clipvalue": 0.7, "nesterov": True, "epsilon_mode": "corrected", "weight_decay": 0.1},
        {"clipvalue": 0.7, "nesterov": True, "epsilon_mode": "corrected", "weight_decay": 0.1},
    ),
}


def c_order(x):
    return x.copy()


def fortran(x):
    return np.asfortranarray(x)


def every_second(x):
    return np.repeat(x, 2, axis=-1)[..., ::2]


def backwards(x):
    return x[::-1].copy()[::-1]


def transposed(x):
    return np.ascontiguousarray(x.T).T


# Shape, and how the variable, its gradient and its state are laid out.
LAYOUTS = {
    "vector": ((37,), c_order, c_order, c_order),
    "matrix": ((5, 7), c_order, c_order, c_order),
    "matrix in Fortran order": ((5, 7), fortran, fortran, fortran),
    "mixed orders": ((5, 7), fortran, c_order, c_order),
    "strided vector": ((37,), every_second, c_order, c_order),
    "backwards": ((37,), backwards, backwards, every_second),
    "strided matrix": ((5, 7), every_second, transposed, c_order),
    "three dimensions": ((3, 4, 5), transposed, every_second, c_order),
    "one number": ((), c_order, c_order, c_order),
    "empty": ((0,), c_order, c_order, c_order),
    "empty matrix": ((3, 0), every_second, c_order, c_order),
    "no rows": ((0, 3), fortran, c_order, c_order),
    "long": ((70_001,), c_order, c_order, c_order),
}


def numbers(shape, dtype, steps=STEPS):
    """A variable and its gradients, of all magnitudes; zeros at last, whose moments decay."""
    rng = np.random.default_rng(hash((shape, dtype)) % 2**32 if shape else 3)
    p = rng.normal(size=shape).astype(dtype)
    gradients = rng.normal(size=(steps, *shape)) * 10.0 ** rng.integers(-30, 4, size=(steps, *shape))
    gradients[-2:] = 0
    return np.asarray(p), gradients.astype(dtype)


def by_adamw(p, gradients, options):
    """Variable and moments after `AdamW.apply`."""
    p = np.array(p)
    optimizer = AdamW(**{"learning_rate": 0.1, **options})
    optimizer.build([p])
    for g in gradients:
        optimizer.apply([np.array(g)])
    slots = {name.partition("/")[0]: array for name, array in optimizer.state.items()}
    return [p, slots["momentum"], slots["velocity"], *([slots["velocity_hat"]] if "amsgrad" in options else [])]


def same_bits(found, wanted):
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(found, wanted, strict=True)
    )


def by_step(p, gradients, options, amsgrad=False, layouts=(c_order, c_order, c_order)):
    of_p, of_g, of_state = layouts
    p = of_p(p)
    state = [of_state(np.zeros_like(p)) for _ in range(3 if amsgrad else 2)]
    for number, g in enumerate(gradients):
        step(p, of_g(np.asarray(g)), *state[:2], number, 0.1, velocity_hat=state[2] if amsgrad else None, **options)
    return [p, *state]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype):
    theirs, ours = options
    p, gradients = numbers((37,), dtype)
    found = by_step(p, gradients, ours, amsgrad="amsgrad" in theirs)
    assert same_bits(found, by_adamw(p, gradients, theirs))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, dtype):
    shape, *layouts = layout
    p, gradients = numbers(shape, dtype)
    found = by_step(p, gradients, {}, layouts=layouts)
    assert same_bits(map(np.ascontiguousarray, found) if shape else found, by_adamw(p, gradients, {}))


def test_subnormal_moments_become_zero_as_in_adamw():
    p, gradients = np.ones(5, np.float32), np.zeros((2000, 5), np.float32)
    gradients[0] = 1e-10
    found = by_step(p, gradients, {})
    assert same_bits(found, by_adamw(p, gradients, {}))
    assert (found[1] == 0).all()


@njit
def descend(p, gradients, m, v, rate):
    for number in range(len(gradients)):
        step(p, gradients[number], m, v, number, rate)


@njit(fastmath=True, error_model="python", boundscheck=True)
def descend_with_all(p, gradients, m, v, top):
    """With options of its own that must not reach the formula, which stands beside products like its own."""
    total = 0.0
    for number in range(len(gradients)):
        total += (gradients[number] * p * 0.9 + p * 0.1).sum()
        step(
            p, gradients[number], m, v, number, 0.1, 0.1, velocity_hat=top, clipvalue=0.7, nesterov=True,
            epsilon_mode="corrected",
        )  # fmt: skip
    return total


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_in_a_compiled_loop(dtype):
    p, gradients = numbers((37,), dtype)
    found = [p.copy(), np.zeros_like(p), np.zeros_like(p)]
    descend(found[0], gradients, *found[1:], 0.1)
    assert same_bits(found, by_adamw(p, gradients, {}))
    found = [p.copy(), np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)]
    descend_with_all(found[0], gradients, *found[1:])
    assert same_bits(found, by_adamw(p, gradients, OPTIONS["all"][0]))


@njit(parallel=True)
def descend_in_parallel(p, gradients, m, v, rate):
    for k in prange(len(p)):
        for number in range(gradients.shape[1]):
            step(p[k], gradients[k, number], m[k], v[k], number, rate)


def test_in_parallel_loops():
    """Each row is a variable; the threads do not get into each other's way."""
    rows = [numbers((41,), "float32", steps=8) for _ in range(64)]
    rows = [(p + k, g * (k + 1)) for k, (p, g) in enumerate(rows)]
    p, gradients = (np.array(part, np.float32) for part in zip(*rows, strict=True))
    found = [p.copy(), np.zeros_like(p), np.zeros_like(p)]
    descend_in_parallel(found[0], gradients, *found[1:], 0.1)
    for k, (own, own_gradients) in enumerate(zip(p, gradients, strict=True)):
        assert same_bits([array[k] for array in found], by_adamw(own, own_gradients, {}))


def test_an_error_in_a_parallel_loop_is_the_users():
    with pytest.raises((ValueError, SystemError)) as error:
        descend_in_parallel(np.ones((2, 3)), np.ones((2, 1, 3)), np.zeros((2, 3)), np.zeros((2, 3)), -1.0)
    assert isinstance(error.value if isinstance(error.value, ValueError) else error.value.__cause__, ValueError)


# One element


@njit
def descend_by_element(p, gradients, m, v, top, nesterov, amsgrad):
    for number in range(len(gradients)):
        c = coefficients(number, 0.1, clipvalue=0.7, nesterov=nesterov)
        for i in range(p.size):
            g = gradients[number, i]
            if amsgrad:
                p[i], m[i], v[i], top[i] = update_amsgrad(p[i], g, m[i], v[i], top[i], c)
            else:
                p[i], m[i], v[i] = update(p[i], g, m[i], v[i], c)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_element_by_element(dtype, nesterov, amsgrad):
    p, gradients = numbers((37,), dtype)
    gradients[abs(gradients) < 1e-12] = 0  # others' squares are subnormal in float32, which `update` keeps
    found = [p.copy(), *(np.zeros_like(p) for _ in range(3))]
    descend_by_element(found[0], gradients, *found[1:], nesterov, amsgrad)
    options = {"clipvalue": 0.7, "nesterov": nesterov, **({"amsgrad": True} if amsgrad else {})}
    wanted = by_adamw(p, gradients, options)
    assert same_bits(found[: len(wanted)], wanted)


def test_coefficients_are_those_of_the_kernels():
    c = coefficients(4, 0.1, 0.01, 0.8, 0.95, 1e-5, 2.0, True, "corrected", False, 0.5)
    hyper = AdamW(
        0.1,
        weight_decay=0.01,
        beta_1=0.8,
        beta_2=0.95,
        epsilon=1e-5,
        clipvalue=2.0,
        nesterov=True,
        epsilon_mode="corrected",
    )
    wanted = common.coefficients(hyper, 4, 0.1, 0.01, 1.0, 0.5)._replace(average_c=1.0)
    assert c == wanted
    assert njit(lambda: coefficients(4, 0.1, 0.01, 0.8, 0.95, 1e-5, 2.0, True, "corrected", False, 0.5))() == c


# Errors

WRONG_NUMBERS = {
    "number": {"number": -1},
    "a number that is not whole": {"number": 1.5},
    "learning_rate": {"learning_rate": -0.1},
    "infinite rate": {"learning_rate": np.inf},
    "weight_decay": {"weight_decay": np.nan},
    "beta_1": {"beta_1": 1.0},
    "beta_2": {"beta_2": -0.1},
    "epsilon": {"epsilon": 0.0},
    "clipvalue": {"clipvalue": 0.0},
    "scale": {"scale": np.nan},
}


@pytest.mark.parametrize("case", WRONG_NUMBERS)
def test_wrong_numbers(case):
    arrays = [np.ones(3), np.ones(3), np.zeros(3), np.zeros(3)]
    ((name, value),) = WRONG_NUMBERS[case].items()
    with pytest.raises(ValueError, match=rf"`{name}` must be .* Received:") as error:
        step(*arrays, **{"number": 0, "learning_rate": 0.1, name: value})
    assert repr(value) in str(error.value)
    assert [array.tolist() for array in arrays] == [[1] * 3, [1] * 3, [0] * 3, [0] * 3]


NO_NUMBERS = {
    "learning_rate": None,
    "weight_decay": "0.1",
    "beta_1": np.ones(1),
    "beta_2": None,
    "epsilon": (1e-7,),
    "scale": "1",
    "clipvalue": np.ones(1),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number(name):
    value = NO_NUMBERS[name]
    with pytest.raises(TypeError, match=rf"`{name}` is .* of type {type(value).__name__}; expected a number"):
        step(np.ones(3), np.ones(3), np.zeros(3), np.zeros(3), **{"number": 0, "learning_rate": 0.1, name: value})
    scope = {"step": step}
    rest = "value" if name == "learning_rate" else f"0.1, {name}=value"
    exec(f"def f(p, value): step(p, p.copy(), p.copy(), p.copy(), 0, {rest})", scope)
    with pytest.raises(TypingError, match=rf"`{name}` is .*; expected a number"):
        njit(scope["f"])(np.ones(3), value)


@pytest.mark.parametrize("number", [0.0, True])
def test_a_number_of_steps_that_is_no_integer(number):
    with pytest.raises(TypingError, match=r"`number` is (float64|bool).*; expected an integer"):
        njit(lambda p: step(p, p.copy(), p.copy(), p.copy(), number, 0.1))(np.ones(3))


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(range(5), 2)])
@pytest.mark.parametrize("overlap", ["the same", "a part", "the same, with gaps"])
def test_arrays_that_share_memory(one, other, overlap):
    arrays = [np.ones(6) for _ in range(5)]
    if overlap == "a part":
        memory = np.ones(11)
        arrays[one], arrays[other] = memory[:6], memory[5:]
    else:
        arrays = [array[::2] for array in arrays] if overlap == "the same, with gaps" else arrays
        arrays[other] = arrays[one]
    with pytest.raises(ValueError, match=r"share.* memory.*; expected arrays that do not overlap"):
        step(*arrays[:4], 0, 0.1, velocity_hat=arrays[4])
    assert all((array == 1).all() for array in arrays)


def test_rows_that_lie_between_each_other_are_fine():
    memory = np.ones((3, 4))
    memory[:, 2:] = 0
    p, g, m, v = memory.T
    step(p, g, m, v, 0, 0.1, weight_decay=0)
    assert p == pytest.approx(0.9)
    step(*np.ones((4, 0)), 0, 0.1)


@pytest.mark.parametrize("function", [update, lambda *a: update_amsgrad(*a[:4], 0.0, a[4])])
@pytest.mark.parametrize("elements", [(1, 2, 0, 0), (1.0, np.float32(2), 0.0, 0.0), (1j, 2.0, 0.0, 0.0)], ids=str)
def test_elements_of_another_type(function, elements):
    with pytest.raises(TypingError, match=r"`[pg]` is .* and `p` is .*; expected float32 or float64 for all"):
        function(*elements, coefficients(0, 0.1))


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("layout", [c_order, every_second])
def test_wrong_shapes(place, layout):
    arrays = [layout(np.ones(4 if k == place else 3)) for k in range(5)]
    name = ["g", "g", "m", "v", "velocity_hat"][place]  # if `p` differs, `g` is the first that does not fit
    with pytest.raises(ValueError, match=f"`{name}` must have the shape of `p`.*\\(4,\\)") as error:
        step(*arrays[:4], 0, 0.1, velocity_hat=arrays[4])
    assert "(3,)" in str(error.value)
    assert all((array == 1).all() for array in arrays)


def read_only(x):
    x.flags.writeable = False
    return x


WRONG_TYPES = {
    "another dtype": (lambda a: a.__setitem__("g", np.ones(3, np.float32)), "`g` is array.float32.*float64, as `p` has"),
    "another dimension": (lambda a: a.__setitem__("m", np.ones((3, 1))), "`m` is array.*expected 1 dimensions"),
    "integers": (lambda a: a.__setitem__("p", np.ones(3, int)), "`p` is array.int64.*expected an array of float32 or float64"),
    "a list": (lambda a: a.__setitem__("v", [1.0]), "`v` is .*list.*expected an array"),
    "a number": (lambda a: a.__setitem__("v", 1.0), "`v` is float64; expected an array"),
    "half": (lambda a: a.__setitem__("p", np.ones(3, np.float16)), "`p` is array.float16"),
    "complex": (lambda a: a.__setitem__("p", np.ones(3, complex)), "`p` is array.complex128"),
    "read-only": (lambda a: a.__setitem__("m", read_only(np.zeros(3))), "`m` is .*read-only"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TYPES)
@pytest.mark.filterwarnings("ignore::numba.NumbaPendingDeprecationWarning")
def test_wrong_types(case):
    arrays = {"p": np.ones(3), "g": np.ones(3), "m": np.zeros(3), "v": np.zeros(3)}
    change, message = WRONG_TYPES[case]
    change(arrays)
    with pytest.raises(TypingError, match=message):
        step(*arrays.values(), 0, 0.1)
    with pytest.raises(TypingError, match=message):
        njit(lambda p, g, m, v: step(p, g, m, v, 0, 0.1))(*arrays.values())


def test_a_read_only_gradient_is_fine():
    p = np.ones(3)
    step(p, read_only(np.ones(3)), np.zeros(3), np.zeros(3), 0, 0.1)
    assert (p < 1).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nesterov", 1, "`nesterov` is 1; expected True or False"),
        ("epsilon_mode", "torch", "`epsilon_mode` is 'torch'; expected 'hat' or 'corrected'"),
    ],
)
def test_wrong_flags(name, value, message):
    scope = {"step": step, "value": value}
    exec(f"def f(p): step(p, p.copy(), p.copy(), p.copy(), 0, 0.1, {name}={value!r})", scope)
    with pytest.raises(TypingError, match=message):
        njit(scope["f"])(np.ones(3))


def test_flags_that_are_variables():
    function = njit(lambda p, flag: step(p, p.copy(), p.copy(), p.copy(), 0, 0.1, nesterov=flag))
    with pytest.raises(
        TypingError, match=r"`nesterov` is a variable .*; expected True or False, written out in the call"
    ):
        function(np.ones(3), True)


def test_python_checks_the_mode():
    with pytest.raises(
        ValueError, match=r"`epsilon_mode` must be 'hat' or 'corrected'. Received: epsilon_mode='torch'"
    ):
        step(np.ones(3), np.ones(3), np.ones(3), np.ones(3), 0, 0.1, epsilon_mode="torch")
