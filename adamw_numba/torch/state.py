"""What `optimizer.state` and `state_dict` of the torch front show: the engine's own arrays, under torch's names.

The counts of all parameters are one NumPy array, and each `step` is a view of its element: one assignment updates them
all. Tensors in the state are the engine's arrays. So what is written into either counts at the next step; and since a
user may also put other tensors there, both are compared with what they are known to be.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from operator import is_, setitem
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import arrays
from ..array_api import moments
from ..array_api.masters import converted
from ..arrays.brief import brief
from ..arrays.dtensors import check_alike, is_dtensor, like
from ..arrays.moments import SCALES, check_scales, kind_of
from ..state import Slots
from ..step.commit import exhaust

Own = dict[str, Any]

# Torch's names of the arrays of the state, then ours, and what the engine calls them.
NUMBERS = {"exp_avg": "momentum", "exp_avg_sq": "velocity"}
CODES = {  # in the place of numbers: under torch's names its own optimizer would take codes for numbers
    "exp_avg_code": "momentum",
    "exp_avg_sq_code": "velocity",
    "exp_avg_scale": "momentum_scale",
    "exp_avg_sq_scale": "velocity_scale",
}
OTHERS = {
    "max_exp_avg_sq": "velocity_hat",
    "average": "average",
    "gradient_accumulator": "gradient_accumulator",
    "master": "master",
}


class Started(NamedTuple):
    """What the engine has of a parameter."""

    slots: Slots
    steps: int
    micro_steps: int = 0  # since the last update
    calls: int = 0  # of all parameters, whether this one took part or not


class Shown:
    """The state of the parameters as the user sees it.

    Parameters
    ----------
    engine : Engine
    window : int
        How many micro-steps an update takes.

    Attributes
    ----------
    window : int
    contents : dict
        For each parameter that has had a gradient, a dict with ``step``, ``exp_avg`` and so on.
    is_shown : bool
        Whether anybody has seen the arrays.
    is_lent : bool
        Whether anybody has the dicts, and may put other tensors there.
    """

    def __init__(self, engine: Any, window: int) -> None:
        self._engine, self.window = engine, window
        self.contents: Any = defaultdict(dict)
        self.is_shown = self.is_lent = False
        self._dtype = np.float64 if torch.get_default_dtype() == torch.float64 else np.float32  # of torch's counts
        self._places: dict[torch.Tensor, int] = {}  # of each parameter among the counts
        self._own = np.zeros(0, np.intp)  # those of the parameters that the engine has, in its order
        self._counts = self._told = np.zeros(0, self._dtype)  # what the user sees, and a copy
        self._micro_steps, self._calls = np.zeros((), self._dtype), np.zeros((), np.int64)
        self._known: tuple[list[Any], list[Any]] = [], []
        self._given: Any = None  # of the engine, when this was made for it

    def show(self) -> Any:
        """The contents as they are now, for somebody to look at."""
        with self._engine.lock:
            self.is_shown = True
            self.sync()
            if self._engine.workspace is not None:
                self._engine.workspace.lend()
            return self.contents

    def replace(self, contents: Any) -> None:
        """Take other contents, which `is_written` tells of."""
        self.contents, self.is_shown, self.is_lent = contents, True, True

    def sync(self) -> None:
        """Have the counts be those of now, unless somebody has written them."""
        if self._counts.tobytes() == self._told.tobytes():
            self.tell()

    def tell(self) -> None:
        """Write the steps that were taken into the counts."""
        workspace, groups = self._engine.workspace, self._engine.hyper.groups
        if workspace is None or workspace.given is not self._given:
            return
        self._engine.catch_up()
        calls = self._engine.state.scalars["iteration"].item()
        updates, micro_steps = divmod(calls, self.window)
        counts: Any = updates - groups[0].started
        if len(groups) > 1:
            counts = updates - np.array([group.started for group in groups])[np.array(workspace.which)]
        # All of it or nothing, since what differs from its copy was written by the user.
        told = (self._counts, self._own, counts), (self._told, self._own, counts)
        exhaust(starmap(setitem, (*told, (self._micro_steps, ..., micro_steps), (self._calls, ..., calls))))

    def is_written(self) -> bool:
        """Whether the user has written counts, or put something else into the dicts, since the last step."""
        if self._counts.tobytes() != self._told.tobytes():
            return True
        return self.is_lent and not all(map(are_same, self._now(), self._known))

    def _now(self) -> tuple[list[Any], list[Any]]:
        """The dicts, and all that they hold."""
        dicts = [own for own in self.contents.values() if own and isinstance(own, dict)]
        return dicts, [value for own in dicts for value in own.values()]

    def put(self, params: Sequence[torch.Tensor], started: Sequence[Started]) -> None:
        """Show the arrays of these parameters, which are what the engine has now."""
        self._given = None
        self._make_places(params)
        self._counts[self._own] = self._told[self._own] = [each.steps for each in started]
        counts, micro_steps = torch.from_numpy(self._counts), torch.from_numpy(self._micro_steps)
        calls, is_rounded = torch.from_numpy(self._calls), self._engine.hyper.moments != "float32"
        for place, param, each in zip(self._own.tolist(), params, started, strict=True):
            own = self.contents.get(param) or {}
            # A count that somebody holds stays the one that counts.
            held = {"step": own["step"] if self._is_ours(own.get("step"), place) else counts[place]}
            held |= {
                theirs: shown_as(each.slots[ours], param, own.get(theirs))
                for theirs, ours in names_of(each.slots).items()
            }
            held |= {"micro_steps": micro_steps} if self.window > 1 else {}
            held |= {"iteration": calls} if is_rounded else {}
            if param in self.contents:
                self.contents[param].update(held)
                for name in {*NUMBERS, *CODES, "iteration"} - held.keys():  # of moments that were kept in other bits
                    self.contents[param].pop(name, None)
            else:
                self.contents[param] = held
        self._known, workspace = self._now(), self._engine.workspace
        if workspace is not None:
            self._given = workspace.given
            if self.is_shown:
                workspace.lend()

    def _is_ours(self, step: Any, place: int) -> bool:
        at = self._counts.ctypes.data + place * self._counts.itemsize
        return isinstance(step, torch.Tensor) and step.data_ptr() == at

    def _make_places(self, params: Sequence[torch.Tensor]) -> None:
        """Give a count to each parameter that has none; more room than needed, so that views seldom have to go."""
        places = self._places
        for param in params:
            places.setdefault(param, len(places))
        if len(places) > len(self._counts):
            self._places = places = {param: i for i, param in enumerate(params)}
            self._counts, self._told = np.zeros((2, max(64, 2 * len(params))), self._dtype)
        self._own = np.array([places[param] for param in params], np.intp)


def are_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


def started_of(engine: Any) -> dict[torch.Tensor, Started]:
    """What an engine has of the parameters."""
    workspace, groups, updates = engine.workspace, engine.hyper.groups, engine.updates()
    if workspace is None:
        return {}
    return {
        param: Started(slots, updates - groups[k].started)
        for param, slots, k in zip(workspace.given, workspace.slots, workspace.which, strict=True)
    }


def restored(name: str, param: torch.Tensor, own: Own, slots: Slots, before: Slots) -> Started:
    """The state of a parameter as somebody has given it, in new slots; arrays that the engine has already stay.

    Raises
    ------
    TypeError, ValueError
        If something is missing, or of another shape.
    """
    what = f"the state of parameter {brief(name)}"
    with _about(what):
        given = _moments_in(own, param)
    lacking = [key for key in ("step", *given) if key not in own]
    if lacking:
        raise ValueError(f"{what} lacks {lacking}; expected that of an AdamW")
    with _about(what):
        own = own | _converted(own, given, param, slots)
    for theirs, ours in names_of(slots).items():
        if theirs not in own:
            if ours == "average":
                arrays.write(slots[ours], param)
            continue
        with _about(f"{what}: {theirs!r}"):
            value = _part(own[theirs], param)
            if not arrays.is_array(value):
                raise TypeError(f"it is {brief(value)}; expected a tensor")
            if theirs in CODES and arrays.dtype_name(value) != arrays.dtype_name(slots[ours]):
                raise TypeError(f"it has dtype {arrays.dtype_name(value)}; expected {arrays.dtype_name(slots[ours])}")
            if isinstance(value, torch.Tensor):
                # All of it is in its storage, whatever was done to it.
                of_integers = theirs in CODES or (ours == "master" and value.dtype == torch.int16)
                arrays.check_tensor("it", value, of_integers)
                if ours in SCALES:
                    check_scales("it", arrays.to_numpy(value))
                if ours == "master":
                    value = converted(arrays.detached(arrays.seen(param)), value, arrays.dtype_name(slots[ours]))
            known = before.get(ours)
            is_known = value is known or (value is not own[theirs] and _lies_at(known, value))
            if is_known and _is_laid_out_like(value, slots[ours]):
                slots[ours] = before[ours]
            else:
                arrays.write(slots[ours], value)
    with _about(what):
        return Started(slots, *(_count(own, key) for key in ("step", "micro_steps", "iteration")))


def _count(own: Own, key: str) -> int:
    """A number of steps that somebody has given; 0 where it is missing."""
    try:
        count = float(own.get(key, 0))
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of torch, and of Python
        raise TypeError(f"{key!r} is {brief(own[key])}; expected an integer >= 0") from None
    if not 0 <= count < 2**62 or count != int(count):
        raise ValueError(f"{key!r} is {count}; expected an integer >= 0")
    return int(count)


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Say in errors what they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def names_of(slots: Slots) -> dict[str, str]:
    """The names under which slots are shown, and what the engine calls them."""
    is_number = arrays.dtype_name(slots["momentum"]) in arrays.COMPUTE
    return {theirs: ours for theirs, ours in ((NUMBERS if is_number else CODES) | OTHERS).items() if ours in slots}


def new_slots(engine: Any, name: str, param: torch.Tensor, amsgrad: bool) -> Slots:
    """Zeros for a parameter, once it was checked.

    Raises
    ------
    TypeError, ValueError
        If it cannot be trained, or its moments cannot be kept in the bits that were asked for.
    """
    arrays.check_variable(name, param)
    if is_dtensor(param) and engine.hyper.moments == "8bit":  # the scales would have to be DTensors of another shape
        raise ValueError(
            f"moments='8bit': parameter {brief(name)} is a DTensor, and no state dict could hold the scales of its "
            "blocks; expected moments='bfloat16'"
        )
    slots: Slots = engine.new_slots(arrays.seen(param), amsgrad, name)
    return slots


def _moments_in(own: Own, param: torch.Tensor) -> dict[str, str]:
    """The names of the moments in a state that somebody has given, and what the engine calls them."""
    if "exp_avg_code" not in own:
        return NUMBERS
    code = own["exp_avg_code"]
    kind = kind_of(arrays.dtype_name(code), arrays.is_complex(param)) if arrays.is_array(code) else "float32"
    if kind == "float32":
        raise TypeError(f"'exp_avg_code' is {brief(code)}; expected a tensor of codes, which are unsigned integers")
    return {theirs: ours for theirs, ours in CODES.items() if kind == "8bit" or ours in NUMBERS.values()}


def _converted(own: Own, given: Mapping[str, str], param: torch.Tensor, slots: Slots) -> Own:
    """Moments that somebody has given in other bits than slots keep; nothing where they need no conversion."""
    kept = names_of(slots)
    if given.keys() <= kept.keys() and (given is NUMBERS or own["exp_avg_code"].dtype == slots["momentum"].dtype):
        return {}
    local = arrays.seen(param)
    model = np.broadcast_to(np.zeros((), arrays.SLOT[arrays.dtype_name(local)]), tuple(local.shape))
    found = {}
    for theirs, ours in given.items():
        with _about(repr(theirs)):
            value = found[ours] = arrays.as_numpy(_tensor(own[theirs], param))
            if ours in NUMBERS.values() and value.shape != model.shape:
                raise ValueError(f"value has shape {value.shape}; expected {model.shape}")
    made = moments.brought_in(model, found)
    if kept.keys() & CODES.keys():
        made = moments.narrowed(model, made, {key: arrays.as_numpy(slot) for key, slot in slots.items()})
    return {theirs: made[ours] for theirs, ours in kept.items() if ours in made}


def _tensor(value: Any, param: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"it is {brief(value)}; expected a tensor")
    return arrays.detached(_part(value, param))


def shown_as(slot: torch.Tensor, param: torch.Tensor, before: Any) -> torch.Tensor:
    """A slot as the user sees it: of a DTensor a DTensor over its memory, and the one that was seen before if it is."""
    if not is_dtensor(param):
        return slot
    if is_dtensor(before):
        known = arrays.seen(before)
        if _lies_at(known, slot) and _is_laid_out_like(known, slot):
            return before
    return like(slot, param)


def _part(value: Any, param: torch.Tensor) -> Any:
    """What this process has of a state that somebody has given."""
    if not is_dtensor(param):
        return value
    if not is_dtensor(value):
        raise ValueError(
            f"it is a {type(value).__name__}; expected a DTensor, as the parameter is: "
            "`torch.distributed.checkpoint.state_dict.set_optimizer_state_dict` makes it of a whole tensor"
        )
    check_alike("it", None, value, param)
    return arrays.seen(value)


def _lies_at(some: Any, other: torch.Tensor) -> bool:
    """Whether a tensor, which may be None, lies where another does: DTensors wrap views."""
    return some is not None and some.data_ptr() == other.data_ptr()


def _is_laid_out_like(some: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether kernels, which take all slots to lie as the momentum does, can go on with a tensor that they had."""
    kinds = ((each.shape, each.stride(), each.dtype, each.device) for each in (some, other))
    return next(kinds) == next(kinds)


# State dicts


class _Held:
    """Keeps a tensor as it is, which torch would cast to the dtype of its parameter."""

    def __init__(self, value: Any) -> None:
        self.value = value


def apart(optimizer: Any, state_dict: Own) -> None:
    """Have a state dict have dicts of its own: what is put into them is not put into the optimizer."""
    state_dict["state"] = {key: dict(own) if isinstance(own, dict) else own for key, own in state_dict["state"].items()}


def hold(optimizer: Any, state_dict: Own) -> Own:
    """A state dict whose tensors torch does not cast."""
    held = {
        key: {name: _Held(value) for name, value in own.items()} if isinstance(own, dict) else own
        for key, own in state_dict["state"].items()
    }
    return {**state_dict, "state": held}


def released(state: Mapping[Any, Any]) -> Any:
    """A state with its tensors themselves, in dicts of its own."""
    return defaultdict(
        dict,
        {
            key: {name: value.value if isinstance(value, _Held) else value for name, value in own.items()}
            if isinstance(own, dict)
            else own
            for key, own in state.items()
        },
    )
