"""The hyperparameters that have to be the same on all ranks."""

from collections.abc import Sequence
from typing import Any

from ..arrays.brief import brief
from ..hyperparameters.groups import comparable
from .telling import values

NAMES = (
    "beta_1", "beta_2", "epsilon", "amsgrad", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum",
    "ema_overwrite_frequency", "gradient_accumulation_steps", "nonfinite", "master_weights", "decouple_lr", "maximize",
    "nesterov", "epsilon_mode", "moments", "seed",
)  # fmt: skip


def settings_of(engine: Any) -> dict[str, Any]:
    """The hyperparameters of an optimizer, and those of its groups, by name.

    A loss scale counts as what the present step divides by, and steps that it leaves out as skipped.
    """
    hyper, recipes = engine.hyper, engine.recipes
    common = {name: getattr(hyper, name) for name in NAMES}
    scale = hyper.loss_scale_factor if recipes is None else recipes.loss_scale
    common |= {"loss_scale": scale or 1.0, "nonfinite": hyper.nonfinite if recipes is None else recipes.nonfinite}
    own = [comparable(group.own or {}) for group in hyper.groups]
    if not hyper.counts_each:
        own = [each | {"started": group.started} for each, group in zip(own, hyper.groups, strict=True)]
    return common | {f"groups[{k}].{name}": value for k, each in enumerate(own) for name, value in each.items()}


def rates_of(groups: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The rates of all groups but the common one, by name."""
    return {
        f"groups[{k}].{name}": rate
        for k, pair in enumerate(groups, 1)
        for name, rate in zip(("learning_rate", "weight_decay"), pair, strict=True)
    }


def different_settings(told: list[dict[str, Any]]) -> str:
    """Which of them are not the same everywhere, of what each rank has told of its own."""
    given = {name: [own.get(name) for own in told] for own in told for name in own}
    names = [name for name, each in given.items() if any(value != each[0] for value in each)]
    return "; ".join(f"{name} is {values(given[name], brief)}" for name in names[:4])
