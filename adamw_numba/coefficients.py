"""Hyperparameters and the step number become the few numbers a kernel needs: in float64, cast once by their user."""

import math
from typing import Any

import numpy as np

from .update import Coefficients, Variant

MOST_STEPS = 2**62  # of a counter in int64, with room


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
        beta_1=hyper.beta_1,
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
    t = updates + 1
    correction_1, correction_2 = -xp.expm1(t * log_beta_1), -xp.expm1(t * log_beta_2)
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


class Recipe:
    """A kind of step: what stays the same while no hyperparameter changes, and the numbers that each step fills in.

    Attributes
    ----------
    c : Coefficients
        All but ``alpha`` and ``decay`` hold for every step of this kind; so does ``scale``, unless a norm is clipped.
    variant : Variant
    is_update, overwrite : bool
        Whether the variables change (otherwise gradients are accumulated), and become their averages.
    alone : bool
        Whether this is Adam alone for one variable, which no counter counts.
    factor : float
        What the norms that kernels take are multiplied with to be those of the mean unscaled gradients.
    takes_norm : bool
    nonfinite : {"propagate", "skip", "raise"}
    clipnorm, global_clipnorm : float or None
    threads : int or None
        The most threads to use; None for Numba's own number.
    number : int
        Calls of `apply` before this step.
    alpha, decay, scale : float
    clips : array of float64, or None
        What each variable's gradient is multiplied with besides.
    """

    def __init__(
        self, c: Coefficients, variant: Variant, is_update: bool, overwrite: bool, alone: bool = False
    ) -> None:
        self.c, self.variant, self.is_update, self.overwrite, self.alone = c, variant, is_update, overwrite, alone
        self.factor, self.takes_norm, self.nonfinite = 1.0, False, "propagate"
        self.clipnorm: float | None = None
        self.global_clipnorm: float | None = None
        self.threads: int | None = None
        self.number, self.alpha, self.decay, self.scale = 0, c.alpha, c.decay, c.scale
        self.clips: np.ndarray[Any, Any] | None = None

    def clip(self, norms: np.ndarray[Any, Any], norm: float) -> None:
        """Fill in what clipping by norm comes to."""
        if self.global_clipnorm:
            self.scale = self.c.scale * clip_factor(norm, self.global_clipnorm)
        if self.clipnorm:
            self.clips = self.clipnorm / np.maximum(norms, self.clipnorm)

    def coefficients(self) -> Coefficients:
        """The coefficients of the step that was filled in."""
        return self.c._replace(alpha=self.alpha, decay=self.decay, scale=self.scale)


class Recipes:
    """The recipes of all kinds of step, for as long as the hyperparameters stay as they are.

    Parameters
    ----------
    hyper : Hyperparameters
    given : float, optional
        A dynamic loss scale, with which steps are skipped that are not finite; the hyperparameters' own otherwise.
    """

    def __init__(self, hyper: Any, given: float | None = None) -> None:
        self.token = hyper.token  # before any of the values, so that one that changes meanwhile is noticed
        self.hyper, self.given = hyper, given
        self.loss_scale: float = given or hyper.loss_scale_factor or 1.0
        self.nonfinite: str = hyper.nonfinite if given is None else "skip"
        self.window: int = hyper.gradient_accumulation_steps or 1
        self.every: int = (hyper.ema_overwrite_frequency or 0) if hyper.use_ema else 0
        self.log_beta_1, self.log_beta_2 = log(hyper.beta_1), log(hyper.beta_2)
        self._usual: Recipe | None = None  # of every step but the first, where all of them are of one kind
        self._made: dict[tuple[bool, bool, bool], Recipe] = {}

    @property
    def has_fixed_rates(self) -> bool:
        """Whether learning rate and weight decay are numbers."""
        return self.hyper.learning_rate_function is None and self.hyper.weight_decay_function is None

    def at(self, number: int, rate: float, weight_decay: float) -> Recipe:
        """The recipe of the step after `number` others, filled in."""
        recipe, updates = self._usual, number
        if recipe is None or number <= 0:
            updates = number // self.window
            recipe = self._of(number, updates)
        recipe.number = number
        recipe.alpha = step_size(updates, rate, self.log_beta_1, self.log_beta_2)
        recipe.decay = rate * weight_decay
        return recipe

    def _of(self, number: int, updates: int) -> Recipe:
        if not 0 <= number < MOST_STEPS:
            raise ValueError(f"the iteration is {number}; expected a counter that can go on")
        is_update = (number + 1) % self.window == 0
        overwrite = bool(self.every) and is_update and (updates + 1) % self.every == 0
        kind = updates == 0, is_update, overwrite
        recipe = self._made.get(kind) or self._make(*kind)
        if updates and self.window == 1 and not self.every:
            self._usual = recipe
        return recipe

    def _make(self, is_first: bool, is_update: bool, overwrite: bool) -> Recipe:
        hyper = self.hyper
        c = coefficients(hyper, 0 if is_first else 1, 0.0, 0.0, 1 / self.loss_scale, 1.0)
        accumulate = hyper.gradient_accumulation_steps is not None
        variant = Variant(hyper.amsgrad, hyper.use_ema, accumulate, hyper.clipvalue is not None)
        recipe = Recipe(c, variant, is_update, overwrite)
        recipe.factor = 1 / self.window if accumulate else 1 / self.loss_scale
        recipe.threads = hyper.threads
        recipe.clipnorm, recipe.global_clipnorm = hyper.clipnorm, hyper.global_clipnorm
        clips = is_update and (hyper.clipnorm or hyper.global_clipnorm)
        recipe.nonfinite = self.nonfinite
        recipe.takes_norm = self.nonfinite != "propagate" or bool(clips)
        self._made[is_first, is_update, overwrite] = recipe  # whole, or not at all
        return recipe


def adam_alone(hyper: Any, updates: int, learning_rate: float) -> Recipe:
    """The recipe of Adam for one variable: no clip, decay, average or accumulator."""
    c = coefficients(hyper, updates, learning_rate, 0.0, 1.0, 1.0)._replace(scale=1.0, limit=math.inf)
    recipe = Recipe(c, Variant(hyper.amsgrad, False, False, False), True, False, alone=True)
    recipe.threads = hyper.threads
    return recipe
