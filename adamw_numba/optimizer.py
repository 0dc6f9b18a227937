"""`AdamW`: the surface of `keras.optimizers.AdamW` over plain arrays."""

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import numpy as np

from . import arrays, schedules
from .arrays import Array
from .arrays.brief import brief, brief_names
from .arrays.moments import MOMENTS
from .arrays.torch_graphs import outside_graphs
from .arrays.tree import Container, flatten
from .hyperparameters import table as hp
from .hyperparameters.conventions import Conventional
from .hyperparameters.groups import CHECKS, Group, read_override
from .ranks.agreement import Agreement
from .saving import overrides
from .saving.manifest import DTYPES
from .saving.saveable import Saveable
from .step import gradients as matching
from .step import uncounted
from .step.commit import commit
from .step.engine import Engine
from .step.record import LastStep

_ABSENT: Any = inspect.Parameter.empty
_checked: Any = hp.Hyperparameter


@outside_graphs(traced=("stateless_apply", "scale_loss"))
class AdamW(Saveable, Conventional):
    """AdamW over plain arrays, updated in place in one fused pass: the constructor and methods of Keras 3.

    Parameters
    ----------
    learning_rate : float, LearningRateSchedule or callable, default 0.001
        A callable takes the step (the number of `apply` calls so far), or nothing.
    weight_decay : float, LearningRateSchedule or callable, default 0.004
        Decoupled (Loshchilov & Hutter 2019), and multiplied by the learning rate: see ``decouple_lr``.
    beta_1, beta_2 : float, default 0.9 and 0.999
        Decay rates of the first and second moment, in [0, 1).
    epsilon : float, default 1e-7
        The "epsilon hat" of Kingma & Ba (2015): added to the square root of the raw second moment. See
        ``epsilon_mode``.
    amsgrad : bool, default False
        Divide by the largest raw second moment so far (Reddi et al. 2018).
    clipnorm, clipvalue, global_clipnorm : float, optional
        Clip each gradient to this norm, each element to this magnitude, or all gradients together to this norm. Only
        one may be set.
    use_ema : bool, default False
        Keep an exponential moving average of the variables: see `averages` and `averaged`.
    ema_momentum : float, default 0.99
    ema_overwrite_frequency : int, optional
        Copy the averages into the variables after every so many updates.
    loss_scale_factor : float, optional
        Gradients are divided by it: see `scale_loss`.
    gradient_accumulation_steps : int, optional
        Update once in so many calls of `apply`, with the mean of their gradients.
    name : str, default "adamw"
    nonfinite : {"propagate", "skip", "raise"}
        What a NaN or an infinity in a gradient does: go through, as in Keras; have the step skipped and counted in
        `skipped_steps`; or raise FloatingPointError. Decided before anything is written, at the cost of one more read
        of the gradients.
    threads : int, optional
        The most threads to use; by default as many as Numba does. Results do not depend on it.
    master_weights : bool or "remainder", default True
        Keep a float32 copy of every 16-bit variable, without which small updates are lost; or, of bfloat16 ones, only
        what rounding leaves over, in 16 bits (docs/small_moments.md).
    decouple_lr : bool, default False
        Let the decay be ``weight_decay`` itself, not multiplied by the learning rate: as in TensorFlow Addons and, with
        a schedule, in Loshchilov & Hutter (2019), algorithm 2. Then 0.004 is a lot.
    maximize : bool, default False
        Go up instead of down, as in torch.
    nesterov : bool, default False
        Nesterov's momentum (Dozat 2016, without his schedule), as in optax.
    epsilon_mode : {"hat", "corrected"}
        Add ``epsilon`` to the square root of the raw second moment, as Keras does, or of the one whose bias is
        corrected, as torch and optax do.
    moments : {"float32", "bfloat16", "8bit"}
        What momentum and velocity are kept in, of variables of 16 and 32 bits (docs/small_moments.md).
    seed : int, default 0
        Of the stochastic rounding of such moments.
    **kwargs
        Nothing else is known; ``decay`` is ignored with a warning, as in Keras.

    Raises
    ------
    ValueError
        If an argument is unknown, out of range, or in conflict with another.

    Examples
    --------
    >>> import numpy as np
    >>> weights = np.ones(3)
    >>> optimizer = AdamW(learning_rate=0.1)
    >>> optimizer.build([weights])
    >>> optimizer.apply([np.array([1.0, -1.0, 0.0])])
    >>> weights.round(4)
    array([0.8996, 1.0996, 0.9996])
    """

    # In the order of Keras's config, then what Keras lacks.
    name: str = _checked(hp.text)
    weight_decay: Any = _checked(hp.rate)
    clipnorm: float | None = _checked(hp.optional_positive)
    global_clipnorm: float | None = _checked(hp.optional_positive)
    clipvalue: float | None = _checked(hp.optional_positive)
    use_ema: bool = _checked(hp.flag, fixed=True)
    ema_momentum: float = _checked(hp.fraction)
    ema_overwrite_frequency: int | None = _checked(hp.integer(1))
    loss_scale_factor: float | None = _checked(hp.loss_scale)
    gradient_accumulation_steps: int | None = _checked(hp.integer(2), fixed=True)
    beta_1: float = _checked(hp.beta)
    beta_2: float = _checked(hp.beta)
    epsilon: float = _checked(hp.positive)
    amsgrad: bool = _checked(hp.flag, fixed=True)
    nonfinite: str = _checked(hp.choice("propagate", "skip", "raise"))
    threads: int | None = _checked(hp.integer(1))
    master_weights: bool | str = _checked(hp.masters, fixed=True)
    decouple_lr: bool = _checked(hp.flag)
    maximize: bool = _checked(hp.flag)
    nesterov: bool = _checked(hp.flag)
    epsilon_mode: str = _checked(hp.choice("hat", "corrected"))
    moments: str = _checked(hp.choice(*MOMENTS), fixed=True)
    seed: int = _checked(hp.integer(0, optional=False, most=2**32 - 1))
    engine: Engine
    hyper: hp.Hyperparameters

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
        name: str = "adamw",
        *,
        nonfinite: str = "propagate",
        threads: int | None = None,
        master_weights: bool | str = True,
        decouple_lr: bool = False,
        maximize: bool = False,
        nesterov: bool = False,
        epsilon_mode: str = "hat",
        moments: str = "float32",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        given = locals()
        if kwargs.pop("decay", None) is not None:
            warnings.warn("Argument `decay` is no longer supported and will be ignored.", stacklevel=2)
        if kwargs:
            hints = [f"`{key}` is `{SYNONYMS[key]}` here" for key in kwargs if key in SYNONYMS]
            raise ValueError(
                f"Argument(s) not recognized: {brief(kwargs)}. "
                f"{'; '.join(hints) or f'Expected some of {HYPERPARAMETERS}'}"
            )
        hyper = hp.Hyperparameters()
        vars(self).update(hyper=hyper, engine=Engine(hyper))
        for key in HYPERPARAMETERS:
            setattr(self, key, given[key])
        self.learning_rate = learning_rate

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self) is AdamW and not hasattr(AdamW, name):
            raise AttributeError(
                f"AdamW has no attribute {brief(name)}; expected one of {['learning_rate', *HYPERPARAMETERS]}"
            )
        super().__setattr__(name, value)

    # What it is

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step. Setting takes a float, a schedule or a callable, at any time."""
        rate = self.engine.rate()
        if isinstance(rate, float):
            return rate
        self.engine.catch_up()
        return float(rate(self.engine.state.scalars["iteration"].item()))

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.engine.set_rate(value)

    @property
    def built(self) -> bool:
        """Whether `build` has allocated the state."""
        return self.engine.workspace is not None

    @property
    def iterations(self) -> int:
        """Updates so far: calls of `apply`, divided by ``gradient_accumulation_steps``."""
        return self.engine.updates()

    @property
    def trainable_variables(self) -> list[Array]:
        """The arrays that `build` was given (of an unpickled optimizer: its own copies), in order."""
        return list(self.engine.workspace.given) if self.engine.workspace else []

    @property
    def variables(self) -> list[Array]:
        """The arrays of the state, live, in Keras's order; float32 masters of 16-bit variables follow it."""
        return uncounted.state_of(self.engine, self.engine.lent_places())

    @property
    def variable_names(self) -> list[str]:
        """The names of `variables`: ``iteration``, ``learning_rate``, ``momentum/<name>``, ..."""
        return [name for name, _, _ in self.engine.places()]

    @property
    def state(self) -> dict[str, Array]:
        """The arrays of the state, live, by name."""
        return {name: own[key] for name, own, key in self.engine.lent_places()}

    @property
    def averages(self) -> list[Array]:
        """The moving averages, live, in the order of `build`; zeros before the first update."""
        return [own[key] for _, own, key in self.engine.lent_places() if key == "average"]

    @property
    def last_step(self) -> LastStep | None:
        """What the last call of `apply` did; None before the first."""
        self.engine.catch_up(norm=True)
        return self.engine.record.last_step()

    @property
    def extra(self) -> Any:
        """What was saved as ``extra`` beside the state that was loaded or restored last; else None."""
        return self.engine.extra

    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite="skip"`` has left out."""
        self.engine.catch_up()
        return self.engine.record.skipped

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, {self.engine!r})"

    # Setting up

    def build(
        self, variables: Container, *, comm: Any = None, replicated: Sequence[str] = (), pieces: Any = None
    ) -> None:
        """Allocate the state for the variables to train.

        Parameters
        ----------
        variables : array, list of arrays, list of ``(name, array)`` pairs, or nested dict or list of arrays
            Arrays of floats or complex numbers that do not overlap: of any Array-API library, or that tell where they
            lie (docs/arrays.md). On the CPU, NumPy's, torch's and the latter are updated in place by compiled code. Of
            DTensors it is the local part; their mesh connects the processes (docs/distributed.md).
        comm : communicator of mpi4py, process group or device mesh of torch, or distributed.Ranks, optional
            Take each step together with other processes, each of which has its own variables, or none.
        replicated : list of str
            With `comm`: regular expressions for the names of variables that all processes have, with the same values.
        pieces : dict, optional
            With `comm`: for a variable's name, a slice for each axis of the whole variable whose part it is. Without,
            the parts follow each other along the first axis, in the order of the processes.

        Raises
        ------
        TypeError
            If one is no array, or an array of a kind or dtype that cannot be trained.
        ValueError
            If there are none, one is read-only, two share memory, two have one name, or other variables were built.
        distributed.RankError
            If another process has failed, or they do not agree.
        """
        with self.engine.lock:
            if comm is None:
                if replicated or pieces:
                    raise ValueError("`replicated` and `pieces` are for several processes; expected `comm` with them")
                self.engine.build(*matching.variables_of(self.engine, variables))
                return
            together = Agreement(comm)
            with together.deciding("build"):
                together.share(replicated, pieces)
                self.engine.build(*matching.variables_of(self.engine, variables), together)

    def exclude_from_weight_decay(
        self, var_list: Iterable[Array] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Leave variables out of weight decay; a second call replaces the first.

        Parameters
        ----------
        var_list : list of arrays, optional
            The very arrays that will be built.
        var_names : list of str, optional
            Regular expressions, searched for (`re.search`) in the whole path of a variable and in its last component.

        Raises
        ------
        ValueError
            If the optimizer is built already (Keras documents this and does not do it), or a pattern is not valid.

        Warns
        -----
        UserWarning
            From `build`, if an array or a pattern that was asked for matches no variable.
        """
        if self.built:
            raise ValueError("`exclude_from_weight_decay()` can only be configured before the optimizer is built.")
        override = read_override(var_list, var_names, {"weight_decay": 0.0}, self)._replace(is_exclusion=True)
        kept = [each for each in self.hyper.overrides if not each.is_exclusion]
        saved = [name for each in self.hyper.overrides if each.is_exclusion for name in each.exact]
        if saved:
            warnings.warn(
                f"the exclusions from weight decay that were saved, of {brief_names(saved)}, are replaced", stacklevel=2
            )
        self.hyper.overrides = [*kept, override]

    # Groups

    def override(
        self,
        var_list: Iterable[Array] | None = None,
        var_names: Iterable[str] | None = None,
        *,
        learning_rate: Any = _ABSENT,
        learning_rate_multiplier: float = _ABSENT,
        weight_decay: Any = _ABSENT,
        beta_1: float = _ABSENT,
        beta_2: float = _ABSENT,
        epsilon: float = _ABSENT,
        clipnorm: float | None = _ABSENT,
        clipvalue: float | None = _ABSENT,
        trainable: bool = _ABSENT,
    ) -> None:
        """Give some variables hyperparameters of their own, before `build` and as often as you want.

        A variable that several calls name takes each hyperparameter from the last call that gives it. After `build`,
        the `groups` hold them, and can be changed.

        Parameters
        ----------
        var_list : list of arrays, optional
            The very arrays that will be built.
        var_names : list of str, optional
            Regular expressions, searched for (`re.search`) in the whole path of a variable and in its last component.
        learning_rate : float, LearningRateSchedule or callable, optional
        learning_rate_multiplier : float, optional
            On top of the rate that holds for these variables, their own or the common one.
        weight_decay : float, LearningRateSchedule or callable, optional
        beta_1, beta_2, epsilon : float, optional
        clipnorm, clipvalue : float or None, optional
            Only one kind of clip holds for a variable; None switches it off. ``global_clipnorm`` is over all trainable
            variables, and excludes both.
        trainable : bool, optional
            False leaves the variables alone, and keeps no state for them.

        Raises
        ------
        ValueError
            If the optimizer is built already, nothing is given, or a value is out of range or in conflict.

        Warns
        -----
        UserWarning
            From `build`, if an array or a pattern that was asked for matches no variable.

        Examples
        --------
        >>> import numpy as np
        >>> optimizer = AdamW(learning_rate=0.1)
        >>> optimizer.override(var_names=["bias"], weight_decay=0)
        >>> optimizer.override(var_names=["^encoder/"], learning_rate_multiplier=0.1)
        >>> optimizer.build({"encoder": {"kernel": np.ones(2), "bias": np.ones(1)}, "head": {"bias": np.ones(1)}})
        >>> [(group.names, group.weight_decay, group.learning_rate_multiplier) for group in optimizer.groups[1:]]
        [(('encoder/kernel',), 0.004, 0.1), (('encoder/bias',), 0.0, 0.1), (('head/bias',), 0.0, 1.0)]
        """
        given = {name: value for name, value in locals().items() if name in CHECKS and value is not _ABSENT}
        if self.built:
            raise ValueError(
                "`override()` can only be called before the optimizer is built. Set the attributes of `groups` instead."
            )
        if not given:
            raise ValueError(f"`override()` gives no hyperparameter; expected some of {list(CHECKS)}")
        override = read_override(var_list, var_names, given, self)
        if not override.listed and not override.patterns:
            raise ValueError("`override()` is for no variables; expected `var_list` or `var_names`")
        self.hyper.overrides = [*self.hyper.overrides, override]

    @property
    def groups(self) -> list[Group]:
        """The variables by their hyperparameters (see `Group`), the common group first; empty before `build`."""
        return list(self.hyper.groups)

    def group_of(self, name: Any) -> Group:
        """The group of a variable.

        Parameters
        ----------
        name : str

        Returns
        -------
        Group

        Raises
        ------
        ValueError
            If the optimizer is not built.
        KeyError
            If no variable has that name, here or on another rank.
        """
        known = matching.groups_of(self.engine)
        if not isinstance(name, str) or name not in known:
            raise KeyError(f"there is no variable {brief(name)}; expected one of {brief_names(known)}")
        return self.hyper.groups[known[name]]  # type: ignore[no-any-return]

    def add_variable(
        self,
        shape: Sequence[int],
        initializer: Any = "zeros",
        dtype: Any = None,
        aggregation: str | None = "none",
        layout: Any = None,
        name: str | None = None,
    ) -> Array:
        """Add a NumPy array to the state: it is saved and restored with `variables`, and never touched otherwise.

        Parameters
        ----------
        shape : tuple of int
        initializer : {"zeros", "ones"} or callable
            A callable takes the shape and ``dtype=``.
        dtype : dtype, default float32
        aggregation, layout
            Accepted as in Keras, without effect: there are no replicas here.
        name : str, optional

        Returns
        -------
        numpy.ndarray

        Raises
        ------
        TypeError
            If no file can hold the dtype.
        """
        array = np.zeros(shape, np.float32 if dtype is None else dtype)
        if array.dtype.name not in DTYPES or not array.dtype.isnative:
            raise TypeError(f"`dtype` is {brief(dtype)}; expected one of {', '.join(DTYPES)}, in native byte order")
        name = f"variable_{len(self.engine.state.places())}" if name is None else name
        return self.engine.state.add(name, array, initializer, late=self.built)

    def add_variable_from_reference(
        self, reference_variable: Array, name: str | None = None, initializer: Any = "zeros"
    ) -> Array:
        """Add an array of a variable's library, shape, dtype, layout and device to the state.

        Parameters
        ----------
        reference_variable : array
        name : str, optional
            The array is called ``<variable>_<name>``, ``var`` by default.
        initializer : {"zeros", "ones"} or callable

        Returns
        -------
        array
        """
        workspace = self.engine.workspace
        known = zip(workspace.names, workspace.given, strict=True) if workspace else ()
        prefix = next((f"{n.replace('/', '_')}_" for n, variable in known if variable is reference_variable), "")
        array = arrays.zeros_like(reference_variable, arrays.dtype_name(arrays.seen(reference_variable)))
        return self.engine.state.add(f"{prefix}{name or 'var'}", array, initializer, late=self.built)

    # Stepping

    def apply(self, grads: Container, trainable_variables: Container | None = None) -> None:
        """Take one step: update the variables in place; all of them or, on any error or interrupt, none.

        Parameters
        ----------
        grads : list of arrays and None, or a container like the one of `build`
            Gradients of the variables' shapes. A variable without one (None) is left alone, except for its average.
            They are only read: in place where they have the variable's dtype, or float32 for a 16-bit variable; other
            floats are cast first.
        trainable_variables : container, optional
            Builds the optimizer at the first call; later, the variables that the gradients belong to.

        Raises
        ------
        TypeError
            If a gradient is of another library, device or kind than its variable.
        ValueError
            If a count or a shape differs, no variable has a gradient, or one shares memory with what is updated.
        FloatingPointError
            With ``nonfinite="raise"``, if a gradient is not finite.

        Warns
        -----
        UserWarning
            If some gradients are None.
        """
        self.engine.apply(grads, trainable_variables)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Array | None, Array]]) -> int:
        """Take one step with ``(gradient, variable)`` pairs, as `zip` makes them.

        Returns
        -------
        int
            Calls of `apply` so far.
        """
        self.apply(*matching.pairs(self.engine, grads_and_vars))
        return int(self.engine.state.scalars["iteration"])

    def update_step(self, gradient: Array, variable: Array, learning_rate: float) -> None:
        """Adam alone for one variable: no clip, decay, average or accumulation, and no count of steps.

        Parameters
        ----------
        gradient, variable : array
            The variable must be one of those built.
        learning_rate : float
        """
        uncounted.update_one(self.engine, gradient, variable, learning_rate)

    def stateless_apply(
        self, optimizer_variables: Sequence[Array], grads: Container, trainable_variables: Container
    ) -> tuple[Container, list[Array]]:
        """One step as a pure function: for immutable arrays, and inside `jax.jit`.

        Parameters
        ----------
        optimizer_variables : list of arrays
            The state, in the order of `variables`.
        grads, trainable_variables : container
            In the order, or with the names, of `build`.

        Returns
        -------
        trainable_variables : container
            New arrays, in a container of the same shape.
        optimizer_variables : list of arrays
            The new state.

        Raises
        ------
        ValueError
            If the optimizer is not built, or a count or a shape differs, or under a trace with ``nonfinite="raise"``.

        Notes
        -----
        Neither the arguments nor the optimizer change: a skipped step shows in the iteration (the first variable)
        alone. `set_weights` puts a state back into the optimizer.
        """
        factor = self.loss_scale_factor or 1.0
        return uncounted.stateless_apply(
            self.engine, optimizer_variables, grads, trainable_variables, factor, self.nonfinite
        )

    def scale_loss(self, loss: Any) -> Any:
        """The loss times ``loss_scale_factor``, whose gradients `apply` divides by it again."""
        return loss if self.loss_scale_factor is None else loss * self.loss_scale_factor

    def update_hyperparameters(self, steps: int = 1024) -> None:
        """Send a GPU the coefficients of the next `steps` steps, for the replays of a captured graph; waits for it.

        Needed before a graph that holds a step is replayed more often than that, and after any change of a
        hyperparameter, to have the replays follow it. Without a GPU nothing happens.

        Parameters
        ----------
        steps : int, default 1024
            A graph that is replayed more often does nothing any more, and the next look at the optimizer raises
            RuntimeError.

        Raises
        ------
        ValueError
            If the optimizer is not built, or ``steps`` is no positive integer.
        """
        hp.integer(1, optional=False)("steps", steps)
        self.engine.send_hyperparameters(steps)

    # Averages

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the variables hold their averages; after it they are, bit for bit, what they were.

        What is written into them inside the block is lost. Before the first update there are no averages, and the
        variables stay as they are.

        Raises
        ------
        ValueError
            Without ``use_ema``, or before `build`.
        RuntimeError
            From `apply` inside the block, or from a second block inside it.
        """
        engine = self.engine
        with engine.lock:
            built = engine.require_built("averaged")
            if not self.use_ema:
                raise ValueError("`averaged` needs averages. Received: use_ema=False; expected AdamW(use_ema=True)")
            if engine.swapped:
                raise RuntimeError("`averaged()` is active already; expected no such block inside another")
            for name, variable in zip(built.names, built.given, strict=True):
                arrays.check_variable(name, variable)
            kept = [(variable, arrays.like(variable, variable)) for variable in built.given]
            # An interrupt has both made whole; where that cannot be, `swapped` stays, and the next step says so.
            back = [(arrays.write_all, kept)]
            ended = (setattr, engine, "alone", built.alone), (setattr, engine, "swapped", False)
            try:
                engine.swapped, engine.alone = True, None
                self.finalize_variable_values(built.given)
                yield
            finally:
                commit(back, ended)

    def finalize_variable_values(self, var_list: Container) -> None:
        """Put the averages into variables for good; without ``use_ema``, or before the first update, nothing happens.

        Parameters
        ----------
        var_list : container of the variables built, or of some of them
        """
        built = self.engine.workspace
        if not self.use_ema or built is None or not self.iterations:
            return
        variables = flatten(var_list, "var_list")[1]
        groups, updates = self.hyper.groups, self.iterations
        writes = []
        for variable, i in zip(variables, matching.indices(built, variables), strict=True):
            # What is not trainable has no average, and what has only just been made so has zeros.
            if "average" in built.slots[i] and updates > groups[built.which[i]].started:
                writes.append((variable, built.slots[i]["average"]))
        arrays.write_all(writes)

    # Assigning

    def assign(self, variable: Array, value: Any) -> None:
        """Set the elements of an array, of the model or of the state; the shapes must be equal."""
        arrays.write(variable, value)

    def assign_add(self, variable: Array, value: Any) -> None:
        """Add to the elements of an array."""
        arrays.write(variable, variable + value)

    def assign_sub(self, variable: Array, value: Any) -> None:
        """Subtract from the elements of an array."""
        arrays.write(variable, variable - value)

    # Saving

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: Keras's keys, and others that are not the default."""
        rate: Any = self.engine.hyper.learning_rate_function
        config = {
            "name": self.name,
            "learning_rate": self.learning_rate if rate is None else schedules.serialize(rate.function),
        }
        for key in HYPERPARAMETERS[1:]:
            value = getattr(self, key)
            if key not in _EXTRAS or value != _EXTRAS[key]:
                config[key] = schedules.serialize(value) if callable(value) else value
        groups = overrides.config_of(self.hyper)
        return config | {"overrides": groups} if groups else config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """An optimizer from a config of ours or of Keras; the config is left as it is.

        Parameters
        ----------
        config : dict
        custom_objects : dict, optional
            Your own schedule classes and functions, by name.

        Raises
        ------
        ValueError
            If an argument is unknown or out of range, or a class or function is neither Keras's nor given.
        """
        config = dict(config)
        for key in ("learning_rate", "weight_decay"):
            if isinstance(config.get(key), Mapping):
                config[key] = schedules.deserialize(config[key], custom_objects)
        groups = config.pop("overrides", [])
        optimizer = cls(**config)
        optimizer.hyper.overrides = overrides.read(groups, custom_objects, optimizer)
        return optimizer

    def __copy__(self) -> NoReturn:
        raise TypeError("a shallow copy would share its state with this optimizer; expected `copy.deepcopy`")


HYPERPARAMETERS = [  # all but the learning rate, in the order of Keras's config
    key for key, value in vars(AdamW).items() if isinstance(value, hp.Hyperparameter)
]
SYNONYMS = {  # what other libraries call them
    "lr": "learning_rate",
    "betas": "beta_1, beta_2",
    "eps": "epsilon",
    "b1": "beta_1",
    "b2": "beta_2",
    "params": "build(params)",
}
_ARGUMENTS = inspect.signature(AdamW.__init__).parameters.values()
_EXTRAS = {each.name: each.default for each in _ARGUMENTS if each.kind is each.KEYWORD_ONLY}  # what Keras lacks
