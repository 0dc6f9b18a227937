"""What the tests of torch's clients share: the optimizer, a tiny model, its data, and how two runs are compared."""

import pytest
import torch

from adamw_numba.torch import AdamW

BOTH = (AdamW, torch.optim.AdamW)
DTYPES = (torch.float32, torch.float64)
OPTIONS = {"lr": 0.02, "weight_decay": 0.1}
SAMPLES, INPUTS, CLASSES = 32, 4, 3
# What these packages say of themselves, whatever the optimizer
WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",  # Lightning
        "The '.*' does not have many workers:UserWarning",  # Lightning
        "Checkpoint directory .* exists and is not empty:UserWarning",  # Lightning
        r"`torch\.jit\.(script|interface)` is deprecated:DeprecationWarning",  # torch.distributed.optim
    )
]


def model_of(dtype):
    """A classifier of 67 parameters, always with the same weights."""
    torch.manual_seed(1)
    layers = torch.nn.Linear(INPUTS, 8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES)
    return torch.nn.Sequential(*layers).to(dtype)


def numbers(dtype):
    """Inputs, and the class of each."""
    random = torch.Generator().manual_seed(2)
    inputs = torch.randn(SAMPLES, INPUTS, generator=random, dtype=torch.float64)
    return inputs.to(dtype), inputs[:, :CLASSES].argmax(1)


def groups_of(model):
    """Biases are not decayed."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if not name.endswith("bias")]},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]


def weights_of(model):
    """Of a model that is cut, what is here."""
    return [getattr(p, "to_local", lambda: p)().detach().clone() for p in model.parameters()]  # noqa: B023


def assert_close(ours, theirs, exact=False):
    """Of equal dtype, and equal to rounding, or bit for bit."""
    for one, other in zip(ours, theirs, strict=True):
        rtol = 0 if exact else 1e-5 if other.dtype == torch.float32 else 1e-11
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol)
