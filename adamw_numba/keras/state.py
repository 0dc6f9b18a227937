"""The variables of an optimizer's state, which are Keras's own: made, set, saved and loaded."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

from .. import arrays
from ..arrays.brief import brief
from ..arrays.masters import master_dtype
from ..arrays.moments import SCALES, blocks_of, stored_as
from ..step.slots import moments_of
from .trained import Variable, is_torch, tensor

Slots = dict[str, Variable]


class WithState(keras.optimizers.AdamW):  # type: ignore[misc]  # which has no types here
    """Keras's AdamW with a state of the dtypes that the engine wants, which a later `build` can take."""

    _adamw: Any
    _loaded: list[Any] = []  # noqa: RUF012  # what was loaded before `build`; replaced, never changed

    @property
    def variables(self) -> list[Variable]:
        """The variables of the state, in Keras's order; then masters of 16-bit variables, and scales of moments."""
        self._adamw.engine.catch_up()  # with a GPU that counts by itself
        return list(super().variables)

    @property
    def iterations(self) -> Any:
        """Updates so far: calls of `apply`, divided by ``gradient_accumulation_steps``."""
        self._adamw.engine.catch_up()
        return super().iterations

    def _make_slots(self, variables: Sequence[Variable]) -> tuple[list[Variable], list[Slots]]:
        """The variables that are trained, and the state of each by our names, once Keras has made its own."""
        of_all = {"momentum": self._momentums, "velocity": self._velocities}
        if self.amsgrad:
            of_all["velocity_hat"] = self._velocity_hats
        if self.use_ema:
            of_all["average"] = self._model_variables_moving_average
        if self.gradient_accumulation_steps:
            of_all["gradient_accumulator"] = self._accumulated_gradients
        chosen, slots = [], []
        for i, variable in enumerate(variables):
            if variable.overwrite_with_gradient:  # Keras does that, and keeps no moments
                continue
            own = {key: kept[i] for key, kept in of_all.items()}
            kept = master_dtype(self.master_weights, variable.dtype)
            if kept:
                own["master"] = self.add_variable_from_reference(variable, "master")
            if kept == "float32":
                own["master"].assign(variable)
            if self._kept_in(variable) == "8bit":
                blocks = (blocks_of(variable.shape, variable.dtype.startswith("complex")),)
                scales = SimpleNamespace(path=variable.path, shape=blocks, dtype="float32")
                own |= {key: super(WithState, self).add_variable_from_reference(scales, key) for key in SCALES}
            chosen.append(variable)
            slots.append(own)
        if not chosen:
            raise ValueError("all `variables` are overwritten with their gradients; expected one at least to train")
        return chosen, slots

    def add_variable_from_reference(
        self, reference_variable: Variable, name: str | None = None, initializer: Any = "zeros"
    ) -> Variable:
        """Add a variable to the state, like one of the model; float32 for one of 16 bits.

        Parameters
        ----------
        reference_variable : keras.Variable
        name : str, optional
            Of momentum, velocity and master, the dtype follows from ``moments`` and ``master_weights``.
        initializer : str or keras.initializers.Initializer

        Returns
        -------
        keras.Variable
        """
        dtype = keras.backend.standardize_dtype(reference_variable.dtype)
        moments = self._kept_in(reference_variable) if name in ("momentum", "velocity") else "float32"
        kept = arrays.SLOT.get(dtype, dtype)
        if moments != "float32":
            kept = stored_as(moments, dtype.startswith("complex"), has_bfloat=True)
        elif name == "master":
            kept = master_dtype(self.master_weights, dtype)
        like = SimpleNamespace(
            path=reference_variable.path,
            shape=reference_variable.shape,
            dtype=kept,
            _layout=vars(reference_variable).get("_layout"),
        )
        return super().add_variable_from_reference(like, name, initializer)

    def _kept_in(self, variable: Variable) -> str:
        """What the moments of a variable are kept in."""
        held = tensor(variable) if is_torch() else variable.value
        return moments_of(self._adamw.moments, variable.path, held, None)

    def _check_known(self, variables: Iterable[Variable]) -> None:
        for variable in variables:
            if self._var_key(variable) not in self._trainable_variables_indices:
                raise ValueError(
                    f"unknown variable {brief(getattr(variable, 'path', variable))}; expected those that the optimizer "
                    "was built with. For other variables, make another optimizer"
                )

    def finalize_variable_values(self, var_list: Iterable[Variable]) -> None:
        """Put the averages into variables for good; without ``use_ema``, or before the first update, nothing happens.

        Parameters
        ----------
        var_list : list of keras.Variable
            Those that were built, or some of them.
        """
        if not self.use_ema or not self.built or not int(keras.ops.convert_to_numpy(self.iterations)):
            return
        variables = list(var_list)
        self._check_known(variables)
        for variable in variables:
            average = self._model_variables_moving_average[self._get_variable_index(variable)]
            if average is not None:
                variable.assign(average)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set the state, in the order of `variables`.

        Raises
        ------
        ValueError
            If the optimizer is not built, or the count or a shape differs: nothing is written.
        """
        if self.built and len(weights) != len(self.variables):
            raise ValueError(f"`weights` holds {len(weights)} arrays; expected {len(self.variables)}")
        for variable, weight in zip(self.variables if self.built else (), weights, strict=True):
            dtypes = [variable.dtype, str(getattr(weight, "dtype", None))]
            coded = [dtype.startswith(("uint", "int16")) for dtype in dtypes]
            if any(coded) and dtypes[0] != dtypes[1]:
                wanted = f"{'codes' if coded[0] else 'numbers'}, in {variable.dtype}"
                raise ValueError(f"`weights`: {variable.path} is {brief(weight)}; expected {wanted}")
            if tuple(np.shape(weight)) != tuple(variable.shape):
                raise ValueError(
                    f"`weights`: {variable.path} has shape {tuple(np.shape(weight))}; expected {tuple(variable.shape)}"
                )
        if self.built:  # what cannot be converted raises before anything is written
            pairs = zip(weights, self.variables, strict=True)
            weights = [keras.ops.convert_to_tensor(weight, dtype=variable.dtype) for weight, variable in pairs]
        super().set_weights(weights)

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Set the state, from what `save_own_variables` has written; before `build`, which then takes it.

        Warns
        -----
        UserWarning
            If there are not as many arrays: they are skipped, as in Keras.
        """
        variables = self.variables
        if self.built or len(store.keys()) <= len(variables):
            super().load_own_variables(store)
            return
        loaded = [np.array(store[str(i)]) for i in range(len(store.keys()))]
        for variable, value in zip(variables, loaded, strict=False):
            variable.assign(value)
        self.__dict__["_loaded"] = loaded

    def _take_loaded(self, before: int) -> None:
        """Put what was loaded before `build` into all variables but the first ones, which have it already."""
        if self._loaded and len(self._loaded) != len(self.variables):
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}', because it has {len(self.variables)} "
                f"variables whereas the saved optimizer has {len(self._loaded)} variables. ",
                stacklevel=4,
            )
        elif self._loaded:
            for variable, value in zip(self.variables[before:], self._loaded[before:], strict=True):
                variable.assign(value)


def checked_variables(variables: Any, what: str) -> list[Variable]:
    """A list of Keras's variables."""
    if not isinstance(variables, Iterable) or isinstance(variables, keras.Variable):
        raise TypeError(f"`{what}` is {brief(variables)}; expected a list of keras.Variable")
    found = list(variables)
    for k, variable in enumerate(found):
        if not isinstance(variable, keras.Variable):
            raise TypeError(
                f"`{what}` holds {brief(variable)} of type {type(variable).__name__} at {k}; expected a "
                "keras.Variable. Arrays and tensors are trained by adamw_numba.AdamW"
            )
    return found
