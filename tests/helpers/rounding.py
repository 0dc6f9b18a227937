"""The rounding of moments of fewer bits, in Python's integers and NumPy's float64."""

import zlib

import numpy as np

from adamw_numba.arrays import as_numpy

BLOCK = 256
MASK = 0xFFFFFFFF


def mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


def noise(seed, name, step, places):
    golden = 0x9E3779B1
    key = mixed(mixed(zlib.crc32(name.encode()) ^ mixed(seed + golden & MASK)) + step * golden & MASK)
    found = []
    for place in places:
        x = place * 0x7FEB352D + key & MASK
        found.append((x ^ (x >> 15)) * 0x846CA68B & MASK)
    return np.array(found, np.int64)


def rounded(values, spacing, noise, bits):
    """Down to a multiple of a power of two, or up where what is lost and the noise make one."""
    exact = np.abs(values.astype(np.float64)) / spacing
    lost = np.floor((exact - np.floor(exact)) * 2**bits)
    return np.sign(values) * (np.floor(exact) + (lost + noise >= 2**bits)) * spacing


def as_bfloat(values, noise):
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 2.0**-126).astype(np.float64))) - 7)
    return rounded(values, spacing, noise, 16)


def as_bytes(values, largest, noise, offset):
    """Floats with 3 bits of mantissa, of the magnitude and an offset in units of a power of two."""
    scale = 2.0 ** np.floor(np.log2(np.maximum(np.float64(largest), 2.0**-100)))
    scale = np.where(np.float64(largest) / scale >= 1.875 - 2.0**-15, 2 * scale, scale)
    moved = (np.abs(values) / np.float32(scale) + np.float32(offset)).astype(np.float32)
    spacing = 2.0 ** (np.floor(np.log2(moved.astype(np.float64))) - 3)
    found = rounded(moved, spacing, noise, 20) - offset
    if offset < 2.0**-20:  # of a velocity, nothing that is not 0 becomes 0
        found = np.where((found == 0) & (values > 0), offset / 8, found)
    return np.sign(values) * found * scale


def numbers(optimizer, name):
    """The moments as float64, from their bits."""
    found = []
    for key, offset, first in (("momentum", 2.0**-15, 15), ("velocity", 2.0**-31, 31)):
        bits = as_numpy(optimizer.state[f"{key}/{name}"])
        if bits.dtype == np.uint16:
            found.append((bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64).ravel())
            continue
        sign = np.where(bits >= 128, -1.0, 1.0) if key == "momentum" else 1.0
        code = (bits & 127 if key == "momentum" else bits).astype(int)
        number = (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - first) - offset
        scales = np.repeat(as_numpy(optimizer.state[f"{key}_scale/{name}"]), BLOCK)[: bits.size]
        found.append((sign * number).ravel() * scales)
    return found
