"""torch: the `state_dict` of `torch.optim.AdamW`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..arrays.brief import brief, brief_names
from ..arrays.tree import Container
from ..optimizer import AdamW
from .exact import check_squares, checked_count, exact
from .moments import assembled, epsilon_factor, exportable

_SLOTS = {"momentum": "exp_avg", "velocity": "exp_avg_sq", "velocity_hat": "max_exp_avg_sq"}


def from_torch(state_dict: Mapping[str, Any], variables: Container | None = None, **options: Any) -> AdamW:
    """An optimizer with the hyperparameters and the state of `torch.optim.AdamW`, or of `Adam` without decay.

    Parameters
    ----------
    state_dict : dict
        What ``torch_optimizer.state_dict()`` returned; load a file yourself, with ``weights_only=True``.
    variables : container, optional
        What to build it on, in the order of torch's parameter groups.
    **options
        Arguments of `AdamW` that torch lacks, ``clipvalue`` for example.

    Returns
    -------
    AdamW
        Parameters of groups without decay are excluded from it.

    Raises
    ------
    ValueError
        Where no exact conversion exists: groups that differ in more than their decay being 0, a decay that is coupled
        (`torch.optim.Adam`'s), ``maximize``, parameters that have taken different numbers of steps.

    Notes
    -----
    torch adds ``eps`` after the bias correction, so at update t it is ``epsilon = eps * sqrt(1 - beta_2**t)`` here. It
    is converted for the next update, which is then exact. As t grows, the factor goes to 1 in torch and stays here.
    AMSGrad's maximum is that of the raw second moment in both.
    """
    groups, states = _parts(state_dict)
    hyper = _common_group(groups)
    numbers = [number for group in groups for number in group["params"]]
    slots = {ours: theirs for ours, theirs in _SLOTS.items() if ours != "velocity_hat" or hyper["amsgrad"]}
    _check_states(states, numbers, ["step", *slots.values()])
    updates = _common_count(states, numbers)
    decays = [float(group["weight_decay"]) for group in groups for _ in group["params"]]
    excluded = [decay == 0 and any(decays) for decay in decays]
    moments = [{ours: states[n][theirs] for ours, theirs in slots.items()} if n in states else None for n in numbers]
    beta_1, beta_2 = map(float, hyper["betas"])
    given = {
        "learning_rate": float(hyper["lr"]),  # a tensor, where a graph is captured
        "weight_decay": max(decays, default=0.0),
        "beta_1": beta_1,
        "beta_2": beta_2,
        "epsilon": float(hyper["eps"]) * epsilon_factor(beta_2, updates),
        "amsgrad": bool(hyper["amsgrad"]),
    }
    return assembled(given | options, moments, excluded, updates, variables, "`state_dict`")


def to_torch(optimizer: AdamW, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """What `torch.optim.AdamW.load_state_dict` takes.

    Parameters
    ----------
    optimizer : AdamW
        Built.
    leave_out : list of str
        Options that torch's optimizer lacks and that you do without, or do yourself: ``"global_clipnorm"``, ...

    Returns
    -------
    dict
        Of torch tensors. It has one group of parameters; if some are excluded from decay it has two, those with decay
        first. Build torch's optimizer with the same groups.

    Raises
    ------
    ValueError
        Where no exact conversion exists: an option that torch lacks, a window of accumulation that is not complete, a
        state that is not exact in a 16-bit parameter's dtype, which is what torch keeps.

    Notes
    -----
    ``eps`` is converted for the next update: see `from_torch`. A schedule becomes its present learning rate.
    """
    built = exportable(optimizer, "torch", leave_out)
    updates, first = optimizer.iterations, 0
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for indices in _groups_of(built.decayed):
        numbers = range(first, first + len(indices))
        if updates:  # torch makes the state at the first step
            state |= {number: _state_of(built, i, updates) for number, i in zip(numbers, indices, strict=True)}
        groups.append(_group(optimizer, built.decayed[indices[0]], list(numbers)))
        first += len(indices)
    return {"state": state, "param_groups": groups}


# From torch


def _parts(state_dict: Any) -> tuple[Sequence[Mapping[str, Any]], Mapping[Any, Any]]:
    """The groups that hold parameters, and the states, if they are those of torch.optim.AdamW."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"`state_dict` is {brief(state_dict)}; expected what `optimizer.state_dict()` returns: a dict")
    for key in ("param_groups", "state"):
        if key not in state_dict:
            raise ValueError(f"`state_dict` lacks {key!r}; expected what torch.optim.AdamW's state_dict() returns")
    groups = state_dict["param_groups"]
    if not groups:
        raise ValueError("`state_dict` has no 'param_groups'; expected one at least")
    for group in groups:
        lacking = [key for key in ("params", "lr", "betas", "eps", "weight_decay", "amsgrad") if key not in group]
        if lacking:
            raise ValueError(f"`state_dict` has a group without {lacking}; expected one of torch.optim.AdamW")
    return [group for group in groups if group["params"]], state_dict["state"]


def _check_states(states: Mapping[Any, Any], numbers: Sequence[Any], keys: Sequence[str]) -> None:
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"`state_dict` has the parameters {brief_names(numbers)}; expected each of them once")
    for number in numbers:
        own = states.get(number)
        lacking = [key for key in keys if key not in own] if own is not None else []
        if lacking:
            raise ValueError(f"`state_dict`: the state of parameter {number} lacks {lacking}; expected AdamW's")
    squares = [key for key in keys if key.endswith("sq")]
    check_squares(
        {f"`state_dict`: {k!r} of parameter {n}": states[n][k] for n in numbers if n in states for k in squares}
    )


def _common_count(states: Mapping[Any, Any], numbers: Sequence[Any]) -> int:
    """How many steps all parameters have taken: torch counts for each by itself."""
    first_with: dict[float, Any] = {}
    for number in numbers:
        first_with.setdefault(float(states[number]["step"]) if number in states else 0.0, number)
    if len(first_with) != 1:
        told = [f"parameter {number} after {steps:g}" for steps, number in sorted(first_with.items())[:4]]
        raise ValueError(f"`state_dict` holds {', '.join(told)} steps; expected one number of steps for all")
    return checked_count(first_with.popitem()[0], "`state_dict`: 'step'")


def _common_group(groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The hyperparameters of all groups, which may differ in their decay being 0."""
    if not groups:
        raise ValueError("`state_dict` has groups without parameters; expected some")
    first = groups[0]
    for group in groups:
        if group.get("maximize"):
            raise ValueError("`state_dict` has maximize=True; expected False: negate the gradients instead")
        decay = float(group["weight_decay"])
        # Adam adds its decay to the gradient; without decay it is AdamW.
        if decay and not group.get("decoupled_weight_decay", True):
            raise ValueError(
                f"`state_dict` is that of Adam with the coupled weight decay {decay}; expected torch.optim.AdamW's, or "
                "weight_decay=0"
            )
        for key in ("lr", "betas", "eps", "amsgrad"):
            if group[key] != first[key]:
                raise ValueError(
                    f"`state_dict` has groups with {key}={brief(first[key])} and {brief(group[key])}; expected one for "
                    "all"
                )
    decays = {float(group["weight_decay"]) for group in groups}
    if len(decays - {0.0}) > 1:
        raise ValueError(
            f"`state_dict` has groups with weight_decay in {brief_names(sorted(decays))}; expected one besides 0"
        )
    return first


# To torch


def _groups_of(decayed: Sequence[bool]) -> list[list[int]]:
    """The indices of the parameters in groups: one, or those with decay and those without."""
    if all(decayed) or not any(decayed):
        return [list(range(len(decayed)))]
    return [[i for i, own in enumerate(decayed) if own == wanted] for wanted in (True, False)]


def _state_of(built: Any, i: int, updates: int) -> dict[str, Any]:
    """What torch keeps of one parameter."""
    import torch

    variable, name, own = built.variables[i], built.names[i], built.slots[i]
    slots = {
        theirs: torch.from_numpy(exact(own[ours], variable, f"{ours} of {brief(name)}"))
        for ours, theirs in _SLOTS.items()
        if ours in own
    }
    return {"step": torch.tensor(float(updates)), **slots}


def _group(optimizer: AdamW, decays: bool, numbers: list[int]) -> dict[str, Any]:
    """A group of torch's, with the options that its AdamW has by default."""
    return {
        "lr": optimizer.learning_rate,
        "betas": (optimizer.beta_1, optimizer.beta_2),
        "eps": optimizer.epsilon / epsilon_factor(optimizer.beta_2, optimizer.iterations),
        "weight_decay": float(optimizer.engine.rates_now()[1]) if decays else 0.0,
        "amsgrad": optimizer.amsgrad,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
        "params": numbers,
    }
