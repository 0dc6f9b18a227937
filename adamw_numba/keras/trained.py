"""What an optimizer of Keras trains: its variables in order, those of their state, and how the engine is given them."""

from collections import Counter
from collections.abc import Sequence
from operator import is_, itemgetter
from types import SimpleNamespace
from typing import Any

import keras

from .. import arrays
from ..array_api import stateless
from ..arrays.moments import Alias
from ..hyperparameters.groups import make_groups

Variable = Any  # keras.Variable

# The tensor itself: `value` asks for scopes and devices first, which takes twenty times as long.
_tensor_of = itemgetter("_value")


def tensor(variable: Variable) -> Any:
    """The tensor that a variable holds on the torch backend, whatever scope is active."""
    return _tensor_of(vars(variable))


def is_torch() -> bool:
    """Whether Keras's backend is torch; otherwise it is JAX."""
    return bool(keras.backend.backend() == "torch")


def seen_by_numpy(variable: Variable) -> Any:
    """A scalar of the torch backend as an array of NumPy in the same memory.

    Raises
    ------
    TypeError
        If it is in bfloat16, which NumPy lacks.
    """
    if variable.dtype == "bfloat16":
        raise TypeError(
            f"{variable.path} is in bfloat16, as Keras's floatx is; expected another floatx: for layers in bfloat16 "
            "there are their `dtype` and the policies"
        )
    return tensor(variable).detach().numpy()


def are_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


class Trained:
    """The variables of an optimizer, and those of their state.

    Parameters
    ----------
    engine : Engine
        Which is to have hyperparameters for them.
    variables : list of keras.Variable
        Without those that are overwritten with their gradients.
    slots : list of dict
        Of each, the variables of its state, by our names of the slots.

    Attributes
    ----------
    variables : list of keras.Variable
    names : list of str
        Their paths; of several with one path, all but the first are numbered.
    unmatched : list
        What was asked for in `override` and `exclude_from_weight_decay`, and matches nothing.
    """

    def __init__(self, engine: Any, variables: Sequence[Variable], slots: Sequence[dict[str, Variable]]) -> None:
        self._engine, self.variables, self._slots = engine, list(variables), list(slots)
        self._tensors: list[Any] = []
        engine.warns = False  # of what is frozen: Keras says what else has no gradient
        # A model that was loaded from a file may have other paths: its variables round by their positions.
        self.names = [Alias(name, str(k)) for k, name in enumerate(names_of(variables))]
        hyper = engine.hyper
        groups, self._which, self.unmatched = make_groups(engine, hyper.overrides, self.names, self.variables)
        hyper.overrides = [override.by_names(self.names, self.variables) for override in hyper.overrides]
        vars(hyper).update(groups=groups, others=tuple(groups[1:]), is_fixed=True, token=object())

    def lay_out(self) -> None:
        """Have the engine work on the tensors of all these variables: those of the torch backend.

        Raises
        ------
        TypeError, ValueError
            If one cannot be trained, or two share memory.
        """
        tensors = self._tensors_now()
        arrays.check_variables(self.names, tensors)
        slots = [{key: tensor(own) for key, own in each.items()} for each in self._slots]
        self._engine.lay_out(self.names, tensors, slots, self._which, self._engine.hyper.groups, tensors)
        self._engine.workspace.lend()  # the state is Keras's, and anybody may write it
        self._tensors = tensors

    def _tensors_now(self) -> list[Any]:
        return list(map(_tensor_of, map(vars, self.variables)))

    def step(self, gradients: list[Any]) -> None:
        """Take one step in place: see `AdamW.apply` of `adamw_numba`."""
        if not are_same(self._tensors_now(), self._tensors):
            self.lay_out()
        self._engine.apply(gradients)

    def step_as_a_function(
        self, scalars: dict[str, Variable], gradients: list[Any], loss_scale: float, nonfinite: str
    ) -> None:
        """The same in new arrays, which Keras's variables are assigned: under a trace too, or in a `StatelessScope`.

        Parameters
        ----------
        scalars : dict
            The iteration, and the learning rate where it is a variable.
        gradients : list of arrays and None
        loss_scale : float
        nonfinite : str
        """
        named = dict(scalars)
        for name, own in zip(self.names, self._slots, strict=True):
            named |= {f"{key}/{name}": variable for key, variable in own.items()}
        values = [variable.value for variable in self.variables]
        slots = [{key: variable.value for key, variable in own.items()} for own in self._slots]
        built = SimpleNamespace(names=self.names, variables=values, slots=slots, which=self._which)
        state = [variable.value for variable in named.values()]
        new = stateless.apply(self._engine, built, list(named), state, gradients, values, loss_scale, nonfinite)
        for variables, given in zip((self.variables, named.values()), new, strict=True):
            for variable, value in zip(variables, given, strict=True):
                variable.assign(value)


def names_of(variables: Sequence[Variable]) -> list[str]:
    """The paths of variables, each of them once."""
    counts: Counter[str] = Counter()
    names = []
    for variable in variables:
        counts[variable.path] += 1
        names.append(variable.path if counts[variable.path] == 1 else f"{variable.path}:{counts[variable.path]}")
    return names
