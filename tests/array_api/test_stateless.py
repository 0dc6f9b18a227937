"""`stateless_apply`: what it refuses, and that its results are nobody else's."""

import numpy as np
import pytest
import torch
from helpers.training import built

STATELESS = {
    "state of another shape": (lambda s: [*s[:2], np.zeros((2, 3)), s[3]], None, None, ValueError),
    "state of integers": (lambda s: [*s[:2], np.zeros(3, int), s[3]], None, None, TypeError),
    "state with a hole": (lambda s: [*s[:2], None, s[3]], None, None, TypeError),
    "too short a state": (lambda s: s[:3], None, None, ValueError),
    "gradient of another shape": (None, np.ones((1, 3)), None, ValueError),
    "complex gradient": (None, np.ones(3, complex), None, TypeError),
    "integer gradient": (None, np.ones(3, int), None, TypeError),
    "gradient of torch": (None, torch.ones(3), None, TypeError),
    "variable of another shape": (None, np.ones(4), np.ones(4), ValueError),
}


@pytest.mark.parametrize("case", STATELESS)
def test_stateless_apply(case):
    change, gradient, variable, error = STATELESS[case]
    optimizer = built([np.ones(3)])
    state = change(optimizer.variables) if change else optimizer.variables
    with pytest.raises(error):
        optimizer.stateless_apply(
            state, [np.ones(3) if gradient is None else gradient], [np.ones(3) if variable is None else variable]
        )


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"gradient_accumulation_steps": 2}, {}], ids=str)
def test_stateless_results_are_not_the_arguments(options):
    variable = np.ones(3)
    optimizer = built([variable], **options)
    new, state = optimizer.stateless_apply(
        optimizer.variables, [np.full(3, np.nan if "nonfinite" in options else 1.0)], [variable]
    )
    frozen = [np.array(a) for a in [*new, *state]]
    optimizer.apply([np.ones(3)])
    optimizer.apply([np.ones(3)])
    for one, two in zip([*new, *state], frozen, strict=True):
        np.testing.assert_array_equal(one, two)


def test_stateless_results_carry_no_graph():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = built([parameter], use_ema=True)
    gradient = torch.ones(3, requires_grad=True) * 2
    new, state = optimizer.stateless_apply(optimizer.variables, [gradient], [parameter])
    assert not any(getattr(array, "requires_grad", False) for array in [*new, *state])


def test_scalars_stay_arrays_in_stateless_apply():
    optimizer = built([np.ones(())], use_ema=True)
    new, state = optimizer.stateless_apply(optimizer.variables, [np.ones(())], [np.ones(())])
    assert all(isinstance(array, np.ndarray) for array in [*new, *state])
