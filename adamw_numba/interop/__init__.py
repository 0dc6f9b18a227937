"""State exchanged with Keras, torch and optax: moments, counters and hyperparameters, exactly or not at all."""

from .dcp import dcp_state
from .keras import from_keras, to_keras
from .optax import from_optax, to_optax
from .torch import from_torch, to_torch

__all__ = ["dcp_state", "from_keras", "from_optax", "from_torch", "to_keras", "to_optax", "to_torch"]
