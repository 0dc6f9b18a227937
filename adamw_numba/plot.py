"""Plots of results, with matplotlib (the extra ``plot``)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays.brief import brief

_MANY = 20  # rows from which a loss can be called noisy
_OFTEN = 0.4  # of the steps turn where it is, up after down or down after up


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'adamw-numba[plot]'") from None
    return pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")[1]


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
        The axes of the loss, with a logarithmic scale where anything is above 0. If a loss is not positive, each run is
        drawn by how much it exceeds its own lowest value, which its label gives. A loss that goes up and down (with
        batches, say) is faint, under its running median. A cross marks where a run met NaN or infinity. The learning
        rate has its own axis on the right, and a single result its message as the title.

    Raises
    ------
    TypeError, ValueError
        If a result has no history, or is none.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np, matplotlib
    >>> matplotlib.use("agg")
    >>> import adamw_numba
    >>> result = adamw_numba.minimize(lambda x: ((x**2).sum(), 2 * x), np.ones(3), jac=True)
    >>> adamw_numba.plot.convergence(result).get_xlabel()
    'iteration'
    """
    labelled = _labelled(results)
    own = ax is None
    ax = _new_axes() if own else ax
    is_positive = all(_lowest(result["history"]) > 0 for result in labelled.values())
    handles = []
    for label, result in labelled.items():
        history = result["history"]
        lowest = 0.0 if is_positive else _lowest(history)
        name = label if is_positive or len(labelled) == 1 else f"{label} (lowest {lowest:.4g})"
        handles.append(_draw_loss(ax, history, lowest, name))
    ax.set_xlabel("iteration")
    ax.set_ylabel(
        "loss" if is_positive else f"loss above {lowest:.6g}" if len(labelled) == 1 else "loss above its lowest"
    )
    if len(labelled) == 1:
        (result,) = labelled.values()
        handles += _draw_rest(ax, result["history"])
        ax.set_title(str(result.get("message", ""))[:120], fontsize="medium", wrap=True)
    if any((line.get_ydata() > 0).any() for line in ax.get_lines()):
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    _add_legend(ax, handles, own)
    return ax


def waterfall(result: Any, ax: Any = None) -> Any:
    """Plot the final losses of many runs in order; a flat step is a minimum that was found more than once.

    Parameters
    ----------
    result : result of `multistart`, or list of results
        SciPy's results will do.
    ax : `matplotlib.axes.Axes`, optional

    Returns
    -------
    `matplotlib.axes.Axes`
        With a logarithmic scale if all losses are positive.

    Raises
    ------
    TypeError, ValueError
        If there are no results.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> import numpy as np, matplotlib
    >>> matplotlib.use("agg")
    >>> import adamw_numba
    >>> result = adamw_numba.multistart(lambda x: ((x**2).sum(), 2 * x), np.eye(3), jac=True)
    >>> adamw_numba.plot.waterfall(result).get_ylabel()
    'final loss'
    """
    results = result.get("results") if isinstance(result, Mapping) else result
    if not isinstance(results, (list, tuple)) or not results or not all(_is_result(one) for one in results):
        raise ValueError(
            f"`result` is {brief(result)}, which has no `results`; expected what `multistart` returns, or a list of "
            "results"
        )
    own = ax is None
    ax = _new_axes() if own else ax
    losses = np.array([float(one["fun"]) for one in results])
    order = np.argsort(np.where(np.isfinite(losses), losses, np.inf), kind="stable")
    losses, success = losses[order], np.array([bool(one.get("success", True)) for one in results])[order]
    ranks, finite = np.arange(1, len(losses) + 1), np.isfinite(losses)
    ax.plot(ranks[finite], losses[finite], color="0.7", linewidth=1, zorder=1)
    for chosen, label, face in ((success, "converged", "C0"), (~success, "stopped by a limit", "white")):
        shown = chosen & finite
        if shown.any():
            ax.scatter(ranks[shown], losses[shown], s=28, facecolor=face, edgecolor="C0", label=label, zorder=2)
    if not finite.all():
        ax.plot([], [], "x", color="C3", label=f"not finite: {(~finite).sum()}")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("starts, best first")
    ax.set_ylabel("final loss")
    if finite.any() and losses[finite].min() > 0:
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    _add_legend(ax, ax.get_legend_handles_labels()[0], own)
    return ax


def _is_result(value: Any) -> bool:
    return isinstance(value, Mapping) and "fun" in value


def _labelled(results: Any) -> dict[str, Any]:
    """One or several results, by label."""
    if _is_result(results):
        labelled = {"loss": results}
    elif isinstance(results, Mapping):
        labelled = {str(label): result for label, result in results.items()}
    elif isinstance(results, (list, tuple)):
        labelled = {f"run {k}": result for k, result in enumerate(results, start=1)}
    else:
        raise TypeError(f"`results` is {brief(results)}; expected a result of `minimize`, or a list or dict of them")
    if not labelled:
        raise ValueError("`results` is empty; expected at least one result")
    for label, result in labelled.items():
        if not _is_result(result) or "history" not in result or not len(result["history"]["nit"]):
            raise ValueError(
                f"`results` at {brief(label)} is {brief(result)}, which has no history; expected a result of "
                "`minimize(..., history=True)`"
            )
    return labelled


def _lowest(history: Any) -> float:
    finite = history["fun"][np.isfinite(history["fun"])]
    return float(finite.min()) if finite.size else 0.0


def _draw_loss(ax: Any, history: Any, lowest: float, label: str) -> Any:
    """Draw one loss; what its legend shows."""
    nit, loss = history["nit"], history["fun"]
    above = np.where(np.isfinite(loss), loss - lowest, np.nan)
    if (above > 0).any():  # else the scale is linear
        above[above <= 0] = np.nan
    ups = np.diff(loss) > 0
    noisy = len(loss) >= _MANY and np.mean(ups[1:] != ups[:-1]) > _OFTEN
    style: Any = {"linewidth": 0.8, "alpha": 0.35} if noisy else {"linewidth": 1.5}
    (line,) = ax.plot(nit, above, label=label, marker="o" if np.isfinite(above).sum() == 1 else None, **style)
    color, handle = line.get_color(), line
    if noisy:
        line.set_label("_each")
        (handle,) = ax.plot(
            nit, _running_median(above), color=color, linewidth=1.8, label=f"{label}, running median", zorder=3
        )
    last = np.flatnonzero(np.isfinite(above))
    if last.size and not np.isfinite(loss[-1]):
        ax.plot(nit[last[-1]], above[last[-1]], "X", color="C3", markersize=9, label="_NaN or infinity follows")
        at = (nit[last[-1]], above[last[-1]])
        ax.annotate("NaN or infinity  ", at, color="C3", fontsize="small", ha="right", va="center")
    return handle


def _running_median(values: Any) -> Any:
    """The median of a twentieth of the values, at least five, around each."""
    half = max(len(values) // 40, 2)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, mode="edge"), 2 * half + 1)
    some = np.isfinite(windows).any(axis=1)
    medians = np.full(len(values), np.nan)
    medians[some] = np.nanmedian(windows[some], axis=1)
    return medians


def _draw_rest(ax: Any, history: Any) -> list[Any]:
    """Draw the gradient norm and the learning rate."""
    norm = np.where(history["gradient_norm"] > 0, history["gradient_norm"], np.nan)
    norm[np.isinf(norm)] = np.nan
    marker = "." if np.isfinite(norm).sum() == 1 else None
    (gradient,) = ax.plot(history["nit"], norm, label="gradient norm", color="C1", linewidth=0.6, marker=marker)
    ax.set_ylabel(f"{ax.get_ylabel()}, gradient norm")
    if not np.isfinite(history["learning_rate"]).any():
        return [gradient]
    right = ax.twinx()
    (rate,) = right.plot(history["nit"], history["learning_rate"], label="learning rate", color="C2", linestyle="--")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    return [gradient, rate]


def _add_legend(ax: Any, handles: list[Any], own: bool) -> None:
    """Below the axes, where it covers nothing."""
    columns = min(len(handles), 3)
    if own:
        ax.figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    else:
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False)
