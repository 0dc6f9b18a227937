"""The verdict on a step: the norms of its gradients, whether it is applied, and how it is clipped."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..arrays import Array
from ..arrays.brief import brief_names
from ..coefficients import Recipe, whole_norm
from .workspace import Workspace


def judge(
    workspace: Workspace,
    recipe: Recipe,
    gradients: Sequence[Array | None],
    combine: Callable[..., Any] | None = None,
) -> tuple[float | None, bool]:
    """The norm of all gradients together, and whether the step is applied; the recipe is told of the clip.

    Where several processes take it together, they `combine` their norms, and all come to the same.

    Raises
    ------
    FloatingPointError
        With ``nonfinite="raise"``, if a gradient is not finite.
    """
    if combine is not None and not recipe.takes_norm:
        combine(recipe, gradients, None)
        return None, True
    norms, norm = _norms(workspace, recipe, gradients)
    if recipe.nonfinite == "raise" and not math.isfinite(norm * recipe.factor):
        found = zip(workspace.trained[0], norms * recipe.factor, strict=True)
        names = brief_names(name for name, norm in found if not math.isfinite(norm))
        raise FloatingPointError(f"gradients of {names} hold values that are not finite (nonfinite='raise')")
    steady = norms, norm
    if combine is not None:
        norm, *steady = combine(recipe, gradients, norms)
    elif len(workspace.plans) == 1 and recipe.is_update and math.isfinite(norm):
        steady = workspace.plans[0].steady_norms(recipe, norms, norm)
    norm *= recipe.factor
    if recipe.nonfinite != "propagate" and not math.isfinite(norm):
        return norm, False
    if recipe.is_update:
        recipe.clip(steady[0] * recipe.factor, steady[1] * recipe.factor, workspace.trained[1])
    return norm, True


def _norms(
    workspace: Workspace, recipe: Recipe, gradients: Sequence[Array | None]
) -> tuple[np.ndarray[Any, Any], float]:
    """The norm of each variable's gradient, and of all together, not yet multiplied with the recipe's factor."""
    found = [plan.norms(recipe, gradients) for plan in workspace.plans]
    if len(found) == 1:
        return found[0]  # type: ignore[no-any-return]
    # Each plan has zeros for the variables of the others.
    norms = np.sum([np.zeros(len(workspace.trained[0])), *(each for each, _ in found)], axis=0)
    return norms, whole_norm(np.array([whole for _, whole in found]))
