"""The hyperparameters of groups as JSON, in a config and in the document of a file."""

from collections.abc import Mapping, Sequence
from typing import Any

from .. import schedules
from ..arrays.brief import brief
from ..hyperparameters import table as hp
from ..hyperparameters.groups import CHECKS, Group, Override, check_clips, checked

_WHO = ("var_names", "names", "beneath")  # whom an entry is for


def config_of(hyper: Any, exclusions: bool = False) -> list[dict[str, Any]]:
    """The overrides of an optimizer, and what was set in its groups since; empty where none but exclusions are.

    Exclusions from weight decay alone are no part of a config that Keras's own AdamW is to understand; with
    `exclusions` they are.

    Raises
    ------
    ValueError
        If arrays are listed whose names are not known before `build`.
    """
    if any(override.listed or override.positions for override in hyper.overrides):  # not once it is built
        raise ValueError(
            "arrays were given to `override` or `exclude_from_weight_decay`, whose names are not known before `build`; "
            "expected the optimizer to be built, or `var_names`"
        )
    entries = [entry for override in hyper.overrides if (entry := _entry(override))]
    changed = [{"names": list(group.names), **_plain(group.changed)} for group in hyper.others if group.changed]
    only_exclusions = not changed and all(override.is_exclusion for override in hyper.overrides)
    return [] if only_exclusions and not exclusions else entries + changed


def _entry(override: Override) -> dict[str, Any]:
    """An override for JSON; nothing where it is for nobody."""
    who = {"var_names": override.patterns, "names": list(override.exact), "beneath": list(override.beneath)}
    who = {key: value for key, value in who.items() if value}
    exclusion = {"is_exclusion": True} if override.is_exclusion else {}
    return who | _plain(override.own) | exclusion if who else {}


def _plain(own: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: schedules.serialize(value.function) if isinstance(value, hp.Rate) else value for key, value in own.items()
    }


def read(entries: Any, custom_objects: Mapping[str, Any] | None, common: Any) -> list[Override]:
    """The overrides of a config, checked.

    Raises
    ------
    TypeError, ValueError
        If one is not as `config_of` makes them.
    """
    if not isinstance(entries, (list, tuple)):
        raise TypeError(f"`overrides` is {brief(entries)}; expected a list of dicts")
    return [_read_one(entry, custom_objects, common) for entry in entries]


def _read_one(entry: Any, custom_objects: Mapping[str, Any] | None, common: Any) -> Override:
    if not isinstance(entry, Mapping) or not set(entry) <= {*_WHO, *CHECKS, "is_exclusion"}:
        raise ValueError(f"`overrides` holds {brief(entry)}; expected a dict with some of {[*_WHO, *CHECKS]}")
    patterns = hp.patterns("var_names", entry.get("var_names"))
    names, beneath = (entry.get(key) or [] for key in _WHO[1:])
    for given in (names, beneath):
        if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
            raise TypeError(f"`overrides` holds the names {brief(given)}; expected strings")
    own = {}
    for key in CHECKS:
        if key in entry:
            value = entry[key]
            is_function = isinstance(value, Mapping)
            own[key] = checked(key, schedules.deserialize(value, custom_objects) if is_function else value)
    if not own or not (patterns or names or beneath):
        raise ValueError(f"`overrides` holds {brief(entry)}; expected the names of variables, and a hyperparameter")
    check_clips(own, common)
    is_exclusion = bool(entry.get("is_exclusion"))
    return Override([], patterns, own, exact=tuple(names), beneath=tuple(beneath), is_exclusion=is_exclusion)


def described(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """All groups but the common one, with all that they have for themselves, and since when they count their steps."""
    return [{"names": list(group.names), "started": group.started, "own": _plain(group.own or {})} for group in groups]


def is_description(entry: Any) -> bool:
    """Whether an entry of a document may be what `described` has made."""
    return (
        type(entry) is dict
        and type(entry.get("names")) is list
        and all(type(name) is str for name in entry["names"])
        and type(entry.get("started")) is int
        and 0 <= entry["started"] < 2**62
        and type(entry.get("own")) is dict
    )
