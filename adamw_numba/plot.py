"""Plots of results, with matplotlib (the extra ``plot``)."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'adamw-numba[plot]'") from None
    return pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")[1]


def convergence(results: Any, ax: Any = None) -> Any:
    """Plot the loss over the iterations; for a single result, also the gradient norm and the learning rate.

    Parameters
    ----------
    results : result of `minimize`, list of results, or dict of results by label
    ax : `matplotlib.axes.Axes`, optional
        Where to draw; by default in a new figure.

    Returns
    -------
    `matplotlib.axes.Axes`
        The axes of the loss, with a logarithmic scale. If a loss is not positive, they show by how much the loss
        exceeds the lowest one. The learning rate has its own axis on the right.

    Raises
    ------
    ValueError
        If a result has no history.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np, matplotlib
    >>> matplotlib.use("agg")
    >>> import adamw_numba
    >>> result = adamw_numba.minimize(lambda x: ((x**2).sum(), 2 * x), np.ones(3), jac=True, learning_rate=0.1)
    >>> adamw_numba.plot.convergence(result).get_xlabel()
    'iteration'
    """
    labelled = _labelled(results)
    ax = _new_axes() if ax is None else ax
    lowest = min(float(np.nanmin(history["fun"])) for history in labelled.values())
    lowest = 0.0 if lowest > 0 else lowest
    for label, history in labelled.items():
        above = np.where(history["fun"] > lowest, history["fun"] - lowest, np.nan)
        ax.plot(history["nit"], above, label=label if len(labelled) > 1 else "loss", linewidth=1.5)
    handles = ax.get_lines()
    ax.set_xlabel("iteration")
    ax.set_ylabel(f"loss above {lowest:.6g}" if lowest else "loss")
    if len(labelled) == 1:
        handles = [*handles, *_rest(ax, *labelled.values())]
    ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend(handles=handles, loc="best" if len(labelled) > 1 else "lower left", framealpha=0.9)
    return ax


def waterfall(result: Any, ax: Any = None) -> Any:
    """Plot the final losses of `multistart` in order; a flat step is a minimum that was found more than once.

    Parameters
    ----------
    result : result of `multistart`
    ax : `matplotlib.axes.Axes`, optional

    Returns
    -------
    `matplotlib.axes.Axes`
        With a logarithmic scale if all losses are positive.

    Raises
    ------
    ValueError
        If there are no ``results``.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np, matplotlib
    >>> matplotlib.use("agg")
    >>> import adamw_numba
    >>> result = adamw_numba.multistart(lambda x: ((x**2).sum(), 2 * x), np.eye(3), jac=True, learning_rate=0.1)
    >>> adamw_numba.plot.waterfall(result).get_ylabel()
    'final loss'
    """
    if not result.get("results"):
        raise ValueError("`result` has no `results`; expected what `multistart` returns")
    ax = _new_axes() if ax is None else ax
    losses = np.array([one["fun"] for one in result["results"]])
    success = np.array([one["success"] for one in result["results"]])
    ranks = np.arange(1, len(losses) + 1)
    ax.plot(ranks, losses, color="0.7", linewidth=1, zorder=1)
    for chosen, label, face in ((success, "converged", "C0"), (~success, "stopped by a limit", "white")):
        if chosen.any():
            ax.scatter(ranks[chosen], losses[chosen], s=28, facecolor=face, edgecolor="C0", label=label, zorder=2)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("starts, best first")
    ax.set_ylabel("final loss")
    if np.nanmin(losses) > 0:
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend(loc="best")
    return ax


def _labelled(results: Any) -> dict[str, Any]:
    """The histories of one or several results, by label."""
    if isinstance(results, Mapping) and "history" in results:
        results = {"loss": results}
    elif not isinstance(results, Mapping):
        results = {f"run {k}": result for k, result in enumerate(results, start=1)}
    histories = {str(label): result["history"] for label, result in results.items()}
    for label, history in histories.items():
        if not len(history["nit"]):
            raise ValueError(f"the result {label!r} has no history; expected one of `minimize(..., history=True)`")
    if not histories:
        raise ValueError("`results` is empty; expected at least one result")
    return histories


def _rest(ax: Any, history: Any) -> list[Any]:
    """Draw the gradient norm and the learning rate."""
    (gradient,) = ax.plot(history["nit"], history["gradient_norm"], label="gradient norm", color="C1", linewidth=0.8)
    ax.set_ylabel(f"{ax.get_ylabel()}, gradient norm")
    right = ax.twinx()
    (rate,) = right.plot(history["nit"], history["learning_rate"], label="learning rate", color="C2", linestyle="--")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    return [gradient, rate]
