"""What is saved of an optimizer: named arrays, and one document about them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from . import archive, manifest, overrides
from .manifest import encoded

Place = tuple[dict[str, Array], str]
_MOST_BITS = 14_000  # Python writes and reads integers of up to 4300 digits


class Snapshot(NamedTuple):
    """What is about to be written.

    Attributes
    ----------
    document : dict
        What JSON holds.
    arrays : dict
        ``momentum/<name>`` and so on, as NumPy sees them; bfloat16 as its bits.
    dtypes : dict
        The names of their dtypes.
    """

    document: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]
    dtypes: dict[str, str]


def save(optimizer: Any, target: Any, extra: Any, variables: bool, durable: bool) -> None:
    """Write an optimizer's state, while no step can change it."""
    with engine_of(optimizer).lock:
        archive.write(target, *take(optimizer, extra, variables), durable)


def take(optimizer: Any, extra: Any = None, variables: bool = False, copy: bool = False) -> Snapshot:
    """The document and the arrays of an optimizer; the arrays live, or copies."""
    engine = engine_of(optimizer)
    _check_extra(extra)
    with engine.lock:
        workspace = engine.require_built("save")
        engine.check_not_swapped()
        engine.catch_up()
        live = _live(optimizer, workspace, variables)
        dtypes = {key: arrays.dtype_name(array) for key, array in live.items()} | _bfloat_moments(workspace)
        odd = {key: dtype for key, dtype in dtypes.items() if dtype not in manifest.DTYPES}
        if odd:
            raise TypeError(
                f"these arrays of the state cannot be saved: {brief(odd)}; expected {', '.join(manifest.DTYPES)}"
            )
        ready = {key: arrays.as_numpy(array) for key, array in live.items()}
        document = _document(optimizer, workspace, extra)
        return Snapshot(document, {k: a.copy() for k, a in ready.items()} if copy else ready, dtypes)


def of_no_variable(optimizer: Any) -> Snapshot:
    """The document, and copies of the arrays that belong to no variable alone."""
    engine = engine_of(optimizer)
    with engine.lock:
        engine.check_not_swapped()
        engine.catch_up()
        live = {key: own[name] for key, (own, name) in scalars_of(optimizer).items()}
        dtypes = {key: arrays.dtype_name(array) for key, array in live.items()}
        ready = {key: arrays.as_numpy(array).copy() for key, array in live.items()}
        return Snapshot(_document(optimizer, engine.workspace, None), ready, dtypes)


def key_of(slot: str, name: str) -> str:
    """The key of an array of the state of a variable."""
    return f"{slot}/{encoded(name)}"


def _live(optimizer: Any, workspace: Any, variables: bool) -> dict[str, Array]:
    """Every array to be saved, by the key that it has in a file."""
    live = {key: own[name] for key, (own, name) in scalars_of(optimizer).items()}
    for name, variable, own in zip(workspace.names, workspace.variables, workspace.slots, strict=True):
        for slot, array in own.items():
            live[key_of(slot, name)] = array
        if variables:
            live[key_of("variables", name)] = variable
    return live


def _bfloat_moments(workspace: Any) -> dict[str, str]:
    """The dtypes of moments that NumPy keeps as the bits of bfloat16."""
    of_each = zip(workspace.names, workspace.variables, workspace.slots, strict=True)
    return {
        key_of(slot, name): "bfloat16"
        for name, variable, own in of_each
        for slot in ("momentum", "velocity")
        if slot in own and (arrays.dtype_name(own[slot]), arrays.is_complex(variable)) == ("uint16", False)
    }


def scalars_of(optimizer: Any) -> dict[str, Place]:
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


def _document(optimizer: Any, workspace: Any, extra: Any) -> dict[str, Any]:
    engine = engine_of(optimizer)
    groups = engine.hyper.groups
    excluded = [groups[k].own is not None and groups[k].own.get("weight_decay") == 0 for k in workspace.which]
    described = zip(workspace.names, workspace.variables, excluded, strict=True)
    has_groups = bool(overrides.config_of(engine.hyper)) or any(group.started for group in groups)
    return {
        "class": "AdamW" if inner_of(optimizer) is optimizer else "LossScaleOptimizer",
        "config": optimizer.get_config(),
        "step": int(engine.state.scalars["iteration"]),
        "skipped_steps": engine.record.skipped,
        "extra": extra,
        "variables": [
            {"name": name, "dtype": arrays.dtype_name(v), "shape": [int(s) for s in v.shape], "excluded": out}
            for name, v, out in described
        ],
        **({"groups": overrides.described(groups[1:])} if has_groups else {}),
        "added": [[name, bool(late)] for late, own in enumerate(engine.state.added) for name in own],
    }


def inner_of(optimizer: Any) -> Any:
    """The AdamW itself, or the one inside a loss scale."""
    return vars(optimizer).get("inner_optimizer", optimizer)


def engine_of(optimizer: Any) -> Any:
    """The engine of an AdamW, or of the one inside a loss scale."""
    return inner_of(optimizer).engine


def places_of(optimizer: Any) -> Any:
    """Where every array of an optimizer's state is kept, in Keras's order; those of a loss scale first."""
    return engine_of(optimizer).places() if inner_of(optimizer) is optimizer else optimizer.places()


def _check_extra(extra: Any) -> None:
    try:
        check_json(extra, "extra")
    except RecursionError:
        raise ValueError("`extra` is nested too deeply, or holds itself; expected what JSON can hold") from None


def check_json(value: Any, what: str) -> None:
    """Refuse what would come back from JSON as something else, except for a tuple, which comes back as a list.

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
                raise TypeError(
                    f"`{_ends(what)}` has the key {brief(key)}; expected strings, which is what JSON gives back"
                )
            check_json(child, f"{what}[{brief(key)}]")
    elif type(value) in (list, tuple):
        for index, child in enumerate(value):
            check_json(child, f"{what}[{index}]")
    elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"`{_ends(what)}` is an integer of {value.bit_length()} bits; expected at most {_MOST_BITS}")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        hint = ": pass `.tolist()`" if hasattr(value, "tolist") else ""
        raise TypeError(
            f"`{_ends(what)}` is {brief(value)} of type {type(value).__name__}; expected what JSON can hold{hint}"
        )


def _ends(path: str) -> str:
    """A path, of which the middle is left out where it is long."""
    return path if len(path) <= 200 else f"{path[:100]}...{path[-100:]}"
