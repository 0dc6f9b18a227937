"""AdamW as a `torch.optim.Optimizer`: for torch programs, and whatever takes torch's own optimizers."""

try:
    import torch  # noqa: F401
except ImportError:
    raise ImportError("adamw_numba.torch needs torch: pip install 'adamw-numba[torch]'") from None

from .optimizer import AdamW

__all__ = ["AdamW"]
