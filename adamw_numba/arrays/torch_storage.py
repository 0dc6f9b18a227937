"""What a torch tensor's header does not tell: what its storage holds, and whether its values are yet to be changed.

A tensor keeps its shape when its storage is resized, and a kernel would then write beyond the end. `conj` and some
views of complex numbers only set a bit, and the values in memory are not those of the tensor. DLPack tells neither. One
fact is asked of all tensors at a time, since `map` over a function of C is the fastest loop there is; and nothing is
asked again that does not change: of a tensor that is the same object at the same address, all is known but how much its
storage holds.
"""

import sys
from collections.abc import Sequence
from operator import attrgetter, eq
from typing import Any

from . import Array

_IS_LEAF = attrgetter("is_leaf")


class Tensors:
    """The variables of torch and their gradients, which are compared with what is known of them.

    Parameters
    ----------
    variables : list of tensors
    columns : list of int
        The positions of their gradients.
    signatures : list of tuple or None
        What `arrays.signature` said of each gradient; None for one that has not been seen.
    """

    def __init__(self, variables: Sequence[Array], columns: Sequence[int], signatures: Sequence[Any]) -> None:
        torch = sys.modules["torch"]
        self._storage_of, self._bytes_in = torch.Tensor.untyped_storage, torch.UntypedStorage.nbytes
        self._variables, self._columns = variables, columns
        self._is_complex = any(variable.is_complex() for variable in variables)
        # A tensor that requires a gradient stays a leaf as long as it does: torch refuses what would make it a result.
        self._may_be_results = [variable for variable in variables if not variable.requires_grad]
        # A view that is yet to be negated, the imaginary part of a conjugate, steps over the real parts: of what is
        # dense and has more than one element, the strides tell.
        self._may_be_lazy = [v for v in variables if v.is_complex() or v.numel() < 2 or not v.is_contiguous()]
        self._known_gradients = [each and (*each[-1], *each[-3:-1]) for each in signatures]
        # The same as columns, which are compared much faster.
        is_whole = list(columns) == list(range(len(columns))) and all(self._known_gradients)
        self._known_columns = (
            [list(column) for column in zip(*self._known_gradients, strict=True)] if is_whole else None
        )
        self._known = self._facts()
        self._storages: list[Any] = []
        self._sizes: list[int] = []

    def watch(self, written: Sequence[Array]) -> None:
        """Look at the storages of these as well, since a step writes there, and somebody may resize them.

        A storage mostly lies elsewhere once it was resized, which is noticed in another way, but need not.
        """
        self._storages = [tensor.untyped_storage() for tensor in written]
        self._sizes = list(map(self._bytes_in, self._storages))

    def are_as_known(self, gradients: Sequence[Array | None], are_new: bool) -> bool:
        """Whether nothing has changed but values and addresses; False also where that cannot be told.

        Parameters
        ----------
        gradients : list of tensors and None
        are_new : bool
            Whether one of them is another object than when it was looked at, or lies elsewhere.
        """
        try:
            if (self._may_be_results or self._may_be_lazy) and self._facts() != self._known:
                return False
            if list(map(self._bytes_in, self._storages)) != self._sizes:
                return False
            return self._are_gradients_as_known(gradients, are_new)
        except (RuntimeError, NotImplementedError):
            return False

    def _are_gradients_as_known(self, gradients: Sequence[Array | None], are_new: bool) -> bool:
        known = self._known_columns
        if known is not None and len(gradients) == len(self._columns):  # all are here, and were seen
            try:
                if not are_new:  # most
                    return list(map(self._bytes_in, map(self._storage_of, gradients))) == known[0]
                return all(map(eq, self._facts_of(gradients), known))
            except TypeError:  # one of them is None now
                pass
        pairs = zip((gradients[column] for column in self._columns), self._known_gradients, strict=True)
        there = [(gradient, known) for gradient, known in pairs if gradient is not None]
        found = self._facts_of([gradient for gradient, _ in there])
        return list(zip(*found, strict=True)) == [known for _, known in there]

    def _facts_of(self, gradients: Sequence[Any]) -> tuple[list[Any], ...]:
        """The size of the storage of each, its offset there, and whether it is lazy."""
        sizes = list(map(self._bytes_in, map(self._storage_of, gradients)))
        return sizes, list(map(sys.modules["torch"].Tensor.storage_offset, gradients)), *self._lazy(gradients)

    def _facts(self) -> tuple[list[Any], ...]:
        return list(map(_IS_LEAF, self._may_be_results)), *self._lazy(self._may_be_lazy)

    def _lazy(self, tensors: Sequence[Array]) -> tuple[list[bool], list[bool]]:
        """Whether each is a conjugate, and a negative, that has not been computed."""
        kind = sys.modules["torch"].Tensor
        conjugate = list(map(kind.is_conj, tensors)) if self._is_complex else [False] * len(tensors)
        return conjugate, list(map(kind.is_neg, tensors))
