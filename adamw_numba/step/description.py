"""What an engine says of itself in the `repr` of an optimizer."""

import math
from typing import Any

from .. import arrays
from ..arrays.brief import brief


def described(engine: Any) -> str:
    """The arrays that it trains, what they take, and how far it is."""
    if engine.workspace is None:
        return "built=False"
    variables = engine.workspace.variables
    dtypes = ", ".join(dict.fromkeys(map(arrays.dtype_name, variables)))
    devices = ", ".join(dict.fromkeys(map(arrays.device, variables)))
    state = [own[key] for _, own, key in engine.places()]
    together = engine.together
    return (
        f"arrays={len(variables)}, parameters={sum(math.prod(v.shape) for v in variables)}, dtypes={dtypes!r}, "
        f"devices={devices!r}, step={engine.updates()}, state_bytes={sum(map(arrays.byte_count, state))}"
        f"{_rates(engine)}{'' if together is None else f', rank={together.ranks.rank} of {together.ranks.size}'}"
    )


def _rates(engine: Any) -> str:
    """What the groups are, where there are several."""
    if not engine.hyper.others:
        return ""
    rates = [f"{rate:.4g}" for rate, _ in engine.group_rates()]
    return f", groups={len(rates)}, learning_rates={brief(', '.join(rates))}"
