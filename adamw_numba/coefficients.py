"""Hyperparameters and the step number become the few numbers a kernel needs: in float64, cast once by their user."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .update import VARYING, Coefficients, Variant

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
    scale = clip / micro_steps if micro_steps else clip * unscale
    return Coefficients(
        *varying(hyper, updates, learning_rate, weight_decay, xp),
        beta_1=hyper.beta_1,
        beta_1c=1 - hyper.beta_1,
        beta_2=hyper.beta_2,
        beta_2c=1 - hyper.beta_2,
        unscale=unscale,
        scale=-scale if hyper.maximize else scale,
        limit=math.inf if hyper.clipvalue is None else hyper.clipvalue,
        average_c=(1.0 if updates == 0 else rate) if xp is math else xp.where(updates == 0, 1.0, rate),
    )


def varying(
    hyper: Any, updates: Any, learning_rate: Any, weight_decay: Any, xp: Any = math
) -> tuple[Any, Any, Any, Any]:
    """The coefficients that differ from step to step: ``alpha``, ``decay``, ``epsilon`` and ``lead``.

    `decouple_lr` takes the learning rate out of the decay, as in TensorFlow Addons. An epsilon that is added to the
    *corrected* second moment, as by torch and optax, is one that grows by its correction. Nesterov's momentum is the
    one of the next step, with its correction, and the gradient the one of this step, as in optax.
    """
    mode, flags = hyper.epsilon_mode, (hyper.nesterov, hyper.decouple_lr)
    betas = hyper.beta_1, hyper.beta_2
    return varying_of(*betas, hyper.epsilon, mode != "hat", *flags, updates, learning_rate, weight_decay, xp)


def varying_of(
    beta_1: Any,
    beta_2: Any,
    epsilon: Any,
    is_corrected: bool,
    nesterov: bool,
    decouple_lr: bool,
    updates: Any,
    learning_rate: Any,
    weight_decay: Any,
    xp: Any,
) -> tuple[Any, Any, Any, Any]:
    """The same of plain numbers, which compiled code can call too (see njit/)."""
    log_beta_1, lead = log(beta_1, xp), 0.0
    alpha, root = step_size(updates, learning_rate, log_beta_1, log(beta_2, xp), xp)
    if nesterov:
        lead = alpha * (1 - beta_1)
        alpha = learning_rate * root / -xp.expm1((updates + 2) * log_beta_1) * beta_1
    decay = weight_decay if decouple_lr else learning_rate * weight_decay
    return alpha, decay, epsilon * (root if is_corrected else 1.0), lead


def step_size(updates: Any, learning_rate: Any, log_beta_1: Any, log_beta_2: Any, xp: Any = math) -> tuple[Any, Any]:
    """The learning rate, including both bias corrections (Kingma & Ba 2015, end of section 2).

    Secondly, the root of the correction of the second moment.
    """
    root = xp.sqrt(correction(updates, log_beta_2, xp))
    return learning_rate * root / correction(updates, log_beta_1, xp), root


def correction(updates: Any, log_beta: Any, xp: Any = math) -> Any:
    """What a moment that began with zeros is divided by: ``1 - beta^t``."""
    return -xp.expm1((updates + 1) * log_beta)


def clip_factor(norm: Any, limit: float, maximum: Any = max) -> Any:
    """The factor of a global clip, for every gradient; NaN if the norm is not finite, as in Keras."""
    return limit / maximum(norm, limit) + (norm - norm)


def whole_norm(norms: np.ndarray[Any, Any]) -> float:
    """The norm of several norms, without overflow."""
    peak = float(np.max(norms, initial=0.0))
    return peak * float(np.linalg.norm(norms / peak)) if 0 < peak < math.inf else peak


def log(beta: Any, xp: Any = math) -> Any:
    """The logarithm of a decay rate, which may be 0, or a traced number."""
    if not isinstance(beta, (int, float)):
        return xp.log(beta)
    return math.log(beta) if beta else -math.inf


class Numbers:
    """The numbers of one group of variables at a step.

    Attributes
    ----------
    c : Coefficients
        All but the varying ones hold for every step of a kind; so does ``scale``, unless a norm is clipped.
    clipnorm : float or None
    alpha, decay, epsilon, lead : float
        Those of the step that was filled in.
    """

    def __init__(self, c: Coefficients, clipnorm: float | None) -> None:
        self.c, self.clipnorm = c, clipnorm
        self.alpha, self.decay, self.epsilon, self.lead = c[:VARYING]

    def varying(self) -> tuple[float, float, float, float]:
        """The first coefficients of the step that was filled in."""
        return self.alpha, self.decay, self.epsilon, self.lead

    def fill(self, varying: tuple[float, float, float, float]) -> None:
        """Note them."""
        self.alpha, self.decay, self.epsilon, self.lead = varying


class Recipe(Numbers):
    """A kind of step: what stays the same while no hyperparameter changes, and the numbers that each step fills in.

    Its own numbers are those of the common group.

    Attributes
    ----------
    others : list of Numbers
        Those of all other groups.
    variant : Variant
    is_update, overwrite : bool
        Whether the variables change (otherwise gradients are accumulated), and become their averages.
    alone : bool
        Whether this is Adam alone for one variable, which no counter counts.
    factor : float
        What the norms that kernels take are multiplied with to be those of the mean unscaled gradients.
    shrink : float
        What a clip of all gradients together multiplies the scale of every group with.
    takes_norm : bool
    nonfinite : {"propagate", "skip", "raise"}
    global_clipnorm : float or None
    is_plain : bool
        Whether only ``alpha`` and ``decay`` vary, and there are no other groups.
    clips_each : bool
        Whether a group clips gradients one by one, by their norms.
    threads : int or None
        The most threads to use; None for Numba's own number.
    number, seed : int
        Calls of `apply` before this step, and the seed: what the rounding of moments depends on.
    clips : array of float64, or None
        What each variable's gradient is multiplied with besides.
    """

    def __init__(
        self, c: Coefficients, variant: Variant, is_update: bool, overwrite: bool, alone: bool = False
    ) -> None:
        super().__init__(c, None)
        self.variant, self.is_update, self.overwrite, self.alone = variant, is_update, overwrite, alone
        self.factor, self.takes_norm, self.nonfinite = 1.0, False, "propagate"
        self.others: list[Numbers] = []
        self.global_clipnorm: float | None = None
        self.is_plain = self.clips_each = False
        self.threads: int | None = None
        self.number, self.seed, self.shrink = 0, 0, 1.0
        self.clips: np.ndarray[Any, Any] | None = None

    def clip(self, norms: np.ndarray[Any, Any], norm: float, which: Sequence[int]) -> None:
        """Fill in what clipping by norm comes to; `which` is the group of each variable."""
        if self.global_clipnorm:
            self.shrink = clip_factor(norm, self.global_clipnorm)
        if self.clips_each:
            limits = np.array([group.clipnorm or math.inf for group in self.groups()])[np.asarray(which, int)]
            clips = np.ones(len(norms))
            self.clips = np.divide(limits, np.maximum(norms, limits), out=clips, where=np.isfinite(limits))

    def groups(self) -> list[Numbers]:
        """The numbers of every group, the common one first."""
        return [self, *self.others]

    def coefficients(self) -> list[Coefficients]:
        """The coefficients of the step that was filled in, for every group."""
        scales = zip(self.groups(), self.scales(), strict=True)
        return [Coefficients(*each.varying(), *each.c[VARYING:])._replace(scale=scale) for each, scale in scales]

    def scales(self) -> list[float]:
        """What the gradients of every group are multiplied with."""
        return [each.c.scale * self.shrink for each in self.groups()]

    def filled(self) -> tuple[Any, ...]:
        """What `refill` takes: the numbers of this step, which another step may fill in again."""
        return self.number, [each.varying() for each in self.groups()]

    def refill(self, filled: tuple[Any, ...]) -> None:
        """Have it be about that step again."""
        self.number, numbers = filled
        for each, own in zip(self.groups(), numbers, strict=True):
            each.fill(own)


class Recipes:
    """The recipes of all kinds of step, for as long as the hyperparameters stay as they are.

    Parameters
    ----------
    hyper : Hyperparameters
    given : float, optional
        A loss scale in the place of the hyperparameters' own.
    skips : bool
        Whether steps that are not finite are skipped in any case.
    """

    def __init__(self, hyper: Any, given: float | None = None, skips: bool = False) -> None:
        self.token = hyper.token  # before any of the values, so that one that changes meanwhile is noticed
        self.hyper, self.given = hyper, given
        self.loss_scale: float = given or hyper.loss_scale_factor or 1.0
        self.nonfinite: str = "skip" if skips else hyper.nonfinite
        self.window: int = hyper.gradient_accumulation_steps or 1
        self.every: int = (hyper.ema_overwrite_frequency or 0) if hyper.use_ema else 0
        self.log_beta_1, self.log_beta_2 = log(hyper.beta_1), log(hyper.beta_2)
        # Where Keras's own conventions hold, and there is one group, two numbers vary, and this is quick.
        keras = not (hyper.nesterov or hyper.decouple_lr) and hyper.epsilon_mode == "hat"
        self._is_plain = keras and not hyper.others and not hyper.counts_each
        self.groups = [(group.values(), group) for group in hyper.groups]
        self._usual: Recipe | None = None  # of every step but the first, where all of them are of one kind
        self._made: dict[tuple[Any, ...], Recipe] = {}

    @property
    def has_fixed_rates(self) -> bool:
        """Whether learning rates and weight decays are numbers."""
        common = self.hyper.learning_rate_function is None and self.hyper.weight_decay_function is None
        return common and not any(group.functions() for group in self.hyper.others)

    def at(self, number: int, rate: float, weight_decay: float, others: Sequence[tuple[float, float]] = ()) -> Recipe:
        """The recipe of the step after `number` others, filled in; `others` are the rates of all further groups."""
        recipe, updates = self._usual, number
        if recipe is None or number <= 0:
            updates = number // self.window
            recipe = self._of(number, updates)
        recipe.number = number
        if self._is_plain:
            recipe.alpha, _ = step_size(updates, rate, self.log_beta_1, self.log_beta_2)
            recipe.decay = rate * weight_decay
            return recipe
        if not others:  # most
            values, group = self.groups[0]
            recipe.fill(varying(values, max(updates - group.started, 0), rate, weight_decay))
            return recipe
        rates = [(rate, weight_decay), *others]
        for each, (values, group), own in zip(recipe.groups(), self.groups, rates, strict=True):
            each.fill(varying(values, max(updates - group.started, 0), *own))
        return recipe

    def _of(self, number: int, updates: int) -> Recipe:
        if not 0 <= number < MOST_STEPS:
            raise ValueError(f"the iteration is {number}; expected a counter that can go on")
        is_update = (number + 1) % self.window == 0
        overwrite = bool(self.every) and is_update and (updates + 1) % self.every == 0
        firsts = tuple(updates <= group.started for _, group in self.groups)
        kind = is_update, overwrite, firsts
        recipe = self._made.get(kind) or self._make(*kind)
        if not any(firsts) and self.window == 1 and not self.every:
            self._usual = recipe
        return recipe

    def _make(self, is_update: bool, overwrite: bool, firsts: tuple[bool, ...]) -> Recipe:
        hyper = self.hyper
        accumulate, all_values = hyper.gradient_accumulation_steps is not None, [values for values, _ in self.groups]
        clips = any(values.clipvalue is not None for values in all_values)
        variant = Variant(hyper.use_ema, accumulate, clips, hyper.nesterov)
        c = [self._coefficients(*each) for each in zip(all_values, firsts, strict=True)]
        recipe = Recipe(c[0], variant, is_update, overwrite)
        recipe.clipnorm = hyper.clipnorm
        recipe.others = [Numbers(own, values.clipnorm) for own, values in zip(c[1:], all_values[1:], strict=True)]
        recipe.clips_each = any(each.clipnorm for each in recipe.groups())
        recipe.is_plain = self._is_plain
        recipe.factor = 1 / self.window if accumulate else 1 / self.loss_scale
        recipe.threads, recipe.seed = hyper.threads or hyper.most_threads, hyper.seed
        recipe.global_clipnorm = hyper.global_clipnorm
        recipe.nonfinite = self.nonfinite
        by_norm = is_update and (recipe.clips_each or bool(hyper.global_clipnorm))
        recipe.takes_norm = self.nonfinite != "propagate" or by_norm
        self._made[is_update, overwrite, firsts] = recipe  # whole, or not at all
        return recipe

    def _coefficients(self, values: Any, is_first: bool) -> Coefficients:
        return coefficients(values, 0 if is_first else 1, 0.0, 0.0, 1 / self.loss_scale, 1.0)


def adam_alone(hyper: Any, updates: int, learning_rate: float, groups: int, number: int = 0) -> Recipe:
    """The recipe of Adam for one variable, with the hyperparameters of its group, whichever of so many that is.

    There is no clip, decay, average or accumulator. `number` is that of the calls of `apply` so far.
    """
    c = coefficients(hyper, updates, learning_rate, 0.0, 1.0, 1.0)
    c = c._replace(scale=-1.0 if hyper.maximize else 1.0, limit=math.inf)
    recipe = Recipe(c, Variant(False, False, False, hyper.nesterov), True, False, alone=True)
    recipe.threads, recipe.others = hyper.threads or hyper.most_threads, [Numbers(c, None)] * (groups - 1)
    recipe.number, recipe.seed = number, hyper.seed
    return recipe
