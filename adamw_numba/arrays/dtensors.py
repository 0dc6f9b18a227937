"""DTensors of torch.distributed: what a process has of a tensor that several have together.

Everything from the checks to the kernels only meets the local tensor, which is seen as that of a foreign array is (see
`foreign.py`): it shares its memory with the DTensor.
"""

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from .brief import brief

Array = Any
_read: list[Callable[[Array], Array]] = []  # how a DTensor's local tensor is read, once there has been one


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor; torch is not imported for that."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def local(tensor: Array) -> Array:
    """The very tensor that a DTensor keeps here.

    `to_local()` takes a hundred times as long, and makes a new tensor of a parameter each time, so that it cannot be
    told whether the DTensor has got another one. Every wrapper of tensors tells torch the names of what it holds.
    """
    if not _read:
        _read.append(attrgetter(tensor.__tensor_flatten__()[0][0]))
    found = _read[0](tensor)
    return found.wait() if hasattr(type(found), "wait") else found  # where it is still on its way


def is_local(array: Array) -> bool:
    """Whether a tensor is what `to_local()` has given, in autograd's graph, of a DTensor: it shares its memory."""
    try:
        made_by = str(getattr(array, "grad_fn", None))
    except RuntimeError as error:  # so torch says once the DTensor was written in place
        made_by = str(error)
    return "_ToTorchTensor" in made_by  # torch tells nothing else


def like(array: Array, model: Array) -> Array:
    """A local tensor as a DTensor of the mesh, placements and shape of another, over the same memory."""
    return type(model).from_local(
        array, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def check_placements(what: str, tensor: Array) -> None:
    """Refuse a DTensor whose local tensors are not the parts, or copies, of its elements."""
    library = sys.modules["torch.distributed.tensor"]
    known = vars(library)["Shard"], vars(library)["Replicate"]
    odd = [placement for placement in tensor.placements if type(placement) not in known]
    if odd:
        hint = ": pass `redistribute(...)`" if any(placement.is_partial() for placement in odd) else ""
        raise ValueError(f"{what} is a DTensor of placement {odd[0]!r}; expected Shard and Replicate alone{hint}")


def check_alike(what: str, name: str | None, tensor: Array, model: Array) -> None:
    """Refuse a DTensor that is not cut, over the processes, as another is.

    Raises
    ------
    TypeError
        If only the first is one.
    ValueError
        If they differ.
    """
    if not is_dtensor(tensor):
        return
    if not is_dtensor(model):
        raise TypeError(f"{_called(what, name)} is {described(tensor)}; expected a {type(model).__name__}")
    if tensor.placements != model.placements or tensor.device_mesh != model.device_mesh or tensor.shape != model.shape:
        raise ValueError(f"{_called(what, name)} is {described(tensor)}; expected {described(model)}")


def _called(what: str, name: str | None) -> str:
    return what if name is None else f"{what} {brief(name)}"


def described(tensor: Array) -> str:
    """A DTensor in a few words."""
    mesh = tensor.device_mesh
    ranks = f"{mesh.ndim} dimensions" if mesh.ndim > 1 else f"{mesh.size()} ranks"
    return (
        f"a DTensor of shape {tuple(tensor.shape)} and placements {tuple(tensor.placements)} on a mesh of "
        f"{ranks} ({mesh.mesh.tolist()})"
    )
