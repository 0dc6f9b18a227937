"""AdamW as a `torch.optim.Optimizer`, for torch programs and all that takes torch's own optimizers.

Torch's groups, state and conventions are translated to those of `adamw_numba.AdamW`, whose engine takes the steps. A
parameter gets a state at its first gradient. The engine has those parameters alone, in groups by their hyperparameters
and by how many steps they have taken (see `hyperparameters.groups.parted`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Self

import torch
from torch.optim import optimizer as torch_optimizer

from .. import arrays
from .. import optimizer as surface
from ..arrays.brief import brief, brief_names
from ..arrays.dtensors import check_alike, is_dtensor
from ..arrays.torch_graphs import outside_graphs
from ..hyperparameters.groups import Group
from ..ranks.joining import deciding, rejoined
from ..step.record import LastStep
from .groups import CLIPS, OURS, Noted, are_as_noted, check_common, checked, groups_of, layout, listed, noted
from .state import Shown, Started, apart, are_same, hold, new_slots, released, restored, started_of

_IGNORED = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
# Torch says nowhere else whether it wants to look at a step.
_HOOKS_OF_ALL = [vars(torch_optimizer)[f"_global_optimizer_{when}_hooks"] for when in ("pre", "post")]
_is_profiled = vars(torch.autograd)["_profiler_enabled"]
_gradient_of = attrgetter("grad")

Params = Iterable[Any]
Own = dict[str, Any]


@outside_graphs(traced=())
class AdamW(torch.optim.Optimizer):  # type: ignore[misc]  # which has no types here
    """`torch.optim.AdamW`, with the steps taken by the kernels of this library.

    Numbers, groups, state and `state_dict` are torch's, and state dicts can be exchanged in both directions.

    Parameters
    ----------
    params : iterable of tensors, of named tensors, or of dicts
        Torch's parameters or groups of them.
    lr : float or tensor of one element, default 0.001
        Read at each step, from the group: of a tensor on a GPU the host waits for it.
    betas : pair of float, default (0.9, 0.999)
    eps : float, default 1e-8
        Added after the bias correction.
    weight_decay : float, default 0.01
        Decoupled, and multiplied by the learning rate.
    amsgrad, maximize : bool
    foreach, capturable
        Accepted, and without effect: a step can always be captured once one was taken.
    fused : bool, optional
        Every step is fused. With True, `torch.amp.GradScaler` leaves unscaling and skipping to it, as to torch's own.
    differentiable : bool
        False: there is no derivative of a step.
    **ours
        Options of `adamw_numba.AdamW` that torch lacks: ``global_clipnorm``, ``clipnorm``, ``clipvalue``, ``use_ema``,
        ``ema_momentum``, ``ema_overwrite_frequency``, ``nonfinite``, ``gradient_accumulation_steps``,
        ``master_weights``, ``nesterov``, ``loss_scale_factor``, ``threads``, ``moments`` and ``seed``. ``clipnorm`` and
        ``clipvalue`` may also be given in groups.

    Raises
    ------
    TypeError
        If a parameter is no tensor, or an argument is unknown.
    ValueError
        If there are no parameters, one is given twice, or a value is out of range.

    Notes
    -----
    As in torch, a parameter without gradient is left alone, counts no step, and has no state before its first gradient.
    Of 16-bit parameters, the state is float32, with a master copy, unless ``master_weights=False``; `load_state_dict`
    keeps it as it is, where torch's own casts it to 16 bits.

    Examples
    --------
    >>> import torch
    >>> from adamw_numba.torch import AdamW
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = AdamW(model.parameters(), lr=0.1)
    >>> model(torch.ones(2)).backward()
    >>> optimizer.step()
    >>> optimizer.state[model.bias]["step"]
    tensor(1.)
    """

    def __init__(
        self,
        params: Params,
        lr: Any = 1e-3,
        betas: Sequence[Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Any = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **ours: Any,
    ) -> None:
        if differentiable:
            raise ValueError(f"`differentiable` is {brief(differentiable)}; expected False: a step has no derivative")
        unknown = [name for name in ours if name not in OURS]
        if unknown:
            raise TypeError(f"unexpected arguments {brief_names(unknown)}; expected torch's, or {list(OURS)}")
        betas = tuple(betas) if isinstance(betas, list) else betas
        group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        flags = {"maximize": maximize, "foreach": foreach, "capturable": capturable, "fused": fused}
        self._begin(ours | {"epsilon_mode": "corrected"})
        self._start(params, group | _IGNORED | flags)

    @classmethod
    def from_adamw(cls, optimizer: surface.AdamW, params: Params) -> Self:
        """The same for an `adamw_numba.AdamW`, with its conventions: Keras's epsilon, for example.

        Parameters
        ----------
        optimizer : adamw_numba.AdamW
            Not built; it is left as it is. What its `override` and `exclude_from_weight_decay` say about some variables
            makes groups of parameters; patterns search the names of named parameters.
        params : iterable of tensors or of named tensors

        Raises
        ------
        TypeError
            If it is no `adamw_numba.AdamW`.
        ValueError
            If it is built, a rate is a schedule, or a variable is not trainable.
        """
        groups = groups_of(optimizer, params)
        common = {key: value for key, value in groups[0].items() if key != "params"}
        new = cls.__new__(cls)
        new._begin({key: getattr(optimizer, key) for key in surface.HYPERPARAMETERS if key not in common})
        new._start([group for group in groups if group["params"]], common | _IGNORED)
        return new

    # Setting up

    def _begin(self, options: Own) -> None:
        """Have an engine, for options that are the same in all groups."""
        self._options = options
        self._adamw = surface.AdamW(**options)
        self._engine = self._adamw.engine
        self._engine.hyper.counts_each = True
        self._known: Noted = []  # torch's groups, and their values as the engine has them
        self._own: list[Own] = []  # those in the engine's words
        self._layout: list[tuple[int, bool]] = []  # of each group, how many parameters there are, and whether amsgrad
        self._params: list[torch.Tensor] = []  # of all groups, in order
        self._new: list[int] = []  # which of them have no state
        self._shown = Shown(self._engine, self._adamw.gradient_accumulation_steps or 1)

    def _start(self, params: Any, defaults: Own) -> None:
        """Have torch read the parameters, with these hyperparameters for groups that have none of their own."""
        clips = {key: getattr(self._adamw, key) for key in CLIPS}
        defaults |= {key: clip for key, clip in clips.items() if clip is not None} | {"decoupled_weight_decay": True}
        checked(defaults, self._engine.hyper)
        super().__init__(params, defaults)
        self._shown.is_shown = self._shown.is_lent = False  # torch has set `state`
        self.register_state_dict_post_hook(apart, prepend=True)

    def add_param_group(self, param_group: Own) -> None:
        """Add a group of parameters, at any time: see `torch.optim.Optimizer.add_param_group`.

        Raises
        ------
        ValueError
            If a parameter is there already, or a value is out of range: nothing is added.
        """
        if isinstance(param_group, dict):
            if any(param_group.get(clip) is not None for clip in CLIPS):  # one of its own replaces the other kind
                param_group |= {clip: param_group.get(clip) for clip in CLIPS}
            check_common(param_group, self._options)
            checked(self.defaults | param_group, self._engine.hyper)
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len(set(params)) < len(params):
            del self.param_groups[-1]
            raise ValueError(f"`params` has {len(params)} parameters, some of them twice; expected each of them once")
        if any(map(is_dtensor, params)):
            self._join()

    def _join(self) -> None:
        """Be connected with the ranks that have the other parts of DTensors, if there are any."""
        found = listed(self.param_groups)
        self._engine.together = rejoined(
            self._engine.together, [each[0] for each in found], [each[1] for each in found]
        )

    def _translate(self) -> None:
        """Tell the engine of the groups as they are now."""
        hyper = self._engine.hyper
        new_values = [checked(group, hyper) for group in self.param_groups]
        self._own = (self._own or [vars(hyper)])[: len(new_values)]
        self._own += [{} for _ in new_values[len(self._own) :]]
        for own, new in zip(self._own, new_values, strict=True):
            own.update(new)  # which all groups of the engine share that are of one of torch's
        functions = {f"{key}_function": own[key] for own in new_values[:1] for key in ("learning_rate", "weight_decay")}
        vars(hyper).update(functions, token=object())
        self._engine.state.scalars.pop("learning_rate", None)
        now = [layout(group) for group in self.param_groups]
        if now != self._layout:
            self._params = []  # all is to be laid out again
        self._layout, self._known = now, noted(self.param_groups)

    # Stepping

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients that the parameters have.

        Parameters
        ----------
        closure : callable, optional
            Computes the gradients again, and returns the loss.

        Returns
        -------
        object
            What the closure returned, or None.

        Raises
        ------
        TypeError, ValueError
            If a gradient is sparse, or does not belong to its parameter, or a group has a value that is out of range:
            nothing is changed.
        FloatingPointError
            With ``nonfinite="raise"``, if a gradient is not finite.
        """
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or any(_HOOKS_OF_ALL)
        if hooks or _is_profiled():
            return _watched_step(self, *(() if closure is None else (closure,)))
        return self._step(closure)

    # Torch would put its own code around the step, which takes as long as a small step does.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with deciding(self._engine.together, "apply"), torch.enable_grad():
                loss = closure()
        with self._engine.lock:
            found = vars(self).get("found_inf")
            if found is not None and found.item():
                self._engine.skip()
            else:
                with deciding(self._engine.together, "apply"):
                    self._apply(self._gradients())
        return loss

    def _gradients(self) -> list[Any]:
        """The gradients of the parameters that have a state, once the engine knows all that has changed."""
        gradients = list(map(_gradient_of, self._look()))
        if self._new:
            if any(gradients[i] is not None for i in self._new):
                self._grow(gradients)
            for i in reversed(self._new):
                del gradients[i]
        return gradients

    def _look(self) -> Sequence[torch.Tensor]:
        """The parameters, once the engine knows all that has changed."""
        groups = self.param_groups
        params = groups[0]["params"] if len(groups) == 1 else [param for group in groups for param in group["params"]]
        if not are_as_noted(self.param_groups, self._known):
            self._translate()
        shown = self._shown
        if not are_same(params, self._params) or (shown.is_shown and shown.is_written()):
            self._engine.check_not_swapped()
            shown.sync()
            self._install()
        return params

    def _apply(self, gradients: list[Any]) -> None:
        if not gradients:
            if self._engine.together is not None:
                self._engine.together.idle(self._engine, self._engine.rates_now())
            return
        scale = vars(self).get("grad_scale")
        if scale is not None:
            scale = float(scale) * (self._adamw.loss_scale_factor or 1.0)
        self._engine.apply(gradients, None, scale)
        if self._shown.is_shown:
            self._shown.tell()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `torch.amp.GradScaler` leaves unscaling and skipping to the step: of those of torch, to fused ones.

        It sets ``grad_scale`` and ``found_inf`` then. Lightning and Accelerate treat such optimizers in another way.
        """
        return bool(self.defaults.get("fused"))

    # The state

    @property
    def state(self) -> Any:
        """What is kept of each parameter that has had a gradient: torch's names, and ours beside them; live."""
        self._shown.is_lent = True
        return self._shown.show()

    @state.setter
    def state(self, value: Any) -> None:
        self._shown.replace(value)

    def _grow(self, gradients: Sequence[Any]) -> None:
        """Have a state for the parameters that have a gradient for the first time."""
        started, params = started_of(self._engine), listed(self.param_groups)
        for i in self._new:
            name, param, k = params[i]
            if gradients[i] is not None:
                slots = new_slots(self._engine, name, param, self._own[k]["amsgrad"])
                check_alike("the gradient of", name, gradients[i], param)
                arrays.check_gradient(name, arrays.seen(gradients[i]), arrays.seen(param))
                started[param] = Started(slots, 0)
        self._arrange(started, self._engine.count())

    def _install(self) -> None:
        """Go on with what the state says, which somebody has loaded or changed."""
        before, started = started_of(self._engine), {}
        for name, param, k in listed(self.param_groups):
            own = self._shown.contents.get(param)
            if own:
                slots = new_slots(self._engine, name, param, self._own[k]["amsgrad"])
                started[param] = restored(name, param, own, slots, before[param].slots if param in before else {})
        count = max((each.steps for each in started.values()), default=0)
        calls = max((each.calls for each in started.values()), default=0)
        count = max(count, calls // self._shown.window)  # which no parameter has to have reached by itself
        micro_steps = max((each.micro_steps for each in started.values()), default=0)  # the same of all
        self._arrange(started, count * self._shown.window + micro_steps)

    def _arrange(self, started: Mapping[torch.Tensor, Started], iteration: int) -> None:
        """Lay out the engine's work and the state for the parameters that have one."""
        self._shown.sync()
        self._params = []  # an interrupt from here on has the next step begin again, from what is shown
        engine, everything = self._engine, listed(self.param_groups)
        found = [each for each in everything if each[1] in started]
        names, params = [name for name, _, _ in found], [param for _, param, _ in found]
        own, updates = [started[param] for param in params], iteration // self._shown.window
        kinds = [(k, each.steps) for (_, _, k), each in zip(found, own, strict=True)]
        first = next((kind for kind in kinds if kind[0] == 0), (0, updates))  # the engine's common group
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys([first, *kinds]))}
        hypers = [None if kind == first else self._own[kind[0]] if kind[0] else {} for kind in numbers]
        groups = [
            Group(engine, (), (), hyper, updates - steps) for hyper, (_, steps) in zip(hypers, numbers, strict=True)
        ]
        if params:
            variables, which = arrays.seen_all(names, params), [numbers[kind] for kind in kinds]
            engine.lay_out(names, variables, [each.slots for each in own], which, groups, params)
        else:
            engine.workspace = engine.alone = None
        engine.state.scalars["iteration"][...] = iteration
        self._new = [i for i, (_, param, _) in enumerate(everything) if param not in started]
        self._shown.put(params, own)
        self._params = [param for _, param, _ in everything]

    # Saving

    def state_dict(self) -> Own:
        """The state as `torch.optim.AdamW` has it, with ours beside it: see `torch.optim.Optimizer.state_dict`."""
        is_lent = self._shown.is_lent
        try:
            return dict(super().state_dict())
        finally:
            self._shown.is_lent = is_lent  # what torch has looked at was not given to anybody

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, of this class or of `torch.optim.AdamW`.

        Tensors are copied. The state of a 16-bit parameter is float32, and is kept as it is; torch's own would cast it.

        Raises
        ------
        ValueError
            If groups differ in number or size, or a state lacks a tensor or has one of another shape: nothing is
            changed.
        """
        holding = self.register_load_state_dict_pre_hook(hold)  # after all others
        try:
            super().load_state_dict(state_dict)
        finally:
            holding.remove()

    def __getstate__(self) -> Own:
        own = {"defaults": self.defaults, "param_groups": self.param_groups, "options": self._options}
        return own | {"state": self._shown.show()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        given, before = dict(state), vars(self).copy()
        new, options = given.pop("state"), given.pop("options", None)
        if options is not None:  # a copy
            self._begin(options)
        super().__setstate__(given)
        if options is not None:
            self.register_state_dict_post_hook(apart, prepend=True)
        try:
            for group in self.param_groups:
                for key, value in self.defaults.items():
                    group.setdefault(key, value)
                group["decoupled_weight_decay"] = True  # also where it was torch's Adam
            self._join()
            self._translate()
            self._shown = Shown(self._engine, self._adamw.gradient_accumulation_steps or 1)
            self._shown.contents = released(new)
            self._install()
        except BaseException:
            if options is None:
                self.__dict__.update(before)
                self._translate()
            raise

    # What torch's optimizers lack

    @property
    def last_step(self) -> LastStep | None:
        """What the last step did: see `adamw_numba.AdamW.last_step`."""
        return self._adamw.last_step

    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite="skip"``, or a `GradScaler`, has left out."""
        return self._adamw.skipped_steps

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the parameters hold their averages: see `adamw_numba.AdamW.averaged`."""
        with self._engine.lock:
            self._look()
        if self._engine.workspace is None and self._adamw.use_ema:
            yield  # nothing has an average yet
            return
        with self._adamw.averaged():
            yield

    def update_hyperparameters(self, steps: int = 1024) -> None:
        """Send a GPU what captured graphs need: see `adamw_numba.AdamW.update_hyperparameters`."""
        self._adamw.update_hyperparameters(steps)


_watched_step = torch.optim.Optimizer.profile_hook_step(AdamW._step)
