"""The options of `minimize`: what each may be, and what it is by default."""

import inspect
import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from ..arrays.brief import brief
from ..hyperparameters import table as hp
from ..optimizer import HYPERPARAMETERS, SYNONYMS

Settings = dict[str, Any]
_warned: set[str] = set()

_tolerance = hp.real("a float >= 0, or None", lambda value: value >= 0, optional=True)
_seconds = hp.real("a number of seconds > 0, or None", lambda value: value > 0, optional=True)


def _count(least: int) -> hp.Check:
    """A check for a number of iterations or evaluations; as in SciPy, it may be a float, and infinity or None none."""
    integer = hp.integer(least)

    def check(name: str, value: Any) -> Any:
        if isinstance(value, (float, np.floating)):
            value = None if value == math.inf else int(value) if value == value // 1 else value
        return integer(name, value)

    return check


def _flag_or_none(name: str, value: Any) -> bool | None:
    return None if value is None else hp.flag(name, value)


def _verbose(name: str, value: Any) -> bool:
    return bool(value) if hp.is_real(value) else hp.flag(name, value)


def _history(name: str, value: Any) -> int:
    return 1000 * value if isinstance(value, bool) else int(hp.integer(0, optional=False)(name, value))


def _progress(name: str, value: Any) -> Any:
    return value if callable(value) else hp.flag(name, value)


def _polish(name: str, value: Any) -> dict[str, Any] | None:
    """The options of L-BFGS-B; None where it is not wanted."""
    if value is None or value is False:
        return None
    if value is True or (isinstance(value, str) and value == "L-BFGS-B"):
        return {}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    raise ValueError(f"`{name}` is {brief(value)}; expected True, False, 'L-BFGS-B', or a dict of its options")


def _anything(name: str, value: Any) -> Any:
    return value


# Option -> default and check; AdamW's hyperparameters are added to them.
_OPTIONS: dict[str, tuple[Any, hp.Check]] = {
    "maxiter": (10_000, _count(0)),
    "maxfev": (None, _count(1)),
    "maxfun": (None, _count(1)),
    "maxtime": (None, _seconds),
    "gtol": (1e-5, _tolerance),
    "ftol": (None, _tolerance),
    "xtol": (None, _tolerance),
    "patience": (None, hp.integer(1)),
    "disp": (False, _verbose),
    "progress": (False, _progress),
    "history": (True, _history),
    "return_best": (None, _flag_or_none),
    "checkpoint": (None, _anything),
    "state": (None, _anything),
    "nonfinite": ("stop", hp.choice("stop", "propagate", "skip", "raise")),
    "batches": (None, _anything),
    "workers": (None, _anything),
    "finite_diff_rel_step": (None, _anything),
    "eps": (None, _anything),
    "x_scale": (None, _anything),
    "polish": (None, _polish),
    "return_all": (False, hp.flag),
    "callback_every": (1, hp.integer(1, optional=False)),
    "compiled": (True, hp.flag),
}
_NOT_HERE = ("name", "nonfinite", "maximize", "moments", "seed")
_HYPERPARAMETERS = ["learning_rate", *(key for key in HYPERPARAMETERS if key not in _NOT_HERE)]


def read_settings(options: dict[str, Any], tol: Any, hess: Any, hessp: Any, constraints: Any) -> Settings:
    """All options, checked; AdamW's own are under ``hyper``."""
    _warn_of_unused(hess, hessp, constraints)
    _warn_of_unknown(options)
    settings = {key: check(key, options.get(key, default)) for key, (default, check) in _OPTIONS.items()}
    tol = _tolerance("tol", options.get("tol", tol))
    if "gtol" not in options and (tol is not None or settings["batches"] is not None):
        settings["gtol"] = tol  # one batch whose gradient happens to vanish is no minimum
    if settings["maxfev"] is not None and settings["maxfun"] not in (None, settings["maxfev"]):
        raise ValueError(
            f"`maxfev` is {settings['maxfev']} and `maxfun` is {settings['maxfun']}; expected one of them, since they "
            "are the same"
        )
    settings["maxfev"] = settings["maxfun"] if settings["maxfev"] is None else settings["maxfev"]
    hyper = {key: options[key] for key in _HYPERPARAMETERS if key in options}
    settings["automatic"] = isinstance(hyper.get("learning_rate", "auto"), str)
    if settings["automatic"] and hyper.pop("learning_rate", "auto") != "auto":
        raise ValueError(
            f"`learning_rate` is {brief(options['learning_rate'])}; expected 'auto', a number, a schedule or a function"
        )
    # A run that stops looks at the value and the gradient itself: the optimizer need not read the gradient again.
    hyper["nonfinite"] = "propagate" if settings["nonfinite"] == "stop" else settings["nonfinite"]
    return settings | {"hyper": {"weight_decay": 0.0} | hyper}


def _warn_of_unused(hess: Any, hessp: Any, constraints: Any) -> None:
    for name, value in (("hess", hess), ("hessp", hessp)):
        if value is not None and name not in _warned:  # once a process: some callers pass one always
            _warned.add(name)
            warn(f"Method AdamW does not use Hessian information ({name}).", RuntimeWarning)
    if not (constraints is None or (isinstance(constraints, (tuple, list)) and not constraints)):
        warn("Method AdamW cannot handle constraints.", RuntimeWarning)


def _warn_of_unknown(options: dict[str, Any]) -> None:
    known = {*_OPTIONS, *_HYPERPARAMETERS, "tol"}
    unknown = [key for key in options if key not in known]
    if not unknown:
        return
    hints = [f"`{key}` is `{SYNONYMS[key]}` here" for key in unknown if key in SYNONYMS]
    # SciPy's words
    warn("; ".join([f"Unknown solver options: {_listed(unknown)}", *hints]), _warning())


def warn(message: str, category: Any) -> None:
    """Warn of the first line that is neither ours nor SciPy's."""
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_back and frame.f_globals.get("__name__", "").startswith(("adamw_numba.", "scipy.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _listed(names: list[str], most: int = 10) -> str:
    shown = [brief(name)[1:-1] for name in names[:most]]
    return ", ".join(shown + [f"... {len(names) - most} more"] * (len(names) > most))


def _warning() -> Any:
    """SciPy's class of warnings for unknown options, where SciPy is installed."""
    with suppress(ImportError):
        from scipy.optimize import OptimizeWarning

        return OptimizeWarning
    return UserWarning
