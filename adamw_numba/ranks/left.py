"""What is left of an agreement in a copy."""

from typing import Any


class Left:
    """In the place of an agreement, in the copy of an optimizer: the copy cannot go on with the others.

    Parameters
    ----------
    ranks : Ranks
        Of which this keeps the numbers alone.
    """

    def __init__(self, ranks: Any) -> None:
        self.rank: int = ranks.rank
        self.size: int = ranks.size
        self.ranks = self
        self.group_of: dict[str, int] = {}

    def begin(self, call: str) -> None:
        """Refuse to go on."""
        raise RuntimeError(
            "this optimizer is the copy of one that was connected with those of other processes; expected a new one, "
            "built with `comm`, that takes the state by `load`"
        )

    def deciding(self, call: str) -> None:
        """Refuse to go on."""
        self.begin(call)

    def tell(self, own: Any) -> None:
        """Refuse to go on."""
        self.begin("")

    def fail(self, error: BaseException) -> None:
        """Nobody is to be told."""

    def left(self) -> "Left":
        """It has left already."""
        return self
