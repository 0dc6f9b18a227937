"""torch.distributed: gloo on the host; NCCL takes its rows through the GPU."""

from collections.abc import Iterable, Sequence
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
        sent, received = _parts(send, send_counts), _parts(receive, receive_counts)
        received[self.rank][:] = sent[self.rank]
        others = self._others()
        self._pass(((k, sent[k]) for k in others), [(k, received[k]) for k in others])

    def spread(self, parts: Sequence[Sequence[Bytes]]) -> None:
        """From each to all others: see `BulkRanks.spread`."""
        others = self._others()
        own = ((k, each) for each in parts[self.rank] for k in others)
        self._pass(own, [(k, each) for k in others for each in parts[k]])

    def _others(self) -> list[int]:
        return [(self.rank + k) % self.size for k in range(1, self.size)]

    def _pass(self, sent: Iterable[tuple[int, Bytes]], received: Sequence[tuple[int, Bytes]]) -> None:
        """Messages from one rank to another: with gloo they take half of the time of its collective calls."""
        import torch
        from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

        there = [torch.from_numpy(each).to(self._device) for _, each in received]
        calls = [
            P2POp(irecv, each, group=self._group, group_peer=k) for each, (k, _) in zip(there, received, strict=True)
        ]
        for k, each in sent:
            calls.append(P2POp(isend, torch.from_numpy(each).to(self._device), group=self._group, group_peer=k))
        for work in batch_isend_irecv(calls) if calls else ():
            work.wait()
        if self._device != "cpu":
            for each, (_, here) in zip(there, received, strict=True):
                torch.from_numpy(here).copy_(each)


def _parts(buffer: Bytes, counts: Sequence[int]) -> list[Bytes]:
    return np.split(buffer, np.cumsum(counts)[:-1])


def ranks_of(comm: Any) -> TorchRanks | None:
    """The processes of a process group, or of a device mesh of one dimension; None of anything else."""
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(comm, DeviceMesh) and comm.ndim == 1:
        return TorchRanks(comm.get_group())
    return TorchRanks(comm) if isinstance(comm, ProcessGroup) else None
