"""Several processes, each with a part of every batch, do what one process does with torch's own on the whole batch."""

import pytest
import torch
from helpers.processes import in_a_group
from helpers.torch_clients import OPTIONS, AdamW, assert_close, groups_of, model_of, numbers, weights_of
from torch.distributed import broadcast_object_list
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ExponentialLR

DTYPE = torch.float64
HALF = 3  # steps
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def steps(model, optimizer, schedule, part=slice(None)):
    inputs, classes = numbers(DTYPE)
    for _ in range(HALF):
        optimizer.zero_grad()
        cross_entropy(model(inputs[part]), classes[part]).backward()
        optimizer.step()
        schedule.step()


def parallel(make, params, views, rank, size):
    """With an optimizer that is replaced in the middle by one that has loaded its state."""
    model = DistributedDataParallel(model_of(DTYPE), gradient_as_bucket_view=views)
    saved = [None, None]
    for _ in range(2):
        optimizer = make(params(model), views)
        schedule = ExponentialLR(optimizer, 0.9)
        if saved[0]:
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        steps(model, optimizer, schedule, slice(rank, None, size))
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
        saved = [optimizer.state_dict(), schedule.state_dict()] if rank == 0 else [None, None]
        broadcast_object_list(saved)
    return weights_of(model), saved[0]


def plain(params, views=False, kind=AdamW):
    return kind(params, **OPTIONS)


def zero(params, views):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns that it uses what torch deprecates

    return ZeroRedundancyOptimizer(params, AdamW, parameters_as_bucket_view=views, **OPTIONS)


parameters = torch.nn.Module.parameters
# What each process makes, of what, and whether gradients, and with ZeRO parameters, become views of larger tensors.
# With four processes, some of ZeRO's have no parameter of a group.
WAYS = {
    "DDP": (plain, parameters, False),
    "DDP, groups": (plain, groups_of, False),
    "DDP, views": (plain, parameters, True),
    "ZeRO": (zero, parameters, False),
    "ZeRO, groups": (zero, groups_of, False),
    "ZeRO, views": (zero, groups_of, True),
}


def all_ways(rank, size):
    return {name: parallel(*way, rank, size) for name, way in WAYS.items()}


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def found(request, tmp_path_factory):
    return in_a_group(all_ways, request.param, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("name", WAYS)
def test_as_one_process(found, name):
    """Each process ends with the same weights; and the state is that of one process, which can go on with it."""
    params = WAYS[name][1]
    model = model_of(DTYPE)
    optimizer = plain(params(model), kind=torch.optim.AdamW)
    schedule = ExponentialLR(optimizer, 0.9)
    for _ in range(2):
        steps(model, optimizer, schedule)
    for weights, _ in (of_rank[name] for of_rank in found):
        assert_close(weights, found[0][name][0], exact=True)
        assert_close(weights, weights_of(model))

    other = model_of(DTYPE)
    other.load_state_dict(model.state_dict())
    loaded = plain(params(other))
    loaded.load_state_dict(found[0][name][1])
    steps(model, optimizer, schedule)
    steps(other, loaded, ExponentialLR(loaded, 0.9, last_epoch=2 * HALF - 1))
    assert_close(weights_of(other), weights_of(model))
