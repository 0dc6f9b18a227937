"""Which engine connects the processes behind a communicator."""

import sys
from typing import Any

from ..arrays.brief import brief
from .protocol import Ranks


def ranks_of(comm: Any) -> Ranks:
    """The processes behind a communicator.

    Raises
    ------
    TypeError
        If it is none.
    """
    mpi, distributed = sys.modules.get("mpi4py.MPI"), sys.modules.get("torch.distributed")
    if mpi is not None and isinstance(comm, mpi.Comm):
        from .mpi import MpiRanks

        return MpiRanks(comm)
    if distributed is not None:
        from . import torch as engine

        if (found := engine.ranks_of(comm)) is not None:
            return found
    if isinstance(comm, Ranks) and not isinstance(comm, type):
        return comm
    raise TypeError(
        f"`comm` is {brief(comm)} of type {type(comm).__name__}; expected a communicator of mpi4py, a process group "
        "or a device mesh of one dimension of torch, or an object with `rank`, `size` and `gather`"
    )
