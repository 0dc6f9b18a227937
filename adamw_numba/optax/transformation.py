"""`adamw`: optax's arguments in our words, and one step of `array_api.stateless` as its updates and its state."""

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import optax

from ..array_api import stateless
from ..arrays import Array
from ..arrays.brief import brief
from ..hyperparameters import table as hp
from ..optimizer import AdamW
from . import moments as few_bits
from . import trees


class AdamWState(NamedTuple):
    """What `adamw` keeps: fields of optax's names; trees are nested like the parameters.

    Attributes
    ----------
    count : int32
        Updates so far, which schedules are asked with.
    mu, nu : tree
        First and second moment: of the dtype of the parameter, float32 for one of 16 bits; or their bits.
    nu_max : tree or None
        With ``amsgrad``, the largest corrected second moment.
    average : tree or None
        With ``use_ema``, the moving average of the parameters.
    accumulator : tree or None
        With ``gradient_accumulation_steps``, the sum of this window's gradients.
    mini_step : int32 or None
        And how many there are in it.
    skipped : int32 or None
        With ``nonfinite="skip"``, how many steps were skipped.
    mu_scale, nu_scale : tree or None
        With ``moments="8bit"``, the scales of blocks of 256 elements; None for a parameter whose moments are float32.
    """

    count: Any
    mu: Any
    nu: Any
    nu_max: Any = None
    average: Any = None
    accumulator: Any = None
    mini_step: Any = None
    skipped: Any = None
    mu_scale: Any = None
    nu_scale: Any = None


SLOTS = few_bits.KEPT | {  # and what the step calls them
    "nu_max": "velocity_hat",
    "average": "average",
    "accumulator": "gradient_accumulator",
}

_NUMBERS = ("clipnorm", "clipvalue", "global_clipnorm", "ema_momentum", "seed")  # of our options, which may be traced


def adamw(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    eps_root: Any = 0.0,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    amsgrad: bool = False,
    global_clipnorm: Any = None,
    clipnorm: Any = None,
    clipvalue: Any = None,
    use_ema: bool = False,
    ema_momentum: Any = 0.99,
    ema_overwrite_frequency: int | None = None,
    gradient_accumulation_steps: int | None = None,
    nonfinite: str = "propagate",
    nu_dtype: Any = None,
    moments: str = "float32",
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw`, with the options of `adamw_numba.AdamW` in the same pass.

    Parameters
    ----------
    learning_rate : float, scalar array, or schedule
        A schedule takes the number of updates so far.
    b1, b2 : float or scalar array
        Decay rates of the first and second moment, in [0, 1).
    eps : float or scalar array, default 1e-8
        Added to the root of the corrected second moment.
    eps_root : float or scalar array, default 0
        Added to the corrected second moment under the root; above 0, derivatives of a step exist at gradients of 0.
    mu_dtype : dtype, optional
        Of the first moment as it is kept, rounded to the nearest.
    weight_decay : float, scalar array, or schedule, default 0.0001
        Multiplied by the learning rate.
    mask : tree of bool, or callable, optional
        Nested like the parameters, or like the beginning of their tree, or what makes that of the parameters. What is
        False is not decayed.
    nesterov : bool
        Nesterov's momentum (Dozat 2016), as `optax.nadamw` has it.
    amsgrad : bool
        Divide by the largest corrected second moment so far, as `optax.amsgrad` does.
    global_clipnorm, clipnorm, clipvalue : float or scalar array, optional
        Clip all gradients together to this norm, each to this norm, or each element to this magnitude. Only one may be
        set.
    use_ema : bool
        Keep the moving average of the parameters in ``state.average``. It is what they are once these updates are
        added, so nothing may follow this in an `optax.chain` that changes the updates.
    ema_momentum : float or scalar array, default 0.99
    ema_overwrite_frequency : int, optional
        After every so many updates the parameters become their average.
    gradient_accumulation_steps : int, optional
        Update with the mean gradient of so many calls; the updates of the others are 0.
    nonfinite : {"propagate", "skip", "raise"}
        What to do where a gradient is not finite. Skipping leaves the state as it is. "raise" needs values, which there
        are outside `jax.jit` only.
    nu_dtype : dtype, optional
        Of the second moment as it is kept: float32, or with ``mu_dtype=bfloat16`` bfloat16, which is
        ``moments="bfloat16"``. A second moment alone that is rounded to the nearest bfloat16 would hardly ever move.
    moments : {"float32", "bfloat16", "8bit"}
        What both moments are kept in, of parameters of 16 and 32 bits, rounded stochastically
        (docs/small_moments.md).
    seed : int or scalar array, default 0
        Of that rounding.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        ``init(params)`` gives an `AdamWState`. ``update(grads, state, params, loss_scale=1.0)`` gives updates, nested
        exactly like the parameters, and the next state; the gradients are divided by the loss scale.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range; from ``init`` and ``update``, if a leaf is no array, is not a float, or trees do
        not match. The message has the path of the leaf.

    Notes
    -----
    The numbers are those of optax 0.2.8, to rounding. A leaf whose gradient is None does not move. Real and imaginary
    parts of complex parameters are moved by themselves, as within `optax.contrib.split_real_and_imaginary`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax
    >>> from adamw_numba.optax import adamw
    >>> params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    >>> transformation = adamw(optax.cosine_decay_schedule(0.1, 100), global_clipnorm=1.0, use_ema=True)
    >>> state = transformation.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...     grads = jax.grad(lambda p: jnp.sum((p["w"] + p["b"]) ** 2))(params)
    ...     updates, state = transformation.update(grads, state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> for _ in range(3):
    ...     params, state = step(params, state)
    >>> int(state.count), sorted(state.average)
    (3, ['b', 'w'])
    """
    hyper = _hyperparameters(
        {
            "learning_rate": ("learning_rate", learning_rate),
            "weight_decay": ("weight_decay", weight_decay),
            "beta_1": ("b1", b1),
            "beta_2": ("b2", b2),
            "epsilon": ("eps", eps),
            "eps_root": ("eps_root", eps_root),
        },
        {
            "nesterov": nesterov,
            "amsgrad": amsgrad,
            "clipnorm": clipnorm,
            "clipvalue": clipvalue,
            "global_clipnorm": global_clipnorm,
            "use_ema": use_ema,
            "ema_momentum": ema_momentum,
            "ema_overwrite_frequency": ema_overwrite_frequency,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "nonfinite": nonfinite,
            "moments": moments,
            "seed": seed,
        },
    )
    vars(hyper)["moments"], dtypes = few_bits.asked(mu_dtype, nu_dtype, moments)
    return optax.GradientTransformationExtraArgs(partial(_init, hyper, dtypes), partial(_update, hyper, mask))


def _hyperparameters(theirs: dict[str, tuple[str, Any]], ours: dict[str, Any]) -> hp.Hyperparameters:
    """All hyperparameters, checked but for arrays, whose values may not be known."""
    hyper = hp.Hyperparameters()
    vars(hyper).update(maximize=False, decouple_lr=False, epsilon_mode="corrected")
    for own, (name, value) in theirs.items():
        if _is_array(value):
            vars(hyper)[own] = _scalar(name, value)
        elif own in ("learning_rate", "weight_decay"):
            hyper.set(own, value, hp.rate)
        else:
            check = hp.beta if own in ("beta_1", "beta_2") else hp.fixed_rate
            vars(hyper)[own] = check(name, value)
    for name, value in ours.items():
        is_array = _is_array(value)
        if is_array and name not in _NUMBERS:
            raise TypeError(
                f"`{name}` is {brief(value)}, which may have no value yet; expected an int or a bool: name it in the "
                "`static_args` of optax.inject_hyperparams"
            )
        hyper.set(name, value, _scalar if is_array else vars(AdamW)[name].check)
    hyper.others = [_Undecayed(SimpleNamespace(**vars(hyper) | {"decouple_lr": True}))]
    return hyper


class _Undecayed(NamedTuple):
    """The group of what is not decayed. Its decay is 0.0 itself: times a traced learning rate, that would be traced."""

    own: Any
    started: int = 0

    def values(self) -> Any:
        """Its hyperparameters."""
        return self.own


def _is_array(value: Any) -> bool:
    import jax

    return isinstance(value, jax.Array)


def _scalar(name: str, value: Any) -> Any:
    if value.shape != () or value.dtype.kind in "bc":
        raise ValueError(f"`{name}` is {brief(value)}; expected a number, or an array of no dimensions")
    return value


def _fields(hyper: Any) -> list[str]:
    """The trees that a state has."""
    has = {
        "mu": True,
        "nu": True,
        "nu_max": hyper.amsgrad,
        "average": hyper.use_ema,
        "accumulator": hyper.gradient_accumulation_steps,
        "mu_scale": hyper.moments == "8bit",
        "nu_scale": hyper.moments == "8bit",
    }
    return [field for field, there in has.items() if there]


def _counts(hyper: Any) -> list[str]:
    """The numbers that a state has."""
    has = {
        "count": True,
        "mini_step": bool(hyper.gradient_accumulation_steps),
        "skipped": hyper.nonfinite == "skip",
    }
    return [name for name, there in has.items() if there]


def _init(hyper: Any, dtypes: dict[str, Any], params: Any) -> AdamWState:
    trained = trees.Trained(params)
    made: dict[str, Any] = few_bits.zeros_of(hyper.moments, trained) if hyper.moments != "float32" else {}
    for field in _fields(hyper):
        make = trees.copied if field == "average" else partial(trees.zeros, dtype=dtypes.get(field))
        if field not in made:
            made[field] = trained.tree([make(leaf) for leaf in trained.leaves])
    made |= {name: trees.counter(trained.leaves) for name in _counts(hyper)}
    return AdamWState(**made)


def _update(
    hyper: Any,
    mask: Any,
    updates: Any,
    state: AdamWState,
    params: Any = None,
    *,
    loss_scale: Any = 1.0,
    **extra: Any,
) -> tuple[Any, AdamWState]:
    import jax.numpy as jnp

    if params is None:
        raise ValueError("`params` is missing; expected `update(grads, state, params)`: they are decayed")
    check = _scalar if _is_array(loss_scale) else hp.scale
    loss_scale, trained = check("loss_scale", loss_scale), trees.Trained(params)
    kept, gradients = _kept(hyper, state, trained), trained.gradients(updates)
    own = trained.own
    dtypes = [trees.state_dtype(leaf) for leaf in trained.leaves]
    count, window = jnp.asarray(state.count), hyper.gradient_accumulation_steps
    is_update = True if window is None else jnp.asarray(state.mini_step) == window - 1
    variables, slots = [trained.leaves[k] for k in own], [_slots(hyper, kept, k, dtypes[k]) for k in own]
    number = count if window is None else count * window + jnp.asarray(state.mini_step)  # of calls before this
    finite, changes, slots = stateless.step(
        hyper,
        (count, is_update),
        _rates(hyper, count),
        variables,
        [gradients[k] for k in own],
        slots,
        _which(hyper, mask, trained),
        loss_scale,
        hyper.nonfinite,
        hyper.eps_root,
        few_bits.noises(hyper, number, trained, variables, slots),
    )
    all_changes = [jnp.zeros_like(leaf) for leaf in trained.leaves]
    for k, change, slot in zip(own, changes, slots, strict=True):
        g, p = gradients[k], trained.leaves[k]
        all_changes[k] = change.astype(p.dtype if g is None else jnp.result_type(g, p))
        for field, leaves in kept.items():
            if leaves[k] is not None:
                leaves[k] = slot[SLOTS[field]].astype(leaves[k].dtype)
    new = {field: trained.tree(leaves) for field, leaves in kept.items()}
    new["count"] = stateless.select_number(finite if is_update is True else finite & is_update, _next(count), count)
    if window is not None:
        mini_step = jnp.asarray(state.mini_step)
        new["mini_step"] = stateless.select_number(finite, (mini_step + 1) % window, mini_step)
    if hyper.nonfinite == "skip":
        skipped = jnp.asarray(state.skipped)
        new["skipped"] = stateless.select_number(finite, skipped, _next(skipped))
    return trained.tree(all_changes), state._replace(**new)


def _kept(hyper: Any, state: Any, trained: trees.Trained) -> dict[str, list[Any]]:
    """The leaves of every tree of the state."""
    if not isinstance(state, AdamWState):
        raise TypeError(f"`state` is a {type(state).__name__}; expected the AdamWState that `init` has made")
    fields, counts = _fields(hyper), _counts(hyper)
    for field in AdamWState._fields:
        is_there, belongs = getattr(state, field) is not None, field in (*fields, *counts)
        if is_there != belongs:
            raise ValueError(
                f"`state` {'has' if is_there else 'lacks'} {field!r}; expected the state that `init` has made, with "
                "the same options"
            )
    kept: dict[str, list[Any]] = {}
    for field in fields:
        if field not in few_bits.SCALES:
            kept[field] = trained.like(getattr(state, field), f"`state`: {field}")
        elif trained.leaves:
            kept[field] = trained.beside(getattr(state, field), f"`state`: {field}")
    if hyper.moments != "float32":
        few_bits.check(hyper.moments, trained, kept)
    return kept


def _slots(hyper: Any, kept: dict[str, list[Any]], k: int, dtype: Any) -> dict[str, Array]:
    """The state of a parameter as the step takes it; moments of fewer bits as they are."""
    as_they_are = few_bits.KEPT if hyper.moments != "float32" else ()
    own = {field: leaves[k] for field, leaves in kept.items() if leaves[k] is not None}
    return {SLOTS[field]: leaf if field in as_they_are else leaf.astype(dtype) for field, leaf in own.items()}


def _rates(hyper: Any, count: Array) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    """Learning rate and weight decay at a count of updates, and those of what is not decayed."""
    rate, decay = (
        values[name] if values.get(f"{name}_function") is None else values[f"{name}_function"](count)
        for values in [vars(hyper)]
        for name in ("learning_rate", "weight_decay")
    )
    return rate, decay, [(rate, 0.0)]


def _which(hyper: Any, mask: Any, trained: trees.Trained) -> list[int]:
    """Whether each leaf is among those that are not decayed, as an index of the group."""
    decay: Any = vars(hyper)["weight_decay"]
    if isinstance(decay, float) and decay == 0.0:
        return [1] * sum(trained.is_float)
    decayed = [True] * len(trained.leaves) if mask is None else trained.masked(mask)
    return [0 if own else 1 for own, is_float in zip(decayed, trained.is_float, strict=True) if is_float]


def _next(count: Array) -> Array:
    return optax.safe_increment(count)
