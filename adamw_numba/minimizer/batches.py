"""What `fun` gets after `x` at each iteration: the batches of an iterable, again and again, or of a function."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..arrays.brief import brief


class Batches:
    """Batches by the number of the iteration.

    Parameters
    ----------
    source : iterable or callable
        An iterable is walked from its start until it ends, and then again; a function takes the iteration.

    Raises
    ------
    TypeError
        If it is neither, or can be walked only once.
    """

    def __init__(self, source: Iterable[Any] | Callable[[int], Any]) -> None:
        if not callable(source) and not isinstance(source, Iterable):
            raise TypeError(f"`batches` is {brief(source)}; expected an iterable, or a function of the iteration")
        if not callable(source) and isinstance(source, Iterator):
            raise TypeError(
                f"`batches` is {brief(source)}, which can be walked only once; expected an iterable that can be walked "
                "again, or a function of the iteration"
            )
        self._source = source
        self._iterator: Iterator[Any] | None = None
        self._drawn = 0

    def at(self, number: int) -> Any:
        """The batch of an iteration; a run that was resumed skips those that it has seen."""
        if callable(self._source):
            return self._source(number)
        item = self._next(self._source)
        while self._drawn <= number:
            item = self._next(self._source)
        return item

    def _next(self, source: Iterable[Any]) -> Any:
        nothing = object()
        item = nothing if self._iterator is None else next(self._iterator, nothing)
        if item is nothing:
            self._iterator = iter(source)
            item = next(self._iterator, nothing)
        if item is nothing:
            raise ValueError("`batches` yields nothing; expected at least one batch")
        self._drawn += 1
        return item

    def close(self) -> None:
        """Let go of the iterator."""
        self._iterator = None
