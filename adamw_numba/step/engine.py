"""Everything behind the surface of an optimizer: its state, its rates, and the way a step is taken."""

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import starmap
from operator import call, setitem
from typing import Any, Self

from .. import arrays
from ..array_api.stateless import is_traced
from ..arrays import Array
from ..arrays.brief import brief_names
from ..arrays.garbage import without_collections
from ..arrays.torch_graphs import tell_torch
from ..arrays.tree import Container, Form
from ..coefficients import MOST_STEPS, Recipe, Recipes
from ..hyperparameters.groups import Group, make_groups, parted
from ..ranks.joining import joining
from ..state import Place, Slots, State
from . import gradients as matching
from . import workspace as building
from .commit import Call, commit, exhaust
from .description import described
from .forked import renew_lock
from .norms import judge
from .rates import Rates
from .record import Record
from .slots import new_slots, of_pieces
from .workspace import Workspace


class Engine(Rates):
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
        A saved state for variables that are yet to be built: it has ``variables``, ``started`` and ``fill``.
    extra : object
        What was saved beside the state that was loaded or restored last.
    warns : bool
        Whether a step says which variables have no gradient.
    together : ranks.agreement.Agreement or None
        What connects it with the optimizers of other processes.
    """

    def __init__(self, hyper: Any) -> None:
        self.hyper = hyper
        self.lock = threading.RLock()
        self.state = State()
        self.workspace: Workspace | None = None
        self.alone: Any = None  # the plan with kernels, where it is the only one and the variables are themselves
        self.record = Record()
        self.swapped = False
        self.loaded: Any = None
        self.extra: Any = None
        self.warns = True
        self.recipes: Recipes | None = None  # of the hyperparameters as they were at the last step
        self.together: Any = None
        self.form: Form | None = None  # of the gradients last given in a container other than a list
        renew_lock(self)
        tell_torch()

    # Building

    def build(self, names: list[str], variables: list[Array], together: Any = None) -> Workspace:
        """Allocate the state and lay out the work; the same variables again change nothing."""
        # What was built under a trace of JAX has ended with it: a function may be traced more than once.
        if self.workspace is not None and not any(map(is_traced, self.workspace.variables[:1])):
            matching.check_same(self.workspace, variables, together)
            return self.workspace
        if not variables and together is None:
            raise ValueError("`variables` is empty; expected at least one array")
        with without_collections(), joining(together, names, variables) as joined:
            return self._build(names, variables, joined)

    def _build(self, names: list[str], variables: list[Array], together: Any) -> Workspace:
        arrays.check_variables(names, variables)
        hyper = self.hyper
        groups, which, unmatched = make_groups(self, hyper.overrides, names, variables, together)
        given, variables = variables, arrays.seen_all(names, variables)
        of_each = zip(names, variables, which, strict=True)
        slots = [self.new_slots(v, name=name) if groups[k].trainable else {} for name, v, k in of_each]
        workspace = building.build(names, variables, slots, which, len(groups), given, together is not None)
        if together is not None:
            together.meet(self, names, variables, given)
            hyper.most_threads = together.threads
            if hyper.moments != "float32":  # which depend on where the parts of variables lie in the whole ones
                workspace = of_pieces(hyper, workspace, len(groups), together)
        for called, nothing in unmatched:
            warnings.warn(
                f"{called}: each of {brief_names(nothing, 20)} matches none of the variables {brief_names(names)}",
                stacklevel=4,
            )
        if self.loaded is not None:
            counts = self.loaded.fill(names, variables, workspace.slots, groups, together)
            for group, started in zip(groups, counts, strict=True):
                vars(group)["started"] = started
            self.loaded = None
        hyper.overrides = [override.by_names(names, given) for override in hyper.overrides]
        self._take(workspace, groups)
        self.together = together
        return workspace

    def lay_out(
        self,
        names: list[str],
        variables: list[Array],
        slots: list[Slots],
        which: list[int],
        groups: list[Group],
        given: list[Array] | None = None,
    ) -> None:
        """Go on with these variables, with that state, in those groups; others than they were have been given.

        Raises
        ------
        RuntimeError
            If a graph was captured, whose replays would go on as before.
        """
        if self.workspace and any(gpu.has_captures for gpu in self.workspace.gpus):
            raise RuntimeError(
                "which variables have a state, and what they count, cannot change once a graph was captured; expected "
                "that before it"
            )
        if given is None:
            given = self.workspace.given  # type: ignore[union-attr]
        elif self.together is not None:
            self.together.arrange(names, given)
        with without_collections():
            pieces, is_cut = getattr(self.together, "pieces", None), self.together is not None
            workspace = building.build(names, variables, slots, which, len(groups), given, is_cut, pieces)
        for k, group in enumerate(groups):
            group.take(self, [i for i, own in enumerate(which) if own == k], names, given)
        self._take(workspace, groups)

    def _take(self, workspace: Workspace, groups: list[Group]) -> None:
        changes = (
            *((self.hyper, "groups", groups), (self.hyper, "others", tuple(groups[1:]))),
            *((self.hyper, "is_fixed", True), (self.hyper, "token", object()), (self, "recipes", None)),
            *((self.state, "names", workspace.names), (self.state, "slots", workspace.slots)),
            *((self, "workspace", workspace), (self, "alone", workspace.alone)),
        )
        exhaust(starmap(setattr, changes))  # all or nothing, for an interrupt

    def require_built(self, what: str) -> Workspace:
        """The workspace; an error that names what needs it, before `build`."""
        if self.workspace is None:
            raise ValueError(f"`{what}` needs an optimizer that is built. Call `optimizer.build(variables)` first.")
        if self.workspace.foreign:
            self.look_again()
        return self.workspace

    def look_again(self) -> None:
        """Lay out the work again where a foreign variable has moved: see `Workspace.seen_again`."""
        with self.lock:
            workspace: Workspace = self.workspace  # type: ignore[assignment]
            variables = workspace.seen_again()
            if variables is not None:
                self.lay_out(workspace.names, variables, workspace.slots, workspace.which, self.hyper.groups)

    def check_not_swapped(self) -> None:
        """Refuse to go on inside `averaged()`."""
        if self.swapped:
            raise RuntimeError("the variables hold their averages inside `averaged()`; expected this after the block")

    # Stepping

    def apply(
        self,
        grads: Container,
        trainable_variables: Container | None = None,
        loss_scale: float | None = None,
        more: Callable[[bool], list[Call]] | None = None,
    ) -> None:
        """Take one step: see `AdamW.apply`.

        A loss scale may be given in the place of ``loss_scale_factor``. A dynamic one gives `more` besides, which makes
        calls of whether the step is applied: they are committed with it, and steps that are not finite are skipped.
        """
        with self.lock:
            together = self.together
            try:
                if together is not None:
                    together.begin("apply")
                    _check_counter(self.state.scalars["iteration"])
                alone = self.alone if trainable_variables is None else None
                if alone is not None:  # most steps: a list like the last one, which one compiled call looks through
                    gradients: Any = grads if self.form is None else self.form.flat(grads)
                    gradients = list(gradients) if type(gradients) is list else ()  # the caller's may change meanwhile
                else:
                    gradients = matching.match(self, grads, trainable_variables)
                    together = self.together  # which may have been built here
                    if not gradients and together is None:
                        return
                workspace: Any = self.workspace
                if workspace.gpus:
                    self._ask_gpus(loss_scale)
                hyper, scalars = self.hyper, self.state.scalars
                iteration, own, weight_decay = scalars["iteration"], scalars.get("learning_rate"), hyper.weight_decay
                others: Any = ()
                if own is not None and type(weight_decay) is float and not hyper.others:
                    rate = own.item()
                else:  # what is called here may take a step: no address has been read yet
                    rate, weight_decay, others = self.rates_now()
                gradients = gradients if workspace.trainable is None else workspace.of_trainable(gradients)
                is_complete = alone is not None and alone.begins_as_before(gradients)
                idle: list[Group] = []
                if not is_complete:
                    if alone is not None:
                        gradients = matching.match(self, grads, None)
                        if not gradients and together is None:
                            return
                        gradients = workspace.of_trainable(gradients)
                    if hyper.counts_each:
                        if all(g is None for g in gradients):
                            if together is not None:
                                together.idle(self, (rate, weight_decay, others))
                            return
                        idle = self._part(gradients)
                        rate, weight_decay, others = self.rates_now()
                        workspace, alone = self.workspace, self.alone
                    _check_counter(iteration)
                    workspace.begin(gradients)
                recipes = self.recipes
                if recipes is None or recipes.token is not hyper.token or recipes.given != loss_scale:
                    recipes = self.recipes = Recipes(hyper, loss_scale, skips=more is not None)
                recipe = recipes.at(iteration.item(), rate, weight_decay, others)
                alone_decides = more is None and not idle and recipe.nonfinite != "raise" and together is None
                if workspace.resident is not None and alone_decides:
                    self._leave_to_gpu(recipe, recipes, gradients, (rate, others), is_complete)
                    return
                if recipe.takes_norm or together is not None:
                    combine = together and partial(together.combine, self, (rate, weight_decay, others))
                    norm, applied = judge(workspace, recipe, gradients, combine)
                    if not applied:
                        self._skip(norm, rate, others, more)
                        return
                else:
                    norm = None
                repeatable, calls = (alone or workspace).work(recipe, gradients)
                # The counter first: where it has become read-only, nothing else has happened yet.
                told = setattr, self.record, "last", (norm, True, rate, others)
                calls = [(setitem, iteration, (), recipe.number + 1), *calls, told]
                if idle and recipe.is_update:
                    calls += [(setitem, vars(group), "started", group.started + 1) for group in idle]
                if more is not None:
                    calls += more(True)
                if workspace.tensors:
                    _check_counter(iteration)  # before torch is told of a change
                    arrays.note_writes(workspace.touched(gradients, recipe, is_complete))
                try:
                    commit(repeatable, calls) if repeatable else exhaust(starmap(call, calls))
                except ValueError:
                    _check_counter(iteration)
                    raise
            except BaseException as error:
                if self.together is not None:
                    self.together.fail(error)
                raise

    def skip(self) -> None:
        """Count a step that somebody else has found not to be finite."""
        with self.lock:
            self.catch_up()
            rate, _, others = self.rates_now()
            self._skip(None, rate, others, None)

    def _skip(self, norm: float | None, rate: float, others: Any, more: Callable[[bool], list[Call]] | None) -> None:
        """Count a step that is left out, since a gradient is not finite."""
        record = self.record
        calls = [
            (setattr, record, "last", (norm, False, rate, others)),
            (setattr, record, "skipped", record.skipped + 1),
        ]
        commit((), calls if more is None else calls + more(False))

    def _leave_to_gpu(self, recipe: Recipe, recipes: Recipes, gradients: Any, rates: Any, is_complete: bool) -> None:
        """Take a step that a GPU decides and counts by itself."""
        workspace: Workspace = self.workspace  # type: ignore[assignment]
        launches, counted = workspace.resident.decide(recipe, recipes, self.rates_at, self.key())
        iteration = self.state.scalars["iteration"]
        calls: list[Call] = [(setitem, iteration, (), recipe.number + 1)] if counted else []
        if workspace.tensors:
            arrays.note_writes(workspace.touched(gradients, recipe, is_complete, counted))
        exhaust(starmap(call, [*calls, *launches, (setattr, self.record, "last", (None, True, *rates))]))

    def _ask_gpus(self, loss_scale: float | None) -> None:
        """Catch up with a GPU that counts by itself, where this step needs its count."""
        for gpu in self.workspace.gpus:  # type: ignore[union-attr]
            if gpu.is_certain:
                continue
            asks = gpu.has_captures or loss_scale is not None or self.hyper.nonfinite == "raise" or self.key() is None
            if asks and not gpu.looks_captured():
                self.catch_up()

    # Groups

    def set_trainable(self, group: Group, trainable: bool) -> None:
        """Give the variables of a group new state, or take it from them, and lay out the work of a step again.

        Raises
        ------
        ValueError
            If no variable would be left.
        RuntimeError
            If a graph was captured, whose replays would go on as before.
        """
        with self.lock:
            self.check_not_swapped()
            workspace = self.require_built("trainable")
            self.catch_up()
            slots, members, pieces = list(self.state.slots), set(group.names), getattr(self.together, "pieces", {})
            for i, (name, variable) in enumerate(zip(workspace.names, workspace.variables, strict=True)):
                if name in members:
                    slots[i] = self.new_slots(variable, None, name, pieces.get(name)) if trainable else {}
            started = self.updates() if trainable else 0
            self.lay_out(workspace.names, workspace.variables, slots, workspace.which, self.hyper.groups)
            vars(group)["started"] = started

    def _part(self, gradients: Sequence[Array | None]) -> list[Group]:
        """The groups without any gradient, once those in which some variables have one have been parted."""
        workspace: Workspace = self.workspace  # type: ignore[assignment]
        groups, which, idle = parted(self.hyper.groups, workspace.which, [g is not None for g in gradients])
        if idle:
            self.catch_up()
        if len(groups) > len(self.hyper.groups):
            self.lay_out(workspace.names, workspace.variables, workspace.slots, which, groups)
        return idle

    def new_slots(self, variable: Array, amsgrad: bool | None = None, name: Any = None, piece: Any = None) -> Slots:
        """The arrays of the state of one variable; where groups differ in it, with or without amsgrad."""
        return new_slots(self.hyper, variable, self.hyper.amsgrad if amsgrad is None else amsgrad, name, piece)

    # What a GPU has counted

    def updates(self) -> int:
        """Updates so far: calls of `apply`, divided by the number of micro-steps."""
        self.catch_up()
        return int(self.state.scalars["iteration"]) // (self.hyper.gradient_accumulation_steps or 1)

    def catch_up(self, norm: bool = False) -> None:
        """Ask a GPU that decides and counts by itself, if there is anything to ask; waits for it.

        What has been written into the iteration since it was last told holds for the GPU as well.
        """
        device = self.workspace and self.workspace.resident
        if not device or not (device.pending or (norm and device.norm_pending)):
            return
        with self.lock:
            told, counts, report = device.iteration, device.pending, device.report()
            iteration = self.state.scalars["iteration"]
            self.record.skipped += device.skipped
            device.skipped = 0
            if counts and iteration.item() != told:
                device.expect(iteration.item())
                return
            note = setattr, device.counter, "known", report.known
            # Otherwise the host has counted along. Both at once, so that one never looks as if the user had written it.
            exhaust(starmap(call, [(setitem, iteration, (), report.iteration), note] if counts else [note]))
            last = self.record.last
            if last is not None or report.iteration:
                if last is None or self.key():
                    rate, _, others = self.rates_at(report.iteration - report.applied)
                else:
                    rate, others = last[2:]
                self.record.last = report.norm, report.applied, rate, others

    def places(self) -> list[Place]:
        """Where every array of the state is kept, in Keras's order, once a GPU has been asked."""
        self.catch_up()
        return self.state.places()

    def lent_places(self) -> list[Place]:
        """The same for the user, who may change the arrays from now on."""
        if self.workspace is not None:
            self.workspace.lend()
        return self.places()

    def send_hyperparameters(self, steps: int) -> None:
        """Send a GPU the coefficients of the next steps: see `AdamW.update_hyperparameters`."""
        resident = self.require_built("update_hyperparameters").resident
        if resident is None:
            return
        with self.lock:
            self.catch_up()
            hyper = self.hyper
            resident.check_captured(bool(hyper.clipnorm or hyper.global_clipnorm), hyper.nonfinite == "skip")
            first, recipes = self.state.scalars["iteration"].item(), Recipes(hyper)
            resident.send_ahead_now(first, steps, lambda k: recipes.at(k, *self.rates_at(k)), self.key())

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        self.check_not_swapped()
        self.catch_up()
        # Plans hold addresses, and recipes a token: both are made again from these.
        workspace = self.workspace and self.workspace[:4]  # names, variables, slots, and the groups they are in
        state = {key: value for key, value in vars(self).items() if key != "lock"}
        together = self.together and self.together.left()  # communicators cannot be copied
        return state | {"workspace": workspace, "alone": None, "form": None, "recipes": None, "together": together}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())
        renew_lock(self)
        tell_torch()
        # What was pickled out of band may be read-only.
        for own in (self.state.scalars, *self.state.added, *self.state.slots):
            own.update({key: arrays.writeable_copy(array) for key, array in own.items()})
        if state["workspace"] is not None:
            names, variables, _, which = state["workspace"]
            variables = [arrays.writeable_copy(variable) for variable in variables]
            groups = self.hyper.groups
            alone = self.together is None
            self.workspace = building.build(names, variables, self.state.slots, which, len(groups), None, not alone)
            self.alone = self.workspace.alone
            for k, group in enumerate(groups):
                group.take(self, [i for i, own in enumerate(which) if own == k], names, variables)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self.lock:
            new = type(self).__new__(type(self))
            memo[id(self)] = new
            new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
            return new

    def __repr__(self) -> str:
        """The arrays that it trains, for the `repr` of an optimizer."""
        return described(self)


def _check_counter(iteration: Array) -> None:
    if not 0 <= iteration.item() < MOST_STEPS or not iteration.flags.writeable:
        raise ValueError(f"the iteration is {iteration} or read-only; expected a counter that can go on")
