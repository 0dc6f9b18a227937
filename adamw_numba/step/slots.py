"""The arrays of the state of one variable, and what its moments are kept in."""

import math
from typing import Any

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.masters import master_dtype
from ..arrays.moments import BLOCK, SCALES, blocks_of, stored_as
from ..arrays.pieces import Piece, whole
from ..state import Slots
from .workspace import Workspace, build


def new_slots(hyper: Any, variable: Array, amsgrad: bool, name: str | None, piece: Piece | None) -> Slots:
    """Zeros for one variable, or a piece of one, and the variable itself as the master of a 16-bit one.

    Raises
    ------
    ValueError
        If its moments cannot be kept in the bits that were asked for.
    """
    moments = moments_of(hyper.moments, name, variable, piece)
    dtype, is_complex = arrays.SLOT[arrays.dtype_name(variable)], arrays.is_complex(variable)
    kept = dtype if moments == "float32" else stored_as(moments, is_complex, arrays.has_dtype(variable, moments))
    keys = ["momentum", "velocity"] + ["velocity_hat"] * amsgrad + ["average"] * hyper.use_ema
    keys += ["gradient_accumulator"] * (hyper.gradient_accumulation_steps is not None)
    slots = {key: arrays.zeros_beside(variable, kept if k < 3 else dtype, k) for k, key in enumerate(keys, 1)}
    if moments == "8bit":
        blocks = (blocks_of(variable.shape, is_complex),)
        slots |= {key: arrays.zeros_of(variable, blocks, "float32") for key in SCALES}
    kept = master_dtype(hyper.master_weights, arrays.dtype_name(variable))
    if kept:
        master = arrays.zeros_beside(variable, kept, len(slots) + 1)
        if kept == "float32":
            if arrays.is_mutable(master):
                arrays.write(master, variable)
            else:
                master = arrays.like(master, variable)
        slots["master"] = master
    return slots


def of_pieces(hyper: Any, built: Workspace, groups: int, together: Any) -> Workspace:
    """The same workspace with slots for variables that are pieces of whole ones; an error reaches all ranks."""
    named, pieces = zip(built.names, built.variables, built.slots, strict=True), together.pieces
    with together.deciding("build"):
        slots = [
            new_slots(hyper, variable, hyper.amsgrad, name, pieces[name]) if own else own
            for name, variable, own in named
        ]
        workspace = build(built.names, built.variables, slots, built.which, groups, built.given, True, pieces)
        together.agree()
    return workspace


def moments_of(asked: str, name: str | None, variable: Array, piece: Piece | None) -> str:
    """What the moments of a variable, or of a piece of one, are kept in.

    In 8 bits float32 stays for what is smaller than a block, or is not laid out in the order of its axes.

    Raises
    ------
    ValueError
        If they cannot be kept in the bits that were asked for.
    """
    if asked == "float32":
        return asked
    dtype = arrays.dtype_name(variable)
    kept = f"moments={asked!r}: variable {brief(name)}"
    if arrays.SLOT[dtype] not in ("float32", "complex64"):
        raise ValueError(f"{kept} has dtype {dtype}, whose moments have 64 bits; expected a dtype of 16 or 32")
    if asked == "bfloat16":
        return asked
    width, piece = 1 + arrays.is_complex(variable), whole(variable.shape) if piece is None else piece
    size, run = math.prod(piece.shape) * width, piece.as_run()
    if size < BLOCK:
        return "float32"
    ends = [] if run is None else [run.start[0] * width, (run.start[0] + run.own[0]) * width]
    if not ends or any(end % BLOCK and end != size for end in ends):
        raise ValueError(
            f"{kept} is a part of one of shape {piece.shape}, from {piece.start} on of shape {piece.own}; expected one "
            f"that begins and ends with a block of {BLOCK} elements"
        )
    has_memory = arrays.place(variable) is not None
    return "float32" if has_memory and not arrays.is_c_contiguous(variable) else asked
