"""The function to minimize and its gradient: whatever form they come in, a value and checked gradients."""

import inspect
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.tree import Container, form_of, rebuild
from .batches import Batches
from .differentiation import BY_LIBRARY, DIFFERENCES, Differences
from .evaluation import Evaluation, gradient_of, gradients_of, number_of, returned
from .options import warn
from .problem import Problem

_LARGE = 2**16  # bytes
_held = SimpleNamespace(lent=np.empty(0))
_ALONE = sys.getrefcount(_held.lent)  # references that are counted where an attribute is the only one


class Objective:
    """A function of arrays with its gradient.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args)``, or ``fun(x, batch, *args)`` with batches.
    jac : True, callable, "2-point", "3-point", "cs", None, "torch" or "jax"
        Where the gradient comes from.
    args : tuple
    problem : Problem
        What ``x`` looks like, and its bounds.
    batches : iterable or callable, optional
    workers : int or map-like, optional
        For finite differences.
    relative_step, absolute_step : float or array, optional
        Of finite differences.

    Raises
    ------
    TypeError, ValueError
        If it cannot be evaluated; nothing is called.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        jac: Any,
        args: tuple[Any, ...],
        problem: Problem,
        batches: Any = None,
        workers: Any = None,
        relative_step: Any = None,
        absolute_step: Any = None,
    ) -> None:
        _check(fun, jac, problem.leaves)
        self.fun, self.jac, self.args, self.problem = fun, jac, args, problem
        self._is_one_array = type(problem.container) is np.ndarray
        self._form = form_of(problem.container, problem.names)  # of most gradients as well
        self._lent: Any = np.empty(0)
        self._fresh: Callable[[], Sequence[Array]] | None = None
        self.batches = None if batches is None else Batches(batches)
        # One parameter more than (x, batch, *args) is the gradient, to be filled.
        self.fills = jac is True and required_parameters(fun) == 2 + len(args) + (batches is not None)
        method = "2-point" if jac is None else jac
        differs = isinstance(method, str) and method in DIFFERENCES
        self._differences = Differences(method, relative_step, absolute_step, workers, problem) if differs else None
        if absolute_step is not None and not differs:
            warn("`eps` is the step of finite differences in `minimize`; AdamW's is `epsilon`.", RuntimeWarning)
        by_library = BY_LIBRARY.get(method) if isinstance(method, str) else None
        self.library = None if by_library is None else by_library()

    def evaluate(
        self, leaves: Sequence[Array], number: int, fresh: Callable[[], Sequence[Array]] | None = None
    ) -> Evaluation:
        """The value and the gradients at iteration `number`; the function gets copies of the arrays.

        Where `fresh` makes the copies, the arrays only say what they look like; not so for differences and libraries.
        """
        self._fresh = fresh
        rest = self.rest_at(number)
        container = self.problem.container
        if self._differences is not None:
            return self._differences.evaluate(self.fun, leaves, rest)
        if self.library is not None:
            value, gradients = self.library.differentiate(self.fun, container, leaves, rest)
            pairs = zip(gradients, leaves, strict=True)
            return Evaluation(number_of(value), [gradient_of("", g, x) for g, x in pairs], 1)
        if self.jac is True:
            value, gradient = self._jointly(leaves, rest)
        else:
            value, gradient = self.fun(self._copies(leaves), *rest), self.jac(self._copies(leaves), *rest)
        if self._form is not None:
            gradient = self._form.flat(gradient)
        return Evaluation(number_of(value), gradients_of(gradient, container, self.problem.names, leaves), 1)

    @property
    def is_called_with_copies(self) -> bool:
        """Whether nothing else is done with the arrays."""
        return self._differences is None and self.library is None

    def rest_at(self, number: int) -> tuple[Any, ...]:
        """What the function gets after x at iteration `number`."""
        return self.args if self.batches is None else (self.batches.at(number), *self.args)

    def least_calls(self) -> int:
        """How many evaluations of the function an iteration takes at least."""
        return 1 if self._differences is None else self._differences.least_calls()

    def fixed(self) -> list[Array] | None:
        """Where the gradient is not known; None if it is known everywhere."""
        return None if self._differences is None else self._differences.fixed()

    def close(self) -> None:
        """End the processes of finite differences, and let go of the batches."""
        if self._differences is not None:
            self._differences.close()
        if self.batches is not None:
            self.batches.close()

    def _copies(self, leaves: Sequence[Array]) -> Container:
        if self._is_one_array:  # most
            return leaves[0].copy() if leaves[0].nbytes < _LARGE else self._lend(leaves[0])
        return rebuild(self.problem.container, self._fresh() if self._fresh else map(arrays.copied, leaves))

    def _lend(self, x: Array) -> Array:
        """A copy for the function: the last one again, if nobody has kept it.

        Memory that is given back at each call is mapped again, page by page: longer than many a function takes.
        """
        if sys.getrefcount(self._lent) == _ALONE and self._lent.shape == x.shape and self._lent.flags.writeable:
            self._lent[...] = x
        else:
            self._lent = x.copy()
        return self._lent

    def _jointly(self, leaves: Sequence[Array], rest: tuple[Any, ...]) -> tuple[Any, Any]:
        if self.fills:
            zeros = [arrays.zeros_like(x, arrays.dtype_name(x)) for x in leaves]
            gradient = rebuild(self.problem.container, zeros)
            return self.fun(self._copies(leaves), gradient, *rest), gradient
        pair = self.fun(self._copies(leaves), *rest)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"`fun` returned {returned(pair)}; expected (value, gradient), since jac=True")
        return pair[0], pair[1]


def is_compiled(function: object) -> bool:
    """Whether a function is one of Numba's, without importing Numba to find out."""
    numba = sys.modules.get("numba")
    return numba is not None and isinstance(function, numba.core.dispatcher.Dispatcher)


def required_parameters(fun: Any) -> int | None:
    """How many positional arguments a function requires; None if that is not known or open."""
    try:
        parameters = inspect.signature(getattr(fun, "py_func", fun)).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def _check(fun: Any, jac: Any, leaves: Sequence[Array]) -> None:
    """Refuse what cannot be evaluated, before anything is."""
    if not callable(fun):
        raise TypeError(f"`fun` is {brief(fun)}; expected a function")
    words = (*DIFFERENCES, *BY_LIBRARY)
    if not (jac is None or jac is True or callable(jac) or (isinstance(jac, str) and jac in words)):
        raise ValueError(
            f"`jac` is {brief(jac)}; expected True, a function, None, or one of {', '.join(map(repr, words))}"
        )
    if jac is None or (isinstance(jac, str) and jac in DIFFERENCES):
        _check_differences(leaves)
    if isinstance(jac, str) and jac in BY_LIBRARY:
        _check_library(jac, leaves)


def _check_differences(leaves: Sequence[Array]) -> None:
    if not all(isinstance(leaf, np.ndarray) for leaf in leaves):
        library = next(arrays.library_name(leaf) for leaf in leaves if not isinstance(leaf, np.ndarray))
        raise ValueError(
            f"`jac` is None or finite differences, which need NumPy arrays, while x0 is an array of {library}; "
            "expected jac=True or a function (or jac='torch' or 'jax' for their arrays)"
        )
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise ImportError(
            "finite differences (jac=None) need SciPy: pip install 'adamw-numba[scipy]'; or give jac=True or a function"
        ) from None


def _check_library(wanted: str, leaves: Sequence[Array]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, np.ndarray) and arrays.library_name(leaf) != wanted:
            raise TypeError(
                f"`jac` is {wanted!r}, while x0 is an array of {arrays.library_name(leaf)}; expected one of {wanted} "
                "or NumPy"
            )
        if leaf.dtype == np.longdouble:
            raise TypeError(f"x0 has dtype {leaf.dtype}; expected float32 or float64")
