"""What torch and optax have in common: moments, a count, and an epsilon added after the bias correction."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..array_api.moments import brought_in
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.dtensors import is_dtensor
from ..arrays.moments import SCALES
from ..arrays.tree import Container, flatten, materialized
from ..hyperparameters.groups import Override
from ..optimizer import AdamW
from ..saving.manifest import encoded
from ..saving.restore import Loaded
from .exact import Matrix

# What only our optimizer and that of Keras have.
_OURS = ("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor", "gradient_accumulation_steps")


def eps_of(values: Any, updates: int) -> float:
    """The others' eps that does at the next update what an epsilon does, and at all later ones if it is "corrected"."""
    if values.epsilon_mode == "corrected" or not values.beta_2:
        return float(values.epsilon)
    return float(values.epsilon / math.sqrt(-math.expm1((updates + 1) * math.log(values.beta_2))))


def assembled(
    options: Mapping[str, Any],
    moments: Sequence[Mapping[str, Any] | None],
    own: Sequence[Mapping[str, Any]],
    updates: int,
    variables: Container | None,
    where: str,
    names: Sequence[str] | None = None,
) -> AdamW:
    """An optimizer with these options, whose state is that of another library.

    Parameters
    ----------
    options : dict
        Arguments of `AdamW`.
    moments : list of dict or None
        For each parameter its slots, in our words; None before the first step.
    own : list of dict
        What each parameter has for itself (see `AdamW.override`).
    updates : int
    variables : container or None
        What to build it on; by default the first `build` takes the state.
    where : str
        What errors call the state.
    names : list of str, optional
        Of the parameters; by default they are known by their positions.
    """
    optimizer = AdamW(**options)
    optimizer.hyper.overrides = _overrides(own)
    if any(moment is None for moment in moments):
        _build_anew(optimizer, len(own), variables, where)
        return optimizer
    named = list(map(str, range(len(moments)))) if names is None else list(names)
    found = {
        f"{key}/{encoded(name)}": _moment(array)
        for name, moment in zip(named, moments, strict=True)
        for key, array in (moment or {}).items()
    }
    described = [
        {"name": n, "dtype": None, "shape": list(found[f"momentum/{encoded(n)}"].shape), "excluded": False}
        for n in named
    ]
    state = optimizer.engine.state.scalars["iteration"]
    state[...] = updates * (optimizer.gradient_accumulation_steps or 1)
    optimizer.engine.loaded = Loaded(described, found, where, positional=names is None, partial=True)
    if variables is not None:
        optimizer.build(variables)
    return optimizer


def _overrides(own: Sequence[Mapping[str, Any]]) -> list[Override]:
    """What parameters have for themselves, by their positions; those that differ in a decay of 0 alone are excluded."""
    kinds: dict[object, list[int]] = {}
    for i, each in enumerate(own):
        kinds.setdefault(tuple(each.items()), []).append(i)
    return [
        Override(
            [],
            [],
            dict(own[indices[0]]),
            positions=frozenset(indices),
            is_exclusion=dict(own[indices[0]]) == {"weight_decay": 0.0},
        )
        for indices in kinds.values()
        if own[indices[0]]
    ]


def _build_anew(optimizer: AdamW, count: int, variables: Container | None, where: str) -> None:
    """Build an optimizer that takes no state: the other one has not taken a step."""
    if variables is None:
        raise ValueError(f"{where} holds no moments yet; expected `variables`")
    variables = materialized(variables, "variables")  # which may be a generator
    leaves = flatten(variables)[1]
    if len(leaves) != count:
        raise ValueError(f"{where} has {count} parameters; expected {len(leaves)}, as many as `variables` has")
    optimizer.build(variables)


def wide(variable: Array, slots: Mapping[str, Array]) -> dict[str, Array]:
    """The slots of a variable as other libraries know them: with moments as numbers, and without scales."""
    return {key: array for key, array in brought_in(variable, dict(slots)).items() if key not in SCALES}


def _moment(array: Array) -> Matrix:
    """16-bit moments in float32, in which ours are kept."""
    value = arrays.to_numpy(array)
    return value.astype(np.float32) if value.dtype.name in ("bfloat16", "float16") else value


def exportable(optimizer: AdamW, library: str, leave_out: Iterable[str], amsgrad: bool = True) -> Any:
    """The workspace of an optimizer, if the other library can go on with it."""
    if not isinstance(optimizer, AdamW):
        raise TypeError(
            f"`optimizer` is a {type(optimizer).__name__}; expected an AdamW, `inner_optimizer` for example"
        )
    built = optimizer.engine.require_built(f"to_{library}")
    if any(map(is_dtensor, built.given)):
        raise ValueError(
            "the variables are DTensors, of which each process has a part; expected whole arrays: `interop.dcp_state`, "
            "or an `adamw_numba.torch.AdamW`, saves the state of DTensors"
        )
    left_out = set(leave_out)
    lacking = [key for key in _OURS if getattr(optimizer, key) and key not in left_out]
    if lacking:
        raise ValueError(f"{library}'s AdamW has no {brief(lacking)}; pass leave_out={brief(lacking)} to drop them")
    if optimizer.decouple_lr:
        raise ValueError(f"decouple_lr=True: {library} multiplies its decay with the learning rate; expected False")
    if not all(group.trainable for group in optimizer.groups):
        raise ValueError(f"some variables are not trainable, of which {library} would want a state; expected all to be")
    if optimizer.amsgrad and not amsgrad:
        raise ValueError(
            f"amsgrad=True: {library} takes the maximum after the bias correction; no exact conversion exists"
        )
    window = optimizer.gradient_accumulation_steps or 1
    if int(optimizer.engine.state.scalars["iteration"]) % window:
        raise ValueError(f"the optimizer is inside a window of {window} accumulated gradients; expected its end")
    return built
