"""An optimizer's state as named arrays and one document: saved, loaded into a new one, restored."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..state import check_scalar
from . import manifest
from .manifest import Saved, encoded
from .stores.atomic import CorruptFileError

Place = tuple[dict[str, Array], str]
_OF_A_VARIABLE = ("variables", "momentum", "velocity", "velocity_hat", "average", "gradient_accumulator", "master")
_MOST_BITS = 14_000  # Python writes and reads integers of up to 4300 digits
_UNUSABLE = (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError)
_FREE = ("name", "threads", "learning_rate")  # what may differ without a word; a learning rate is in the state


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

    def excluded(self, names: Sequence[str], variables: Sequence[Array]) -> frozenset[str]:
        """Which of the variables to build are excluded from weight decay, as they were when they were saved."""
        order = _matched(self, names, variables)
        return frozenset(name for name, index in zip(names, order, strict=True) if self.variables[index]["excluded"])

    def fill(self, names: Sequence[str], variables: Sequence[Array], slots: Sequence[dict[str, Array]]) -> None:
        """Put the state into the slots of variables, and what it holds of the variables into them: all or nothing."""
        _write(_writes(self, names, variables, slots))


class Snapshot(NamedTuple):
    """What is about to be written."""

    document: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]
    dtypes: dict[str, str]


def save(optimizer: Any, target: Any, extra: Any, variables: bool, durable: bool) -> None:
    """Write an optimizer's state, while no step can change it."""
    with engine_of(optimizer).lock:
        manifest.write(target, *snapshot(optimizer, extra, variables), durable)


def snapshot(optimizer: Any, extra: Any = None, variables: bool = False, copy: bool = False) -> Snapshot:
    """The document and the arrays of an optimizer; the arrays live, or copies."""
    engine = engine_of(optimizer)
    try:
        check_json(extra, "extra")
    except RecursionError:
        raise ValueError("`extra` is nested too deep, or holds itself; expected what JSON can hold") from None
    with engine.lock:
        built = engine.require_built("save")
        engine.check_not_swapped()
        engine.catch_up()
        live = {key: own[name] for key, (own, name) in _scalars(optimizer).items()}
        for name, variable, own in zip(built.names, built.variables, built.slots, strict=True):
            live |= {f"{key}/{encoded(name)}": array for key, array in own.items()}
            if variables:
                live[f"variables/{encoded(name)}"] = variable
        dtypes = {key: arrays.dtype_name(array) for key, array in live.items()}
        odd = {key: dtype for key, dtype in dtypes.items() if dtype not in manifest.DTYPES}
        if odd:
            raise TypeError(f"these arrays of the state cannot be saved: {odd}; expected {', '.join(manifest.DTYPES)}")
        ready = {key: arrays.as_numpy(array) for key, array in live.items()}
        document = _document(optimizer, built, extra)
        return Snapshot(document, {k: a.copy() for k, a in ready.items()} if copy else ready, dtypes)


def load(cls: Any, target: Any, variables: Any, custom_objects: Mapping[str, Any] | None) -> Any:
    """A new optimizer from a file; its state goes into the variables given, or into those of the first `build`."""
    saved = manifest.read(target)
    _check_class(cls.__mro__, saved)
    try:
        optimizer = cls.from_config(saved.document["config"], custom_objects)
    except _UNUSABLE as error:
        raise ValueError(f"{saved.where} holds a config that cannot be used: {error}") from error
    engine = engine_of(optimizer)
    _add_arrays(engine, saved)
    _write(_scalar_writes(optimizer, saved))
    engine.loaded = Loaded(saved.document["variables"], _of_variables(saved), saved.where)
    _set_counts(engine, saved)
    if variables is not None:
        optimizer.build(variables)
    return optimizer


def _add_arrays(engine: Any, saved: Saved) -> None:
    """Make the arrays that the user has added: of the dtype that they had, bfloat16 as such."""
    for name, late in saved.document["added"]:
        try:
            key = f"added/{encoded(name)}"
            if key in saved.arrays:
                dtype = _numpy_dtype(saved.document["arrays"][key]["dtype"], f"{saved.where}: {key!r}")
                engine.state.add(name, np.zeros(saved.arrays[key].shape, dtype), "zeros", late)
        except ValueError as error:
            raise CorruptFileError(f"{saved.where} holds an added variable that cannot be: {error}") from error


def _numpy_dtype(name: str, what: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError(f"{what} is bfloat16, which NumPy has from the package ml_dtypes: install it") from None
    return ml_dtypes.bfloat16


def restore(optimizer: Any, target: Any) -> Any:
    """Put a saved state into a built optimizer, all or nothing; what the user's own payload was."""
    engine = engine_of(optimizer)
    with engine.lock:
        built = engine.require_built("restore")
        engine.check_not_swapped()
        engine.catch_up()
        saved = manifest.read(target)
        _check_class(type(optimizer).__mro__, saved)
        loaded = Loaded(saved.document["variables"], _of_variables(saved), saved.where)
        writes = _scalar_writes(optimizer, saved)
        writes += _writes(loaded, built.names, built.variables, built.slots)
        _warn_of_differences(optimizer, built, saved)
        _write(writes)
        _set_counts(engine, saved)
        return engine.extra


def saved_variables(target: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The variables that were saved with ``variables=True``, for arrays that cannot be written into, as JAX's.

    Parameters
    ----------
    target : path, URL or mapping

    Returns
    -------
    dict
        NumPy arrays by name, in the order of `build`; bfloat16 as float32, which holds it exactly.

    Raises
    ------
    ValueError
        If there are none.

    Examples
    --------
    >>> from adamw_numba import AdamW, saved_variables
    >>> store, optimizer = {}, AdamW()
    >>> optimizer.build({"w": np.ones(2)})
    >>> optimizer.save(store, variables=True)
    >>> saved_variables(store)
    {'w': array([1., 1.])}
    """
    saved = manifest.read(target)
    named = {entry["name"]: f"variables/{encoded(entry['name'])}" for entry in saved.document["variables"]}
    if not named or any(key not in saved.arrays for key in named.values()):
        raise ValueError(f"{saved.where} holds no variables; expected them to be saved with `variables=True`")
    return {name: numbers(saved.arrays[key], saved.document["arrays"][key]["dtype"]) for name, key in named.items()}


def inner_of(optimizer: Any) -> Any:
    """The AdamW itself, or the one inside a loss scale."""
    return vars(optimizer).get("inner_optimizer", optimizer)


def engine_of(optimizer: Any) -> Any:
    """The engine of an AdamW, or of the one inside a loss scale."""
    return inner_of(optimizer).engine


def check_json(value: Any, what: str) -> None:
    """Refuse what would come back from JSON as something else (but a tuple, which comes back as a list).

    Raises
    ------
    TypeError
        The message says where the value stands.
    ValueError
        If an integer is too large to be written.
    """
    if isinstance(value, Mapping) and type(value) is dict:
        for key, child in value.items():
            if type(key) is not str:
                raise TypeError(f"`{what}` has the key {key!r}; expected strings, which is what JSON gives back")
            check_json(child, f"{what}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, child in enumerate(value):
            check_json(child, f"{what}[{index}]")
    elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"`{what}` is an integer of {value.bit_length()} bits; expected at most {_MOST_BITS}")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        hint = ": pass `.tolist()`" if hasattr(value, "tolist") else ""
        raise TypeError(f"`{what}` is {value!r:.80} of type {type(value).__name__}; expected what JSON can hold{hint}")


def _document(optimizer: Any, built: Any, extra: Any) -> dict[str, Any]:
    described = [
        {"name": name, "dtype": arrays.dtype_name(v), "shape": [int(s) for s in v.shape], "excluded": not decayed}
        for name, v, decayed in zip(built.names, built.variables, built.decayed, strict=True)
    ]
    engine = engine_of(optimizer)
    added = [[name, late] for late, own in enumerate(engine.state.added) for name in own]
    return {
        "class": "AdamW" if inner_of(optimizer) is optimizer else "LossScaleOptimizer",
        "config": optimizer.get_config(),
        "step": int(engine.state.scalars["iteration"]),
        "skipped_steps": engine.record.skipped,
        "extra": extra,
        "variables": described,
        "added": [[name, bool(late)] for name, late in added],
    }


def _scalars(optimizer: Any) -> dict[str, Place]:
    """What belongs to no variable: counters, the learning rate, the loss scale, arrays that the user has added."""
    state = engine_of(optimizer).state
    places: dict[str, Place] = {}
    if inner_of(optimizer) is not optimizer:
        scalars = optimizer.scale_state.scalars
        places |= {f"loss_scale/{key}": (scalars, key) for key in scalars}
    places |= {key: (state.scalars, key) for key in state.scalars}
    for own in state.added:
        places |= {f"added/{encoded(name)}": (own, name) for name in own}
    return places


def _of_variables(saved: Saved) -> dict[str, np.ndarray[Any, Any]]:
    return {key: array for key, array in saved.arrays.items() if key.partition("/")[0] in _OF_A_VARIABLE}


def _check_class(kinds: Sequence[type], saved: Saved) -> None:
    if saved.document["class"] not in [kind.__name__ for kind in kinds]:
        raise ValueError(f"{saved.where} holds a {saved.document['class']}; expected one of {kinds[0].__name__}")


def _scalar_writes(optimizer: Any, saved: Saved) -> list[tuple[dict[str, Array], str, Array]]:
    places = _scalars(optimizer)
    found = {key for key in saved.arrays if key.partition("/")[0] not in _OF_A_VARIABLE}
    if found != set(places):
        hint = ""
        if "learning_rate" in found ^ set(places):
            hint = "; a learning rate that is a number is part of the state: assign a schedule after `restore`"
        raise ValueError(
            f"{saved.where} holds {sorted(found - set(places))} which the optimizer has not, and lacks "
            f"{sorted(set(places) - found)}{hint}"
        )
    for key, (own, name) in places.items():
        _check_fits(f"{saved.where}: {key!r}", saved.arrays[key], own[name])
        was, here = saved.document["arrays"][key]["dtype"], arrays.dtype_name(own[name])
        if was != here:
            raise ValueError(f"{saved.where}: {key!r} is {was}; the optimizer has {here}")
        if "/" not in key or key.startswith("loss_scale/"):
            check_scalar(name, saved.arrays[key], saved.where)
    if int(saved.arrays["iteration"]) != saved.document["step"]:
        raise CorruptFileError(
            f"{saved.where} is of step {saved.document['step']} and holds 'iteration' {saved.arrays['iteration']}; "
            "expected the same number"
        )
    return [(own, name, saved.arrays[key]) for key, (own, name) in places.items()]


def _check_fits(what: str, value: np.ndarray[Any, Any], array: Array) -> None:
    here = (manifest.DTYPES.get(arrays.dtype_name(array)), tuple(array.shape))
    if (value.dtype, value.shape) != here:
        raise ValueError(f"{what} is {value.dtype} of shape {value.shape}; the optimizer has {here[0]} of {here[1]}")


def _matched(loaded: Loaded, names: Sequence[str], variables: Sequence[Array]) -> list[int]:
    """Which saved variable each of these is; every name, shape and dtype that differs is told."""
    saved = [entry["name"] for entry in loaded.variables]
    if loaded.positional and len(saved) == len(names):
        order = list(range(len(names)))
    elif loaded.positional:
        raise ValueError(f"{loaded.where} holds {len(saved)} variables; expected {len(names)}: {list(names)}")
    else:
        missing, unknown = ([n for n in one if n not in other] for one, other in ((names, saved), (saved, names)))
        if missing or unknown:
            raise ValueError(
                f"{loaded.where} lacks the variables {missing} and holds {unknown}; expected {list(names)}"
            )
        where = {name: index for index, name in enumerate(saved)}
        order = [where[name] for name in names]
    wrong = []
    for name, variable, index in zip(names, variables, order, strict=True):
        entry = loaded.variables[index]
        here = (arrays.dtype_name(variable), tuple(variable.shape))
        there = (entry["dtype"] or here[0], tuple(entry["shape"]))  # other libraries do not say
        if there != here:
            wrong.append(f"{name!r} was {there[0]} of shape {there[1]} and is {here[0]} of shape {here[1]}")
    if wrong:
        raise ValueError(f"{loaded.where} does not fit the variables: {'; '.join(wrong)}")
    return order


def _writes(
    loaded: Loaded, names: Sequence[str], variables: Sequence[Array], slots: Sequence[dict[str, Array]]
) -> list[tuple[dict[str, Array], str, Array]]:
    writes: list[tuple[dict[str, Array], str, Array]] = []
    expected = set()
    for name, variable, own, index in zip(names, variables, slots, _matched(loaded, names, variables), strict=True):
        saved = encoded(loaded.variables[index]["name"])
        for key, array in own.items():
            value = loaded.arrays.get(f"{key}/{saved}")
            foreign = loaded.partial or (key == "master" and loaded.positional)
            if value is None and not (foreign and key not in ("momentum", "velocity")):
                raise ValueError(f"{loaded.where} lacks the {key} of {name!r}; expected what the options ask for")
            if value is not None:
                _check_fits(f"{loaded.where}: {key} of {name!r}", value, array)
                writes.append((own, key, value))
            expected.add(f"{key}/{saved}")
        value = loaded.arrays.get(f"variables/{saved}")
        if value is not None:
            _check_fits(f"{loaded.where}: {name!r}", value, variable)
            writes += _write_of_variable(name, variable, value, loaded.where)
            expected.add(f"variables/{saved}")
    if set(loaded.arrays) - expected:
        raise ValueError(f"{loaded.where} holds {sorted(set(loaded.arrays) - expected)}, which no option asks for")
    return writes


def _write_of_variable(
    name: str, variable: Array, value: np.ndarray[Any, Any], where: str
) -> list[tuple[dict[str, Array], str, Array]]:
    if arrays.is_mutable(variable):
        return [({name: variable}, name, value)]
    if arrays.as_numpy(variable).tobytes() != value.tobytes():
        raise TypeError(
            f"variable {name!r} is immutable and differs from what {where} holds; expected arrays made of "
            "`saved_variables(...)`"
        )
    return []


def _write(writes: Sequence[tuple[dict[str, Array], str, Array]]) -> None:
    new = [(own, key, arrays.like(own[key], value)) for own, key, value in writes if not arrays.is_mutable(own[key])]
    arrays.write_all([(arrays.bits(own[key]), value) for own, key, value in writes if arrays.is_mutable(own[key])])
    for own, key, array in new:
        own[key] = array


def _set_counts(engine: Any, saved: Saved) -> None:
    engine.record.last, engine.record.skipped = None, saved.document["skipped_steps"]
    engine.extra = saved.document["extra"]


def _warn_of_differences(optimizer: Any, built: Any, saved: Saved) -> None:
    here, there = _flat(optimizer.get_config()), _flat_saved(saved)
    different = [key for key in here if key in there and here[key] != there[key] and key not in _FREE]
    if "learning_rate" not in engine_of(optimizer).state.scalars and here["learning_rate"] != there.get(
        "learning_rate"
    ):
        different.append("learning_rate")
    told = [f"{key} is {here[key]!r}, and was {there.get(key)!r}" for key in different]
    excluded = {entry["name"]: entry["excluded"] for entry in saved.document["variables"]}
    changed = [n for n, decayed in zip(built.names, built.decayed, strict=True) if decayed == excluded[n]]
    if changed:
        told.append(f"{changed} are excluded from weight decay in one of them alone")
    if told:
        warnings.warn(f"restored from {saved.where} into an optimizer that differs: {'; '.join(told)}", stacklevel=4)


def _flat_saved(saved: Saved) -> dict[str, Any]:
    try:
        return _flat(saved.document["config"])
    except _UNUSABLE as error:
        raise ValueError(f"{saved.where} holds a config that cannot be used: {error!r}") from error


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it comes back from JSON, that of an inner optimizer beside that of the outer."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=manifest.plain))
    inner: dict[str, Any] = plain.pop("inner_optimizer", {"config": {}})
    plain.update(inner["config"])
    return plain


def numbers(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The numbers that saved bits stand for: bfloat16 as float32, which holds it exactly."""
    if dtype != "bfloat16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)
