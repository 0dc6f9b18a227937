"""Everything behind the surface of an optimizer: its state, its rates, and the way a step is taken."""

import copy
import math
import operator
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from .. import arrays, schedules
from .. import hyperparameters as hp
from ..array_api import stateless
from ..arrays import Array
from ..arrays.brief import brief_names
from ..arrays.tree import Container, Form, flatten, form_of, materialized, order, rebuild
from ..state import Place, State, new_slots
from . import gradients as matching
from . import prepare as step
from . import workspace as building
from .prepare import Call
from .workspace import Workspace


class Record:
    """What the last step did, and how many were skipped.

    Slots, so that `setattr` is one call into C: a commit writes them with no bytecode, and so no interrupt, between.
    """

    __slots__ = ("last", "skipped")

    def __init__(self) -> None:
        self.last: tuple[float | None, bool, float] | None = None  # gradient norm, whether applied, learning rate
        self.skipped = 0


class Engine:
    """What `AdamW`, the loss scale, saving and minimizing stand on.

    Parameters
    ----------
    hyper : hyperparameters.Hyperparameters

    Attributes
    ----------
    lock : threading.RLock
        Held while a step is taken or the state is read or written as a whole.
    state : State
    workspace : Workspace or None
        None before `build`.
    record : Record
    swapped : bool
        Whether the variables hold their averages at the moment.
    loaded : object or None
        A saved state for variables that are yet to be built: it has ``variables``, ``excluded`` and ``fill``.
    extra : object
        What was saved beside the state that was loaded or restored last.
    """

    def __init__(self, hyper: Any) -> None:
        self.hyper = hyper
        self.lock = threading.RLock()
        self.state = State()
        self.workspace: Workspace | None = None
        self.record = Record()
        self.exclusions = hp.Exclusions([], [])
        self.swapped = False
        self.loaded: Any = None
        self.extra: Any = None
        self.form: Form | None = None  # of the gradients last given in a container other than a list
        _ENGINES.add(self)

    # Rates

    def rate(self) -> hp.Rate | float:
        """What was set as learning rate; a signal's handler may put a callable in a number's place, and back."""
        scalars = self.state.scalars
        array, rate = scalars.get("learning_rate"), self.hyper.learning_rate_function
        if rate is not None:
            return rate  # type: ignore[no-any-return]
        return float(scalars["learning_rate"] if array is None else array)

    def set_rate(self, value: Any) -> None:
        """Set the learning rate: a number lives in the state, anything callable among the hyperparameters."""
        value = hp.rate("learning_rate", value)
        scalars = self.state.scalars
        if callable(value):
            self.hyper.learning_rate_function = hp.Rate("learning_rate", value)
            scalars.pop("learning_rate", None)
        else:
            scalars.setdefault("learning_rate", np.zeros(()))[...] = value
            self.hyper.learning_rate_function = None

    def rates_at(self, number: Any, learning_rate: Any = None) -> tuple[Any, Any]:
        """Learning rate and weight decay at a step; the learning rate as given where it is a number."""
        own = self.rate()
        if not isinstance(own, float):
            learning_rate = own(number)
        elif learning_rate is None:
            learning_rate = own
        decay = self.hyper.weight_decay_function
        return learning_rate, self.hyper.weight_decay if decay is None else decay(number)

    def rates_now(self) -> tuple[Any, Any]:
        """Learning rate and weight decay at the present iteration."""
        iteration = self.state.scalars["iteration"]
        number = iteration.item()
        rates = self.rates_at(number)
        called = self.hyper.learning_rate_function or self.hyper.weight_decay_function
        if called and iteration.item() != number:
            raise RuntimeError("a callable rate has itself taken a step; expected it to return a number only")
        return rates

    def key(self, loss_scale: float) -> object:
        """Equal for steps whose coefficients follow from the iteration alone, in the same way; None if they may not."""
        own = self.rate()
        rates = [None if isinstance(own, float) else own.function, self.hyper.weight_decay]
        if any(callable(rate) and type(rate).__module__ != schedules.__name__ for rate in rates):
            return None
        return own if rates[0] is None else rates[0], loss_scale, self.hyper.token

    # Building

    def build(self, names: list[str], variables: list[Array]) -> Workspace:
        """Allocate the state and lay out the work; the same variables again change nothing."""
        if self.workspace is not None:
            matching.check_same(self.workspace, variables)
            return self.workspace
        if not variables:
            raise ValueError("`variables` is empty; expected at least one array")
        for name, variable in zip(names, variables, strict=True):
            arrays.check_variable(name, variable)
        hyper = self.hyper
        options = {
            "average": hyper.use_ema,
            "gradient_accumulator": hyper.gradient_accumulation_steps,
            "velocity_hat": hyper.amsgrad,
        }
        keys = ["momentum", "velocity", *(key for key, wanted in options.items() if wanted)]
        slots = [new_slots(variable, keys, hyper.master_weights) for variable in variables]
        excluded, unmatched = self.exclusions.of(names, variables)
        if self.loaded is not None and not any(self.exclusions):
            excluded = self.loaded.excluded(names, variables)
        workspace = building.build(names, variables, slots, excluded)
        if unmatched:
            warnings.warn(
                f"exclude_from_weight_decay: {', '.join(unmatched)} matches none of the variables "
                f"{brief_names(names)}, which are decayed",
                stacklevel=4,
            )
        if self.loaded is not None:
            self.loaded.fill(names, variables, slots)
            self.loaded = None
        self.state.names, self.state.slots = names, slots
        self.workspace, hyper.is_fixed = workspace, True
        return workspace

    def require_built(self, what: str) -> Workspace:
        """The workspace; an error that names what needs it, before `build`."""
        if self.workspace is None:
            raise ValueError(f"`{what}` needs an optimizer that is built. Call `optimizer.build(variables)` first.")
        return self.workspace

    def check_not_swapped(self) -> None:
        """Refuse to go on inside `averaged()`."""
        if self.swapped:
            raise RuntimeError("the variables hold their averages inside `averaged()`; expected this after the block")

    # Stepping

    def apply(self, grads: Container, trainable_variables: Container | None = None) -> None:
        """Take one step: see `AdamW.apply`."""
        with self.lock:
            hyper = self.hyper
            token = hyper.token  # before any hyperparameter, so that one that changes meanwhile is noticed
            scale = hyper.loss_scale_factor or 1.0
            plan = self.workspace.plan if self.workspace and trainable_variables is None and not self.swapped else None
            rates = None
            if plan is not None and plan.repeat is not None:
                if hyper.learning_rate_function is not None or hyper.weight_decay_function is not None:
                    rates = self.rates_now()  # called once, whichever way the step is taken
                if self.form is not None:
                    grads = self.form.flat(grads)
                if step.take_again(hyper, plan, grads, scale, rates, self.state.scalars, self.record):
                    return
            built, gradients = self.match(grads, trainable_variables)
            if gradients:
                self.step(built, gradients, scale, hyper.nonfinite, rates=rates, token=token)

    def step(
        self,
        built: Workspace,
        gradients: Sequence[Array | None],
        loss_scale: float,
        nonfinite: str,
        more: Callable[[bool], list[Call]] | None = None,
        rates: tuple[float, float] | None = None,
        token: object = None,
    ) -> None:
        """Prepare a step and commit it, together with the calls that `more` makes of whether it is applied."""
        iteration = self.state.scalars["iteration"]
        key = self.key(loss_scale) if built.devices else None
        for device in built.devices:
            asks = device.has_captures or key is None or more or nonfinite == "raise"
            if not device.is_certain and asks and not device.looks_captured():
                self.catch_up()
        rates = rates or self.rates_now()
        number = iteration.item()
        if not 0 <= number < 2**62 or not iteration.flags.writeable:
            raise ValueError(f"the iteration is {number} or read-only; expected a counter that can go on")
        taken = step.Step(number, self.rates_at, rates, key, loss_scale, nonfinite, more is not None, token)
        prepared = step.prepare(self.hyper, built, gradients, taken)
        calls: list[Call] = [(setattr, self.record, "last", (prepared.norm, prepared.applied, rates[0]))]
        if not prepared.applied:
            calls.append((setattr, self.record, "skipped", self.record.skipped + 1))
        elif prepared.counted:
            calls.append((operator.setitem, iteration, (), number + 1))
        step.commit(prepared, calls + more(prepared.applied) if more else calls)

    def update_one(self, gradient: Array, variable: Array, learning_rate: float) -> None:
        """Adam alone for one variable: see `AdamW.update_step`."""
        with self.lock:
            built = self.require_built("update_step")
            self.check_not_swapped()
            if gradient is None:
                raise TypeError("`gradient` is None; expected an array of the variable's shape")
            rate = hp.Rate("learning_rate", lambda: learning_rate)(0)
            (index,) = matching.indices(built, [variable])
            step.commit(step.prepare_one(self.hyper, built, gradient, index, self.updates(), rate), [])

    def stateless(
        self, state: Sequence[Array], grads: Container, variables: Container, loss_scale: Any, nonfinite: str
    ) -> tuple[Container, list[Array]]:
        """One step as a pure function: see `AdamW.stateless_apply`."""
        built, container = self.require_built("stateless_apply"), materialized(variables, "trainable_variables")
        names, leaves = flatten(container, "trainable_variables")
        positions = order(container, names, built.names, "trainable_variables")
        gradients = matching.gradients(built, grads, warn=False)
        if not gradients:
            return rebuild(container, leaves), list(state)
        state_names = [name for name, _, _ in self.places()]
        given = [leaves[i] for i in positions]
        new, new_state = stateless.apply(self, built, state_names, state, gradients, given, loss_scale, nonfinite)
        for i, leaf in zip(positions, new, strict=True):
            leaves[i] = leaf
        return rebuild(container, leaves), new_state

    def match(self, grads: Container, variables: Container | None) -> tuple[Any, Sequence[Array | None]]:
        """What is built, here if need be, and the gradients in its order; no gradients at all are an empty list."""
        if self.swapped:
            self.check_not_swapped()
        if variables is None:
            if self.workspace is None:
                raise ValueError(
                    "When passing `grads` without `variables`, the optimizer must already be built on a list of "
                    "variables. Call `optimizer.build(trainable_variables)` first."
                )
            if self.form is not None:
                grads = self.form.flat(grads)
            flat = matching.as_flat(self.workspace, grads)
            if flat is not None:
                return self.workspace, flat
            found = matching.gradients(self.workspace, grads)
            if found:
                self.form = form_of(grads, self.workspace.names) or self.form
            return self.workspace, found
        names, given = flatten(variables)
        grads = materialized(grads, "grads")
        if not flatten(grads, "grads")[1]:
            return self.workspace, []
        built = self.workspace or self.build(names, given)
        return built, matching.gradients_of(built, grads, names, given)

    # What a GPU has counted

    def updates(self) -> int:
        """Updates so far: calls of `apply`, divided by the number of micro-steps."""
        self.catch_up()
        return int(self.state.scalars["iteration"]) // (self.hyper.gradient_accumulation_steps or 1)

    def catch_up(self, norm: bool = False) -> None:
        """Ask a GPU that decides and counts by itself, if there is anything to ask; waits for it."""
        device = self.workspace and self.workspace.resident
        if not device or not (device.pending or (norm and device.norm_pending)):
            return
        with self.lock:
            counts, report = device.pending, device.report()
            iteration = self.state.scalars["iteration"]
            if counts:  # otherwise the host has counted along, and may have been written
                iteration[...] = report.iteration
            self.record.skipped += device.skipped
            device.skipped = 0
            last = self.record.last
            if last is not None or report.iteration:
                rate = self.rates_at(report.iteration - report.applied)[0] if last is None or self.key(1.0) else last[2]
                self.record.last = report.norm, report.applied, rate

    def places(self) -> list[Place]:
        """Where every array of the state is kept, in Keras's order, once a GPU has been asked."""
        self.catch_up()
        return self.state.places()

    def send_hyperparameters(self, steps: int) -> None:
        """Send a GPU the coefficients of the next steps: see `AdamW.update_hyperparameters`."""
        resident = self.require_built("update_hyperparameters").resident
        if resident is None:
            return
        with self.lock:
            self.catch_up()
            hyper = self.hyper
            resident.check_captured(bool(hyper.clipnorm or hyper.global_clipnorm), hyper.nonfinite == "skip")
            first, scale = self.state.scalars["iteration"].item(), hyper.loss_scale_factor or 1.0
            resident.send_rows_now(
                first,
                steps,
                lambda k: step.row(hyper, step.numbers_of(hyper, k, self.rates_at(k), scale)),
                self.key(scale),
            )

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        self.check_not_swapped()
        self.catch_up()
        workspace = self.workspace and self.workspace._replace(plan=None, devices=[], tensors=[])
        return {k: v for k, v in vars(self).items() if k != "lock"} | {"workspace": workspace, "form": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())
        _ENGINES.add(self)
        # What was pickled out of band may be read-only.
        for own in (self.state.scalars, *self.state.added, *self.state.slots):
            own.update({key: arrays.writeable_copy(array) for key, array in own.items()})
        if self.workspace is not None:
            names, decayed = self.workspace.names, self.workspace.decayed
            excluded = frozenset(name for name, wanted in zip(names, decayed, strict=True) if not wanted)
            variables = [arrays.writeable_copy(variable) for variable in self.workspace.variables]
            self.workspace = building.build(names, variables, self.state.slots, excluded)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self.lock:
            new = type(self).__new__(type(self))
            memo[id(self)] = new
            new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
            return new

    def __repr__(self) -> str:
        """The arrays that it trains, for the `repr` of an optimizer."""
        if self.workspace is None:
            return "built=False"
        variables = self.workspace.variables
        dtypes = ", ".join(dict.fromkeys(map(arrays.dtype_name, variables)))
        devices = ", ".join(dict.fromkeys(map(arrays.device, variables)))
        state = [own[key] for _, own, key in self.places()]
        return (
            f"arrays={len(variables)}, parameters={sum(math.prod(v.shape) for v in variables)}, dtypes={dtypes!r}, "
            f"devices={devices!r}, step={self.updates()}, state_bytes={sum(map(arrays.byte_count, state))}"
        )


_ENGINES: "weakref.WeakSet[Engine]" = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: the threads that held them do not exist there."""
    for engine in list(_ENGINES):
        engine.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
