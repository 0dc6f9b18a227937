"""What a minimization returns: SciPy's `OptimizeResult` where SciPy is installed, else a dict that looks like it."""

import html
from contextlib import suppress
from functools import cache
from typing import Any


class _Attributes(dict[str, Any]):
    """A dict whose items are attributes too, like SciPy's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__

    def __dir__(self) -> list[str]:
        return list(self)

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{key:>{width}}: {value!r}" for key, value in self.items())


@cache
def _result_type() -> Any:
    """Made at the first result, so that importing the package does not import SciPy."""
    base: Any = _Attributes
    with suppress(ImportError):
        from scipy.optimize import OptimizeResult

        base = OptimizeResult

    class MinimizeResult(base):  # type: ignore[misc]
        """The result of a minimization."""

        _HIDDEN = ("history", "state", "results")

        def __repr__(self) -> str:
            shown: Any = base((key, value) for key, value in self.items() if key not in self._HIDDEN)
            return base.__repr__(shown)  # type: ignore[no-any-return]

        def _repr_html_(self) -> str:
            keys = ["message", "status", "success", "fun", "x", "nit", "nfev", "njev"]
            cells = [(key, html.escape(short(str(self[key])))) for key in keys if key in self]
            rows = "".join(f"<tr><th>{key}</th><td><pre>{text}</pre></td></tr>" for key, text in cells)
            return f"<table>{rows}</table>"

        def __reduce__(self) -> Any:
            return new_result, (dict(self),)

    return MinimizeResult


def new_result(fields: dict[str, Any]) -> Any:
    """A result with these fields."""
    return _result_type()(fields)


def short(text: str, most: int = 300) -> str:
    """The start of a text."""
    return text if len(text) <= most else f"{text[:most]} ..."
