"""Moments in 16 and 8 bits: how a float32 becomes fewer bits and comes back, written once for every target.

Rounding is stochastic: up or down, each as often as makes the mean right. A moment changes by a thousandth in a step,
and what lies between two numbers of 8 bits apart by a hundredth would never move if it were rounded to the nearest one.
The noise is a hash of the seed, the number of the step, the name of the variable and the place of an element in the
whole variable, so that bits depend neither on threads nor on how variables are cut.

`make_rounding` is bound by `numba` (cpu/moments.py), by `numba.cuda` (gpu/moments.py) and by whole-array functions
(array_api/moments.py).

- **bfloat16** is the upper half of a float32. The second moment is stored itself and not as its root: that has the same
  8 bits of precision, so the root of what is stored is twice as exact, and the range is float32's either way.
- **8 bits** are a float in which 3 bits are the mantissa, relative to the largest element of a block: a sign and 4 bits
  of exponent for the momentum, 5 for the velocity. A small offset makes the numbers near 0 evenly spaced, down to
  2^-18 of the block's scale for the momentum, and to 2^-34 for the velocity, whose root is 2^-17: what the noise can
  add to a momentum is thus at most half of what it is divided by. A velocity that is not 0 never becomes 0. A block's
  scale is a power of two, so that nothing is lost where it changes. A block that holds a NaN, or more than
  1.6e38, becomes NaN.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self
from zlib import crc32

import numpy as np

MOMENTS = ("float32", "bfloat16", "8bit")
BLOCK = 256  # elements that have one scale
SCALES = ("momentum_scale", "velocity_scale")
NARROWER = {"float32": 0, "bfloat16": 1, "8bit": 2}  # how many times the itemsize is halved
_GOLDEN = 0x9E3779B1
WEYL = 0x7FEB352D  # the step of a Weyl sequence
_SIGN, _MAGNITUDE, _NAN = 1 << 31, 0x7FFFFFFF, 0x7FC00000
_LARGEST_BFLOAT = 0x7F7F0000
_MOMENTUM_OFFSET, _VELOCITY_OFFSET = (127 - 15) << 23, (127 - 31) << 23  # 2^-15 and 2^-31, as bits
_DROPPED = 20  # bits of a float32's mantissa that 8 bits do not have
# So that an element of 1.875 times a power of two or more, and of less by the momentum's offset, has the next one for
# its scale: rounding could make 2 of it, which has no code.
_CARRY = (1 << _DROPPED) + (1 << 8)
# Exponents of powers of two, of which neither the inverse is subnormal nor the product with a beta.
_LEAST_SCALE, _MOST_SCALE = 27, 253


# What NumPy keeps them in; a complex number in one word. bfloat16 is bfloat16 where a library has it.
_WORDS = {
    ("bfloat16", False): "uint16",
    ("bfloat16", True): "uint32",
    ("8bit", False): "uint8",
    ("8bit", True): "uint16",
}
_KINDS = {(word, is_complex): kind for (kind, is_complex), word in _WORDS.items()} | {("bfloat16", False): "bfloat16"}


CODES = ("uint8", "uint16", "uint32", "int16")  # the dtypes of what are no numbers; the last is that of remainders


def stored_as(moments: str, is_complex: bool, has_bfloat: bool) -> str:
    """The dtype of moments of fewer bits, in a library that has bfloat16 or not."""
    return moments if moments == "bfloat16" and has_bfloat and not is_complex else _WORDS[moments, is_complex]


def kind_of(dtype: str, is_complex: bool) -> str:
    """What moments of a dtype are: one of `MOMENTS`."""
    return _KINDS.get((dtype, is_complex), "float32")


def blocks_of(shape: Sequence[int], is_complex: bool) -> int:
    """How many scales a variable has in 8 bits."""
    return -(-math.prod(shape) * (1 + is_complex) // BLOCK)


def check_scales(what: str, values: np.ndarray[Any, Any]) -> None:
    """Refuse what cannot be scales of blocks: powers of two, 0 where nothing was stored yet, or NaN."""
    with np.errstate(over="ignore"):
        values = values.astype(np.float32).reshape(-1)
    odd = np.flatnonzero((np.frexp(values)[0] != 0.5) & (values != 0) & ~np.isnan(values))
    if odd.size:
        raise ValueError(f"{what} holds {values[odd[0]]} at {odd[0]}; expected powers of two")


class Rounding(NamedTuple):
    """Functions of one target; words are unsigned integers of 32 bits."""

    key: Callable[..., Any]
    term: Callable[..., Any]
    noise: Callable[..., Any]
    to_bfloat: Callable[..., Any]
    from_bfloat: Callable[..., Any]
    scale_of: Callable[..., Any]
    inverse_of: Callable[..., Any]
    to_momentum: Callable[..., Any]
    from_momentum: Callable[..., Any]
    to_velocity: Callable[..., Any]
    from_velocity: Callable[..., Any]


class Alias(str):
    """A name for errors, of a variable that rounds by another one, which stays the same where this does not.

    Parameters
    ----------
    name : str
    rounded_as : str
    """

    def __new__(cls, name: str, rounded_as: str) -> Self:
        new = super().__new__(cls, name)
        new.rounded_as = rounded_as
        return new

    rounded_as: str

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return Alias, (str(self), self.rounded_as)


def name_word(name: str) -> int:
    """What stands for the name of a variable."""
    name = name.rounded_as if isinstance(name, Alias) else name
    return crc32(name.encode("utf-8", "surrogatepass"))


def make_rounding(compiled: Callable[..., Any], word: Any, bits_of: Any, number_of: Any, choose: Any) -> Rounding:
    """The functions of a target.

    Parameters
    ----------
    compiled : callable
        A decorator.
    word : callable
        Makes 32 bits of what an operation on words gives.
    bits_of, number_of : callable
        The bits of a float32, and the float32 of bits.
    choose : callable
        ``choose(condition, yes, no)``.
    """

    @compiled
    def mixed(x):  # type: ignore[no-untyped-def]
        x = word(word(x ^ (x >> word(16))) * word(0x7FEB352D))
        x = word(word(x ^ (x >> word(15))) * word(0x846CA68B))
        return word(x ^ (x >> word(16)))

    @compiled
    def key(seed, name, step):  # type: ignore[no-untyped-def]
        """A word for one variable at one step."""
        return mixed(word(mixed(word(name ^ mixed(word(seed + word(_GOLDEN))))) + word(step * word(_GOLDEN))))

    @compiled
    def term(place, key):  # type: ignore[no-untyped-def]
        """What the noise of an element is made of: a term of a Weyl sequence that begins at the key."""
        return word(word(place * word(WEYL)) + key)

    @compiled
    def noise(x):  # type: ignore[no-untyped-def]
        """32 bits for an element, from its term: half of what `mixed` does.

        Of dithers nobody asks what is asked of random numbers, and these are a tenth of all that is computed in 8 bits.
        """
        return word(word(x ^ (x >> word(15))) * word(0x846CA68B))

    @compiled
    def to_bfloat(x, bits):  # type: ignore[no-untyped-def]
        """The 16 bits of a bfloat16, rounded by 16 bits of noise.

        Nothing is added to NaN and infinities, nor to what would become one: that is cut to the largest bfloat16.
        """
        x = bits_of(x)
        bits = choose(word(x & word(_MAGNITUDE)) < word(_LARGEST_BFLOAT), bits, word(bits & word(0)))
        return word(word(x + bits) >> word(16))

    @compiled
    def from_bfloat(x):  # type: ignore[no-untyped-def]
        return number_of(word(x << word(16)))

    @compiled
    def scale_of(largest):  # type: ignore[no-untyped-def]
        """The bits of a block's scale; `largest` are those of its largest magnitude."""
        exponent = word(word(largest + word(_CARRY)) >> word(23))
        too_small = exponent < word(_LEAST_SCALE)
        scale = word(choose(too_small, word(word(exponent & word(0)) | word(_LEAST_SCALE)), exponent) << word(23))
        return choose(exponent > word(_MOST_SCALE), word(scale | word(_NAN)), scale)

    @compiled
    def inverse_of(scale):  # type: ignore[no-untyped-def]
        """The bits of 1 / scale; anything where that is NaN."""
        return word(word(254 << 23) - scale)

    # The offsets are multiples of what is dropped, so the codes are the last bits of what is left.

    @compiled
    def dithered(magnitude, inverse, offset, dither):  # type: ignore[no-untyped-def]
        return word(bits_of(magnitude * inverse + number_of(offset)) + dither)

    @compiled
    def to_momentum(x, inverse, noise):  # type: ignore[no-untyped-def]
        """8 bits, rounded by the last 20 bits of noise: the sign and 7 bits of magnitude."""
        x = bits_of(x)
        dither = word(noise & word((1 << _DROPPED) - 1))
        code = dithered(number_of(word(x & word(_MAGNITUDE))), inverse, word(_MOMENTUM_OFFSET), dither)
        code = word(code << word(24 - _DROPPED))  # all but its 7 bits, and the place of the sign, will be dropped
        return word(word(word(code & word(_MAGNITUDE)) | word(x & word(_SIGN))) >> word(24))

    @compiled
    def from_momentum(code):  # type: ignore[no-untyped-def]
        """What is to be multiplied with a block's scale."""
        spread = word(word(code ^ word(128)) - word(128))  # the sign is in all bits before the others
        spread = word(spread << word(_DROPPED))
        offset = word(word(spread & word(_SIGN)) | word(_MOMENTUM_OFFSET))
        return number_of(word(word(spread & word(127 << _DROPPED)) | offset)) - number_of(offset)

    @compiled
    def to_velocity(x, inverse, noise):  # type: ignore[no-untyped-def]
        """8 bits of magnitude, rounded by the first 20 bits of noise; at least 1 of what is not 0."""
        code = dithered(x, inverse, word(_VELOCITY_OFFSET), word(noise >> word(32 - _DROPPED)))
        code = word(code >> word(_DROPPED))
        least, bits = word((_VELOCITY_OFFSET >> _DROPPED) + 1), bits_of(x)
        least = choose(bits < least, bits, word(word(bits & word(0)) | least))  # 0, or less than the bits of any number
        return word(choose(code < least, least, code) & word(255))

    @compiled
    def from_velocity(code):  # type: ignore[no-untyped-def]
        offset = word(_VELOCITY_OFFSET)
        return number_of(word(word(code << word(_DROPPED)) + offset)) - number_of(offset)

    return Rounding(
        key,
        term,
        noise,
        to_bfloat,
        from_bfloat,
        scale_of,
        inverse_of,
        to_momentum,
        from_momentum,
        to_velocity,
        from_velocity,
    )
