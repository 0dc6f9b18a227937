"""The methods by which optimizers, those with a dynamic loss scale included, are saved and take what was saved."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from ..arrays.torch_graphs import outside_graphs
from ..arrays.tree import Container
from . import folders, own_variables, restore, snapshot
from .snapshot import engine_of, places_of


@outside_graphs(traced=())
class Saveable:
    """An optimizer with `get_config` and `from_config` that can be saved."""

    def save(self, target: Any, extra: Any = None, variables: bool = False, durable: bool = True) -> None:
        """Save everything that a run needs to go on bit for bit: all of it, or on an error nothing.

        Parameters
        ----------
        target : path, URL or mapping
            A path ending in ``.npz``, ``.safetensors``, ``.h5``, ``.zarr`` or ``.zarr.zip``; a URL or a store of
            zarr; a group of h5py or zarr; or any mapping, into which NumPy arrays are put. Of an optimizer that is
            connected with other processes, a path without suffix: the folder in which all of them save.
        extra : optional
            Your own payload, of what JSON can hold: given back by `extra` and `restore`. Tuples come back as lists.
        variables : bool
            Save the variables as well.
        durable : bool
            Return only when the file is on disk to stay; otherwise when the system has taken it.

        Raises
        ------
        TypeError, ValueError
            If the target or the payload is none of these, or the optimizer is not built.
        RuntimeError
            Inside `averaged()`.
        OSError
            If it cannot be written: what was there before is still there.

        Examples
        --------
        >>> import numpy as np
        >>> from adamw_numba import AdamW
        >>> optimizer, store = AdamW(), {}
        >>> optimizer.build({"w": np.ones(2)})
        >>> optimizer.save(store, extra={"epoch": 3})
        >>> AdamW.load(store, {"w": np.ones(2)}).extra
        {'epoch': 3}
        """
        if engine_of(self).together is None:
            snapshot.save(self, target, extra, variables, durable)
        else:
            folders.save(self, target, extra, variables, durable)

    @classmethod
    def load(
        cls,
        target: Any,
        variables: Container | None = None,
        custom_objects: Mapping[str, Any] | None = None,
        *,
        comm: Any = None,
        replicated: Sequence[str] = (),
        pieces: Any = None,
    ) -> Self:
        """A new optimizer with the arguments, the exclusions from decay and the state that `save` has written.

        Parameters
        ----------
        target : path, URL or mapping
        variables : container, optional
            What to build it on, in any order of the names that were saved; by default the first `build` takes
            the state. Where the variables were saved too, their values are written into these arrays.
        custom_objects : dict, optional
            Your own schedule classes and functions, by name: a function is saved by its name alone.
        comm, replicated, pieces : optional
            As for `AdamW.build`: each process takes its own pieces of what one process, or any number of them, have
            saved.

        Raises
        ------
        CorruptFileError
            If the file is not what was saved.
        ValueError
            If a name, shape or dtype differs from the variables': the message says which, and nothing is written.
        """
        optimizer: Self = restore.load(cls, target, variables, custom_objects, comm, replicated, pieces)
        return optimizer

    def restore(self, target: Any) -> Any:
        """Take the state that `save` has written into this optimizer, all of it or on an error nothing.

        Parameters
        ----------
        target : path, URL or mapping

        Returns
        -------
        object
            What was saved as ``extra``.

        Raises
        ------
        CorruptFileError
            If the file is not what was saved.
        ValueError
            If the optimizer is not built, or a name, shape, dtype or an array that an option asks for differs.

        Warns
        -----
        UserWarning
            If hyperparameters or exclusions are others than they were: this optimizer's are kept.
        """
        return restore.restore(self, target)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Give every array of `variables` another value: all of them, or on an error none.

        Raises
        ------
        ValueError
            If the optimizer is not built, or the count, a shape or a kind of dtype differs.
        """
        engine = engine_of(self)
        engine.require_built("set_weights")
        with engine.lock:
            own_variables.replace(places_of(self), list(weights), "weights")
            engine.catch_up()

    def save_own_variables(self, store: Any) -> None:
        """Put a NumPy copy of every array of `variables` into a mapping, under ``"0"``, ``"1"``, ... as Keras does."""
        with engine_of(self).lock:
            own_variables.save(places_of(self), store)

    def load_own_variables(self, store: Any) -> None:
        """Take every array of `variables` from a mapping that `save_own_variables`, of ours or of Keras, has filled.

        Raises
        ------
        ValueError
            If the optimizer is not built, or the keys, a shape or a kind of dtype differ.
        """
        engine = engine_of(self)
        engine.require_built("load_own_variables")
        with engine.lock:
            own_variables.load(places_of(self), store)
            engine.catch_up()
