"""Several processes that take their steps together: existing engines carry the bytes, and every rank decides alike.

`AdamW.build(variables, comm=...)` and `minimize(..., comm=...)` take a communicator of mpi4py, a process group or a
device mesh of torch, or anything else that is a `Ranks`.
"""

from .ranks import RankError, Ranks

__all__ = ["RankError", "Ranks"]
