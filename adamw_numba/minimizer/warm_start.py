"""Going on from an earlier result: where it ended, and AdamW's state there."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.brief import brief, brief_names
from ..optimizer import AdamW


def read_start(x0: Any, state: Any) -> tuple[Any, Any]:
    """Where to start and with which state, if any: `x0` may be an earlier result."""
    if isinstance(x0, Mapping) and "x_last" in x0 and "state" in x0:
        return x0["x_last"], x0["state"] if state is None else state
    if isinstance(x0, Mapping) and {"x", "fun", "nfev"} <= x0.keys():
        raise TypeError(f"`x0` is a result of another optimizer, {brief(x0)}; expected its `x`: pass `result.x`")
    if state is not None and not isinstance(state, Mapping):
        raise TypeError(f"`state` is {brief(state)}; expected the `state` of an earlier result: a dict of arrays")
    return x0, state


def iteration_of(state: Mapping[str, Any] | None) -> int:
    """Calls of the optimizer up to an earlier result; 0 for what `take_state` refuses."""
    found = np.asarray(0 if state is None else state.get("iteration", 0))
    return int(found) if found.shape == () and found.dtype.kind in "iu" else 0


def take_state(optimizer: AdamW, state: Mapping[str, Any]) -> None:
    """Take AdamW's arrays from an earlier state; the learning rate of this call, and the run's own arrays, are kept."""
    own = optimizer.state
    needed = {name for name in own if name == "iteration" or "/" in name or name.startswith("scale_")}
    given = set(state) - {"learning_rate"}
    if given != needed:
        missing, unknown = brief_names(sorted(needed - given)), brief_names(sorted(given - needed, key=str))
        raise ValueError(
            f"`state` lacks {missing} and holds the unknown {unknown}; expected the state of a run with the same x0 "
            "and options"
        )
    optimizer.set_weights([state[name] if name in needed else array for name, array in own.items()])
