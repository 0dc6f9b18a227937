"""AdamW as a `keras.optimizers.Optimizer`.

All that Keras keeps stays Keras's: the variables of the state, the iteration, the learning rate. On the torch backend
the engine of `adamw_numba.AdamW` updates their very tensors; on the JAX backend they are assigned what our step as a
function returns.
"""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import repeat
from operator import attrgetter, is_
from types import SimpleNamespace
from typing import Any, Self

import keras
from keras.src import backend

from .. import arrays, schedules
from .. import optimizer as surface
from ..arrays.brief import brief, brief_names
from ..arrays.torch_graphs import outside_graphs
from ..hyperparameters import table as hp
from ..hyperparameters.groups import CHECKS, read_override
from ..saving import overrides
from ..step.record import LastStep
from .state import WithState, checked_variables
from .trained import Trained, Variable, are_same, is_torch, names_of, seen_by_numpy, tensor

_BACKENDS = ("torch", "jax")
_EXTRAS = {  # what Keras lacks, and its default
    name: parameter.default
    for name, parameter in inspect.signature(surface.AdamW).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
_constraint_of = attrgetter("constraint")
_OWN = [name for name in CHECKS if name != "trainable"]  # what an `override` may give


class _Shared:
    """A hyperparameter of the `adamw_numba.AdamW` inside, which checks it whenever it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(instance._adamw, self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance._adamw, self.name, value)


@keras.saving.register_keras_serializable(package="adamw_numba")
@outside_graphs(traced=())
class AdamW(WithState):
    """`keras.optimizers.AdamW`, with the steps taken by the kernels of this library.

    It goes wherever Keras takes an optimizer: `Model.compile`, callbacks, ``.keras`` files. On the torch backend a step
    is one pass in place; on the JAX backend it is a pure function, traced into Keras's jitted train step.

    Parameters
    ----------
    learning_rate : float, keras.optimizers.schedules.LearningRateSchedule or callable, default 0.001
        A callable takes nothing.
    weight_decay : float, or a schedule, default 0.004
    beta_1, beta_2, epsilon, amsgrad, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum
        As those of `keras.optimizers.AdamW`.
    ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, name
        Likewise.
    nonfinite, threads, master_weights, decouple_lr, maximize, nesterov, epsilon_mode, moments, seed
        Those of `adamw_numba.AdamW`.
    **kwargs
        Nothing else is known; ``decay`` is ignored with a warning, as in Keras.

    Raises
    ------
    ValueError
        If an argument is unknown, out of range, or in conflict with another.
    RuntimeError
        If Keras's backend is neither torch nor JAX.

    Notes
    -----
    The numbers are those of `adamw_numba.AdamW`. The state of a 16-bit variable is float32, and has a float32 master
    copy, which `variables` holds after all that Keras has; so it does the scales of moments in 8 bits.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from adamw_numba.keras import AdamW
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="last")])
    >>> model.compile(optimizer=AdamW(0.1, global_clipnorm=1.0), loss="mse")
    >>> history = model.fit(np.ones((8, 2), "float32"), np.ones((8, 1), "float32"), epochs=2, verbose=0)
    >>> int(model.optimizer.iterations)
    2
    """

    __module__ = "adamw_numba.keras"  # where files say that it is

    _adamw: surface.AdamW
    _trained: Trained
    built: bool
    weight_decay: Any = _Shared()
    clipnorm: Any = _Shared()
    global_clipnorm: Any = _Shared()
    clipvalue: Any = _Shared()
    use_ema: Any = _Shared()
    ema_momentum: Any = _Shared()
    ema_overwrite_frequency: Any = _Shared()
    loss_scale_factor: Any = _Shared()
    gradient_accumulation_steps: Any = _Shared()
    beta_1: Any = _Shared()
    beta_2: Any = _Shared()
    epsilon: Any = _Shared()
    amsgrad: Any = _Shared()
    nonfinite: Any = _Shared()
    threads: Any = _Shared()
    master_weights: Any = _Shared()
    decouple_lr: Any = _Shared()
    maximize: Any = _Shared()
    nesterov: Any = _Shared()
    epsilon_mode: Any = _Shared()
    moments: Any = _Shared()
    seed: Any = _Shared()

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: Any = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        *,
        nonfinite: str = "propagate",
        threads: int | None = None,
        master_weights: bool = True,
        decouple_lr: bool = False,
        maximize: bool = False,
        nesterov: bool = False,
        epsilon_mode: str = "hat",
        moments: str = "float32",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        given = locals()
        if keras.backend.backend() not in _BACKENDS:
            raise RuntimeError(
                f"Keras's backend is {keras.backend.backend()!r}; expected one of {list(_BACKENDS)}: set KERAS_BACKEND "
                "in the environment before Keras is imported"
            )
        options: dict[str, Any] = {key: given[key] for key in surface.HYPERPARAMETERS if key in given and key != "name"}
        # Keras refuses and tracks what is set otherwise.
        self.__dict__.update(_adamw=surface.AdamW(**options, **kwargs))
        shared = {key: value for key, value in options.items() if key not in _EXTRAS}
        # Where the host counts the steps and reads the rate, it would wait for another device.
        with keras.device("cpu") if is_torch() else nullcontext():
            super().__init__(learning_rate=_checked_rate(learning_rate), name=name, **shared)
        self._follow()

    # The learning rate

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the next step, as Keras has it: a variable, or what a schedule returns.

        Setting takes a float, a schedule of Keras or a callable; a float only where it is a float now.
        """
        return self._get_current_learning_rate()

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        value = _checked_rate(value)
        now = self._learning_rate
        if not callable(value) and not isinstance(now, keras.Variable):
            raise TypeError(
                f"`learning_rate` is {brief(value)}, while this optimizer was created with {brief(now)}, in whose "
                "place Keras keeps no number; expected a schedule or a callable, or a float in the constructor"
            )
        keras.optimizers.AdamW.learning_rate.fset(self, value)
        self._follow()

    def _follow(self) -> None:
        """Have the engine read the iteration and the learning rate where Keras has them."""
        engine, rate = self._adamw.engine, self._learning_rate
        scalars = engine.state.scalars
        if is_torch():
            scalars["iteration"] = seen_by_numpy(self._iterations)
        if not isinstance(rate, keras.Variable):
            engine.set_rate(self._get_current_learning_rate)
        elif is_torch():
            scalars["learning_rate"] = seen_by_numpy(rate)
            engine.hyper.learning_rate_function = None

    # Setting up

    def build(self, variables: Iterable[Variable]) -> None:
        """Make the variables of the state, for those to train; an optimizer that is built stays as it is.

        Parameters
        ----------
        variables : list of keras.Variable

        Raises
        ------
        TypeError
            If one is no `keras.Variable`, or of a dtype that cannot be trained.
        ValueError
            If there are none, or two share memory: no state is made.

        Warns
        -----
        UserWarning
            If an exclusion or an override matches no variable.
        """
        if self.built:
            return
        variables = checked_variables(variables, "variables")
        if not variables:
            raise ValueError("`variables` is empty; expected at least one keras.Variable")
        if len({id(variable) for variable in variables}) < len(variables):
            raise ValueError("`variables` holds a keras.Variable more than once; expected every one once")
        held = [tensor(variable) if is_torch() else variable.value for variable in variables]
        arrays.check_variables(names_of(variables), held)
        hyper, before = self._adamw.hyper, len(self.variables)
        asked = hyper.overrides
        try:
            super().build(variables)
            trained = Trained(self._adamw.engine, *self._make_slots(variables))
            self._take_loaded(before)
            if is_torch():
                trained.lay_out()
        except BaseException:
            for variable in self.variables[before:]:
                self._untrack_variable(variable)
            self.built = False
            vars(hyper).update(overrides=asked, groups=[], others=(), is_fixed=False, token=object())
            raise
        self.__dict__.update(_trained=trained, _loaded=[])
        for called, nothing in trained.unmatched:
            names = brief_names(trained.names)
            warnings.warn(
                f"{called}: each of {brief_names(nothing, 20)} matches none of the variables {names}", stacklevel=2
            )

    def exclude_from_weight_decay(
        self, var_list: Iterable[Variable] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Leave variables out of weight decay; a second call replaces the first.

        Parameters
        ----------
        var_list : list of keras.Variable, optional
        var_names : list of str, optional
            Regular expressions, searched for (`re.search`) in the whole path of a variable and in its name.

        Raises
        ------
        ValueError
            If the optimizer is built already, or a pattern is not valid.
        """
        new = self._read("exclude_from_weight_decay", var_list, var_names, {"weight_decay": 0.0})
        hyper = self._adamw.hyper
        kept = [each for each in hyper.overrides if not each.is_exclusion]
        hyper.overrides = [*kept, new._replace(is_exclusion=True)]

    def override(
        self, var_list: Iterable[Variable] | None = None, var_names: Iterable[str] | None = None, **hyperparameters: Any
    ) -> None:
        """Give some variables hyperparameters of their own, before `build`: see `adamw_numba.AdamW.override`.

        Parameters
        ----------
        var_list : list of keras.Variable, optional
        var_names : list of str, optional
            Regular expressions, searched for (`re.search`) in the whole path of a variable and in its name.
        **hyperparameters
            Some of ``learning_rate``, ``learning_rate_multiplier``, ``weight_decay``, ``beta_1``, ``beta_2``,
            ``epsilon``, ``clipnorm`` and ``clipvalue``. Whether a variable is trained is said by its ``trainable``.

        Raises
        ------
        TypeError
            If a hyperparameter is unknown.
        ValueError
            If the optimizer is built already, nothing is given, or a value is out of range or in conflict.
        """
        unknown = [name for name in hyperparameters if name not in _OWN]
        if unknown or not hyperparameters:
            raise TypeError(f"`override()` is given {brief_names(unknown)}; expected some of {_OWN}")
        new = self._read("override", var_list, var_names, hyperparameters)
        if not new.listed and not new.patterns:
            raise ValueError("`override()` is for no variables; expected `var_list` or `var_names`")
        self._adamw.hyper.overrides = [*self._adamw.hyper.overrides, new]

    def _read(self, called: str, var_list: Any, var_names: Any, own: Mapping[str, Any]) -> Any:
        if self.built:
            raise ValueError(f"`{called}()` can only be called before the optimizer is built.")
        listed = checked_variables(var_list or (), "var_list")
        return read_override(None, var_names, own, self._adamw)._replace(listed=listed)

    # Stepping

    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Variable] | None = None) -> None:
        """Take one step; on the torch backend in place: all of the variables or, on any error or interrupt, none.

        Parameters
        ----------
        grads : list of tensors and None
            A variable without a gradient is left alone, except for its average.
        trainable_variables : list of keras.Variable, optional
            Builds the optimizer at the first call. Later those that the gradients belong to: of the variables that were
            built, the others are frozen at this step.

        Raises
        ------
        TypeError
            If a gradient is of another library, device or kind than its variable.
        ValueError
            If a count or a shape differs, a variable is unknown or given twice, or none has a gradient.
        FloatingPointError
            With ``nonfinite="raise"``, if a gradient is not finite.

        Warns
        -----
        UserWarning
            If some gradients are None.
        """
        grads = list(grads)
        if not grads:
            return
        given = None if trainable_variables is None else list(trainable_variables)
        if not self.built:
            if given is None:
                raise ValueError(
                    "When passing `grads` without `variables`, the optimizer must already be built on a list of "
                    "variables. Call `optimizer.build(trainable_variables)` first."
                )
            with backend.name_scope(self.name, caller=self):
                self.build(given)
        given = self._trainable_variables if given is None else given
        if len(grads) != len(given):
            raise ValueError(f"`grads` holds {len(grads)} gradients; expected {len(given)}, one for each variable")
        if not are_same(given, self._trained.variables) or any(map(is_, grads, repeat(None))):
            gradients, given = self._in_order(grads, given)
        else:
            gradients = grads
        if is_torch() and not backend.in_stateless_scope():
            self._trained.step(gradients)
        else:
            scalars = {"iteration": self._iterations}
            if isinstance(self._learning_rate, keras.Variable):
                scalars["learning_rate"] = self._learning_rate
            factor = self.loss_scale_factor or 1.0
            self._trained.step_as_a_function(scalars, gradients, factor, self.nonfinite)
        for variable, constraint in zip(given, map(_constraint_of, given), strict=True):
            if constraint is not None:
                variable.assign(constraint(variable))

    def _in_order(self, grads: list[Any], given: list[Variable]) -> tuple[list[Any], list[Variable]]:
        """Gradients in the order of the variables, with None for those that have none; and the variables that have."""
        self._check_known(given)
        if len({id(variable) for variable in given}) < len(given):
            raise ValueError("`trainable_variables` holds a variable more than once; expected every one once")
        grads, given = self._filter_empty_gradients(grads, given)
        grads, given = self._overwrite_variables_directly_with_gradients(grads, given)
        own = {id(variable): gradient for variable, gradient in zip(given, grads, strict=True)}
        return [own.get(id(variable)) for variable in self._trained.variables], given

    def update_step(self, gradient: Any, variable: Variable, learning_rate: Any) -> None:
        """Adam alone for one variable, on the torch backend: see `adamw_numba.AdamW.update_step`.

        Raises
        ------
        NotImplementedError
            On the JAX backend.
        """
        if not is_torch():
            raise NotImplementedError("`update_step` needs Keras's torch backend; expected `apply`")
        self._adamw.update_step(gradient, tensor(variable), float(learning_rate))

    @property
    def last_step(self) -> LastStep | None:
        """What the last step did: see `adamw_numba.AdamW.last_step`. On the JAX backend None."""
        return self._adamw.last_step

    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite="skip"`` has left out. On the JAX backend they are not counted: 0."""
        return self._adamw.skipped_steps

    # Saving

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: Keras's, ours where they are not the default, and groups."""
        config: dict[str, Any] = super().get_config()
        if callable(self.weight_decay):
            config["weight_decay"] = schedules.serialize(self.weight_decay)
        config |= {key: getattr(self, key) for key, default in _EXTRAS.items() if getattr(self, key) != default}
        hyper = self._adamw.hyper
        named = [each.by_names(names_of(each.listed), each.listed) for each in hyper.overrides]
        entries = overrides.config_of(SimpleNamespace(overrides=named, others=hyper.others), exclusions=True)
        return config | {"overrides": entries} if entries else config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer from a config, of this class or of `keras.optimizers.AdamW`."""
        config = dict(config)
        entries = config.pop("overrides", [])
        if isinstance(config.get("weight_decay"), Mapping):
            config["weight_decay"] = schedules.deserialize(config["weight_decay"], custom_objects)
        optimizer: Self = super().from_config(config, custom_objects)
        adamw = optimizer._adamw
        adamw.hyper.overrides = overrides.read(entries, custom_objects, adamw)
        return optimizer


def _checked_rate(value: Any) -> Any:
    """A learning rate that Keras can take: a float, a schedule of its own, or a callable of nothing."""
    value = hp.rate("learning_rate", value)
    is_schedule = isinstance(value, keras.optimizers.schedules.LearningRateSchedule)
    if callable(value) and not is_schedule and hp.Rate("learning_rate", value).takes_step:
        raise ValueError(
            f"`learning_rate` is {brief(value)}, which takes the step; expected a "
            "keras.optimizers.schedules.LearningRateSchedule, or a callable of nothing"
        )
    return value
