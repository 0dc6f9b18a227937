"""Saved state, back in an optimizer: loaded into a new one, or restored into one that is built."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, brief_names
from ..hyperparameters.groups import Group, Override
from ..ranks.agreement import Agreement
from ..ranks.protocol import RankError
from ..state import check_scalar
from . import folders, manifest
from .archive import Saved
from .differences import UNUSABLE, differences
from .indexes import is_of_a_variable
from .manifest import encoded
from .snapshot import Place, engine_of, scalars_of
from .stores.atomic import CorruptFileError

Write = tuple[dict[str, Array], str, Array]  # a dict, its key, and the new value
# Which option a slot belongs to.
_OPTION_OF = {
    "average": "use_ema",
    "velocity_hat": "amsgrad",
    "gradient_accumulator": "gradient_accumulation_steps",
    "master": "master_weights",
    "momentum_scale": "moments",
    "velocity_scale": "moments",
}


class Loaded(NamedTuple):
    """The state of variables that are yet to be built.

    Attributes
    ----------
    variables : list of dict
        Their ``name``, ``dtype``, ``shape``, and whether they are ``excluded`` from weight decay.
    arrays : dict
        ``momentum/<name>`` and so on; bfloat16 as its bits.
    where : str
        What messages call it.
    positional : bool
        Whether the variables are known by their order alone: in what another library has saved.
    partial : bool
        Whether other slots than the moments, which another library lacks, stay as they were built.
    """

    variables: list[dict[str, Any]]
    arrays: dict[str, np.ndarray[Any, Any]]
    where: str
    positional: bool = False
    partial: bool = False
    groups: Sequence[Mapping[str, Any]] = ()
    pieces: Callable[[Any], "Loaded"] | None = None  # reads, or cuts out, what a rank has of it
    mark: float = 0.0  # by which ranks know that they have loaded the same

    def started(self, groups: Sequence[Group]) -> list[int]:
        """For each group, how many updates came before its moments were new.

        Raises
        ------
        ValueError
            If variables that are one group now counted their steps from different ones.
        """
        of = {name: group["started"] for group in self.groups for name in group["names"]}
        return [_common_start(group, of, self.where) for group in groups]

    def fill(
        self,
        names: Sequence[str],
        variables: Sequence[Array],
        slots: Sequence[dict[str, Array]],
        groups: Sequence[Group],
        together: Any,
    ) -> list[int]:
        """Put the state into the slots of variables, and what it holds of the variables into them: all or nothing.

        Returns
        -------
        list of int
            What each group has started from: see `started`.
        """
        with folders.agreeing(together, "load") as agreed:
            own = self if self.pieces is None else self.pieces(together)
            writes, started = _writes(own, names, variables, slots), own.started(groups)
            arrays.check_writeable(own[key] for own, key, _ in writes if arrays.is_mutable(own[key]))
            if not agreed(self.mark) and together is not None:
                raise RankError(
                    f"the ranks have loaded different saves, such as {self.where}; expected the same on all"
                )
        _write(writes)
        return started


def load(
    cls: Any,
    target: Any,
    variables: Any,
    custom_objects: Mapping[str, Any] | None,
    comm: Any = None,
    replicated: Sequence[str] = (),
    pieces: Any = None,
) -> Any:
    """A new optimizer from a file; its state goes into the variables given, or into those of the first `build`."""
    if comm is None:
        optimizer = _load(cls, target, custom_objects)
        if variables is not None:
            optimizer.build(variables)
        return optimizer
    with folders.agreeing(Agreement(comm), "load") as agreed:
        if variables is None:
            raise ValueError(
                "`comm` needs `variables`; expected both, or neither and then `build(variables, comm=...)`"
            )
        optimizer = _load(cls, target, custom_objects)
        agreed()
    optimizer.build(variables, comm=comm, replicated=replicated, pieces=pieces)
    return optimizer


def _load(cls: Any, target: Any, custom_objects: Mapping[str, Any] | None) -> Any:
    # Of a folder the arrays are read when it is known which: by then there may be another save, and another way to it.
    path = Path(target).absolute() if folders.is_folder(target) else None
    saved = folders.read(target) if path is None else folders.read_folder(path, names=())
    _check_class(cls.__mro__, saved)
    try:
        optimizer = cls.from_config(saved.document["config"], custom_objects)
    except UNUSABLE as error:
        raise ValueError(f"{saved.where} holds a config that cannot be used: {error!s:.400}") from error
    engine = engine_of(optimizer)
    _add_arrays(engine, saved)
    _write(_scalar_writes(optimizer, saved))
    engine.loaded = _loaded(saved)._replace(pieces=partial(_pieces, saved, path))
    excluded = tuple(entry["name"] for entry in saved.document["variables"] if entry["excluded"])
    if excluded and not engine.hyper.overrides:  # otherwise they are among those
        engine.hyper.overrides = [Override([], [], {"weight_decay": 0.0}, exact=excluded, is_exclusion=True)]
    _set_counts(engine, saved)
    return optimizer


def _pieces(saved: Saved, path: Path | None, together: Any) -> Loaded:
    """What a rank has of what was read, or of a folder of which the head was read."""
    if path is not None:
        saved = folders.read_folder(path, together, crc32=saved.document["crc32"])
    elif together is not None:
        saved = folders.cut(saved, together)
    return _loaded(saved)


def restore(optimizer: Any, target: Any) -> Any:
    """Put a saved state into a built optimizer, all or nothing; the user's own payload is returned."""
    engine = engine_of(optimizer)
    engine.require_built("restore")
    return take(optimizer, lambda: folders.read(target, engine.together))


def take(optimizer: Any, read: Callable[[], Saved]) -> Any:
    """Put what is read into a built optimizer, all or nothing, on all ranks; the user's own payload is returned."""
    engine = engine_of(optimizer)
    with engine.lock:
        workspace, together = engine.require_built("restore"), engine.together
        with folders.agreeing(together, "restore") as agreed:
            engine.check_not_swapped()
            engine.catch_up()
            saved = read()
            _check_class(type(optimizer).__mro__, saved)
            # Every check comes before the first write.
            writes, loaded, groups = _scalar_writes(optimizer, saved), _loaded(saved), engine.hyper.groups
            writes += _writes(loaded, workspace.names, workspace.variables, workspace.slots)
            started = loaded.started(groups)
            told = differences(optimizer, saved)
            if told:
                warnings.warn(
                    f"restored from {saved.where} into an optimizer that differs: {'; '.join(told)}", stacklevel=4
                )
            arrays.check_writeable(own[key] for own, key, _ in writes if arrays.is_mutable(own[key]))
            if not agreed(float(int(saved.document["crc32"], 16))) and together is not None:
                raise RankError(f"the ranks have read different saves from {saved.where}; expected the same on all")
        _write(writes)
        for group, since in zip(groups, started, strict=True):
            vars(group)["started"] = since
        engine.hyper.token = object()
        engine.catch_up()  # a GPU that counts by itself is told of the iteration
        _set_counts(engine, saved)
        return engine.extra


def _common_start(group: Group, of: Mapping[str, int], where: str) -> int:
    found = {of.get(name, 0) for name in group.names} or {0}
    if len(found) > 1:
        raise ValueError(
            f"{where} holds {brief_names(group.names)} as parts of several groups, which count their steps from "
            f"{brief_names(sorted(found))}; expected the groups that were saved"
        )
    return found.pop()


def _loaded(saved: Saved) -> Loaded:
    own = {key: array for key, array in saved.arrays.items() if is_of_a_variable(key)}
    groups, mark = saved.document.get("groups", ()), float(int(saved.document["crc32"], 16))
    return Loaded(saved.document["variables"], own, saved.where, groups=groups, mark=mark)


def _add_arrays(engine: Any, saved: Saved) -> None:
    """Make the arrays that the user had added: of the dtype that they had, bfloat16 as such."""
    for name, late in saved.document["added"]:
        try:
            key = f"added/{encoded(name)}"
            if key in saved.arrays:
                dtype = _numpy_dtype(saved.document["arrays"][key]["dtype"], f"{saved.where}: {brief(key)}")
                engine.state.add(name, np.zeros(saved.arrays[key].shape, dtype), "zeros", late)
        except ValueError as error:
            raise CorruptFileError(f"{saved.where} holds an added variable that cannot be: {error!s:.400}") from error


def _numpy_dtype(name: str, what: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError(f"{what} is bfloat16, which NumPy has from the package ml_dtypes: install it") from None
    return ml_dtypes.bfloat16


def _check_class(kinds: Sequence[type], saved: Saved) -> None:
    if saved.document["class"] not in [kind.__name__ for kind in kinds]:
        raise ValueError(f"{saved.where} holds a {saved.document['class']}; expected one of {kinds[0].__name__}")


def _scalar_writes(optimizer: Any, saved: Saved) -> list[Write]:
    """What to write of the arrays that belong to no variable, once all of them were checked."""
    places = scalars_of(optimizer)
    _check_keys(places, saved)
    for key, (own, name) in places.items():
        _check_scalar(key, own[name], saved)
        if "/" not in key or key.startswith("loss_scale/"):
            check_scalar(name, saved.arrays[key], saved.where)
    if int(saved.arrays["iteration"]) != saved.document["step"]:
        raise CorruptFileError(
            f"{saved.where} is of step {saved.document['step']} and holds 'iteration' {saved.arrays['iteration']}; "
            "expected the same number"
        )
    return [(own, name, saved.arrays[key]) for key, (own, name) in places.items()]


def _check_keys(places: Mapping[str, Place], saved: Saved) -> None:
    found = {key for key in saved.arrays if not is_of_a_variable(key)}
    if found == set(places):
        return
    hint = ""
    if "learning_rate" in found ^ set(places):
        hint = "; a learning rate that is a number is part of the state: assign a schedule after `restore`"
    raise ValueError(
        f"{saved.where} holds {brief_names(sorted(found - set(places)))}, which the optimizer lacks, and lacks "
        f"{brief_names(sorted(set(places) - found))}{hint}"
    )


def _check_scalar(key: str, array: Array, saved: Saved) -> None:
    what = f"{saved.where}: {brief(key)}"
    _check_fits(what, saved.arrays[key], array)
    # bfloat16 and uint16 are the same bits to NumPy.
    was, here = saved.document["arrays"][key]["dtype"], arrays.dtype_name(array)
    if was != here:
        raise ValueError(f"{what} is {was}; the optimizer has {here}")


def _check_fits(what: str, value: np.ndarray[Any, Any], array: Array) -> None:
    if not _fits(value, array):
        here = manifest.DTYPES.get(arrays.dtype_name(array))
        raise ValueError(
            f"{what} is {value.dtype} of shape {value.shape}; the optimizer has {here} of {tuple(array.shape)}"
        )


def _fits(value: np.ndarray[Any, Any], array: Array) -> bool:
    return bool(value.shape == tuple(array.shape) and value.dtype == manifest.DTYPES.get(arrays.dtype_name(array)))


def _matched(loaded: Loaded, names: Sequence[str], variables: Sequence[Array]) -> list[int]:
    """Which saved variable each of these is; an error says which names, shapes and dtypes differ."""
    order = _order(loaded, names)
    wrong = []
    for name, variable, index in zip(names, variables, order, strict=True):
        entry = loaded.variables[index]
        here = (arrays.dtype_name(variable), tuple(variable.shape))
        there = (entry["dtype"] or here[0], tuple(entry["shape"]))  # other libraries do not say
        if there != here:
            wrong.append(f"{brief(name)} was {there[0]} of shape {there[1]} and is {here[0]} of shape {here[1]}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{loaded.where} does not fit the variables: {'; '.join(wrong[:3])}{more}")
    return order


def _order(loaded: Loaded, names: Sequence[str]) -> list[int]:
    """Where each variable is among those that were saved: by name, or by position where there are no names."""
    saved = [entry["name"] for entry in loaded.variables]
    if loaded.positional:
        if len(saved) != len(names):
            raise ValueError(
                f"{loaded.where} holds {len(saved)} variables; expected {len(names)}: {brief_names(names)}"
            )
        return list(range(len(names)))
    where = {name: index for index, name in enumerate(saved)}
    known = set(names)
    missing, unknown = [n for n in names if n not in where], [n for n in saved if n not in known]
    if missing or unknown:
        wrong = [f"lacks the variables {brief_names(missing)}"] * bool(missing)
        wrong += [f"holds {brief_names(unknown)}, which are not among the variables"] * bool(unknown)
        raise ValueError(f"{loaded.where} {' and '.join(wrong)}; expected {brief_names(names)}")
    return [where[name] for name in names]


def _writes(
    loaded: Loaded, names: Sequence[str], variables: Sequence[Array], slots: Sequence[dict[str, Array]]
) -> list[Write]:
    """What to write of every variable's arrays, once all of them were checked."""
    writes: list[Write] = []
    expected: set[str] = set()
    for name, variable, own, index in zip(names, variables, slots, _matched(loaded, names, variables), strict=True):
        saved = encoded(loaded.variables[index]["name"])
        for slot, array in own.items():
            value = _value_of_slot(loaded, f"{slot}/{saved}", slot, name, array)
            if value is not None:
                writes.append((own, slot, value))
        value = loaded.arrays.get(f"variables/{saved}")
        if value is not None:
            writes += _write_of_variable(name, variable, value, loaded.where)
        expected.update(f"{slot}/{saved}" for slot in (*own, "variables"))
    if not expected.issuperset(loaded.arrays):
        unexpected = sorted(set(loaded.arrays) - expected)
        frozen = [name for name, own in zip(names, slots, strict=True) if not own]
        of_frozen = [name for name in frozen if f"momentum/{encoded(name)}" in unexpected]
        if of_frozen:
            raise ValueError(
                f"{loaded.where} holds the state of {brief_names(of_frozen)}, which are not trainable; expected "
                "trainable=True"
            )
        kinds = [key.partition("/")[0] for key in unexpected]
        raise ValueError(
            f"{loaded.where} holds {brief_names(unexpected)}{_asked_for(kinds, 'for which', 'is not set')}; expected "
            "an optimizer with the options that it was saved with"
        )
    return writes


def _asked_for(slots: Sequence[str], pronoun: str, what: str) -> str:
    """A clause that names the option of some slots, where there is one."""
    options = [f"`{_OPTION_OF[slot]}`" for slot in dict.fromkeys(slots) if slot in _OPTION_OF]
    return f", {pronoun} {' and '.join(options)} {what}" if options else ""


def _value_of_slot(loaded: Loaded, key: str, slot: str, name: str, array: Array) -> np.ndarray[Any, Any] | None:
    """What was saved of a slot; None where another library has saved nothing, and the slot stays as it was built."""
    value = loaded.arrays.get(key)
    if value is None:
        may_be_absent = loaded.partial or (slot == "master" and loaded.positional)
        if any(name in group["names"] and group["own"].get("trainable") is False for group in loaded.groups):
            raise ValueError(
                f"{loaded.where} holds no state of {brief(name)}, which was not trainable; expected a group with "
                "trainable=False"
            )
        if slot in ("momentum", "velocity") or not may_be_absent:
            raise ValueError(
                f"{loaded.where} lacks the {slot} of {brief(name)}{_asked_for([slot], 'which', 'asks for')}; expected "
                "an optimizer with the options that it was saved with"
            )
    elif not _fits(value, array):
        decisive = {"momentum": "moments", "velocity": "moments", "master": "master_weights"}.get(slot)
        hint = f" (on which `{decisive}` decides)" if decisive else ""
        _check_fits(f"{loaded.where}: {slot} of {brief(name)}{hint}", value, array)
    return value


def _write_of_variable(name: str, variable: Array, value: np.ndarray[Any, Any], where: str) -> list[Write]:
    _check_fits(f"{where}: {brief(name)}", value, variable)
    if arrays.is_mutable(variable):
        return [({name: variable}, name, value)]
    if arrays.as_numpy(variable).tobytes() != value.tobytes():
        raise TypeError(
            f"variable {brief(name)} is immutable and differs from what {where} holds; expected arrays made of "
            "`saved_variables(...)`"
        )
    return []


def _write(writes: Sequence[Write]) -> None:
    """Write into the arrays that can be written, all of them or none; others are replaced afterwards."""
    mutable: list[tuple[Array, Array]] = []
    replaced: list[Write] = []
    for own, key, value in writes:
        if arrays.is_mutable(own[key]):
            mutable.append((arrays.bits(own[key]), value))
        else:
            replaced.append((own, key, arrays.like(own[key], value)))
    arrays.write_all(mutable)
    for own, key, array in replaced:
        own[key] = array


def _set_counts(engine: Any, saved: Saved) -> None:
    engine.record.last, engine.record.skipped = None, saved.document["skipped_steps"]
    engine.extra = saved.document["extra"]
