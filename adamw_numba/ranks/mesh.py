"""A device mesh of torch, over which DTensors are cut: its processes, and what each has of every variable."""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.dtensors import described, is_dtensor
from ..arrays.pieces import Piece
from .protocol import Rows


class MeshRanks:
    """The processes of a mesh, which may have several dimensions: rows are gathered along one after the other.

    Parameters
    ----------
    mesh : torch.distributed.device_mesh.DeviceMesh

    Attributes
    ----------
    shape, coordinate : tuple of int
        How many processes there are along each dimension, and where this one is.
    """

    def __init__(self, mesh: Any) -> None:
        from .torch import TorchRanks

        self.mesh = mesh
        self._along = [TorchRanks(mesh.get_group(k)) for k in range(mesh.ndim)]
        # The ranks of the groups, which may count in another order than the mesh does.
        self.shape = tuple(each.size for each in self._along)
        self.coordinate = tuple(each.rank for each in self._along)
        self.rank = int(np.ravel_multi_index(self.coordinate, self.shape))
        self.size: int = math.prod(self.shape)

    def gather(self, row: Rows) -> Rows:
        """The rows of all ranks: see `Ranks.gather`."""
        rows = row
        for each in reversed(self._along):
            rows = each.gather(rows.ravel())
        return rows.reshape(self.size, row.size)


class Cut(NamedTuple):
    """How DTensors, and what lies beside them, are cut over the processes of a mesh."""

    is_shared: NDArray[np.bool_]  # which variables all ranks have whole
    counts: NDArray[np.bool_]  # which of them this rank counts: what several have counts once
    has_twins: NDArray[np.bool_]  # of which there are as many copies as some dimensions of the mesh are long
    twins: list[list[int]]  # the ranks that have the same parts, where there are such
    told: list[Any]  # of each variable, what has to be the same on all ranks
    pieces: dict[str, Piece]  # where this rank's part of each lies


def mesh_of(names: Sequence[str], variables: Sequence[Any]) -> Any:
    """The mesh of the DTensors among some variables; None if there are none.

    Raises
    ------
    ValueError
        If there are several, or this process is not part of it.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    found = [(name, variable) for name, variable in zip(names, variables, strict=True) if is_dtensor(variable)]
    if not found:
        return None
    first, mesh = found[0][0], found[0][1].device_mesh
    for name, variable in found:
        if variable.device_mesh != mesh:
            raise ValueError(
                f"variable {brief(name)} is {described(variable)}, and {brief(first)} is {described(found[0][1])}; "
                "expected DTensors of one mesh: make an optimizer for each"
            )
    if mesh.get_coordinate() is None:
        raise ValueError(f"variable {brief(first)} is {described(found[0][1])}, to which this process does not belong")
    return mesh


def cut_of(ranks: MeshRanks, names: Sequence[str], variables: Sequence[Array]) -> Cut:
    """How variables are cut. What is no DTensor counts as replicated: torch takes it so where it meets DTensors."""
    copied = np.array([_copied(variable, len(ranks.shape)) for variable in variables], bool)
    copied = copied.reshape(
        len(variables), len(ranks.shape)
    )  # whether there are copies of a variable along a dimension
    at_first = np.array(ranks.coordinate) == 0
    is_shared, has_some = np.asarray(copied.all(axis=1)), np.asarray(copied.any(axis=1))
    has_twins = np.asarray(has_some & ~is_shared)
    along = np.asarray(copied[has_twins].all(axis=0) & has_twins.any())  # where all that have twins have them
    where = np.array(np.unravel_index(np.arange(ranks.size), ranks.shape)).reshape(len(ranks.shape), -1)
    parts = np.ravel_multi_index(tuple(np.where(along[:, None], 0, where)), ranks.shape)
    twins = [np.flatnonzero(parts == part).tolist() for part in np.unique(parts)] if along.any() else []
    told = [
        [name, list(variable.shape), str(variable.placements) if is_dtensor(variable) else "whole"]
        for name, variable in zip(names, variables, strict=True)
    ]
    pieces = {name: piece_of(ranks, variable) for name, variable in zip(names, variables, strict=True)}
    return Cut(is_shared, np.asarray((at_first | ~copied).all(axis=1)), has_twins, twins, told, pieces)


def piece_of(ranks: MeshRanks, variable: Array) -> Piece:
    """Where the local part of a DTensor lies: torch cuts an axis as `torch.chunk` does, along one dimension of the mesh
    after the other."""
    start, own = [0] * len(variable.shape), [int(length) for length in variable.shape]
    placements = getattr(variable, "placements", ())
    for placement, size, at in zip(placements, ranks.shape, ranks.coordinate, strict=False):
        if placement.is_shard():
            length = own[placement.dim]
            chunk = -(-length // size)
            first, stop = (min(chunk * k, length) for k in (at, at + 1))
            start[placement.dim] += first
            own[placement.dim] = stop - first
    return Piece(tuple(int(length) for length in variable.shape), tuple(start), tuple(own))


def _copied(variable: Array, dimensions: int) -> list[bool]:
    if not is_dtensor(variable):
        return [True] * dimensions
    return [placement.is_replicate() for placement in variable.placements]
