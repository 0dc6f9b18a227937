"""The agreement of DTensors, whose mesh connects the ranks."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from .agreement import Agreement
from .mesh import MeshRanks, mesh_of


def deciding(together: Agreement | None, call: str) -> AbstractContextManager[None]:
    """Around what leads to a decision, where there are other ranks: they are told of what is raised."""
    return nullcontext() if together is None else together.deciding(call)


@contextmanager
def joining(together: Agreement | None, names: Sequence[str], variables: Sequence[Any]) -> Iterator[Agreement | None]:
    """The agreement for the variables that are built inside: the one given, or for DTensors that of their mesh.

    Raises
    ------
    ValueError
        If there are both.
    """
    mesh = mesh_of(names, variables)
    if mesh is None:
        yield together
        return
    if together is not None:
        raise ValueError(
            "`comm` is given, and there are DTensors, whose mesh connects the ranks; expected DTensors without `comm`, "
            "or their local tensors (`to_local()`) with it"
        )
    joined = Agreement(MeshRanks(mesh))
    with joined.deciding("build"):
        yield joined


def rejoined(together: Agreement | None, names: Sequence[str], variables: Sequence[Any]) -> Agreement | None:
    """The agreement for variables that replace others, or None without DTensors: no message is sent."""
    mesh = mesh_of(names, variables)
    if mesh is None:
        return None
    if together is None or not isinstance(together.ranks, MeshRanks) or together.ranks.mesh != mesh:
        together = Agreement(MeshRanks(mesh))
    together.arrange(names, variables)
    return together
