"""Keras: its optimizers, and the files that its models are saved in."""

import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief, brief_names
from ..arrays.moments import SCALES
from ..arrays.tree import Container
from ..loss_scale import LossScaleOptimizer
from ..optimizer import AdamW
from ..saving.restore import Loaded
from ..saving.snapshot import inner_of, places_of
from ..saving.stores import hdf5
from ..saving.stores.atomic import CorruptFileError, naming, replacing
from ..saving.stores.targets import adapted
from ..saving.stores.zips import checked_members
from ..state import check_scalar
from .exact import Matrix, check_exact, exact
from .moments import wide

_GROUP = "optimizer"  # of HDF5, in a file of weights


def from_keras(
    source: Any,
    variables: Container | None = None,
    config: Mapping[str, Any] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
) -> AdamW | LossScaleOptimizer:
    """An optimizer with the arguments and the state of one of Keras.

    Parameters
    ----------
    source : path or keras.optimizers.Optimizer
        A ``.keras`` file, a ``.weights.h5`` file, or a built `AdamW` or `LossScaleOptimizer` of Keras.
    variables : container, optional
        What to build it on, **in the order of Keras's trainable variables**, since Keras saves no names. By default
        the first `build` takes the state.
    config : dict, optional
        Keras's ``optimizer.get_config()``: a ``.weights.h5`` file does not hold it.
    custom_objects : dict, optional
        Your own schedule classes and functions, by name.

    Returns
    -------
    AdamW or LossScaleOptimizer

    Raises
    ------
    CorruptFileError
        If the file cannot be read.
    ValueError
        If the config is missing, belongs to another optimizer, or does not fit the arrays.

    Notes
    -----
    Keras keeps the state of a 16-bit variable in 16 bits, which float32 holds exactly. The float32 master copy, which
    Keras does not have, starts from the variable.

    Examples
    --------
    >>> import numpy as np
    >>> state = {"0": np.int32(7), "1": np.float32(0.5), "2": np.ones(3, "f4"), "3": np.ones(3, "f4")}
    >>> optimizer = from_keras(state, {"w": np.zeros(3, np.float32)}, config=AdamW(0.5).get_config())
    >>> optimizer.iterations, optimizer.learning_rate
    (7, 0.5)
    """
    if isinstance(source, (str, os.PathLike)):
        found, state = _read_file(Path(source))
        config = found if config is None else config
    elif hasattr(source, "save_own_variables"):
        _check_class("source", source, ["AdamW", "LossScaleOptimizer"])
        store: dict[str, Any] = {}
        source.save_own_variables(store)
        state, config = _in_order(store, "the optimizer of Keras"), source.get_config() if config is None else config
    else:
        state = _in_order(adapted(source), "the mapping")
    if config is None:
        raise ValueError(
            f"{brief(source)} holds no config; expected `config`, what `optimizer.get_config()` of Keras returns"
        )
    scaled = "inner_optimizer" in config
    moments = (config["inner_optimizer"]["config"] if scaled else config).get("moments", "float32")
    if moments != "float32":  # of an `adamw_numba.keras.AdamW`: its state holds codes besides numbers
        raise ValueError(f"{brief(source)} has moments={moments!r}; expected 'float32', as Keras's AdamW has them")
    optimizer: Any = (LossScaleOptimizer if scaled else AdamW).from_config(config, custom_objects)
    _take(optimizer, state, str(source) if isinstance(source, (str, os.PathLike)) else "the state of Keras")
    if variables is not None:
        optimizer.build(variables)
    return optimizer  # type: ignore[no-any-return]


def to_keras(optimizer: AdamW | LossScaleOptimizer, target: Any, template: Any = None, durable: bool = True) -> None:
    """Give the state to Keras. The order of `build` must be that of Keras's trainable variables.

    Parameters
    ----------
    optimizer : AdamW or LossScaleOptimizer
    target : path, keras.optimizers.Optimizer or mapping
        A ``.weights.h5`` file to write, a built optimizer of Keras to fill, or a mapping for its `load_own_variables`.
    template : path, optional
        A ``.weights.h5`` file that Keras has saved: it is copied and the state of the optimizer replaced, so that
        ``model.load_weights`` takes all of it.
    durable : bool

    Raises
    ------
    ValueError
        If the state of a 16-bit variable is not exact in 16 bits, which is what Keras keeps, or Keras's optimizer has
        another number of arrays.

    Notes
    -----
    Keras keeps the learning rate in float32 and counts in int32. The arguments are those of `get_config`, which Keras
    accepts without ``nonfinite``, ``threads``, ``master_weights`` and the bounds of a loss scale.

    Examples
    --------
    >>> import numpy as np
    >>> store, optimizer = {}, AdamW()
    >>> optimizer.build([np.ones(2)])
    >>> to_keras(optimizer, store)
    >>> sorted(store)
    ['0', '1', '2', '3']
    """
    state = _state_of(optimizer)
    if isinstance(target, (str, os.PathLike)):
        _write_read_file(Path(target), state, template, durable)
        return
    if template is not None:
        raise ValueError(f"`template` is {brief(template)}; expected None where `target` is no path")
    if hasattr(target, "load_own_variables"):
        _check_fit(target, optimizer, state)
        target.load_own_variables({str(index): array for index, array in enumerate(state)})
        return
    store = adapted(target)
    for index, array in enumerate(state):
        store[str(index)] = array


def _read_file(path: Path) -> tuple[Any, list[Matrix]]:
    """The optimizer's config, where a file has it, and its arrays."""
    if path.name.endswith(".keras"):
        with naming(str(path)), zipfile.ZipFile(path) as archive:
            members = checked_members(archive, str(path))
            missing = {"config.json", "model.weights.h5"} - set(members)
            if missing:
                raise CorruptFileError(f"{path} lacks {sorted(missing)}; expected a model saved by Keras")
            compiled = json.loads(archive.read("config.json")).get("compile_config") or {}
            with archive.open("model.weights.h5") as file:
                return _config_of(compiled.get("optimizer"), path), _read_group(file, path)
    if not path.name.endswith(".h5"):
        raise ValueError(f"{brief(str(path))} has no suffix of Keras's; expected '.keras' or '.weights.h5'")
    with naming(str(path)), open(path, "rb") as file:
        return None, _read_group(file, path)


def _read_group(file: Any, path: Path) -> list[Matrix]:
    with hdf5.library().File(file, "r") as h5:
        name = f"{_GROUP}/vars"
        if name not in h5:
            raise CorruptFileError(f"{path} lacks {name!r}; expected the weights of a compiled Keras model")
        return _in_order(hdf5.Group(h5).below(name), str(path))


def _config_of(entry: Any, path: Path) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or entry.get("class_name", "").lower() not in ("adamw", "lossscaleoptimizer"):
        raise ValueError(f"{path} holds the optimizer {brief(entry)}; expected AdamW or LossScaleOptimizer")
    return dict(entry["config"])


def _in_order(store: Any, where: str) -> list[Matrix]:
    """Arrays under "0", "1", ...; bfloat16 as float32, which holds it exactly."""
    found = sorted(map(str, store.keys()))
    keys = [str(index) for index in range(len(found))]
    if found != sorted(keys):
        raise CorruptFileError(f"{where} holds the keys {brief_names(found)}; expected '0' to {str(len(keys) - 1)!r}")
    values = [np.asarray(store[key]) for key in keys]
    return [array.astype(np.float32) if array.dtype.name == "bfloat16" else array for array in values]


def _take(optimizer: Any, state: list[Matrix], where: str) -> None:
    """Give an optimizer the arrays of Keras: its scalars now, the others when it is built."""
    inner = inner_of(optimizer)
    scalars = [*([] if inner is optimizer else optimizer.scale_state.places()), *inner.engine.state.places()]
    blocks = _blocks(inner)
    per_variable = sum(map(len, blocks))
    count, rest = divmod(len(state) - len(scalars), per_variable)
    if rest or count < 1:
        raise ValueError(f"{where} holds {len(state)} arrays; the config asks for {len(scalars)} + n * {per_variable}")
    values = iter(state)
    for name, own, key in scalars:
        value = next(values)
        if value.shape or value.dtype.kind != own[key].dtype.kind:
            raise ValueError(f"{where}: {name!r} is {value.dtype} of shape {value.shape}; expected a scalar")
        check_scalar(key, value, where)
        own[key][...] = value
    found = {f"{key}/{index}": next(values) for block in blocks for index in range(count) for key in block}
    variables = [
        {"name": str(i), "dtype": None, "shape": list(found[f"momentum/{i}"].shape), "excluded": False}
        for i in range(count)
    ]
    inner.engine.loaded = Loaded(variables, found, where, positional=True)


def _blocks(optimizer: AdamW) -> list[list[str]]:
    """The slots in Keras's order: those of a block follow each other for each variable."""
    before = {"average": optimizer.use_ema, "gradient_accumulator": optimizer.gradient_accumulation_steps}
    blocks = [[key] for key, wanted in before.items() if wanted] + [["momentum", "velocity"]]
    return blocks + [["velocity_hat"]] * optimizer.amsgrad


def _state_of(optimizer: Any) -> list[Matrix]:
    """Copies of all arrays that Keras has too, in its order."""
    inner = inner_of(optimizer)
    engine = inner.engine
    with engine.lock:
        built = engine.require_built("to_keras")
        odd = [key for key in ("decouple_lr", "maximize", "nesterov") if getattr(inner, key)]
        odd += ["groups"] * ("overrides" in inner.get_config()) + ["epsilon_mode"] * (inner.epsilon_mode != "hat")
        if odd:
            raise ValueError(f"Keras's AdamW has no {brief_names(odd)}; expected an optimizer without")
        variables = dict(zip(built.names, built.variables, strict=True))
        places = places_of(optimizer)
        slots = {f"{key}/{name}": name for name, own in zip(built.names, built.slots, strict=True) for key in own}
        result = []
        for name, own, key in places:
            if key == "master" or key in SCALES:
                continue
            array = wide(variables[slots[name]], own)[key] if name in slots else own[key]
            result.append(exact(array, variables[slots[name]], name) if name in slots else _for_keras(array))
        return result


def _check_class(what: str, target: Any, kinds: Sequence[str]) -> None:
    names = [kind.__name__ for kind in type(target).__mro__]
    if not set(kinds) & set(names):
        raise ValueError(f"`{what}` is a {names[0]} of Keras; expected {' or '.join(kinds)}")


def _check_fit(target: Any, optimizer: Any, state: list[Matrix]) -> None:
    """Refuse a live optimizer of Keras that does not hold all of a state exactly, before it is given any of it."""
    _check_class("target", target, ["AdamW" if inner_of(optimizer) is optimizer else "LossScaleOptimizer"])
    if len(target.variables) != len(state):
        raise ValueError(f"`target` has {len(target.variables)} variables; expected {len(state)}, as `optimizer` has")
    for variable, array in zip(target.variables, state, strict=True):
        if tuple(variable.shape) != array.shape:
            raise ValueError(
                f"`target` does not fit `optimizer`: {brief(str(variable.path))} has shape {tuple(variable.shape)}; "
                f"expected {array.shape}"
            )
    for variable, array in zip(target.variables, state, strict=True):
        if array.ndim or array.dtype.kind != "f":  # of the learning rate Keras keeps float32: see the notes
            check_exact(array, str(variable.dtype), str(variable.path))


def _for_keras(array: Array) -> Matrix:
    """A counter in int32, as Keras counts, or the learning rate."""
    value = arrays.to_numpy(array)
    return value.astype(np.int32) if value.dtype == np.int64 and value < 2**31 else value


def _write_read_file(path: Path, state: list[Matrix], template: Any, durable: bool) -> None:
    if not path.name.endswith(".weights.h5"):
        raise ValueError(f"`target` is {brief(str(path))}; expected a path that ends in '.weights.h5'")
    h5py = hdf5.library()
    with replacing(path, durable) as temporary:
        if template is not None:
            shutil.copyfile(template, temporary)
            with naming(str(template)), h5py.File(temporary, "r"):
                pass
        with h5py.File(temporary, "w" if template is None else "r+") as file:
            if _GROUP in file:
                del file[_GROUP]
            group = file.create_group(f"{_GROUP}/vars")
            for index, array in enumerate(state):
                group[str(index)] = array
