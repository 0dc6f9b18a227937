"""How error messages print a value: in a few hundred characters, whatever it is."""

import reprlib
from collections.abc import Iterable
from typing import Any

_MOST = 200  # characters


class _Brief(reprlib.Repr):
    """Containers by their first entries, arrays by their shape and dtype, anything else by the ends of its repr."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 3, 4, 4, 4, 4
        self.maxstring = self.maxother = self.maxlong = _MOST

    def repr1(self, x: Any, level: int) -> str:
        shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
        if shape is not None and dtype is not None and not isinstance(x, type):
            return _cut(f"<{type(x).__name__} of shape {_text(shape)}, dtype {_text(dtype)}>")
        return super().repr1(x, level)

    def repr_instance(self, x: Any, level: int) -> str:
        return _cut(_text(x, repr))


_BRIEF = _Brief()


def brief(value: object) -> str:
    """The `repr` of a value, cut to some 200 characters; of an array its type, shape and dtype."""
    return _cut(_BRIEF.repr(value))


def brief_names(names: Iterable[object], most: int = 5) -> str:
    """The first of many names, and how many there are: ``['a', 'b', ... 98 more]``."""
    listed = list(names)
    shown = [brief(name) for name in listed[:most]]
    if len(listed) > most:
        shown.append(f"... {len(listed) - most} more")
    return f"[{', '.join(shown)}]"


def _text(value: object, form: Any = str) -> str:
    try:
        return str(form(value))
    except Exception as error:  # an object whose own repr fails must not hide the message
        return f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"


def _cut(text: str) -> str:
    half = _MOST // 2
    return text if len(text) <= _MOST else f"{text[:half]}...{text[-half:]}"
