"""The same parameters twice: ours are trained by adamw_numba.torch.AdamW, theirs by torch.optim.AdamW."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch

from adamw_numba.torch import AdamW

KINDS = [AdamW, torch.optim.AdamW]
ROUNDING = 2.0**-23  # of a float32, relative to it
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def parameters(tensors):
    """Parameters with memory of their own, laid out as the tensors are."""
    return [torch.nn.Parameter(copy.deepcopy(tensor)) for tensor in tensors]


def tensors(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def complex_tensors(seed, *shapes, dtype=torch.complex128):
    pairs = zip(tensors(2 * seed, *shapes), tensors(2 * seed + 1, *shapes), strict=True)
    return [torch.complex(*pair).to(dtype) for pair in pairs]


def largest(tensor):
    return tensor.detach().abs().max().item() if tensor.numel() else 0.0


def assert_close(ours, theirs, allowed, name):
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    torch.testing.assert_close(
        ours.detach(), theirs.detach(), rtol=0, atol=allowed, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def state_copy(optimizer):
    """The state of all parameters, in their order, as copies."""
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [copy.deepcopy(optimizer.state.get(parameter)) for parameter in every]


def assert_same_bits(first, second):
    """Two nested containers hold the same bits."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_bits(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_bits(one, other)
    elif isinstance(first, torch.Tensor):
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        assert torch.equal(first.detach().nan_to_num(12345.0), second.detach().nan_to_num(12345.0))
    else:
        assert first == second


def train(optimizer, steps, seed=100):
    """Steps of one optimizer, with gradients that depend on the seed alone; gives its parameters."""
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for k in range(steps):
        found = tensors(seed + k, *[parameter.shape for parameter in params], dtype=params[0].dtype)
        for parameter, gradient in zip(params, found, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return params


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_pickle(state_dict):
    return pickle.loads(pickle.dumps(state_dict))


WAYS = {"copied": copy.deepcopy, "saved": through_a_file, "pickled": through_pickle}


class Twins:
    """Both optimizers, over parameters that begin at the same values; compared after every step.

    `arrange` makes the argument `params` of a list of parameters. Numbers of float64 may differ as those of float32 do
    if they are `coarse`: torch computes with a tensor of float32, such as a learning rate, in float32.
    """

    def __init__(self, starts, arrange=list, coarse=False, **options):
        self.ours, self.theirs = parameters(starts), parameters(starts)
        self.our = AdamW(arrange(self.ours), **copy.deepcopy(options))
        self.their = torch.optim.AdamW(arrange(self.theirs), **copy.deepcopy(options))
        self.coarse = coarse
        self.steps, self.way, self.sizes = 0, defaultdict(float), defaultdict(float)

    @property
    def both(self):
        return [(self.our, self.ours), (self.their, self.theirs)]

    def groups(self):
        """The two versions of each group."""
        return zip(self.our.param_groups, self.their.param_groups, strict=True)

    def give(self, gradients):
        """Each parameter gets a gradient of its own, laid out as the one given; None for none."""
        for _, params in self.both:
            for parameter, gradient in zip(params, gradients, strict=True):
                parameter.grad = copy.deepcopy(gradient)

    def step(self, gradients):
        self.give(gradients)
        self.go()

    def go(self, take=lambda optimizer: optimizer.step()):
        """A step with the gradients that are there, which are only read."""
        given = [copy.deepcopy(parameter.grad) for parameter in self.ours]
        self.follow(take)
        assert_same_bits([parameter.grad for parameter in self.ours], given)

    def follow(self, take):
        """What moves the parameters of both."""
        before = [parameter.detach().clone() for parameter in self.theirs]
        assert take(self.our) == take(self.their)
        self.steps += 1
        for index, (old, new) in enumerate(zip(before, self.theirs, strict=True)):
            self.way[index] += largest(new - old)
        self.compare()

    def compare(self):
        for ours, theirs in self.groups():
            assert {key: ours[key] for key in theirs if key != "params"} == {
                key: value for key, value in theirs.items() if key != "params"
            }
        for index, (ours, theirs) in enumerate(zip(self.ours, self.theirs, strict=True)):
            size = self.sizes[index] = max(self.sizes[index], largest(theirs))
            self.compare_values(index, ours, theirs, size)
            assert (ours in self.our.state) == (theirs in self.their.state), f"state of parameter {index}"
            if theirs in self.their.state:
                self.compare_state(index, self.our.state[ours], self.their.state[theirs])

    def compare_values(self, index, ours, theirs, size):
        if self.coarse or theirs.dtype in (torch.float32, torch.complex64):
            allowed = 2e-6 * self.way[index] + self.steps * ROUNDING * size
        else:
            allowed = 1e-12 * size
        assert_close(ours, theirs, allowed, f"parameter {index}")

    def compare_state(self, index, ours, theirs):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name in MOMENTS:
                size = self.sizes[index, name] = max(self.sizes[index, name], largest(value))
                is_coarse = self.coarse or value.dtype in (torch.float32, torch.complex64)
                allowed = (2 * (self.steps + 1) * ROUNDING if is_coarse else 1e-12) * size
                assert_close(ours[name], value, allowed, f"{name} of parameter {index}")
            else:
                assert_same_bits(ours[name], value)


# Three small parameters

SHAPES = [(4, 3), (5,), ()]
both_kinds = pytest.mark.parametrize("kind", KINDS, ids=["ours", "theirs"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def random(seed, dtype=torch.float64):
    """Values, or gradients, of three small parameters."""
    return tensors(seed, *SHAPES, dtype=dtype)


def run(twins, steps=3, seed=100):
    """Twins after some steps with such gradients."""
    for k in range(steps):
        twins.step(random(seed + k, twins.theirs[0].dtype))
    return twins


def two_groups(params):
    """The parameters in two groups with hyperparameters of their own."""
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.02, "betas": (0.8, 0.99)}]
