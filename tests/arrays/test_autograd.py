"""What torch's autograd knows of tensors that a step changes."""

import numpy as np
import pytest
import torch
from helpers.training import train

from adamw_numba import AdamW


def test_autograd_notices_what_changed():
    """torch counts versions so that a graph is not run backward through values that have been overwritten."""
    weights = torch.nn.Parameter(torch.ones(3))
    untouched = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW(0.1)
    optimizer.build([weights, untouched])
    stale, fresh = (weights**2).sum(), (untouched**2).sum()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([torch.ones(3), None])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    fresh.backward()
    assert untouched.grad.tolist() == [2.0, 2.0, 2.0]


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        weights = torch.ones(3)
        train([weights], [[torch.ones(3)]])
    np.testing.assert_allclose(weights.numpy(), 0.95, rtol=1e-3)
