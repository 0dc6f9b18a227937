"""Groups: variables with hyperparameters of their own."""

import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..arrays.brief import brief, brief_names
from ..arrays.tree import flatten
from . import table as hp

Own = dict[str, Any]  # the hyperparameters that a group has for itself; a rate that is called is a `Rate`

CHECKS: dict[str, hp.Check] = {
    "learning_rate": hp.rate,
    "learning_rate_multiplier": hp.fixed_rate,
    "weight_decay": hp.rate,
    "beta_1": hp.beta,
    "beta_2": hp.beta,
    "epsilon": hp.positive,
    "clipnorm": hp.optional_positive,
    "clipvalue": hp.optional_positive,
    "trainable": hp.flag,
}
_DEFAULTS = {"learning_rate_multiplier": 1.0, "trainable": True}  # of the common group, for which they are constant
_CLIPS = ("clipnorm", "clipvalue")


class Override(NamedTuple):
    """Hyperparameters for variables: those listed, with names that match or are given, or at certain positions."""

    listed: list[Any]
    patterns: list[str]
    own: Own
    exact: tuple[str, ...] = ()  # whole names
    beneath: tuple[str, ...] = ()  # whole names, or beginnings of paths
    positions: frozenset[int] = frozenset()
    is_exclusion: bool = False  # from weight decay

    def of(self, names: Sequence[str], variables: Sequence[Any]) -> tuple[set[int], list[str]]:
        """Which of the variables it is for, and what was asked for that is none of them."""
        found, unmatched = set(self.positions), []
        where = {id(variable): i for i, variable in enumerate(variables)}
        for k, array in enumerate(self.listed):
            if id(array) in where:
                found.add(where[id(array)])
            else:
                unmatched.append(f"number {k} of `var_list`")
        found.update(i for i, name in enumerate(names) if name in self.exact)
        for path in self.beneath:
            matching = [i for i, name in enumerate(names) if name == path or name.startswith(f"{path}/")]
            found.update(matching if path else range(len(names)))
            unmatched += [path] * (path != "" and not matching)
        if not self.is_exclusion:  # those of a file, whose names are compared in any case
            unmatched += [name for name in self.exact if name not in names]
        for pattern in self.patterns:
            matching = [
                i for i, n in enumerate(names) if re.search(pattern, n) or re.search(pattern, n.rpartition("/")[2])
            ]
            found.update(matching)
            if not matching:
                unmatched.append(pattern)
        return found, unmatched

    def by_names(self, names: Sequence[str], variables: Sequence[Any]) -> "Override":
        """The same without arrays and positions, whose names are known once there are variables."""
        found, _ = self._replace(patterns=[], exact=(), beneath=()).of(names, variables)
        exact = tuple(dict.fromkeys([*self.exact, *(names[i] for i in sorted(found))]))
        return self._replace(listed=[], positions=frozenset(), exact=exact)

    @property
    def called(self) -> str:
        """The method that was called, for messages."""
        return "exclude_from_weight_decay" if self.is_exclusion else "override"


def read_override(var_list: Any, var_names: Any, given: Mapping[str, Any], common: Any) -> Override:
    """An override as it is asked for, checked.

    Raises
    ------
    TypeError, ValueError
        If it is for nothing, asks for nothing, or a hyperparameter is out of range or in conflict.
    """
    patterns = hp.patterns("var_names", var_names)
    if isinstance(var_list, (str, list, tuple)) and any(isinstance(each, str) for each in var_list):
        raise TypeError(f"`var_list` holds names; expected arrays: pass `var_names={brief(var_list)}`")
    listed = [] if var_list is None else flatten(var_list, "var_list")[1]
    own = {name: checked(name, value) for name, value in given.items()}
    check_clips(own, common)
    return Override(listed, patterns, own)


def checked(name: str, value: Any) -> Any:
    """A hyperparameter of a group as it is kept."""
    if name in ("learning_rate", "weight_decay") and getattr(value, "shape", ()) != ():
        raise ValueError(f"`{name}` is an array of shape {tuple(value.shape)}; expected a number, or a callable")
    value = CHECKS[name](name, value)
    return hp.Rate(name, value) if callable(value) else value


def check_clips(own: Mapping[str, Any], common: Any) -> None:
    """Refuse a second kind of clip."""
    asked = {name: own[name] for name in _CLIPS if own.get(name) is not None}
    if len(asked) > 1:
        raise ValueError(f"Only one of `clipnorm` and `clipvalue` can be set for a variable. Received: {asked}")
    if asked and common.global_clipnorm is not None:
        raise ValueError(
            f"a group cannot clip by itself where `global_clipnorm` clips all gradients together. Received: {asked}, "
            f"while global_clipnorm={common.global_clipnorm}"
        )


class _Setting:
    """An attribute of a group: its own value, or the common one; checked like the optimizer's when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, group: Any, owner: type) -> Any:
        return self if group is None else group.read(self.name)

    def __set__(self, group: Any, value: Any) -> None:
        group.write(self.name, value)


class Group:
    """Variables that share hyperparameters, each of which can be read and set at any time.

    What a group has not been given, or set, is the optimizer's own, and follows it. A schedule is read as the rate of
    the next step. Setting a rate to a number ends the schedule of this group alone.

    Attributes
    ----------
    names : tuple of str
    variables : list of arrays
    learning_rate : float
        Set a float, schedule or callable. It does not include the multiplier.
    learning_rate_multiplier : float
        On top of `learning_rate`, the group's own or the common one. Of the common group it is 1.
    weight_decay : float
        Set a float, schedule or callable.
    beta_1, beta_2, epsilon : float
    clipnorm, clipvalue : float or None
        Setting one of them replaces the other; None switches it off for this group.
    trainable : bool
        A group that is not has no state and is left alone by every step, whether it has gradients or not. Once it is
        trainable again, it starts with new moments, and counts its steps from there for the bias correction. Of the
        common group it is True.

    Raises
    ------
    ValueError
        If a value is out of range or in conflict with another: nothing is changed.
    """

    engine: Any
    names: tuple[str, ...]
    variables: list[Array]
    own: Own | None
    changed: Own
    started: int
    learning_rate: Any = _Setting()
    learning_rate_multiplier: Any = _Setting()
    weight_decay: Any = _Setting()
    beta_1: Any = _Setting()
    beta_2: Any = _Setting()
    epsilon: Any = _Setting()
    clipnorm: Any = _Setting()
    clipvalue: Any = _Setting()
    trainable: Any = _Setting()

    def __init__(
        self, engine: Any, names: Sequence[str], variables: Sequence[Array], own: Own | None, started: int = 0
    ) -> None:
        vars(self).update(
            engine=engine,
            names=tuple(names),
            variables=list(variables),
            own=own,  # None of the common group
            changed={},  # what was set since `build`
            started=started,  # updates before its moments were new, or that it has missed since
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in CHECKS:
            raise AttributeError(f"a group has no attribute {brief(name)} to set; expected one of {list(CHECKS)}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"Group({', '.join([brief_names(self.names), *self.told()])})"

    def told(self) -> list[str]:
        """What is its own, in words."""
        return [f"{name}={_shown(value)}" for name, value in (self.own or {}).items()]

    def __getstate__(self) -> dict[str, Any]:
        # The engine puts itself and its variables back: it may be copied before, or after, what refers to its groups.
        return {key: vars(self)[key] for key in ("own", "changed", "started")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(engine=None, names=(), variables=[], **state)

    def read(self, name: str) -> Any:
        """A hyperparameter as it is now."""
        if self.own is not None and name in self.own:
            value = self.own[name]
            return value(self.engine.count()) if isinstance(value, hp.Rate) else value
        if name in _DEFAULTS:
            return _DEFAULTS[name]
        if name in _CLIPS and self.own is not None and any(self.own.get(clip) is not None for clip in _CLIPS):
            return None
        rates = self.engine.rates_at(self.engine.count()) if name in ("learning_rate", "weight_decay") else ()
        return rates[name == "weight_decay"] if rates else getattr(self.engine.hyper, name)

    def write(self, name: str, value: Any) -> None:
        """Set a hyperparameter of this group."""
        if self.own is None:
            self._write_common(name, value)
            return
        value = self._named(lambda: checked(name, value))
        changes, own = {name: value}, _merged(self.own, {name: value})
        self._named(lambda: check_clips(own, self.engine.hyper))
        if name == "trainable" and value is not self.trainable:
            self.engine.set_trainable(self, value)
        # All at once, for an interrupt or another thread.
        vars(self).update(own=own, changed=_merged(self.changed, changes))
        self.engine.hyper.token = object()

    def _write_common(self, name: str, value: Any) -> None:
        if name in _DEFAULTS:
            if CHECKS[name](name, value) != _DEFAULTS[name]:
                raise ValueError(
                    f"`{name}` of the common group is always {_DEFAULTS[name]}. Received: {brief(value)}; expected an "
                    "`override` of the variables"
                )
        elif name == "learning_rate":
            self.engine.set_rate(value)
        else:
            self.engine.hyper.set(name, value, CHECKS[name])

    def _named(self, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except (TypeError, ValueError) as error:
            raise type(error)(f"the group of {brief_names(self.names)}: {error}") from None

    def take(self, engine: Any, indices: Sequence[int], names: Sequence[str], variables: Sequence[Array]) -> None:
        """Belong to a copied engine, and hold those of its variables that are in this group."""
        own_names, own_variables = tuple(names[i] for i in indices), [variables[i] for i in indices]
        vars(self).update(engine=engine, names=own_names, variables=own_variables)

    def twin(self) -> "Group":
        """A group with the same hyperparameters and count, for some of its variables."""
        return Group(self.engine, (), (), self.own or {}, self.started)

    def rates_at(self, number: Any, learning_rate: Any, weight_decay: Any) -> tuple[Any, Any]:
        """Its rates at a step, where the common ones are these."""
        own: Own = self.own or {}
        rate, decay = own.get("learning_rate", learning_rate), own.get("weight_decay", weight_decay)
        rate = rate(number) if isinstance(rate, hp.Rate) else rate
        decay = decay(number) if isinstance(decay, hp.Rate) else decay
        return rate * own.get("learning_rate_multiplier", 1.0), decay

    def functions(self) -> list[hp.Rate]:
        """What is called at each step."""
        return [value for value in (self.own or {}).values() if isinstance(value, hp.Rate)]

    def values(self) -> Any:
        """Its hyperparameters beside all common ones, as the numbers of a step are made of them."""
        own: Own = self.own or {}
        clips = {clip: self.read(clip) for clip in _CLIPS}
        return SimpleNamespace(**(vars(self.engine.hyper) | own | clips))


def parted(
    groups: Sequence[Group], which: Sequence[int], present: Sequence[bool]
) -> tuple[list[Group], list[int], list[Group]]:
    """The groups, and the group of each variable, so that all variables of a group have a gradient, or none has.

    A group in which only some have one is parted: the others count their steps for themselves from now on. Thirdly, the
    groups without any gradient.
    """
    parts, own, has = list(groups), np.array(which), np.array(present)
    sizes, found = (np.bincount(own[chosen], minlength=len(groups)) for chosen in (slice(None), has))
    for k in np.flatnonzero((found > 0) & (found < sizes)).tolist():
        own[(own == k) & ~has] = len(parts)
        parts.append(groups[k].twin())
    idle = [groups[k] for k in np.flatnonzero((found == 0) & (sizes > 0)).tolist()]
    return parts, own.tolist(), idle + parts[len(groups) :]


def _merged(own: Own, later: Own) -> Own:
    """What later words leave of earlier ones: one kind of clip replaces the other."""
    if any(later.get(clip) is not None for clip in _CLIPS):
        own = {name: value for name, value in own.items() if name not in _CLIPS}
    return own | later


def _shown(value: Any) -> str:
    return brief(value.function if isinstance(value, hp.Rate) else value)


def comparable(own: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as another process can compare them with its own: of what is called its name alone."""
    return {name: _name_of(value.function) if isinstance(value, hp.Rate) else value for name, value in own.items()}


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def make_groups(
    engine: Any, overrides: Sequence[Override], names: Sequence[str], variables: Sequence[Array], together: Any = None
) -> tuple[list[Group], list[int], list[tuple[str, list[str]]]]:
    """The groups of variables, the common one first; which group each variable is in; and what matched none.

    A variable takes each hyperparameter from the last override that names it. Equal hyperparameters are one group.
    With `together` the variables of all ranks count, and all ranks have the same groups, some of them maybe empty.
    """
    found = [override.of(names, variables) for override in overrides]
    asked = [tuple(k for k, (those, _) in enumerate(found) if i in those) for i in range(len(names))]
    everywhere, unmatched = asked, [nothing for _, nothing in found]
    if together is not None:
        everywhere, unmatched = together.introduce(overrides, names, asked, unmatched)
    own = {which: _own_of(overrides, which) for which in [(), *everywhere]}
    keys = {which: _key(each) for which, each in own.items()}
    numbers = {key: k for k, key in enumerate(dict.fromkeys(keys.values()))}
    which = [numbers[keys[each]] for each in asked]
    if together is not None:
        together.group_of = {name: numbers[keys[each]] for name, each in together.asked.items()}
    members: list[list[int]] = [[] for _ in numbers]
    for i, k in enumerate(which):
        members[k].append(i)
    first = {numbers[key]: own[each] for each, key in reversed(keys.items())}
    groups = [
        Group(engine, [names[i] for i in those], [variables[i] for i in those], dict(first[k]) if k else None)
        for k, those in enumerate(members)
    ]
    return (
        groups,
        which,
        [(each.called, nothing) for each, nothing in zip(overrides, unmatched, strict=True) if nothing],
    )


def _own_of(overrides: Sequence[Override], which: Sequence[int]) -> Own:
    own: Own = {}
    for k in which:
        own = _merged(own, overrides[k].own)
    return own


def _key(own: Own) -> object:
    """Equal for hyperparameters that are equal: numbers by value, what is called by itself."""
    return frozenset((name, id(value.function) if isinstance(value, hp.Rate) else value) for name, value in own.items())
