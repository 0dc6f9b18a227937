"""How an optimizer's arguments, groups and exclusions from decay differ from those that were saved."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..arrays.brief import brief, brief_names
from ..hyperparameters.groups import Group
from ..ranks.meeting import plain
from . import overrides
from .archive import Saved
from .snapshot import engine_of

# What reading a config may raise that another program has written.
UNUSABLE = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
# May differ without a warning, or are compared otherwise; a learning rate that is a number is in the state.
_FREE = ("name", "threads", "learning_rate", "overrides")


def differences(optimizer: Any, saved: Saved) -> list[str]:
    """How an optimizer's arguments, groups and exclusions differ from the saved ones: one sentence each."""
    here, there = _flat(optimizer.get_config()), _flat_saved(saved)
    different = [key for key in here if key in there and here[key] != there[key] and key not in _FREE]
    rate = "learning_rate"
    if rate not in engine_of(optimizer).state.scalars and here[rate] != there.get(rate):
        different.append(rate)
    told = [f"{key} is {brief(here[key])}, and was {brief(there.get(key))}" for key in different]
    return told + _different_groups(engine_of(optimizer).hyper.groups, saved)


def _different_groups(groups: Sequence[Group], saved: Saved) -> list[str]:
    """Which variables have other hyperparameters for themselves than they had."""
    excluded = [entry["name"] for entry in saved.document["variables"] if entry["excluded"]]
    was: dict[str, Any] = {name: {"weight_decay": 0.0} for name in excluded}
    for group in saved.document.get("groups", []):
        was |= dict.fromkeys(group["names"], group["own"])
    told = []
    for group, own in zip(groups, [{}, *(each["own"] for each in overrides.described(groups[1:]))], strict=True):
        own = json.loads(json.dumps(own, default=plain))
        changed = [name for name in group.names if was.get(name, {}) != own]
        only_decay = all(set(each) <= {"weight_decay"} for each in (own, *(was.get(name, {}) for name in changed)))
        if changed and only_decay and {*own.values(), *(v for n in changed for v in was.get(n, {}).values())} <= {0.0}:
            told.append(f"{brief_names(changed)} are excluded from weight decay in only one of them")
        elif changed:
            there = was.get(changed[0], {})
            told.append(f"{brief_names(changed)} have {brief(own)} for themselves, and had {brief(there)}")
    return told


def _flat_saved(saved: Saved) -> dict[str, Any]:
    try:
        return _flat(saved.document["config"])
    except UNUSABLE as error:
        raise ValueError(f"{saved.where} holds a config that cannot be used: {error!r:.400}") from error


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it comes back from JSON, with that of an inner optimizer in the same dict."""
    flat: dict[str, Any] = json.loads(json.dumps(config, default=plain))
    inner: dict[str, Any] = flat.pop("inner_optimizer", {"config": {}})
    flat.update(inner["config"])
    return flat
