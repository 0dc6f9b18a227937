"""Moments in 16 and 8 bits by whole-array functions: the same bits of the same numbers as compiled kernels make."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import array_api_compat

from ..arrays import Array, dtype_name, is_complex, namespace
from ..arrays.moments import BLOCK, Rounding, kind_of, make_rounding, name_word
from ..arrays.pieces import places_of, whole
from ..update import Coefficients
from .words import MASK, bindings, bits_of, number_of, word_of, words

Slots = dict[str, Array]


class Noise(NamedTuple):
    """What the rounding of the moments of one variable follows from at one step."""

    key: Any
    places: Any = None  # see `pieces.places_of`; None for a whole variable


def noise_of(seed: int, name: str, number: Any, places: Any = None) -> Noise:
    """The noise of a variable at a step, whose number may be traced."""
    if isinstance(number, int):
        key = make_rounding(lambda f: f, lambda x: x & MASK, None, None, None).key
        return Noise(key(seed, name_word(name), number & MASK), places)
    xp = namespace(number)
    rounding = _rounding_of(xp)
    return Noise(rounding.key(*(words(xp, x) for x in (seed, name_word(name), number))), places)


def kind(p: Array, slots: Slots) -> str:
    """What the moments of a variable are kept in."""
    return kind_of(dtype_name(slots["momentum"]), is_complex(p))


def brought_in(p: Array, slots: Slots) -> Slots:
    """The slots with moments as numbers, in float32."""
    moments = kind(p, slots)
    if moments == "float32":
        return slots
    xp = namespace(p)
    rounding = _rounding_of(xp)
    wide = {}
    for key, from_code in (("momentum", rounding.from_momentum), ("velocity", rounding.from_velocity)):
        codes = _flat_words(xp, slots[key], moments, is_complex(p))
        if moments == "bfloat16":
            values = rounding.from_bfloat(codes)
        else:
            values = _flat(from_code(_blocks(xp, codes)) * slots[f"{key}_scale"][:, None], codes.shape[0])
        wide[key] = _of_reals(xp, values, p)
    return slots | wide


def rounded(
    p: Array,
    g: Array,
    before: Slots,
    after: Slots,
    noise: Noise,
    bounds: Callable[..., Any],
    c: Coefficients,
) -> Slots:
    """The slots as they are kept; `bounds` is the formula, which `c` are for.

    Parameters
    ----------
    before, after : dict
        Before the step, as they are kept, and after it, with moments as numbers.
    """
    moments = kind(p, before)
    if moments == "float32":
        return after
    xp = namespace(p)
    rounding = _rounding_of(xp)
    bits = rounding.noise(rounding.term(_places(xp, p, noise.places), words(xp, noise.key)))
    if moments == "bfloat16":
        return after | _in_16_bits(p, after, before, word_of(xp, bits & words(xp, 0xFFFF)), bits >> words(xp, 16))
    bits = _blocks(xp, bits)
    return after | _in_8_bits(p, after, before, _largest(xp, p, g, before, bounds, c), bits, bits)


def narrowed(p: Array, numbers: Slots, like: Slots) -> Slots:
    """Moments that are numbers as slots keep them, which only lend their dtypes; rounded to the nearest."""
    moments, xp = kind(p, like), namespace(p)
    if moments == "float32":
        return numbers
    if moments == "bfloat16":
        return numbers | _in_16_bits(p, numbers, like, *(words(xp, 1 << 15) for _ in range(2)))
    largest = [_magnitude(xp, _blocks(xp, _reals(xp, numbers[key]))) for key in ("momentum", "velocity")]
    return numbers | _in_8_bits(p, numbers, like, largest, words(xp, 1 << 19), words(xp, 1 << 31))


def _in_16_bits(p: Array, numbers: Slots, like: Slots, *noises: Any) -> Slots:
    xp, made = namespace(p), {}
    for key, noise in zip(("momentum", "velocity"), noises, strict=True):
        code = _rounding_of(xp).to_bfloat(_reals(xp, numbers[key]), noise)
        made[key] = _kept(xp, code, like[key], is_complex(p), 16)
    return made


def _in_8_bits(p: Array, numbers: Slots, like: Slots, largest: Sequence[Any], *noises: Any) -> Slots:
    """With the scales that follow from what no element of a block exceeds."""
    xp, made = namespace(p), {}
    rounding = _rounding_of(xp)
    to_codes = rounding.to_momentum, rounding.to_velocity
    for key, most, noise, to_code in zip(("momentum", "velocity"), largest, noises, to_codes, strict=True):
        x, scale = _reals(xp, numbers[key]), rounding.scale_of(bits_of(xp, most))
        code = to_code(_blocks(xp, x), number_of(xp, rounding.inverse_of(scale))[:, None], noise)
        made[key] = _kept(xp, _flat(code, x.shape[0]), like[key], is_complex(p), 8)
        made[f"{key}_scale"] = number_of(xp, scale)
    return made


def _largest(xp: Any, p: Array, g: Array, slots: Slots, bounds: Callable[..., Any], c: Coefficients) -> tuple[Any, Any]:
    """What no element of a block can exceed: see cpu/moments.py."""
    rounding, largest = _rounding_of(xp), {}
    for key, mask, from_code in (("momentum", 127, rounding.from_momentum), ("velocity", 255, rounding.from_velocity)):
        codes = _blocks(xp, _flat_words(xp, slots[key], "8bit", is_complex(p))) & words(xp, mask)
        largest[key] = from_code(xp.max(codes, axis=1)) * slots[f"{key}_scale"]
    total = slots.get("gradient_accumulator")
    up = xp.where(xp.asarray(c.scale) < 0, -1.0, 1.0) if hasattr(c.scale, "shape") else math.copysign(1.0, c.scale)
    largest_g, largest_total = (
        None if x is None else _magnitude(xp, _blocks(xp, _reals(xp, x))) * xp.asarray(up, dtype=xp.float32)
        for x in (g, total)
    )
    return bounds(largest_g, largest["momentum"], largest["velocity"], largest_total)  # type: ignore[no-any-return]


def _magnitude(xp: Any, blocks: Array) -> Array:
    """The largest magnitude of each row, by their bits: those of a NaN are larger than all others."""
    bits = bits_of(xp, blocks) & words(xp, 0x7FFFFFFF)
    return number_of(xp, xp.max(bits, axis=1))


@cache
def _rounding_of(xp: Any) -> Rounding:
    return make_rounding(*bindings(xp))


# Arrays as rows of real numbers, in the order of the axes


def _reals(xp: Any, x: Array) -> Array:
    if is_complex(x):
        x = xp.stack([xp.real(x), xp.imag(x)], axis=-1)
    return xp.reshape(x, (-1,))


def _of_reals(xp: Any, values: Array, p: Array) -> Array:
    if not is_complex(p):
        return xp.reshape(values, p.shape)
    pairs = xp.reshape(values, (*p.shape, 2))
    return xp.astype(pairs[..., 0], xp.complex64) + xp.astype(pairs[..., 1], xp.complex64) * 1j


def _flat_words(xp: Any, kept: Array, moments: str, pairs: bool) -> Array:
    """The codes of a slot, one after the other."""
    if dtype_name(kept) == "bfloat16":
        kept = kept.view(xp.int16 if array_api_compat.is_torch_namespace(xp) else xp.uint16)
    bits = {"bfloat16": 16, "8bit": 8}[moments]
    codes = words(xp, xp.reshape(kept, (-1,))) & words(xp, (1 << bits * (1 + pairs)) - 1)
    if pairs:
        codes = xp.stack([codes & words(xp, (1 << bits) - 1), codes >> words(xp, bits)], axis=-1)
    return xp.reshape(codes, (-1,))


def _kept(xp: Any, codes: Array, like: Array, pairs: bool, bits: int) -> Array:
    """Codes as a slot keeps them."""
    if pairs:
        codes = xp.reshape(codes, (-1, 2))
        codes = codes[:, 0] | (codes[:, 1] << words(xp, bits))
    if dtype_name(like) == "bfloat16":
        codes = number_of(xp, codes << words(xp, 16))  # a float32 that bfloat16 holds
    return xp.reshape(xp.astype(codes, like.dtype), like.shape)


def _blocks(xp: Any, x: Array) -> Array:
    """Blocks as rows, the last one filled up with zeros."""
    short = -x.shape[0] % BLOCK
    if short:
        x = xp.concat([x, xp.zeros((short,), dtype=x.dtype)])
    return xp.reshape(x, (-1, BLOCK))


def _flat(blocks: Array, count: int) -> Array:
    return namespace(blocks).reshape(blocks, (-1,))[:count]


def _places(xp: Any, p: Array, places: Any) -> Array:
    """Where the elements are in the whole variable, in real numbers; from 2^32 on counted from 0 again."""
    first, steps = places_of(whole(p.shape)) if places is None else places
    shape, width = tuple(p.shape), 1 + is_complex(p)
    result = words(xp, width * first & MASK)
    for k, (size, step) in enumerate(zip(shape, steps, strict=True)):
        along = words(xp, xp.arange(size)) * words(xp, width * step & MASK)
        result = word_of(xp, result + xp.reshape(along, (size, *[1] * (len(shape) - k - 1))))
    # Of the shape of the variable and, where JAX has meshes whose axes are explicit, divided like it.
    result = xp.zeros_like(p, dtype=words(xp, xp.zeros(1)).dtype) + result
    if width == 2:
        result = xp.stack([result, word_of(xp, result + words(xp, 1))], axis=-1)
    return words(xp, xp.reshape(result, (-1,)))
