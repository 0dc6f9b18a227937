"""Master copies of 16-bit variables as what their rounding to bfloat16 has left over, written once for every target.

The upper half of a float32 is a bfloat16. Rounded to it, a number is that plus a remainder of 16 bits with a sign: 2
bytes instead of the 4 of a whole copy. TransformerEngine's FusedAdam (Nvidia) keeps such remainders.

`make_splitting` is bound by `numba` (cpu/masters.py), by `numba.cuda` (gpu/masters.py), and by whole-array functions
(array_api/masters.py).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .library import Array, dtype_name

REMAINDER = "int16"  # the dtype of remainders
_MAGNITUDE, _INFINITY, _QUIET = 0x7FFFFFFF, 0x7F800000, 0x40
_HALF, _LOW = 0x8000, 0xFFFF


class Splitting(NamedTuple):
    """Functions of one target; words are unsigned integers of 32 bits."""

    split: Callable[..., Any]
    joined: Callable[..., Any]
    remainder_of: Callable[..., Any]


def master_dtype(master_weights: bool | str, dtype: str) -> str:
    """What is kept beside a variable of a dtype: "" for nothing."""
    if not master_weights or dtype not in ("float16", "bfloat16"):
        return ""
    return REMAINDER if (master_weights, dtype) == ("remainder", "bfloat16") else "float32"


def kept_by(slots: Mapping[str, Array]) -> str:
    """What the slots of a variable hold of its number: nothing, a "float32" copy, or its "remainder"."""
    if "master" not in slots:
        return ""
    return "remainder" if dtype_name(slots["master"]) == REMAINDER else "float32"


def make_splitting(compiled: Callable[..., Any], word: Any, bits_of: Any, number_of: Any, choose: Any) -> Splitting:
    """The functions of a target; for the parameters, see `moments.make_rounding`."""

    @compiled
    def split(x):  # type: ignore[no-untyped-def]
        """The 16 bits of the nearest bfloat16, of which ties go away from zero, and those of the remainder.

        Both neighbours of a tie have remainders with the same bits, and only so is it known which of them it was.
        """
        bits = bits_of(x)
        upper = word(word(bits + word(_HALF)) >> word(16))
        is_nan = word(bits & word(_MAGNITUDE)) > word(_INFINITY)
        upper = choose(is_nan, word(word(bits >> word(16)) | word(_QUIET)), upper)
        return upper, word(bits & word(_LOW))

    @compiled
    def joined(upper, remainder):  # type: ignore[no-untyped-def]
        """The float32 of 16 bits and a remainder.

        A negative one is ignored beside a 0, which nothing is rounded to with one: the owner has written the 0.
        """
        upper_bits = word(upper << word(16))
        below = word(word(remainder >> word(15)) << word(16))
        bits = word(word(upper_bits | remainder) - below)
        is_written = word(below | word(word(upper & word(_HALF - 1)) << word(17))) == word(1 << 16)
        return number_of(choose(is_written, upper_bits, bits))

    @compiled
    def remainder_of(x):  # type: ignore[no-untyped-def]
        """The remainder of a number beside a variable that was rounded to it with ties to even, as of a master copy.

        Of a tie that was rounded down, the largest there is.
        """
        bits = bits_of(x)
        is_tie_down = word(bits & word(2 * _LOW + 1)) == word(_HALF)
        low = word(bits & word(_LOW))
        return choose(is_tie_down, word(word(low & word(0)) | word(_HALF - 1)), low)

    return Splitting(split, joined, remainder_of)
