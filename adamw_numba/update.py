"""The arithmetic of one element: values in, values out, written once for every target.

`make_update` is bound three times: by `numba` (cpu/formula.py), by `numba.cuda` (gpu/formula.py), and by whole-array
functions of any Array-API namespace (array_api/functions.py). An argument that is ``None`` is an array that does not
exist; a coefficient with a neutral value is an option that is off.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

# The operands, in the order of the rows of every table of addresses: the variable, its gradient, and the slots of its
# state. Address 0 means that there is no gradient.
P, G, M, V, TOP, AVERAGE, TOTAL, MASTER, M_SCALE, V_SCALE, ROWS = range(11)
SLOTS = {
    "momentum": M,
    "velocity": V,
    "velocity_hat": TOP,
    "average": AVERAGE,
    "gradient_accumulator": TOTAL,
    "master": MASTER,
    "momentum_scale": M_SCALE,
    "velocity_scale": V_SCALE,
}
LEAST_EPSILON = 2.0**-126  # of compiled kernels: float32's smallest normal number, so that they never divide by 0


class Coefficients(NamedTuple):
    """The numbers that one step needs for one array (see coefficients.py); the first `VARYING` differ by step."""

    alpha: Any  # lr * sqrt(1 - beta_2^t) / (1 - beta_1^t); other bias corrections with nesterov
    decay: Any  # lr * weight_decay, or weight_decay alone
    epsilon: Any
    lead: Any  # what nesterov multiplies the gradient with, read only there
    beta_1: Any
    beta_1c: Any  # 1 - beta_1
    beta_2: Any
    beta_2c: Any  # 1 - beta_2
    unscale: Any  # 1 / loss scale, read only where gradients are accumulated
    scale: Any  # clip factor / micro-steps, or clip factor / loss scale; negative to maximize
    limit: Any  # clipvalue
    average_c: Any  # 1 - ema_momentum, 1 at the first update


VARYING = 4


class Variant(NamedTuple):
    """Which of a kernel's options are compiled in. On a GPU a clip by value is a number, so `clip` is False there."""

    average: bool
    accumulate: bool
    clip: bool
    nesterov: bool


class Storage(NamedTuple):
    """How a kernel's arrays are stored. On a GPU strides are numbers, so `strided` is False there."""

    p: str  # dtype of the variable
    g: str  # dtype of its gradient
    compute: str  # dtype of the arithmetic and of the slots
    strided: bool
    master: str  # what a 16-bit variable has beside itself: "", "float32" (a master copy), or "remainder" of one
    amsgrad: bool = False  # whether there is the largest second moment so far
    moments: str = "float32"  # or "bfloat16" or "8bit": what momentum and velocity are kept in (see arrays/moments.py)


def plain_muladd(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, for targets that have nothing else for it."""
    return a * b + c


def make_update(
    sqrt: Callable[..., Any], maximum: Callable[..., Any], minimum: Callable[..., Any], muladd: Callable[..., Any]
) -> Any:
    """AdamW with the "epsilon hat" of Adam (Kingma & Ba 2015, end of section 2), as in Keras.

    AMSGrad (Reddi et al. 2018) keeps the maximum of the raw second moment; the decay is decoupled (Loshchilov & Hutter
    2019, algorithm 2). With `lead`, the gradient is weighted in beside the momentum (Dozat 2016, without his schedule),
    as in optax.

    `muladd` is for sums of two products: a compiler is free to round either of them only once, together with the sum,
    and would choose one in this loop and the other in that one.
    """

    def update(p, g, m, v, top, average, total, limit, lead, c):  # type: ignore[no-untyped-def]
        x = g * c.scale if total is None else (g * c.unscale + total) * c.scale
        x = x if limit is None else minimum(maximum(x, -limit), limit)
        # Not `m + (x - m) * ...`: beside a large m or v, that loses a small x where beta is small.
        m = muladd(m, c.beta_1, x * c.beta_1c)
        v = muladd(v, c.beta_2, x * x * c.beta_2c)
        highest = None if top is None else maximum(top, v)
        second = v if top is None else highest
        p = p - p * c.decay
        p = p - (m * c.alpha if lead is None else muladd(m, c.alpha, x * lead)) / (sqrt(second) + c.epsilon)
        return p, m, v, highest, (None if average is None else average + (p - average) * c.average_c)

    return update


def accumulate(total: Any, g: Any, c: Any) -> Any:
    """The sum of unscaled gradients of one accumulation window."""
    return g * c.unscale + total


def blend(average: Any, p: Any, c: Any) -> Any:
    """The moving average of a variable that has no gradient at this step."""
    return average + (p - average) * c.average_c
