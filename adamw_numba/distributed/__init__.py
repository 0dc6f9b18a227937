"""Several processes that take their steps together: existing engines carry the bytes, and every rank decides alike.

`AdamW.build(variables, comm=...)` connects ranks that each have variables of their own, `minimize(..., comm=...)` has
them minimize together, and `Sharded` is for ranks that all have the same variables. They take a communicator of mpi4py,
a process group or a device mesh of torch, or anything else that is a `Ranks`, or for `Sharded` a `BulkRanks`.
"""

from ..ranks.protocol import BulkRanks, RankError, Ranks
from .sharded import Sharded

__all__ = ["BulkRanks", "RankError", "Ranks", "Sharded"]
