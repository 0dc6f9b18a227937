"""State exchanged with Keras, torch and optax: moments, counters and hyperparameters, exactly or not at all."""

import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.tree import Container, flatten
from ..loss_scale import LossScaleOptimizer
from ..optimizer import AdamW
from ..saving.manifest import encoded
from ..saving.restore import Loaded
from ..saving.snapshot import inner_of
from ..saving.stores import hdf5
from ..saving.stores.atomic import CorruptFileError, naming, replacing
from ..saving.stores.targets import adapted
from ..saving.stores.zips import checked_members
from ..state import check_scalar

Matrix = np.ndarray[Any, Any]
_KERAS_GROUP = "optimizer"
_BESIDE_A_COUNT = ("hyperparams", "hyperparams_states", "inner_state")  # of optax.inject_hyperparams
_ELSEWHERE = ("clipnorm", "clipvalue", "global_clipnorm", "use_ema", "loss_scale_factor", "gradient_accumulation_steps")


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
        What to build it on, **in the order of Keras's trainable variables**: Keras saves no names. By default the first
        `build` takes the state.
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
        If the config is needed, or is that of another optimizer, or does not go with the arrays.

    Notes
    -----
    Keras keeps the state of a 16-bit variable in 16 bits: it is exact in float32; the float32 master copy,
    which Keras lacks, starts from the variable.

    Examples
    --------
    >>> import numpy as np
    >>> state = {"0": np.int32(7), "1": np.float32(0.5), "2": np.ones(3, "f4"), "3": np.ones(3, "f4")}
    >>> optimizer = from_keras(state, {"w": np.zeros(3, np.float32)}, config=AdamW(0.5).get_config())
    >>> optimizer.iterations, optimizer.learning_rate
    (7, 0.5)
    """
    if isinstance(source, (str, os.PathLike)):
        found, state = _keras_file(Path(source))
        config = found if config is None else config
    elif hasattr(source, "save_own_variables"):
        _check_class_of_keras("source", source, ["AdamW", "LossScaleOptimizer"])
        store: dict[str, Any] = {}
        source.save_own_variables(store)
        state, config = _in_order(store, "the optimizer of Keras"), source.get_config() if config is None else config
    else:
        state = _in_order(adapted(source), "the mapping")
    if config is None:
        raise ValueError(f"{source} holds no config; expected `config`, what `optimizer.get_config()` of Keras returns")
    scaled = "inner_optimizer" in config
    optimizer: Any = (LossScaleOptimizer if scaled else AdamW).from_config(config, custom_objects)
    _take_keras(optimizer, state, str(source) if isinstance(source, (str, os.PathLike)) else "the state of Keras")
    if variables is not None:
        optimizer.build(variables)
    return optimizer  # type: ignore[no-any-return]


def to_keras(optimizer: AdamW | LossScaleOptimizer, target: Any, template: Any = None, durable: bool = True) -> None:
    """Give the state to Keras, in the order of `build`, which must be that of Keras's trainable variables.

    Parameters
    ----------
    optimizer : AdamW or LossScaleOptimizer
    target : path, keras.optimizers.Optimizer or mapping
        A ``.weights.h5`` file to write, a built optimizer of Keras to fill, or a mapping for its `load_own_variables`.
    template : path, optional
        A ``.weights.h5`` file that Keras has saved: it is copied, with the state of the optimizer replaced, so that
        ``model.load_weights`` takes the whole.
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
    state = _keras_state(optimizer)
    if isinstance(target, (str, os.PathLike)):
        _write_keras_file(Path(target), state, template, durable)
        return
    if template is not None:
        raise ValueError(f"`template` is {template!r}; expected None where `target` is no path")
    if hasattr(target, "load_own_variables"):
        ready = _fitting_keras(target, optimizer, state)
        target.load_own_variables({str(index): array for index, array in enumerate(ready)})
        return
    store = adapted(target)
    for index, array in enumerate(state):
        store[str(index)] = array


def from_torch(state_dict: Mapping[str, Any], variables: Container | None = None, **options: Any) -> AdamW:
    """An optimizer with the hyperparameters and the state of `torch.optim.AdamW`.

    Parameters
    ----------
    state_dict : dict
        What ``torch_optimizer.state_dict()`` returned; load a file yourself, with ``weights_only=True``.
    variables : container, optional
        What to build it on, in the order of torch's parameter groups.
    **options
        Arguments of `AdamW` that torch lacks, ``clipvalue`` for example.

    Returns
    -------
    AdamW
        Parameters of groups without decay are excluded from it.

    Raises
    ------
    ValueError
        Where no exact conversion exists: groups that differ in more than their decay being 0, ``maximize``, parameters
        that have taken different numbers of steps.

    Notes
    -----
    torch adds ``eps`` after the bias correction: at update t it is ``epsilon = eps * sqrt(1 - beta_2**t)`` here. It is
    converted for the next update, which is exact; as t grows, the factor goes to 1 in torch and stays here.
    AMSGrad's maximum is that of the raw second moment in both.
    """
    groups, states = _parts_of_torch(state_dict)
    hyper = _common_group(groups)
    numbers = [number for group in groups for number in group["params"]]
    slots = {"momentum": "exp_avg", "velocity": "exp_avg_sq"}
    if hyper["amsgrad"]:
        slots["velocity_hat"] = "max_exp_avg_sq"
    _check_states_of_torch(states, numbers, ["step", *slots.values()])
    steps = {float(states[n]["step"]) if n in states else 0.0 for n in numbers}
    if len(steps) != 1:
        raise ValueError(f"`state_dict` has parameters after {sorted(steps)} steps; expected one number for all")
    updates = _checked_count(steps.pop(), "`state_dict`: 'step'")
    decays = [float(group["weight_decay"]) for group in groups for _ in group["params"]]
    excluded = [decay == 0 and any(decays) for decay in decays]
    moments = [{ours: states[n][theirs] for ours, theirs in slots.items()} if n in states else None for n in numbers]
    beta_1, beta_2 = map(float, hyper["betas"])
    given = {
        "learning_rate": float(hyper["lr"]),
        "weight_decay": max(decays, default=0.0),
        "beta_1": beta_1,
        "beta_2": beta_2,
        "epsilon": float(hyper["eps"]) * _epsilon_factor(beta_2, updates),
        "amsgrad": bool(hyper["amsgrad"]),
    }
    return _assembled(given | options, moments, excluded, updates, variables, "`state_dict`")


def to_torch(optimizer: AdamW, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """What `torch.optim.AdamW.load_state_dict` takes.

    Parameters
    ----------
    optimizer : AdamW
        Built.
    leave_out : list of str
        Options which torch's optimizer lacks, and which you do without or do yourself: ``"global_clipnorm"``, ...

    Returns
    -------
    dict
        torch tensors. One group of parameters; two, those with decay first, where some are excluded from it: build
        torch's optimizer with the same groups.

    Raises
    ------
    ValueError
        Where no exact conversion exists: an option that torch lacks, a window of accumulation that is not complete, a
        state that is not exact in a 16-bit parameter's dtype, which is what torch keeps.

    Notes
    -----
    ``eps`` is converted for the next update: see `from_torch`. A schedule becomes the learning rate of this moment.
    """
    import torch

    built = _exportable(optimizer, "torch", leave_out)
    updates, decay = optimizer.iterations, _rate_now(optimizer)
    whole = [True] if all(built.decayed) or not any(built.decayed) else [True, False]
    groups: list[list[int]] = [
        [i for i, d in enumerate(built.decayed) if len(whole) == 1 or d == kind] for kind in whole
    ]
    slots = {"momentum": "exp_avg", "velocity": "exp_avg_sq", "velocity_hat": "max_exp_avg_sq"}
    state: dict[int, dict[str, Any]] = {}
    number, described = 0, []
    for kind, indices in zip(whole, groups, strict=True):
        for offset, i in enumerate(indices if updates else []):
            own = {
                k: _exact(v, built.variables[i], f"{k} of {built.names[i]!r}")
                for k, v in built.slots[i].items()
                if k in slots
            }
            state[number + offset] = {slots[key]: torch.from_numpy(array) for key, array in own.items()}
            state[number + offset]["step"] = torch.tensor(float(updates))
        described.append(
            {
                "lr": optimizer.learning_rate,
                "betas": (optimizer.beta_1, optimizer.beta_2),
                "eps": optimizer.epsilon / _epsilon_factor(optimizer.beta_2, updates),
                "weight_decay": decay if kind and any(built.decayed) else 0.0,
                "amsgrad": optimizer.amsgrad,
                "maximize": False,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": None,
                "decoupled_weight_decay": True,
                "params": list(range(number, number + len(indices))),
            }
        )
        number += len(indices)
    return {"state": state, "param_groups": described}


def from_optax(
    state: Any, variables: Container | None = None, *, eps: float = 1e-8, eps_root: float = 0.0, **options: Any
) -> AdamW:
    """An optimizer with the state of `optax.adamw`, alone or inside a chain.

    Parameters
    ----------
    state : optax state
        With one ``ScaleByAdamState`` in it.
    variables : container, optional
        What to build it on, with the names, or in the order, of optax's parameters.
    eps, eps_root : float
        What `optax.adamw` was given: optax's state does not hold it.
    **options
        Arguments of `AdamW`, in its words; without them optax's defaults, not ours: ``learning_rate`` must be given.

    Returns
    -------
    AdamW

    Raises
    ------
    ValueError
        Where no exact conversion exists: an ``eps_root``, AMSGrad (whose maximum optax takes after the bias
        correction), a state with none or several of Adam's in it.

    Notes
    -----
    ``eps`` is torch's, and converted for the next update: see `from_torch`.
    """
    if "learning_rate" not in options:
        raise ValueError(
            "`learning_rate` is missing; expected what `optax.adamw` was given, which its state does not hold"
        )
    if eps_root:
        raise ValueError(f"`eps_root` is {eps_root}; expected 0: AdamW has nothing under the square root")
    adam = _adam_of_optax(state)
    names, first = flatten(adam.mu, "mu")
    second = dict(zip(*flatten(adam.nu, "nu"), strict=True))
    if sorted(second) != sorted(names):
        raise ValueError(f"`state` has mu of {names} and nu of {sorted(second)}; expected the same names")
    _check_second_moments({f"`state`: nu of {name!r}": array for name, array in second.items()})
    _check_window_of_optax(state)
    updates, options = _checked_count(adam.count, "`state`: 'count'"), {"weight_decay": 1e-4} | options
    moments = [{"momentum": m, "velocity": second[name]} for name, m in zip(names, first, strict=True)]
    beta_2 = options.get("beta_2", 0.999)
    given = options | {"epsilon": eps * _epsilon_factor(beta_2, updates)}
    positional = names == list(map(str, range(len(names))))
    return _assembled(
        given, moments, [False] * len(names), updates, variables, "`state`", None if positional else names
    )


def to_optax(optimizer: AdamW, state: Any, leave_out: Iterable[str] = ()) -> Any:
    """A state of optax, from ``transformation.init(parameters)``, with the moments and counts of an optimizer.

    Parameters
    ----------
    optimizer : AdamW
        Built, on parameters of the same names or order.
    state : optax state
        With one ``ScaleByAdamState`` in it, which says how the result is to look; it is left as it is.
    leave_out : list of str
        Options which a plain `optax.adamw` lacks: see `to_torch`.

    Returns
    -------
    optax state
        For ``optax.adamw(..., eps=optimizer.epsilon / sqrt(1 - beta_2**t))``, t being the next update.

    Raises
    ------
    ValueError
        Where no exact conversion exists: see `to_torch`, and AMSGrad.
    """
    built = _exportable(optimizer, "optax", leave_out, amsgrad=False)
    adam = _adam_of_optax(state)
    _check_window_of_optax(state)
    by_name = dict(zip(built.names, built.slots, strict=True))
    names = flatten(adam.mu, "mu")[0]
    if sorted(names) != sorted(built.names):
        positions = list(map(str, range(len(built.names))))
        if len(names) != len(built.names) or positions not in (names, built.names):
            raise ValueError(
                f"`state` has the parameters {names}; expected {built.names}, or a list on either side: by position"
            )
        by_name = dict(zip(names, built.slots, strict=True))

    def filled(tree: Any, slot: str) -> Any:
        leaves = flatten(tree, slot)[1]
        new = [_alike(leaf, by_name[n][slot], f"{slot} of {n!r}") for n, leaf in zip(names, leaves, strict=True)]
        return _rebuilt(tree, iter(new))

    new = adam._replace(
        count=_counted(adam.count, optimizer.iterations),
        mu=filled(adam.mu, "momentum"),
        nu=filled(adam.nu, "velocity"),
    )
    return _replaced(state, adam, new, optimizer.iterations)


def _keras_file(path: Path) -> tuple[Any, list[Matrix]]:
    """The optimizer's config, where a file has it, and its arrays."""
    if path.name.endswith(".keras"):
        with naming(str(path)), zipfile.ZipFile(path) as archive:
            members = checked_members(archive, str(path))
            missing = {"config.json", "model.weights.h5"} - set(members)
            if missing:
                raise CorruptFileError(f"{path} lacks {sorted(missing)}; expected a model saved by Keras")
            compiled = json.loads(archive.read("config.json")).get("compile_config") or {}
            with archive.open("model.weights.h5") as file:
                return _keras_config(compiled.get("optimizer"), path), _keras_group(file, path)
    if not path.name.endswith(".h5"):
        raise ValueError(f"{str(path)!r} has no suffix of Keras's; expected '.keras' or '.weights.h5'")
    with naming(str(path)), open(path, "rb") as file:
        return None, _keras_group(file, path)


def _keras_group(file: Any, path: Path) -> list[Matrix]:
    with hdf5.library().File(file, "r") as h5:
        name = f"{_KERAS_GROUP}/vars"
        if name not in h5:
            raise CorruptFileError(f"{path} lacks {name!r}; expected the weights of a compiled Keras model")
        return _in_order(hdf5.Group(h5).below(name), str(path))


def _keras_config(entry: Any, path: Path) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or entry.get("class_name", "").lower() not in ("adamw", "lossscaleoptimizer"):
        raise ValueError(f"{path} holds the optimizer {entry!r:.80}; expected AdamW or LossScaleOptimizer")
    return dict(entry["config"])


def _in_order(store: Any, where: str) -> list[Matrix]:
    """Arrays under "0", "1", ...; bfloat16 as float32, which holds it exactly."""
    keys = [str(index) for index in range(len(list(store.keys())))]
    if sorted(store.keys()) != sorted(keys):
        raise CorruptFileError(f"{where} holds the keys {sorted(store.keys())}; expected '0' to {len(keys) - 1!r}")
    found = [np.asarray(store[key]) for key in keys]
    return [array.astype(np.float32) if array.dtype.name == "bfloat16" else array for array in found]


def _take_keras(optimizer: Any, state: list[Matrix], where: str) -> None:
    """Give an optimizer the arrays of Keras: its scalars now, the others when it is built."""
    inner = inner_of(optimizer)
    scalars = [*([] if inner is optimizer else optimizer.scale_state.places()), *inner.engine.state.places()]
    # Keras's order of blocks; each but the moments is one array per variable.
    options = {"average": inner.use_ema, "gradient_accumulator": inner.gradient_accumulation_steps}
    before = [key for key, wanted in options.items() if wanted]
    per_variable = len(before) + 2 + bool(inner.amsgrad)
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
    found: dict[str, Matrix] = {}
    blocks = [[key] for key in before] + [["momentum", "velocity"]] + ([["velocity_hat"]] if inner.amsgrad else [])
    for block in blocks:
        found |= {f"{key}/{index}": next(values) for index in range(count) for key in block}
    variables = [
        {"name": str(i), "dtype": None, "shape": list(found[f"momentum/{i}"].shape), "excluded": False}
        for i in range(count)
    ]
    inner.engine.loaded = Loaded(variables, found, where, positional=True)


def _keras_state(optimizer: Any) -> list[Matrix]:
    inner = inner_of(optimizer)
    engine = inner.engine
    with engine.lock:
        built = engine.require_built("to_keras")
        variables = dict(zip(built.names, built.variables, strict=True))
        places = engine.places() if inner is optimizer else optimizer.places()
        slots = {f"{key}/{name}": name for name, own in zip(built.names, built.slots, strict=True) for key in own}
        result = []
        for name, own, key in places:
            if key == "master":
                continue
            array = own[key]
            result.append(_exact(array, variables[slots[name]], name) if name in slots else _for_keras(array))
        return result


def _check_class_of_keras(what: str, target: Any, kinds: Sequence[str]) -> None:
    names = [kind.__name__ for kind in type(target).__mro__]
    if not set(kinds) & set(names):
        raise ValueError(f"`{what}` is a {names[0]} of Keras; expected {' or '.join(kinds)}")


def _fitting_keras(target: Any, optimizer: Any, state: list[Matrix]) -> list[Matrix]:
    """The state in the dtypes of a live optimizer of Keras; nothing is given to it unless all of it fits."""
    _check_class_of_keras("target", target, ["AdamW" if inner_of(optimizer) is optimizer else "LossScaleOptimizer"])
    if len(target.variables) != len(state):
        raise ValueError(f"`target` has {len(target.variables)} variables; expected {len(state)}, as `optimizer` has")
    wrong = [
        f"{variable.path} has shape {tuple(variable.shape)}, not {array.shape}"
        for variable, array in zip(target.variables, state, strict=True)
        if tuple(variable.shape) != array.shape
    ]
    if wrong:
        raise ValueError(f"`target` does not fit `optimizer`: {'; '.join(wrong)}")
    for variable, array in zip(target.variables, state, strict=True):
        if array.ndim or array.dtype.kind != "f":  # of the learning rate Keras keeps float32: see the notes
            _check_exact(array, str(variable.dtype), str(variable.path))
    return state


def _for_keras(array: Array) -> Matrix:
    value = arrays.to_numpy(array)
    return value.astype(np.int32) if value.dtype == np.int64 and value < 2**31 else value


def _exact(array: Array, variable: Array, what: str) -> Matrix:
    """A slot as NumPy; refused where the variable's own dtype, in which others keep it, cannot hold it."""
    value = arrays.to_numpy(array)
    _check_exact(value, arrays.dtype_name(variable), what)
    return value


def _check_exact(value: Matrix, dtype: str, what: str) -> None:
    if value.dtype.name != dtype and not _holds(value, dtype):
        raise ValueError(
            f"{what} is {value.dtype} here, and would be rounded to {dtype}; expected numbers that {dtype} holds: "
            "there is no exact conversion"
        )


def _holds(value: Matrix, dtype: str) -> bool:
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":
            single = np.ascontiguousarray(value.astype(np.float32))
            return _holds(value, "float32") and not (single.view(np.uint32) & 0xFFFF).any()
        return bool(np.array_equal(value.astype(dtype).astype(value.dtype), value, equal_nan=value.dtype.kind in "fc"))


def _write_keras_file(path: Path, state: list[Matrix], template: Any, durable: bool) -> None:
    if not path.name.endswith(".weights.h5"):
        raise ValueError(f"`target` is {str(path)!r}; expected a path that ends in '.weights.h5'")
    h5py = hdf5.library()
    with replacing(path, durable) as temporary:
        if template is not None:
            shutil.copyfile(template, temporary)
            with naming(str(template)), h5py.File(temporary, "r"):
                pass
        with h5py.File(temporary, "w" if template is None else "r+") as file:
            if _KERAS_GROUP in file:
                del file[_KERAS_GROUP]
            group = file.create_group(f"{_KERAS_GROUP}/vars")
            for index, array in enumerate(state):
                group[str(index)] = array


def _parts_of_torch(state_dict: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], Mapping[Any, Any]]:
    """The groups and the states, if they are those of torch.optim.AdamW."""
    for key in ("param_groups", "state"):
        if key not in state_dict:
            raise ValueError(f"`state_dict` lacks {key!r}; expected what torch.optim.AdamW's state_dict() returns")
    groups = state_dict["param_groups"]
    if not groups:
        raise ValueError("`state_dict` has no 'param_groups'; expected one at least")
    for group in groups:
        lacking = [key for key in ("params", "lr", "betas", "eps", "weight_decay", "amsgrad") if key not in group]
        if lacking:
            raise ValueError(f"`state_dict` has a group without {lacking}; expected one of torch.optim.AdamW")
    return groups, state_dict["state"]


def _check_states_of_torch(states: Mapping[Any, Any], numbers: Sequence[Any], keys: Sequence[str]) -> None:
    if len(set(numbers)) < len(numbers) or not numbers:
        raise ValueError(f"`state_dict` has the parameters {numbers}; expected some, each of them once")
    for number in numbers:
        own = states.get(number)
        lacking = [key for key in keys if key not in own] if own is not None else []
        if lacking:
            raise ValueError(f"`state_dict`: the state of parameter {number} lacks {lacking}; expected AdamW's")
    _check_second_moments(
        {f"`state_dict`: {key!r} of parameter {n}": states[n][key] for n in numbers if n in states for key in keys[2:]}
    )


def _check_second_moments(named: Mapping[str, Array]) -> None:
    """Refuse sums of squares that are below 0; of complex numbers torch keeps them part by part."""
    for what, array in named.items():
        value = arrays.to_numpy(array)
        if value.dtype.kind != "c" and (value < 0).any():
            raise ValueError(f"{what} holds {value.min()}; expected squares, which are >= 0")


def _checked_count(value: Any, what: str) -> int:
    count = float(value)
    if not (0 <= count < 2**53 and count == int(count)):
        raise ValueError(f"{what} is {count}; expected a whole number >= 0")
    return int(count)


def _common_group(groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The hyperparameters of all groups, which may differ in their decay being 0."""
    first = groups[0]
    for group in groups:
        if group.get("maximize"):
            raise ValueError("`state_dict` has maximize=True; expected False: negate the gradients instead")
        if not group.get("decoupled_weight_decay", True):
            raise ValueError("`state_dict` is that of Adam with coupled weight decay; expected torch.optim.AdamW's")
        for key in ("lr", "betas", "eps", "amsgrad"):
            if group[key] != first[key]:
                raise ValueError(
                    f"`state_dict` has groups with {key}={first[key]} and {group[key]}; expected one for all"
                )
    decays = {float(group["weight_decay"]) for group in groups}
    if len(decays - {0.0}) > 1:
        raise ValueError(f"`state_dict` has groups with weight_decay in {sorted(decays)}; expected one besides 0")
    return first


def _epsilon_factor(beta_2: float, updates: int) -> float:
    """What torch's eps is multiplied with at the next update to be the epsilon of Keras."""
    return math.sqrt(-math.expm1((updates + 1) * math.log(beta_2))) if beta_2 else 1.0


def _assembled(
    options: Mapping[str, Any],
    moments: Sequence[Mapping[str, Any] | None],
    excluded: Sequence[bool],
    updates: int,
    variables: Container | None,
    where: str,
    names: Sequence[str] | None = None,
) -> AdamW:
    """An optimizer whose state is that of another library, as far as that goes."""
    optimizer = AdamW(**options)
    named = list(map(str, range(len(moments)))) if names is None else list(names)
    if any(moment is None for moment in moments):
        if variables is None:
            raise ValueError(f"{where} holds no moments yet; expected `variables`")
        optimizer.exclude_from_weight_decay([v for v, e in zip(flatten(variables)[1], excluded, strict=True) if e])
        optimizer.build(variables)
        return optimizer
    found = {
        f"{key}/{encoded(name)}": _moment(array)
        for name, moment in zip(named, moments, strict=True)
        for key, array in (moment or {}).items()
    }
    described = [
        {"name": n, "dtype": None, "shape": list(found[f"momentum/{encoded(n)}"].shape), "excluded": bool(e)}
        for n, e in zip(named, excluded, strict=True)
    ]
    state = optimizer.engine.state.scalars["iteration"]
    state[...] = updates * (optimizer.gradient_accumulation_steps or 1)
    optimizer.engine.loaded = Loaded(described, found, where, positional=names is None, partial=True)
    if variables is not None:
        optimizer.build(variables)
    return optimizer


def _moment(array: Array) -> Matrix:
    value = arrays.to_numpy(array)
    return value.astype(np.float32) if value.dtype.name in ("bfloat16", "float16") else value


def _exportable(optimizer: AdamW, library: str, leave_out: Iterable[str], amsgrad: bool = True) -> Any:
    """What is built, if the other library can go on with it."""
    if not isinstance(optimizer, AdamW):
        raise TypeError(
            f"`optimizer` is a {type(optimizer).__name__}; expected an AdamW, `inner_optimizer` for example"
        )
    built = optimizer.engine.require_built(f"to_{library}")
    left_out = set(leave_out)
    lacking = [key for key in _ELSEWHERE if getattr(optimizer, key) and key not in left_out]
    if lacking:
        raise ValueError(f"{library}'s AdamW has no {lacking}; expected them in `leave_out`, if you do without")
    if optimizer.amsgrad and not amsgrad:
        raise ValueError(
            f"amsgrad=True: {library} takes the maximum after the bias correction; no exact conversion exists"
        )
    window = optimizer.gradient_accumulation_steps or 1
    if int(optimizer.engine.state.scalars["iteration"]) % window:
        raise ValueError(f"the optimizer is inside a window of {window} accumulated gradients; expected its end")
    return built


def _rate_now(optimizer: AdamW) -> float:
    return float(optimizer.engine.rates_now()[1])


def _adam_of_optax(state: Any) -> Any:
    found = list(_adams(state))
    if len(found) != 1:
        raise ValueError(f"`state` holds {len(found)} states of Adam; expected one, of `optax.adamw`")
    if hasattr(found[0], "nu_max"):
        raise ValueError(
            "`state` is of AMSGrad, whose maximum optax takes after the bias correction; no exact conversion"
        )
    return found[0]


def _adams(state: Any) -> Iterable[Any]:
    if {"count", "mu", "nu"} <= set(getattr(state, "_fields", ())):
        yield state
    elif isinstance(state, (tuple, list)):
        for child in state:
            yield from _adams(child)


def _replaced(state: Any, old: Any, new: Any, count: int) -> Any:
    """The same state with another Adam in it; the counts of schedules follow."""
    if state is old:
        return new
    fields: Sequence[str] = getattr(state, "_fields", ())
    counters = [key for key in fields if _is_counter(state, key)]
    if counters:
        others = {k: _replaced(getattr(state, k), old, new, count) for k in fields if k not in (*counters, "mini_step")}
        return state._replace(**{key: _counted(getattr(state, key), count) for key in counters}, **others)
    if isinstance(state, (tuple, list)):
        children = [_replaced(child, old, new, count) for child in state]
        return type(state)(*children) if hasattr(state, "_fields") else type(state)(children)
    if isinstance(state, dict):
        return {key: _replaced(child, old, new, count) for key, child in state.items()}
    return state


def _is_counter(state: Any, key: str) -> bool:
    """Whether a field counts updates; a counter whose meaning is not known, and would stay behind, is refused."""
    value = getattr(state, key)
    if key == "mini_step" or getattr(value, "shape", None) != () or np.asarray(value).dtype.kind not in "iu":
        return False
    if key != "gradient_step" and not (key == "count" and set(state._fields) <= {"count", *_BESIDE_A_COUNT}):
        raise ValueError(
            f"`state` holds a {type(state).__name__} with the counter {key!r}, which AdamW knows nothing of; expected "
            "the state inside: put what `to_optax` makes of it in its place"
        )
    return True


def _check_window_of_optax(state: Any) -> None:
    """Refuse a state inside a window of optax.MultiSteps, whose gradients have nowhere to go."""
    if hasattr(state, "mini_step") and int(state.mini_step):
        raise ValueError(
            f"`state` is at mini_step {int(state.mini_step)} of optax.MultiSteps; expected 0: after a whole window"
        )
    if isinstance(state, (tuple, list)):
        for child in state:
            _check_window_of_optax(child)


def _counted(like: Any, count: int) -> Any:
    return arrays.like(like, np.asarray(count, np.int64)) if not isinstance(like, int) else count


def _alike(leaf: Array, value: Array, what: str) -> Array:
    if tuple(leaf.shape) != tuple(value.shape):
        raise ValueError(f"`state`: {what} has shape {tuple(leaf.shape)}; expected {tuple(value.shape)}")
    return arrays.like(leaf, _exact(value, leaf, what))


def _rebuilt(tree: Any, leaves: Any) -> Any:
    """A tree of optax's with other leaves, of the same types."""
    if arrays.is_array(tree):
        return next(leaves)
    if isinstance(tree, Mapping):
        return type(tree)({key: _rebuilt(child, leaves) for key, child in tree.items()})  # type: ignore[call-arg]
    children = [_rebuilt(child, leaves) for child in tree]
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
