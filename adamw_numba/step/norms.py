"""The verdict on a step: the norms of its gradients, whether it is applied, and how it is clipped."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import Array
from ..arrays.brief import brief_names
from ..coefficients import Recipe, whole_norm
from .workspace import Workspace


def judge(workspace: Workspace, recipe: Recipe, gradients: Sequence[Array | None]) -> tuple[float, bool]:
    """The norm of all gradients together, and whether the step is applied; the recipe is told of the clip.

    Raises
    ------
    FloatingPointError
        With ``nonfinite="raise"``, if a gradient is not finite.
    """
    norms, norm = _norms(workspace, recipe, gradients)
    if recipe.nonfinite != "propagate" and not math.isfinite(norm):
        if recipe.nonfinite == "raise":
            found = zip(workspace.trained[0], norms, strict=True)
            names = brief_names(name for name, norm in found if not math.isfinite(norm))
            raise FloatingPointError(f"gradients of {names} hold values that are not finite (nonfinite='raise')")
        return norm, False
    if recipe.is_update:
        recipe.clip(norms, norm, workspace.trained[1])
    return norm, True


def _norms(
    workspace: Workspace, recipe: Recipe, gradients: Sequence[Array | None]
) -> tuple[np.ndarray[Any, Any], float]:
    """The norm of each variable's mean unscaled gradient, and of all together."""
    found = [plan.norms(recipe, gradients) for plan in workspace.plans]
    norms, norm = found[0]
    if len(found) > 1:
        norms = np.sum([each for each, _ in found], axis=0)  # each plan has zeros for the variables of the others
        norm = whole_norm(np.array([whole for _, whole in found]))
    return norms * recipe.factor, norm * recipe.factor
