"""Hyperparameters and the step number become the few numbers a kernel needs: in float64, cast once by their user."""

import math
from typing import Any

import numpy as np

from .update import Coefficients


def coefficients(
    hyper: Any, updates: Any, learning_rate: Any, weight_decay: Any, unscale: Any, clip: Any, xp: Any = math
) -> Coefficients:
    """The coefficients of one update, without anything that differs from array to array.

    Parameters
    ----------
    hyper : AdamW
        Anything with its hyperparameters as attributes.
    updates : int or scalar array
        The number of updates before this one; micro-steps are not counted.
    learning_rate, weight_decay, unscale, clip : float or scalar array
        This step's rates, the inverse of the loss scale, and the factor of a global clip (1 when off).
    xp : namespace
        Has ``sqrt``, ``expm1`` and ``where``: `math`, or the namespace of a traced `updates`.
    """
    micro_steps = hyper.gradient_accumulation_steps
    rate = 1 - hyper.ema_momentum
    first = (1.0 if updates == 0 else rate) if xp is math else xp.where(updates == 0, 1.0, rate)
    return Coefficients(
        alpha=step_size(updates, learning_rate, log(hyper.beta_1), log(hyper.beta_2), xp),
        decay=learning_rate * weight_decay,
        beta_1c=1 - hyper.beta_1,
        beta_2=hyper.beta_2,
        beta_2c=1 - hyper.beta_2,
        epsilon=hyper.epsilon,
        unscale=unscale,
        scale=clip / micro_steps if micro_steps else clip * unscale,
        limit=hyper.clipvalue or math.inf,
        average_c=first,
    )


def step_size(updates: Any, learning_rate: Any, log_beta_1: float, log_beta_2: float, xp: Any = math) -> Any:
    """The learning rate, including both bias corrections (Kingma & Ba 2015, end of section 2)."""
    correction_1 = -xp.expm1((updates + 1) * log_beta_1)
    correction_2 = -xp.expm1((updates + 1) * log_beta_2)
    return learning_rate * xp.sqrt(correction_2) / correction_1


def clip_factor(norm: Any, limit: float, maximum: Any = max) -> Any:
    """The factor of a global clip, for every gradient; NaN if the norm is not finite, as in Keras."""
    return limit / maximum(norm, limit) + (norm - norm)


def whole_norm(norms: np.ndarray[Any, Any]) -> float:
    """The norm of several norms, without overflow."""
    peak = float(np.max(norms, initial=0.0))
    return peak * float(np.linalg.norm(norms / peak)) if 0 < peak < math.inf else peak


def log(beta: float) -> float:
    """The logarithm of a decay rate, which may be 0."""
    return math.log(beta) if beta else -math.inf
