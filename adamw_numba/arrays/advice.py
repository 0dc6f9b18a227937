"""What to pass instead of something that is no array: people hand over what their framework calls a variable."""

_OF_KERAS = "[(v.path, v.value) for v in model.trainable_variables]"


def is_model(value: object) -> bool:
    """Whether a value is a module of torch or a model of Keras, or one that looks like them."""
    return _has(value, "named_parameters") or _has(value, "trainable_variables")


def advice(value: object) -> str:
    """How an error about a value that is no array ends: with what was expected."""
    if _has(value, "trainable_variables"):
        return f"expected the arrays of its variables: `{_OF_KERAS}`"
    if _has(value, "named_parameters"):
        return "expected its `named_parameters()`"
    if _has(value, "assign", "value", "path"):
        return f"expected the array that this Keras variable holds, its `value`: `{_OF_KERAS}`"
    if _has(value, "contiguous", "numpy") and not _has(value, "__array_interface__"):  # of Warp, by index
        return "expected an array whose elements lie at regular distances: pass `value.contiguous()`, which is a copy"
    if _has(value, "to_numpy"):
        return "expected an array: pass `value.to_numpy()`"
    if isinstance(value, (int, float, complex, list)) or _has(value, "__array__"):
        return "expected an array: pass `np.asarray(value)`"
    return "expected an array, a dict, a list, or a list of (name, array) pairs"


def _has(value: object, *names: str) -> bool:
    """Whether a value's type has these attributes; its own would have to be computed, and may raise."""
    return not isinstance(value, type) and all(hasattr(type(value), name) for name in names)
