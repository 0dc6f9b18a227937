"""FSDP2 models trained by this library: the same code for a rank of several and for one process.

    python -m torch.distributed.run ... dtensor_runs.py FOLDER CHECKPOINTS save|load

Each rank writes what it has found to FOLDER/RANK.
"""

import copy
import faulthandler
import math
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.functional import mse_loss

import adamw_numba
from adamw_numba import interop
from adamw_numba.torch import AdamW as Front

SECONDS = 100  # a hang is a failure
STEPS = 6
NAN = 3  # the step in which one gradient holds a NaN
ODD = 5  # steps
HALF = 10  # steps of the transformer before it is saved, and after
SHAPES = {
    "uneven": (7, 5),
    "single": (1, 7),
    "three": (3,),
    "cube": (4, 2, 3),
}  # of two ranks, one has none of `single`
OPTIONS = {
    "plain": {},
    "global clip": {"global_clipnorm": 0.5},
    "clip of each": {"clipnorm": 0.5},
    "skip": {"nonfinite": "skip"},
    "bfloat16": {"moments": "bfloat16"},
    "all": {"global_clipnorm": 0.5, "amsgrad": True, "use_ema": True, "gradient_accumulation_steps": 2, "nonfinite": "skip", "moments": "bfloat16"},
}  # fmt: skip


class Parts(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, torch.nn.Parameter(value))

    def forward(self, factor):
        return sum((factor * (p - 0.1)).square().sum() for p in self.parameters())


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local(tensor):
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train(model, take, step):
    model.zero_grad()
    model(1.0 + 0.1 * step).backward()
    take(step)


# How a model gets its optimizer, and what a step of that is


def built(model, options):
    optimizer = adamw_numba.AdamW(0.1, weight_decay=0.1, **options)
    if "clipnorm" not in options:
        optimizer.override(var_names=["three"], weight_decay=0.0, learning_rate_multiplier=0.5)
    optimizer.build(model.named_parameters())
    return optimizer, lambda: optimizer.apply([p.grad for p in model.parameters()])


def front(model, options):
    named = dict(model.named_parameters())
    three = named.pop("three")
    groups = [{"params": list(named.values())}, {"params": [three], "weight_decay": 0.0, "lr": 0.05}]
    optimizer = Front(groups, lr=0.1, weight_decay=0.1, **options)
    return optimizer, optimizer.step


WAYS = {"built": built, "front": front}


def put_nan(model):
    """In the first element of the whole: on one rank."""
    gradient = model.uneven.grad
    if not isinstance(gradient, DTensor) or gradient.device_mesh.get_local_rank("shard") == 0:
        local(gradient)[0, 0] = math.nan


def trained(cut, way, options, dtype=torch.float32, bad=False):
    """What the parameters of a model have become, and what is told of the steps."""
    model = Parts(dtype)
    cut(model)
    optimizer, take = WAYS[way](model, OPTIONS[options])
    norms = []
    for step in range(STEPS):
        model.zero_grad()
        model(1.0 + 0.1 * step).backward()
        if bad and step == NAN:
            put_nan(model)
        take()
        norms.append(optimizer.last_step.gradient_norm)
    found = {name: whole(p) for name, p in model.named_parameters()}
    return found, norms, optimizer.skipped_steps


def all_ways(cut):
    found = {}
    for way in WAYS:
        for options in OPTIONS:
            found[way, options, "float32"] = trained(cut, way, options, bad=options in ("skip", "all"))
        for options in ("plain", "global clip"):
            found[way, options, "bfloat16"] = trained(cut, way, options, torch.bfloat16)
    return found


# A small transformer, each rank of which takes a part of the batch


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(3, 8)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.last = torch.nn.Linear(8, 1)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x).clone()  # FSDP2 warns of views


def transformer(cut, way):
    model = Transformer()
    for layer in model.layers:
        cut(layer)
    cut(model)
    # An epsilon that drowns gradients which are nothing but roundings: those of the keys' biases.
    if way == "front":
        return model, Front(model.parameters(), lr=0.01, eps=1e-4, global_clipnorm=0.5, use_ema=True)
    optimizer = adamw_numba.AdamW(0.01, epsilon=1e-4, global_clipnorm=0.5, use_ema=True)
    optimizer.build(model.named_parameters())
    return model, optimizer


def steps(model, optimizer, first, rank=0, size=1):
    for step in range(first, first + HALF):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, 3, generator=generator), torch.randn(8, 5, 1, generator=generator)
        part = slice(rank * 8 // size, (rank + 1) * 8 // size)
        model.zero_grad()
        mse_loss(model(x[part]), y[part]).backward()
        optimizer.step() if isinstance(optimizer, Front) else optimizer.apply([p.grad for p in model.parameters()])


def state_of(model, optimizer):
    """What DCP is given of a model and its optimizer."""
    if isinstance(optimizer, Front):
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    return {"model": get_model_state_dict(model), "optimizer": interop.dcp_state(optimizer)}


def load(model, optimizer, folder):
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    if isinstance(optimizer, Front):
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def begin(cut, way, checkpoints, rank=0, size=1):
    """The first half of the steps, and a checkpoint; then the second half."""
    model, optimizer = transformer(cut, way)
    steps(model, optimizer, 0, rank, size)
    dcp.save(state_of(model, optimizer), checkpoint_id=checkpoints / way)
    steps(model, optimizer, HALF, rank, size)
    return {name: whole(p) for name, p in model.named_parameters()}


def resume(cut, way, checkpoints, rank=0, size=1):
    """The second half of the steps, from a checkpoint."""
    model, optimizer = transformer(cut, way)
    with torch.no_grad():
        for p in model.parameters():
            local(p).zero_()
    load(model, optimizer, checkpoints / way)
    steps(model, optimizer, HALF, rank, size)
    return {name: whole(p) for name, p in model.named_parameters()}


def all_of_it(cut, way, checkpoints=None, save=False):
    """As many steps of a 16-bit model with every option, in the middle of a window of accumulation saved and loaded."""
    model = Parts(torch.bfloat16)
    cut(model)
    optimizer, take = WAYS[way](model, OPTIONS["all"])
    if checkpoints is None or save:
        for step in range(ODD):
            train(model, lambda _: take(), step)
    if checkpoints is not None:
        folder = checkpoints / f"{way} of 16 bits"
        dcp.save(state_of(model, optimizer), checkpoint_id=folder) if save else load(model, optimizer, folder)
    for step in range(ODD, 2 * ODD):
        train(model, lambda _: take(), step)
    with optimizer.averaged():
        averages = {f"average of {name}": whole(p) for name, p in model.named_parameters()}
    return averages | {name: whole(p) for name, p in model.named_parameters()}


def by_folder(cut, checkpoints=None, save=False):
    """The same through a folder of our own, which has the model's parameters, too."""
    model = Parts(torch.bfloat16)
    cut(model)
    optimizer, take = built(model, OPTIONS["all"])
    if checkpoints is None or save:
        for step in range(ODD):
            train(model, lambda _: take(), step)
    if save:
        optimizer.save(checkpoints / "folder", variables=True)
    elif checkpoints is not None:
        with torch.no_grad():
            for p in model.parameters():
                local(p).zero_()
        optimizer.restore(checkpoints / "folder")
    for step in range(ODD, 2 * ODD):
        train(model, lambda _: take(), step)
    return {name: whole(p) for name, p in model.named_parameters()}


# Two ranks alone


def errors(cut, rank):
    """What each rank is told where one of them is at fault, or they differ, and that nothing has been written."""
    found = {}

    def told(name, way, work):
        model = Parts(torch.float32)
        cut(model)
        optimizer, take = WAYS[way](model, {})
        model(1.0).backward()
        before = [local(p).clone() for p in model.parameters()]
        try:
            work(model, optimizer, take)
            found[name, way] = "nothing"
        except Exception as error:
            found[name, way] = f"{type(error).__name__}: {error}"
        same = all(torch.equal(local(p), b) for p, b in zip(model.parameters(), before, strict=True))
        assert same, (name, way)

    def wrong(model, optimizer, take):
        if rank == 1:
            mesh = model.uneven.device_mesh
            model.uneven.grad = DTensor.from_local(torch.ones(7, 5), mesh, [Replicate()], run_check=False)
        take()

    def missing(model, optimizer, take):
        if rank == 1:
            model.uneven.grad = None
        take()

    def nothing(model, optimizer, take):
        if rank == 1:
            model.zero_grad()
        take()

    def closure(model, optimizer, take):
        def fails():
            raise ArithmeticError("in the closure")

        if isinstance(optimizer, Front):
            optimizer.step(fails if rank == 1 else None)

    def idle(model, optimizer, take):
        model.zero_grad()
        take()

    def rate(model, optimizer, take):
        if rank == 1:
            if isinstance(optimizer, Front):
                optimizer.param_groups[0]["lr"] = 0.2
            else:
                optimizer.learning_rate = 0.2
        take()

    for way in WAYS:
        told("wrong", way, wrong)
        told("rate", way, rate)
        told("missing", way, missing)
        told("nothing", way, nothing)
        told("closure", way, closure)
        told("idle", way, idle)
    return found


def torch_and_back(cut):
    """Steps with torch's own AdamW, then with ours that has its state, then with torch's that has ours."""
    model, other = Parts(torch.float32), Parts(torch.float32)
    cut(model), cut(other)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.1)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1), Front(model.parameters(), lr=0.1)]
    optimizers.append(torch.optim.AdamW(model.parameters(), lr=0.1))
    state = None
    for k, optimizer in enumerate(optimizers):
        if state is not None:
            set_optimizer_state_dict(model, optimizer, state)
        for step in range(3):
            train(model, lambda _: optimizer.step(), 3 * k + step)  # noqa: B023
            train(other, lambda _: theirs.step(), 3 * k + step)
        own = optimizer.state[model.uneven]
        kinds = {key: type(own[key]).__name__ for key in ("step", "exp_avg", "exp_avg_sq")}
        assert kinds == {"step": "Tensor", "exp_avg": "DTensor", "exp_avg_sq": "DTensor"}, kinds
        assert own["exp_avg"].placements == model.uneven.placements
        state = copy.copy(get_optimizer_state_dict(model, optimizer))
    return [{name: whole(p) for name, p in each.named_parameters()} for each in (model, other)]


def by_local(cut, mesh):
    """What `to_local()` gives, connected by `comm`."""
    model = Parts(torch.float32)
    cut(model)
    optimizer = adamw_numba.AdamW(0.1, weight_decay=0.1, clipnorm=0.5)
    optimizer.build([(name, p.to_local()) for name, p in model.named_parameters()], comm=mesh)
    for step in range(STEPS):
        train(model, lambda _: optimizer.apply([local(p.grad) for p in model.parameters()]), step)
    return {name: whole(p) for name, p in model.named_parameters()}


def scaled(cut, rank, fused):
    """By a `GradScaler`, with an infinity on one rank in the second step."""
    model = Parts(torch.float32)
    cut(model)
    optimizer, scaler = Front(model.parameters(), lr=0.1, fused=fused), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        model.zero_grad()
        scaler.scale(model(1.0 + step)).backward()
        if step == 1 and rank == 1:
            local(model.uneven.grad)[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    return float(optimizer.state[model.uneven]["step"]), scaler.get_scale()


def main(folder, checkpoints, what):
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))

    def cut(module):
        fully_shard(module, mesh=mesh)

    found = {"ways": all_ways(cut)}
    if what == "save":
        found["begun"] = {way: begin(cut, way, checkpoints, rank, size) for way in WAYS}
        found["16 bits"] = {way: all_of_it(cut, way, checkpoints, save=True) for way in WAYS}
        found["folder"] = by_folder(cut, checkpoints, save=True)
        found["scaled"] = [scaled(cut, rank, fused) for fused in (False, True)]
        found["errors"], found["torch"], found["local"] = errors(cut, rank), torch_and_back(cut), by_local(cut, mesh)
    else:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

        def cut_twice(module):
            fully_shard(module, mesh=square)

        found["hybrid"] = all_ways(cut_twice)
        found["resumed hybrid"] = {way: resume(cut_twice, way, checkpoints, rank, size) for way in WAYS}
        found["resumed"] = {way: resume(cut, way, checkpoints, rank, size) for way in WAYS}
        found["16 bits"] = {way: all_of_it(cut, way, checkpoints) for way in WAYS}
        found["folder"], found["hybrid folder"] = by_folder(cut, checkpoints), by_folder(cut_twice, checkpoints)
        found["mixed"] = mixed(mesh)
        found["replicas"] = replicas(square, rank)
    torch.save(found, folder / str(rank))
    dist.destroy_process_group()


def mixed(mesh=None):
    """Variables that are cut, whole everywhere as DTensors, and plain."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(5, 3, generator=generator) for _ in range(6)]
    ways = [[Shard(0)], [Replicate()], None]

    def made(tensor, placements):
        return tensor.clone() if mesh is None or placements is None else distribute_tensor(tensor, mesh, placements)

    variables = [made(*each) for each in zip(tensors[:3], ways, strict=True)]
    optimizer = adamw_numba.AdamW(0.1, global_clipnorm=0.5)
    optimizer.build(variables)
    optimizer.apply([made(*each) for each in zip(tensors[3:], ways, strict=True)])
    return [whole(v) for v in variables], optimizer.last_step.gradient_norm


def replicas(mesh, rank):
    """What is told where copies of a part have other gradients."""
    variable = distribute_tensor(torch.ones(4, 2), mesh, [Replicate(), Shard(0)])
    optimizer = adamw_numba.AdamW(0.1, global_clipnorm=0.5)
    optimizer.build([variable])
    gradient = torch.full_like(variable, 2.0)
    local(gradient).mul_(3.0 if rank == 3 else 1.0)
    try:
        optimizer.apply([gradient])
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), sys.argv[3])
