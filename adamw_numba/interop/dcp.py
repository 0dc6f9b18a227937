"""torch.distributed.checkpoint: the state of an optimizer as DTensors, for any number of processes to load."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, brief_names
from ..arrays.dtensors import check_alike, is_dtensor, like
from ..arrays.moments import SCALES
from ..saving import archive, restore, snapshot
from ..saving.archive import Saved
from ..saving.saveable import Saveable
from ..saving.snapshot import Snapshot, engine_of

_REST = "rest"  # the key of all that belongs to no variable


class Stateful:
    """What `torch.distributed.checkpoint` saves and loads of an optimizer: see `dcp_state`."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Every array of the state, live: a DTensor where the variable is one, else a tensor."""
        engine = engine_of(self._optimizer)
        with engine.lock:
            workspace = engine.require_built("dcp_state")
            found: dict[str, Any] = {_REST: _rest(self._optimizer, workspace)}
            for key, given, slot in _slots(workspace):
                found[key] = _tensor(slot, given)
            workspace.lend()
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        """Take what `state_dict` has given here or elsewhere, once DCP has put this process's parts into it.

        Raises
        ------
        ValueError
            If a name, shape, dtype or an array that an option asks for differs.

        Warns
        -----
        UserWarning
            If hyperparameters are others than they were: this optimizer's are kept.
        """
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get(_REST), bytes):
            raise ValueError(f"`state_dict` is {brief(state_dict)}; expected what `state_dict()` returns")
        restore.take(self._optimizer, lambda: self._saved(state_dict))

    def _saved(self, state_dict: Mapping[str, Any]) -> Saved:
        """What this process has been given, as if it had been read from a file."""
        workspace = engine_of(self._optimizer).require_built("dcp_state")
        document, scalars, where = archive.read(_unpacked(state_dict[_REST]))
        of = dict(zip(workspace.names, zip(workspace.given, workspace.variables, strict=True), strict=True))
        for entry in document["variables"]:
            given, variable = of.get(entry["name"], (None, None))
            if is_dtensor(given) and entry["shape"] == list(given.shape):
                entry["shape"] = list(variable.shape)
        models = {key: given for key, given, _ in _slots(workspace)}
        for key, value in state_dict.items():
            if key != _REST:
                slot, _, name = key.partition("/")
                scalars[f"{slot.partition(':')[0]}/{name}"] = _values(key, value, models.get(key))
        return Saved(document, scalars, where)


def dcp_state(optimizer: Any) -> Stateful:
    """The state of an optimizer for `torch.distributed.checkpoint`: saved on some ranks, loaded on any number of them.

    Parameters
    ----------
    optimizer : AdamW or LossScaleOptimizer
        Built. The state of DTensors is DTensors; what all ranks have is written once.

    Returns
    -------
    object
        With ``state_dict`` and ``load_state_dict``, torch's `Stateful`: a value of the dict for `save` and `load`.

    Raises
    ------
    TypeError
        If it is no such optimizer.
    ValueError
        If it is not built, or keeps moments of DTensors in 8 bits.

    Notes
    -----
    DCP loads into the arrays of the state itself. If it is interrupted, part of them is loaded.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed.checkpoint as dcp
    >>> from adamw_numba import AdamW
    >>> from adamw_numba.interop import dcp_state
    >>> optimizer = AdamW()
    >>> optimizer.build({"w": torch.ones(2)})
    >>> state = {"optimizer": dcp_state(optimizer)}
    >>> dcp.save(state, checkpoint_id="checkpoint")  # doctest: +SKIP
    >>> dcp.load(state, checkpoint_id="checkpoint")  # doctest: +SKIP
    """
    if not isinstance(optimizer, Saveable):
        raise TypeError(f"`optimizer` is {brief(optimizer)}; expected an AdamW or a LossScaleOptimizer that is built")
    built = engine_of(optimizer).require_built("dcp_state")
    of_each = zip(built.names, built.given, built.slots, strict=True)
    cut = [name for name, given, own in of_each if is_dtensor(given) and SCALES[0] in own]
    if cut:
        raise ValueError(f"moments='8bit': {brief_names(cut)} are DTensors; expected moments of 16 bits, or `save`")
    return Stateful(optimizer)


def _slots(workspace: Any) -> list[tuple[str, Any, Array]]:
    """The key, the variable that was given, and the array, of all that is kept of variables."""
    named = zip(workspace.names, workspace.given, workspace.slots, strict=True)
    return [(_key_of(slot, name, array), given, array) for name, given, own in named for slot, array in own.items()]


def _key_of(slot: str, name: str, array: Array) -> str:
    """The key of an array; of codes another one than of numbers, since DCP would cast one to the other."""
    dtype = arrays.dtype_name(array)
    return snapshot.key_of(slot if dtype in arrays.COMPUTE else f"{slot}:{dtype}", name)


def _tensor(slot: Array, given: Any) -> Any:
    import torch

    tensor = slot if isinstance(slot, torch.Tensor) else torch.from_numpy(arrays.as_numpy(slot))
    return like(tensor, given) if is_dtensor(given) else tensor


def _values(key: str, value: Any, model: Any) -> np.ndarray[Any, Any]:
    """What this process has of an array."""
    if is_dtensor(model):
        check_alike(brief(key), None, value, model)
    elif is_dtensor(value):
        raise TypeError(f"{brief(key)} is a DTensor; expected a tensor, as its variable is none")
    return arrays.as_numpy(arrays.seen(value))


def _rest(optimizer: Any, workspace: Any) -> bytes:
    """What belongs to no variable, and the document of the whole: the same on all ranks."""
    taken = snapshot.of_no_variable(optimizer)
    for entry, given in zip(taken.document["variables"], workspace.given, strict=True):
        if is_dtensor(given):
            entry["shape"] = list(given.shape)
    return _packed(taken)


def _packed(taken: Snapshot) -> bytes:
    store: dict[str, Any] = {}
    archive.write(store, *taken, durable=False)
    target = io.BytesIO()
    np.savez(target, **store)
    return target.getvalue()


def _unpacked(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as store:
        return dict(store)
