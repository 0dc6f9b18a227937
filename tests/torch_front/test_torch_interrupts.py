"""A KeyboardInterrupt within a step: it was taken or it was not, and the next ones go on from there."""

import sys

import pytest
import torch
from helpers.interrupts import Injector
from helpers.twins import AdamW, assert_same_bits, parameters, tensors

SHAPES = [(3,), (2,), (2, 2)]


def give(params, seed, present="111"):
    for param, gradient, mark in zip(params, tensors(seed, *SHAPES), present, strict=True):
        param.grad = gradient if mark == "1" else None


def first(optimizer, params):
    give(params, 1)


def grows(optimizer, params):
    for seed in range(3):
        give(params, seed, "101")
        optimizer.step()
    give(params, 10)


def parts(optimizer, params):
    for seed in range(3):
        give(params, seed)
        optimizer.step()
    give(params, 10, "110")


def other_groups(optimizer, params):
    for seed in range(3):
        give(params, seed)
        optimizer.step()
    optimizer.param_groups[1]["params"] = []
    optimizer.add_param_group({"params": params[2:], "lr": 0.3, "betas": (0.5, 0.9)})
    give(params, 10)


def another_state(optimizer, params):
    for seed in range(3):
        give(params, seed)
        optimizer.step()
    for param in params:
        optimizer.state[param]["exp_avg"] = torch.ones_like(param)
        optimizer.state[param]["step"] = torch.tensor(7.0)
    give(params, 10, "011")


def trained(kind, prepare, n=None, takes_it=True):
    """The parameters and their counts after a step that is interrupted at the n-th line, and two more."""
    params = parameters(tensors(5, *SHAPES))
    optimizer = kind([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    prepare(optimizer, params)
    line = None
    if n is not None:
        injector, old = Injector(n), sys.gettrace()
        sys.settrace(injector)
        try:
            optimizer.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(old)
        line = injector.line
    elif takes_it:
        optimizer.step()
    for seed in (20, 21):
        give(params, seed)
        optimizer.step()
    return params, [int(optimizer.state[param]["step"]) for param in params], line


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [first, grows, parts, other_groups, another_state])
def test_an_interrupt(prepare):
    references = [trained(torch.optim.AdamW, prepare, takes_it=taken)[:2] for taken in (False, True)]
    ends = [trained(AdamW, prepare, takes_it=taken) for taken in (False, True)]
    for (theirs, their_counts), (ours, counts, _) in zip(references, ends, strict=True):
        assert counts == their_counts
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    found, n = set(), 1
    while True:
        n += 7  # lines
        params, counts, line = trained(AdamW, prepare, n)
        taken = [counts == end[1] for end in ends].index(True)
        assert_same_bits(params, ends[taken][0])
        found.add(taken)
        if line is None:
            break
    assert found == {0, 1}
    assert n > 100
