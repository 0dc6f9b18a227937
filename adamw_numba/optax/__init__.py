"""AdamW as a gradient transformation of optax: for JAX programs, and whatever takes optax's own."""

try:
    import optax  # noqa: F401
except ImportError:
    raise ImportError("adamw_numba.optax needs optax: pip install 'adamw-numba[optax]'") from None

from .transformation import AdamWState, adamw

__all__ = ["AdamWState", "adamw"]
