"""torch.distributed: gloo on the host; NCCL takes its rows through the GPU."""

from typing import Any

import numpy as np

from .ranks import Rows


class TorchRanks:
    """The processes of a group.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
    """

    def __init__(self, group: Any) -> None:
        from torch import distributed

        self._group = group
        self.rank: int = distributed.get_rank(group)
        self.size: int = distributed.get_world_size(group)
        self._device = "cuda" if distributed.get_backend(group) == "nccl" else "cpu"

    def gather(self, row: Rows) -> Rows:
        """The rows of all ranks: see `Ranks.gather`."""
        import torch

        rows = torch.empty((self.size, row.size), dtype=torch.float64, device=self._device)
        torch.distributed.all_gather(list(rows), torch.from_numpy(row).to(self._device), group=self._group)
        return np.asarray(rows.cpu())


def ranks_of(comm: Any) -> TorchRanks | None:
    """The processes of a process group, or of a device mesh of one dimension; None of anything else."""
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(comm, DeviceMesh) and comm.ndim == 1:
        return TorchRanks(comm.get_group())
    return TorchRanks(comm) if isinstance(comm, ProcessGroup) else None
