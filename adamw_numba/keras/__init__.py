"""AdamW as a `keras.optimizers.Optimizer`: for `Model.compile`, on Keras's backends torch and JAX."""

try:
    import keras  # noqa: F401
except ImportError:
    raise ImportError("adamw_numba.keras needs Keras: pip install 'adamw-numba[keras]'") from None

from .optimizer import AdamW

__all__ = ["AdamW"]
