"""How error messages print a value: in a few hundred characters, whatever it is."""

import reprlib
from collections.abc import Callable, Iterable
from typing import Any

_MOST = 200  # characters


class _Brief(reprlib.Repr):
    """Containers by their first entries, arrays by their shape and dtype, anything else by the ends of its repr."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 3, 4, 4, 4, 4
        self.maxstring = self.maxother = self.maxlong = _MOST

    def repr1(self, x: Any, level: int) -> str:
        try:
            shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
            if shape is not None and dtype is not None and not isinstance(x, type):
                return cut(f"<{type(x).__name__} of shape {_text(shape)}, dtype {_text(dtype)}>")
            return super().repr1(x, level)
        except Exception as error:  # an object whose own repr fails must not hide the message
            return f"<{type(x).__name__}, whose repr raises {type(error).__name__}>"

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print an integer of more than 4300 digits.
        return cut(repr(x)) if x.bit_length() < 10_000 else f"<an integer of {x.bit_length()} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        return cut(_text(x, repr))


_BRIEF = _Brief()


def brief(value: object) -> str:
    """The `repr` of a value, cut to some 200 characters; of an array its type, shape and dtype."""
    if type(value) is str and len(value) < _MOST // 2:  # nearly always: a name
        return cut(repr(value))
    return cut(_BRIEF.repr(value))


def brief_names(names: Iterable[object], most: int = 6) -> str:
    """The first of many names, and how many there are: ``['a', 'b', ... 98 more]``."""
    listed = list(names)
    shown = [cut(brief(name), _MOST // 2) for name in listed[:most]]
    if len(listed) > most:
        shown.append(f"... {len(listed) - most} more")
    return f"[{', '.join(shown)}]"


def cut(text: str, most: int = _MOST) -> str:
    """The two ends of a text that is too long."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def _text(value: object, form: Callable[[object], str] = str) -> str:
    return " ".join(form(value).split())
