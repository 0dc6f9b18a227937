"""Torch's groups of parameters in our words, and ours in torch's."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from ..arrays.brief import brief, brief_names
from ..hyperparameters import table as hp
from ..hyperparameters.conventions import pair
from ..hyperparameters.groups import Group, check_clips, make_groups
from ..optimizer import AdamW

Own = dict[str, Any]
Noted = list[tuple[Own, tuple[Any, ...] | None]]

CLIPS = ("clipnorm", "clipvalue")
OURS = (  # options of `adamw_numba.AdamW` that torch lacks
    "clipnorm",
    "clipvalue",
    "ema_momentum",
    "ema_overwrite_frequency",
    "global_clipnorm",
    "gradient_accumulation_steps",
    "loss_scale_factor",
    "master_weights",
    "moments",
    "nesterov",
    "nonfinite",
    "seed",
    "threads",
    "use_ema",
)


def checked(group: Mapping[str, Any], common: Any) -> Own:
    """The hyperparameters of a group in the engine's words."""
    betas = pair("betas", group["betas"])
    rates = {"learning_rate": hp.Live("lr", group), "weight_decay": hp.Live("weight_decay", group)}
    for rate in rates.values():
        rate()
    own = {
        "beta_1": hp.beta("betas[0]", _number(betas[0])),
        "beta_2": hp.beta("betas[1]", _number(betas[1])),
        "epsilon": hp.fixed_rate("eps", _number(group["eps"])),
        "amsgrad": bool(group["amsgrad"]),
        "maximize": bool(group["maximize"]),
        **{clip: hp.optional_positive(clip, group.get(clip)) for clip in CLIPS},
    }
    check_clips(own, common)
    return rates | own


def check_common(group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse an option in a group that all groups share, unless it is the one that they share."""
    for name in set(OURS) - {*CLIPS}:
        if name in group and (name not in options or group[name] != options[name]):
            raise ValueError(
                f"`{name}` is {brief(group[name])} in a group; expected it as an argument of the optimizer, where it "
                "holds for all groups"
            )


def layout(group: Own) -> tuple[int, bool]:
    """What the arrays of the state depend on."""
    return len(group["params"]), bool(group["amsgrad"])


def noted(param_groups: Sequence[Own]) -> Noted:
    """The groups, with all that the engine has to be told of when it changes: not rates, which it reads at each step.

    None for a group that holds what can be changed in place, and may be another one at each step.
    """
    return [(group, _values(group) if _is_constant(group) else None) for group in param_groups]


def are_as_noted(param_groups: Sequence[Own], known: Noted) -> bool:
    """Whether the groups, and their values, are those that were noted."""
    for group, (own, values) in zip(param_groups, known, strict=False):
        if group is not own or _values(group) != values:
            return False
    return len(param_groups) == len(known)


def _values(group: Own) -> tuple[Any, ...]:
    return (
        len(group["params"]),
        group["betas"],
        group["eps"],
        group["amsgrad"],
        group["maximize"],
        group.get("clipnorm"),
        group.get("clipvalue"),
    )


def _is_constant(group: Own) -> bool:
    betas, eps = group["betas"], group["eps"]
    return isinstance(betas, tuple) and not any(isinstance(value, torch.Tensor) for value in (*betas, eps))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def listed(param_groups: Sequence[Own]) -> list[tuple[str, torch.Tensor, int]]:
    """All parameters: name, tensor, and which group they are in."""
    found = [
        (name, param, k)
        for k, group in enumerate(param_groups)
        for name, param in zip_longest(group.get("param_names", ())[: len(group["params"])], group["params"])
    ]
    return [(str(i) if name is None else name, param, k) for i, (name, param, k) in enumerate(found)]


def described(group: Group, common: Any) -> Own:
    """A group of ours as one of torch's."""
    if not group.trainable:
        raise ValueError(f"{group!r} is not trainable; expected `requires_grad_(False)`, or no such parameters")
    if common.hyper.learning_rate_function or common.hyper.weight_decay_function or group.functions():
        raise ValueError(
            "a learning rate or weight decay is a schedule; expected numbers, and a scheduler of torch. For a learning "
            "rate that is 1.0 here: `torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)`"
        )
    clips = {clip: getattr(group, clip) for clip in CLIPS}
    return {
        "lr": group.learning_rate * group.learning_rate_multiplier,
        "betas": (group.beta_1, group.beta_2),
        "eps": group.epsilon,
        "weight_decay": group.weight_decay,
        "amsgrad": common.amsgrad,
        "maximize": common.maximize,
        **{key: clip for key, clip in clips.items() if clip is not None},
    }


def groups_of(optimizer: Any, params: Iterable[Any]) -> list[Own]:
    """Groups of parameters, by what an `adamw_numba.AdamW` says of some variables; the common group first.

    Raises
    ------
    TypeError
        If it is no `adamw_numba.AdamW`.
    ValueError
        If it is built, a rate is a schedule, a variable is not trainable, or something that it names is none of the
        parameters.
    """
    if not isinstance(optimizer, AdamW):
        raise TypeError(f"`optimizer` is {brief(optimizer)}; expected an adamw_numba.AdamW")
    if optimizer.built:
        raise ValueError("`optimizer` is built already; expected one that is not")
    params = list(params)
    named = [each if isinstance(each, tuple) else (str(i), each) for i, each in enumerate(params)]
    names, tensors = [name for name, _ in named], [tensor for _, tensor in named]
    groups, which, unmatched = make_groups(optimizer.engine, optimizer.hyper.overrides, names, tensors)
    for called, nothing in unmatched:
        raise ValueError(f"{called}: {brief_names(nothing)} match none of the parameters {brief_names(names)}")
    found = [described(group, optimizer) | {"params": []} for group in groups]
    for each, k in zip(params, which, strict=True):
        found[k]["params"].append(each)
    return found
