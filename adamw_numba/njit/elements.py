"""`update` and `update_amsgrad`: the formula of update.py for one element, on the processor and on a GPU."""

from ..arrays.compiled import jit_for_python
from ..cpu.blocks import cast_coefficients
from ..cpu.kernels import update as update_element
from .checks import checked


@jit_for_python
def update(p, g, m, v, c):
    """One step of one element: values in, values out.

    It can be called in functions of `numba.njit` and, as a device function, of `numba.cuda.jit`. Unlike `AdamW` and
    `step`, it leaves subnormal numbers as they are, which only tiny gradients in float32 make.

    Parameters
    ----------
    p, g, m, v : float32 or float64
        The element of the variable, of its gradient, momentum and velocity, of one type.
    c : Coefficients
        The numbers of this step, of `coefficients`.

    Returns
    -------
    p, m, v : float
        The new values. In Python they are floats.

    Examples
    --------
    >>> from adamw_numba.njit import coefficients
    >>> p, m, v = update(1.0, 0.5, 0.0, 0.0, coefficients(0, 0.1, weight_decay=0))
    >>> round(p, 3)
    0.9
    """
    c = cast_coefficients(c, 1.0, checked(p, g, m, v))
    # Where there is no lead, not 0 times the gradient: that would make another zero of some zeros.
    if c.lead == 0:
        p, m, v, _, _ = update_element(p, g, m, v, None, None, None, c.limit, None, c)
    else:
        p, m, v, _, _ = update_element(p, g, m, v, None, None, None, c.limit, c.lead, c)
    return p, m, v


@jit_for_python
def update_amsgrad(p, g, m, v, velocity_hat, c):
    """One step of AMSGrad of one element, as `update`.

    Parameters
    ----------
    p, g, m, v, c
        As of `update`.
    velocity_hat : float32 or float64
        The largest velocity so far.

    Returns
    -------
    p, m, v, velocity_hat : float
        The new values.
    """
    cast, c = type(p), cast_coefficients(c, 1.0, checked(p, g, m, v, velocity_hat))
    if c.lead == 0:
        p, m, v, highest, _ = update_element(p, g, m, v, velocity_hat, None, None, c.limit, None, c)
    else:
        p, m, v, highest, _ = update_element(p, g, m, v, velocity_hat, None, None, c.limit, c.lead, c)
    return p, m, v, highest * cast(1)  # which Numba takes for a number that may be None
