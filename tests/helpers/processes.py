"""Processes that work together by torch.distributed, within a limit of time."""

import time
from datetime import timedelta

import torch
import torch.distributed

LIMIT = 60  # seconds


def in_a_group(work, size, folder):
    """What `work(rank, size)`, run in so many new processes, returns in each. None of them outlives this call."""
    context = torch.multiprocessing.start_processes(one, (work, size, folder), size, join=False, start_method="spawn")
    until = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1):
            if time.monotonic() > until:
                raise TimeoutError(f"{size} processes have not finished within {LIMIT} seconds")
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / str(rank)) for rank in range(size)]


def one(rank, work, size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder / 'rendezvous'}", timedelta(seconds=LIMIT), size, rank
    )
    torch.save(work(rank, size), folder / str(rank))
    torch.distributed.destroy_process_group()
