"""What a torch tensor's header does not tell: how much its storage holds, and whether its values are yet to be changed.

A tensor keeps its shape and address when its storage is resized, and a kernel would then write beyond the end. `conj`
and some views of complex numbers only set a bit, and the values in memory are not those of the tensor. DLPack tells
neither. One fact is asked of all tensors at a time, since `map` over a function of C is the fastest loop there is.
"""

import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from . import Array

_IS_LEAF = attrgetter("is_leaf")


class Tensors:
    """The tensors that a step writes and reads, which are compared with what is known of them.

    Parameters
    ----------
    written : list of tensors
        Variables and state.
    variables : list of tensors
        Those of `written` that are variables.
    columns : list of int
        The positions of their gradients.
    signatures : list of tuple or None
        What `arrays.signature` said of each gradient; None for one that has not been seen.
    """

    def __init__(
        self, written: Sequence[Array], variables: Sequence[Array], columns: Sequence[int], signatures: Sequence[Any]
    ) -> None:
        self._written, self._variables, self._columns = written, variables, columns
        self._is_complex = any(variable.is_complex() for variable in variables)
        self._known_gradients = [each and (each[-1][0], *each[-1][1:], *each[-3:-1]) for each in signatures]
        self._known = self._facts()

    def are_as_known(self, gradients: Sequence[Array | None]) -> bool:
        """Whether nothing has changed but values and addresses; False also where that cannot be told."""
        given = [gradients[column] for column in self._columns]
        known = self._known_gradients
        if type(None) in set(map(type, given)):
            known = [each for each, gradient in zip(known, given, strict=True) if gradient is not None]
            given = [gradient for gradient in given if gradient is not None]
        try:
            return self._facts() == self._known and self._of_gradients(given) == known
        except (RuntimeError, NotImplementedError):
            return False

    def _facts(self) -> tuple[list[Any], ...]:
        leaves = list(map(_IS_LEAF, self._variables))
        return _sizes(self._written), leaves, *self._lazy(self._variables)

    def _of_gradients(self, given: Sequence[Array]) -> list[tuple[Any, ...]]:
        offsets = map(sys.modules["torch"].Tensor.storage_offset, given)
        return list(zip(_sizes(given), offsets, *self._lazy(given), strict=True))

    def _lazy(self, tensors: Sequence[Array]) -> tuple[list[bool], list[bool]]:
        """Whether each is a conjugate, and a negative, that has not been computed."""
        kind = sys.modules["torch"].Tensor
        conjugate = list(map(kind.is_conj, tensors)) if self._is_complex else [False] * len(tensors)
        return conjugate, list(map(kind.is_neg, tensors))


def _sizes(tensors: Iterable[Array]) -> list[int]:
    """How many bytes the storage of each holds."""
    torch = sys.modules["torch"]
    return list(map(torch.UntypedStorage.nbytes, map(torch.Tensor.untyped_storage, tensors)))
