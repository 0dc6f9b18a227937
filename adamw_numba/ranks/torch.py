"""torch.distributed: gloo on the host; NCCL takes its rows through the GPU."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from .protocol import Bytes, Rows


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

    def exchange(self, send: Bytes, send_counts: Sequence[int], receive: Bytes, receive_counts: Sequence[int]) -> None:
        """An all-to-all of bytes: see `BulkRanks.exchange`."""
        import torch

        result = torch.from_numpy(receive)
        own = result.to(self._device)
        torch.distributed.all_to_all_single(
            own, torch.from_numpy(send).to(self._device), list(receive_counts), list(send_counts), group=self._group
        )
        if own is not result:
            result.copy_(own)

    def spread(self, buffer: Bytes, counts: Sequence[int]) -> None:
        """All parts of a buffer: see `BulkRanks.spread`."""
        import torch

        result = torch.from_numpy(buffer)
        own = result.to(self._device)
        # Broadcasts: `all_gather` takes parts of one size only, and with gloo three times as long.
        sent = [
            torch.distributed.broadcast(own[start:stop], group_src=rank, group=self._group, async_op=True)
            for rank, (start, stop) in enumerate(pairwise(accumulate(counts, initial=0)))
            if stop > start
        ]
        for each in sent:
            each.wait()
        if own is not result:
            result.copy_(own)


def ranks_of(comm: Any) -> TorchRanks | None:
    """The processes of a process group, or of a device mesh of one dimension; None of anything else."""
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(comm, DeviceMesh) and comm.ndim == 1:
        return TorchRanks(comm.get_group())
    return TorchRanks(comm) if isinstance(comm, ProcessGroup) else None
