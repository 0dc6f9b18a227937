"""The variables that were saved beside their state, for whoever makes new arrays of them."""

from typing import Any

import numpy as np

from . import folders
from .manifest import encoded


def saved_variables(target: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The variables that were saved with ``variables=True``, for arrays that cannot be written into, such as JAX's.

    Parameters
    ----------
    target : path, URL or mapping

    Returns
    -------
    dict
        NumPy arrays by name, in the order of `build`; bfloat16 as float32, which holds it exactly.

    Raises
    ------
    ValueError
        If there are none.

    Examples
    --------
    >>> from adamw_numba import AdamW, saved_variables
    >>> store, optimizer = {}, AdamW()
    >>> optimizer.build({"w": np.ones(2)})
    >>> optimizer.save(store, variables=True)
    >>> saved_variables(store)
    {'w': array([1., 1.])}
    """
    saved = folders.read(target)
    named = {entry["name"]: f"variables/{encoded(entry['name'])}" for entry in saved.document["variables"]}
    if not named or any(key not in saved.arrays for key in named.values()):
        raise ValueError(f"{saved.where} holds no variables; expected them to be saved with `variables=True`")
    return {name: numbers(saved.arrays[key], saved.document["arrays"][key]["dtype"]) for name, key in named.items()}


def numbers(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The numbers that saved bits stand for: bfloat16 as float32, which holds it exactly."""
    if dtype != "bfloat16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)  # the upper half of a float32's bits
