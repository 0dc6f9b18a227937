"""What is known of arguments when a user's function is compiled: their types, and the values of literals."""

from numba import types
from numba.core.errors import TypingError

from ..cpu.kernels import on

MODES = ("hat", "corrected")  # of epsilon


def is_none(kind):
    """Whether an argument is None, given or by default."""
    return kind is None or isinstance(kind, types.NoneType) or getattr(kind, "value", kind) is None


def unliteral(kind):
    """The type of an argument, or the value that it has by default."""
    return (
        kind.value
        if isinstance(kind, types.Omitted)
        else types.unliteral(kind)
        if isinstance(kind, types.Type)
        else kind
    )


def literal(name, kind, expected):
    """The value of an argument that has to be a literal."""
    if isinstance(kind, (types.Literal, types.Omitted)):
        return kind.literal_value if isinstance(kind, types.Literal) else kind.value
    if isinstance(kind, types.Type):
        raise TypingError(f"`{name}` is a variable ({kind}); expected {expected}, written out in the call")
    return kind


def flag(name, kind):
    """A flag that has to be a literal, as `on` gives it."""
    value = literal(name, kind, "True or False")
    if not isinstance(value, bool):
        raise TypingError(f"`{name}` is {value!r}; expected True or False")
    return on(value)


def literal_mode(kind):
    value = literal("epsilon_mode", kind, "'hat' or 'corrected'")
    if value not in MODES:
        raise TypingError(f"`epsilon_mode` is {value!r}; expected 'hat' or 'corrected'")
    return value == "corrected"


def check_numbers(**kinds):
    """Refuse what is no number; an array of no dimensions is one, as in Python."""
    for name, given in kinds.items():
        kind = unliteral(given)
        kind = kind.dtype if isinstance(kind, types.Array) and kind.ndim == 0 else kind
        if not isinstance(kind, (types.Integer, types.Float, int, float)):
            raise TypingError(f"`{name}` is {kind}; expected a number")


def check_step(number, clipvalue, **numbers):
    """Refuse a step's numbers where they are none."""
    kind = unliteral(number)
    if not isinstance(kind, types.Integer):
        raise TypingError(f"`number` is {kind}; expected an integer")
    check_numbers(**numbers, **({} if is_none(clipvalue) else {"clipvalue": clipvalue}))
