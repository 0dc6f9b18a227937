"""torch: the `state_dict` of `torch.optim.AdamW`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..arrays.brief import brief, brief_names
from ..arrays.tree import Container
from ..hyperparameters.groups import Group
from ..optimizer import AdamW
from .exact import check_squares, checked_count, exact
from .moments import assembled, eps_of, exportable, wide

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
        With torch's groups: see `AdamW.groups`. Parameters of groups without decay are excluded from it.

    Raises
    ------
    ValueError
        Where no exact conversion exists: groups that differ in ``amsgrad`` or ``maximize``, a decay that is coupled
        (`torch.optim.Adam`'s), parameters that have taken different numbers of steps.

    Notes
    -----
    torch adds ``eps`` after the bias correction, as ``epsilon_mode="corrected"`` does here. AMSGrad's maximum is that
    of the raw second moment in both.
    """
    groups, states = _parts(state_dict)
    _check_groups(groups)
    hyper = next((group for group in groups if float(group["weight_decay"])), groups[0])
    numbers = [number for group in groups for number in group["params"]]
    slots = {ours: theirs for ours, theirs in _SLOTS.items() if ours != "velocity_hat" or hyper["amsgrad"]}
    _check_states(states, numbers, ["step", *slots.values()])
    updates, common = _common_count(states, numbers), _values(hyper)
    own = [
        {key: value for key, value in _values(group).items() if value != common[key]}
        for group in groups
        for _ in group["params"]
    ]
    moments = [{ours: states[n][theirs] for ours, theirs in slots.items()} if n in states else None for n in numbers]
    given = common | {"epsilon_mode": "corrected", "amsgrad": bool(hyper["amsgrad"])}
    given["maximize"] = bool(hyper.get("maximize", False))
    return assembled(given | options, moments, own, updates, variables, "`state_dict`")


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
        Of torch tensors, with the groups of parameters that the optimizer has, in the order of their first variables.
        Build torch's optimizer with the same groups in that order: it compares nothing but their sizes.

    Raises
    ------
    ValueError
        Where no exact conversion exists: an option that torch lacks, a window of accumulation that is not complete, a
        state that is not exact in a 16-bit parameter's dtype, which is what torch keeps.

    Notes
    -----
    With ``epsilon_mode="corrected"``, ``eps`` is ``epsilon``; otherwise it is converted for the next update, which
    alone is then the same. A schedule becomes its present learning rate, a multiplier a part of it.
    """
    built = exportable(optimizer, "torch", leave_out)
    if optimizer.nesterov:
        raise ValueError("nesterov=True: torch's AdamW has none; expected False")
    updates, first = optimizer.iterations, 0
    state: dict[int, dict[str, Any]] = {}
    groups, all_rates = [], optimizer.engine.group_rates()
    for k in dict.fromkeys(built.which):  # in the order of their first variables, as torch has them
        indices = [i for i, own in enumerate(built.which) if own == k]
        rates = all_rates[k]
        group, numbers = optimizer.groups[k], range(first, first + len(indices))
        lacking = [key for key in ("clipnorm", "clipvalue") if getattr(group, key) and key not in set(leave_out)]
        if lacking or group.started:
            what = lacking or "a count of steps of its own"
            raise ValueError(f"{group!r} has {what}, which torch's AdamW has not; see `leave_out`")
        if updates:  # torch makes the state at the first step
            state |= {number: _state_of(built, i, updates) for number, i in zip(numbers, indices, strict=True)}
        groups.append(_group(optimizer, group, rates, list(numbers)))
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
        own = states.get(number, dict.fromkeys(keys))
        lacking = [key for key in keys if key not in own]
        if lacking and "exp_avg_code" in own:
            raise ValueError(
                f"`state_dict`: the moments of parameter {number} are codes of 8 bits; expected numbers, as "
                '`adamw_numba.torch.AdamW(..., moments="float32")` has them once it has loaded this'
            )
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


def _check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups that cannot be ours."""
    if not groups:
        raise ValueError("`state_dict` has groups without parameters; expected some")
    for group in groups:
        decay = float(group["weight_decay"])
        # Adam adds its decay to the gradient; without decay it is AdamW.
        if decay and not group.get("decoupled_weight_decay", True):
            raise ValueError(
                f"`state_dict` is that of Adam with the coupled weight decay {decay}; expected torch.optim.AdamW's, or "
                "weight_decay=0"
            )
        for key in ("amsgrad", "maximize"):
            if bool(group.get(key)) != bool(groups[0].get(key)):
                raise ValueError(f"`state_dict` has groups with and without {key}; expected one for all")


def _values(group: Mapping[str, Any]) -> dict[str, float]:
    """The hyperparameters of a group, in our words."""
    beta_1, beta_2 = map(float, group["betas"])
    return {
        "learning_rate": float(group["lr"]),  # a tensor, where a graph is captured
        "weight_decay": float(group["weight_decay"]),
        "beta_1": beta_1,
        "beta_2": beta_2,
        "epsilon": float(group["eps"]),
    }


# To torch


def _state_of(built: Any, i: int, updates: int) -> dict[str, Any]:
    """What torch keeps of one parameter."""
    import torch

    variable, name, own = built.variables[i], built.names[i], wide(built.variables[i], built.slots[i])
    slots = {
        theirs: torch.from_numpy(exact(own[ours], variable, f"{ours} of {brief(name)}"))
        for ours, theirs in _SLOTS.items()
        if ours in own
    }
    return {"step": torch.tensor(float(updates)), **slots}


def _group(optimizer: AdamW, group: Group, rates: tuple[float, float], numbers: list[int]) -> dict[str, Any]:
    """A group of torch's, with the options that its AdamW has by default."""
    return {
        "lr": float(rates[0]),
        "betas": (group.beta_1, group.beta_2),
        "eps": eps_of(group.values(), optimizer.iterations),
        "weight_decay": float(rates[1]),
        "amsgrad": optimizer.amsgrad,
        "maximize": optimizer.maximize,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
        "params": numbers,
    }
