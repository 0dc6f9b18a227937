"""`LossScaleOptimizer`: Keras's dynamic loss scaling around an `AdamW`."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from .array_api.stateless import is_traced, lazy_namespace, select_number
from .arrays import Array, writeable_copy
from .arrays.brief import brief, cut
from .arrays.torch_graphs import outside_graphs
from .arrays.tree import Container
from .hyperparameters import table as hp
from .optimizer import AdamW
from .ranks.joining import deciding
from .saving.saveable import Saveable
from .state import Place, State
from .step import gradients as matching
from .step import uncounted
from .step.commit import Call

_INNER_ONLY = {
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}


@outside_graphs(traced=("stateless_apply", "scale_loss"))
class LossScaleOptimizer(Saveable):
    """Scale the loss as high as gradients stay finite: doubled now and then, halved (and the step skipped) if not.

    Parameters
    ----------
    inner_optimizer : AdamW
        Takes the unscaled gradients, in the same pass over memory; its own ``loss_scale_factor`` is set to None.
    initial_scale : float, default 2**15
    dynamic_growth_steps : int, default 2000
        The scale doubles after so many finite steps in a row.
    name : str
    minimum_scale, maximum_scale : float, optional
        Bounds of the scale, which Keras lacks; 2**-126 and 2**126 by default, beyond which float32 has no inverse.
    **kwargs
        ``dynamic=True`` and the defaults of what belongs to the inner optimizer are accepted, as in Keras.

    Raises
    ------
    TypeError
        If ``inner_optimizer`` is no AdamW.
    ValueError
        If another argument is unknown or out of range.

    Examples
    --------
    >>> import numpy as np
    >>> weights = np.ones(2)
    >>> optimizer = LossScaleOptimizer(AdamW(0.1), initial_scale=4.0)
    >>> optimizer.build([weights])
    >>> optimizer.apply([np.array([np.inf, 1.0])])
    >>> weights, float(optimizer.scale_loss(1.0)), optimizer.skipped_steps
    (array([1., 1.]), 2.0, 1)
    """

    name: str = hp.Hyperparameter(hp.text)  # type: ignore[assignment]
    initial_scale: float = hp.Hyperparameter(hp.scale)  # type: ignore[assignment]
    dynamic_growth_steps: int = hp.Hyperparameter(hp.integer(1, optional=False))  # type: ignore[assignment]
    minimum_scale: float | None = hp.Hyperparameter(hp.optional_positive)  # type: ignore[assignment]
    maximum_scale: float | None = hp.Hyperparameter(hp.optional_positive)  # type: ignore[assignment]
    hyper: hp.Hyperparameters
    scale_state: State

    def __init__(
        self,
        inner_optimizer: AdamW,
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        name: str = "loss_scale_optimizer",
        *,
        minimum_scale: float | None = None,
        maximum_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(inner_optimizer, AdamW):
            raise TypeError(f"`inner_optimizer` must be an AdamW. Received: inner_optimizer={brief(inner_optimizer)}")
        _check_kwargs(kwargs)
        vars(self).update(hyper=hp.Hyperparameters(), scale_state=State())
        self.name, self.initial_scale = name, initial_scale
        self.minimum_scale, self.maximum_scale = minimum_scale, maximum_scale
        self.dynamic_growth_steps = dynamic_growth_steps
        if (minimum_scale or 0) > (maximum_scale or np.inf):
            raise ValueError(
                "`minimum_scale` must not exceed `maximum_scale`. Received: "
                f"{brief(minimum_scale)}, {brief(maximum_scale)}"
            )
        if inner_optimizer.nonfinite == "raise":
            raise ValueError(
                "`inner_optimizer` has nonfinite='raise'; expected 'skip' or 'propagate': steps are skipped"
            )
        self.inner_optimizer = inner_optimizer
        inner_optimizer.loss_scale_factor = None
        # Two that Keras has and does not use keep the positions of its saved state.
        self.scale_state.scalars["learning_rate"] = np.zeros(())
        self._counter, self._scale = np.zeros((), np.int64), np.array(self._bounded(self.initial_scale))
        self.scale_state.scalars |= {"step_counter": self._counter, "dynamic_scale": self._scale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        scalars = self.scale_state.scalars
        scalars.update({key: writeable_copy(array) for key, array in scalars.items()})
        self._counter, self._scale = scalars["step_counter"], scalars["dynamic_scale"]

    def __repr__(self) -> str:
        return f"LossScaleOptimizer({self.inner_optimizer!r}, dynamic_scale={self.dynamic_scale})"

    def __setattr__(self, name: str, value: Any) -> None:
        known = name.startswith("_") or name == "inner_optimizer" or hasattr(LossScaleOptimizer, name)
        if type(self) is LossScaleOptimizer and not known:
            raise AttributeError(f"LossScaleOptimizer has no attribute {brief(name)}; set it on `inner_optimizer`")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """What belongs to the inner optimizer: hyperparameters, ``iterations``, ``last_step``, ``averaged``, ..."""
        if name.startswith("_") or name == "inner_optimizer" or not hasattr(self.inner_optimizer, name):
            raise AttributeError(f"{type(self).__name__} and its inner optimizer have no attribute {brief(name)}")
        return getattr(self.inner_optimizer, name)

    @property
    def dynamic_scale(self) -> float:
        """The scale of the next step."""
        return float(self._scale)

    @property
    def built(self) -> bool:
        """Whether the inner optimizer is built."""
        return self.inner_optimizer.built

    @property
    def learning_rate(self) -> float:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    @property
    def variables(self) -> list[Array]:
        """Four scalars (iteration and learning rate, unused; step counter; dynamic scale), then the inner state."""
        self.inner_optimizer.engine.lent_places()
        return uncounted.state_of(self.inner_optimizer.engine, self.places())

    @property
    def state(self) -> dict[str, Array]:
        """The arrays of `variables` by name; those of the inner optimizer's scalars that are unused here prevail."""
        self.inner_optimizer.engine.lent_places()
        return {name: own[key] for name, own, key in self.places()}

    @property
    def variable_names(self) -> list[str]:
        """The names of `variables`."""
        return [name for name, _, _ in self.places()]

    def places(self) -> list[Place]:
        """Where every array of `variables` is kept."""
        return self.scale_state.places() + self.inner_optimizer.engine.places()

    def build(
        self, variables: Container, *, comm: Any = None, replicated: Sequence[str] = (), pieces: Any = None
    ) -> None:
        """Build the inner optimizer: see `AdamW.build`."""
        self.inner_optimizer.build(variables, comm=comm, replicated=replicated, pieces=pieces)

    def scale_loss(self, loss: Any, optimizer_variables: Sequence[Array] | None = None) -> Any:
        """The loss times the current scale: differentiate this one.

        Parameters
        ----------
        loss : float or scalar array
        optimizer_variables : list of arrays, optional
            The state that goes into `stateless_apply`: the scale is taken from there. Needed under a trace, where this
            optimizer's own scale would be compiled in as a constant.
        """
        if optimizer_variables is not None:
            return loss * optimizer_variables[3]
        if is_traced(loss):
            raise ValueError("`scale_loss` is traced; expected `optimizer_variables`, whose scale can change")
        return loss * self.dynamic_scale

    def apply(self, grads: Container, trainable_variables: Container | None = None) -> None:
        """Take one step with scaled gradients, or skip it and halve the scale if one of them is not finite.

        The inner optimizer, the counter and the scale change together or not at all; see `AdamW.apply`.
        """
        engine = self.inner_optimizer.engine
        with engine.lock:
            with deciding(engine.together, "apply"):
                scale = hp.scale("dynamic_scale", self.dynamic_scale)
            engine.apply(grads, trainable_variables, scale, self._after)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Array | None, Array]]) -> int:
        """Take one step with ``(gradient, variable)`` pairs: see `AdamW.apply_gradients`."""
        self.apply(*matching.pairs(self.inner_optimizer.engine, grads_and_vars))
        return int(self.inner_optimizer.engine.state.scalars["iteration"])

    def stateless_apply(
        self, optimizer_variables: Sequence[Array], grads: Container, trainable_variables: Container
    ) -> tuple[Container, list[Array]]:
        """One step as a pure function, the scale included: see `AdamW.stateless_apply`."""
        inner, state = self.inner_optimizer, list(optimizer_variables)
        if len(state) != len(self.places()):
            raise ValueError(f"`optimizer_variables` holds {len(state)} arrays; expected {len(self.places())}")
        xp = lazy_namespace(state)
        counter, scale, before = state[2:5] if xp else (int(state[2]), float(state[3]), int(state[4]))
        if isinstance(scale, float):
            hp.scale("dynamic_scale", scale)
        variables, new = uncounted.stateless_apply(inner.engine, state[4:], grads, trainable_variables, scale, "skip")
        if new[0] is state[4]:  # no gradients at all
            return variables, state
        finite = new[0] != before if xp or lazy_namespace(new[:1]) else bool(int(new[0]) != before)
        counter, scale = self._next(finite, counter, scale)
        own = [counter, scale] if lazy_namespace([counter]) else [np.asarray(counter), np.asarray(scale)]
        return variables, [*state[:2], *own, *new]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: Keras's keys, and the bounds where they are set."""
        inner = {
            "module": "keras.optimizers",
            "class_name": "AdamW",
            "config": self.inner_optimizer.get_config(),
            "registered_name": None,
        }
        bounds = {"minimum_scale": self.minimum_scale, "maximum_scale": self.maximum_scale}
        return {
            "name": self.name,
            "inner_optimizer": inner,
            "initial_scale": self.initial_scale,
            "dynamic_growth_steps": self.dynamic_growth_steps,
            **{key: value for key, value in bounds.items() if value is not None},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer from a config of ours or of Keras; the config is left as it is."""
        config = dict(config)
        inner = config.pop("inner_optimizer", {})
        if str(inner.get("class_name")).lower() != "adamw":
            raise ValueError(f"`inner_optimizer` is a {brief(inner.get('class_name'))}; expected 'AdamW'")
        return cls(AdamW.from_config(inner["config"], custom_objects), **config)

    def _bounded(self, scale: Any) -> Any:
        lowest, highest = self.minimum_scale or hp.LEAST_SCALE, self.maximum_scale or hp.MOST_SCALE
        scale = select_number(scale < lowest, scale * 0 + lowest, scale)
        return select_number(scale > highest, scale * 0 + highest, scale)

    def _next(self, finite: Any, counter: Any, scale: Any) -> tuple[Any, Any]:
        """Counter and scale after a step; `finite` is a bool, or a scalar array under a trace."""
        full = counter == self.dynamic_growth_steps - 1
        grown = select_number(full, self._bounded(scale * 2), scale)
        count = select_number(full, counter * 0, counter + 1)
        return select_number(finite, count, counter * 0), select_number(finite, grown, self._bounded(scale * 0.5))

    def _after(self, applied: bool) -> list[Call]:
        if not (self._counter.flags.writeable and self._scale.flags.writeable):
            raise ValueError("step_counter or dynamic_scale is read-only; expected arrays that can be written")
        counter, scale = self._next(applied, self._counter.item(), self._scale.item())
        return [(operator.setitem, self._counter, (), counter), (operator.setitem, self._scale, (), scale)]


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    if not kwargs.pop("dynamic", True):
        raise ValueError(
            "LossScaleOptimizer no longer supports `dynamic=False`. Instead, simply set `loss_scale_factor` directly "
            "on the `inner_optimizer`."
        )
    for name, default in _INNER_ONLY.items():
        if kwargs.pop(name, default) != default:
            raise ValueError(
                f"LossScaleOptimizer does not support `{name}`. Instead, set `{name}` on the `inner_optimizer`."
            )
    if kwargs:
        raise ValueError(f"LossScaleOptimizer does not support arguments: `{cut('`, `'.join(kwargs))}`.")
