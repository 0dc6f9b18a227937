"""The function to minimize, its gradient and its batches: whatever form they come in, a value and checked gradients."""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.tree import Container, matched, rebuild

DIFFERENCES = ("2-point", "3-point", "cs")
Batches = Iterable[Any] | Callable[[int], Any]


class Evaluation(NamedTuple):
    """What one iteration learns."""

    value: float
    gradients: list[Array]
    calls: int  # of `fun`


class Objective:
    """A function of arrays with its gradient.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args)``, or ``fun(x, batch, *args)`` with batches.
    jac : True, callable, "2-point", "3-point", "cs", None, "torch" or "jax"
        Where the gradient comes from.
    args : tuple
    container : array or nesting of arrays
        What ``x`` looks like.
    names : list of str
        The paths of its arrays.
    batches : iterable or callable, optional
    workers : int or map-like, optional
        For finite differences.
    relative_step : float or array, optional
        Of finite differences.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        jac: Any,
        args: tuple[Any, ...],
        container: Container,
        names: list[str],
        batches: Batches | None = None,
        workers: Any = None,
        relative_step: Any = None,
    ) -> None:
        self.fun, self.jac, self.args, self.container, self.names = fun, jac, args, container, names
        self.batches, self.workers, self.relative_step = batches, workers, relative_step
        self.bounds: list[tuple[Array, Array]] | None = None
        self.fills = jac is True and fills_gradient(fun, len(args) + (batches is not None))
        self._iterator: Iterator[Any] | None = None
        self._drawn = 0
        self._stack = ExitStack()
        self._map: Any = None

    def evaluate(self, leaves: Sequence[Array], number: int) -> Evaluation:
        """The value and the gradients at iteration `number`; the function gets copies of the arrays."""
        rest = self.args if self.batches is None else (self._batch(number), *self.args)
        if self.jac is None or self.jac in DIFFERENCES:
            return self._by_differences(leaves, rest)
        if self.jac == "torch":
            return self._by_torch(leaves, rest)
        if self.jac == "jax":
            return self._by_jax(leaves, rest)
        if self.jac is True:
            value, gradient = self._jointly(leaves, rest)
        else:
            value, gradient = self.fun(self._copies(leaves), *rest), self.jac(self._copies(leaves), *rest)
        return Evaluation(number_of(value), self._accepted(gradient, leaves), 1)

    def close(self) -> None:
        """End the processes of finite differences, and let go of the batches."""
        self._stack.close()
        self._iterator = None

    def _copies(self, leaves: Sequence[Array]) -> Container:
        return rebuild(self.container, [arrays.like(leaf, leaf) for leaf in leaves])

    def _jointly(self, leaves: Sequence[Array], rest: tuple[Any, ...]) -> tuple[Any, Any]:
        if self.fills:
            gradient = rebuild(self.container, [arrays.zeros_like(x, arrays.dtype_name(x)) for x in leaves])
            return self.fun(self._copies(leaves), gradient, *rest), gradient
        pair = self.fun(self._copies(leaves), *rest)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"`fun` returned {_brief(pair)}; expected (value, gradient), since jac=True")
        return pair[0], pair[1]

    def _accepted(self, gradient: Container, leaves: Sequence[Array]) -> list[Array]:
        if len(leaves) == 1 and not isinstance(self.container, (dict, list, tuple)):
            return [_accepted("", gradient, leaves[0])]
        ordered = matched(gradient, self.names, "the gradient")
        return [_accepted(f" of {n!r}", g, x) for n, g, x in zip(self.names, ordered, leaves, strict=True)]

    def _batch(self, number: int) -> Any:
        """The batch of an iteration; an iterable is walked again and again, from where this iteration falls."""
        if callable(self.batches):
            return self.batches(number)
        while True:
            fresh = self._iterator is None
            if self._iterator is None:
                self._iterator = iter(self.batches)  # type: ignore[arg-type]
            try:
                item = next(self._iterator)
            except StopIteration:
                if fresh:
                    raise ValueError("`batches` yields nothing; expected at least one batch") from None
                self._iterator = None
                continue
            self._drawn += 1
            if self._drawn > number:
                return item

    # Where gradients come from

    def _by_torch(self, leaves: Sequence[Array], rest: tuple[Any, ...]) -> Evaluation:
        import torch

        copies = [arrays.like(leaf, leaf) for leaf in leaves]
        tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x.detach() for x in copies]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            value = self.fun(rebuild(self.container, tensors), *rest)
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            raise TypeError(
                f"`fun` returned {_brief(value)}, which does not depend on x through torch; expected a scalar tensor, "
                "since jac='torch'"
            )
        gradients: Any = torch.autograd.grad(value, tensors, allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True)]
        back = [g.numpy() if isinstance(x, np.ndarray) else g for g, x in zip(filled, leaves, strict=True)]
        return Evaluation(
            number_of(value.detach()), [_accepted("", g, x) for g, x in zip(back, leaves, strict=True)], 1
        )

    def _by_jax(self, leaves: Sequence[Array], rest: tuple[Any, ...]) -> Evaluation:
        import jax

        with ExitStack() as stack:
            if any(arrays.dtype_name(leaf) == "float64" for leaf in leaves):
                stack.enter_context(jax.enable_x64(True))
            inputs = [jax.numpy.asarray(leaf) for leaf in leaves]
            differentiate = jax.value_and_grad(lambda xs: self.fun(rebuild(self.container, xs), *rest))
            value, gradients = differentiate(inputs)
            return Evaluation(
                number_of(value), [_accepted("", g, x) for g, x in zip(gradients, leaves, strict=True)], 1
            )

    def _by_differences(self, leaves: Sequence[Array], rest: tuple[Any, ...]) -> Evaluation:
        from scipy.optimize._numdiff import approx_derivative

        flat = np.concatenate([np.ravel(leaf) for leaf in leaves])
        lower, upper = self._flat_bounds(flat)
        free = lower < upper
        shapes = [leaf.shape for leaf in leaves]
        function = _FlatFunction(self.fun, rest, self.container, shapes, flat, free)
        value = number_of(function(flat[free]))
        gradient, calls = np.zeros_like(flat), 1
        if free.any():
            gradient[free], info = approx_derivative(
                function,
                flat[free],
                method=self.jac or "2-point",
                rel_step=self.relative_step,
                f0=value,
                bounds=(lower[free], upper[free]),
                full_output=True,
                workers=self._mapper(),
            )
            calls += info["nfev"]
        return Evaluation(value, _split(gradient, shapes), calls)

    def _flat_bounds(self, flat: Array) -> tuple[Array, Array]:
        if self.bounds is None:
            return np.full_like(flat, -np.inf), np.full_like(flat, np.inf)
        lower, upper = (np.concatenate([np.ravel(pair[k]) for pair in self.bounds]) for k in range(2))
        return lower, upper

    def _mapper(self) -> Any:
        """What maps a function over points: processes are started once."""
        if self._map is None:
            self._map = self.workers if callable(self.workers) else self._stack.enter_context(processes(self.workers))
        return self._map


class _FlatFunction(NamedTuple):
    """The function of the free elements, all in one vector; it can be sent to another process."""

    fun: Callable[..., Any]
    rest: tuple[Any, ...]
    container: Container
    shapes: list[tuple[int, ...]]
    flat: Array
    free: Array

    def __call__(self, free_elements: Array) -> Any:
        x = self.flat.astype(np.result_type(self.flat, free_elements))
        x[self.free] = free_elements
        value = self.fun(rebuild(self.container, _split(x, self.shapes)), *self.rest)
        if not np.iscomplexobj(free_elements):
            return number_of(value)
        if not np.iscomplexobj(value):
            raise TypeError(
                f"`fun` returned {_brief(value)} for complex x; expected a complex number, since jac='cs' "
                "(jac='3-point' takes functions of real numbers)"
            )
        return value


class processes:  # noqa: N801 - a function to whoever uses it
    """A map over so many processes, as a context: SciPy's `workers`; the built-in `map` for one."""

    def __init__(self, workers: int | None) -> None:
        self.workers = workers
        self.pool: Any = None

    def __enter__(self) -> Any:
        if self.workers in (None, 1):
            return map
        from concurrent.futures import ProcessPoolExecutor

        self.pool = ProcessPoolExecutor(None if self.workers == -1 else self.workers)
        return self._map_in_chunks

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def _map_in_chunks(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Any:
        items = list(items)
        count = (os.cpu_count() or 1) if self.workers in (None, -1) else self.workers
        return self.pool.map(function, items, chunksize=max(1, len(items) // (4 * count)))


def check(fun: Any, jac: Any, batches: Any, leaves: Sequence[Array]) -> None:
    """Refuse what cannot be evaluated, before anything is.

    Raises
    ------
    TypeError, ValueError
    """
    if not callable(fun):
        raise TypeError(f"`fun` is {fun!r}; expected a function")
    words = (*DIFFERENCES, "torch", "jax")
    if not (jac is None or jac is True or callable(jac) or (isinstance(jac, str) and jac in words)):
        raise ValueError(f"`jac` is {jac!r}; expected True, a function, None, or one of {', '.join(map(repr, words))}")
    if jac is None or (isinstance(jac, str) and jac in DIFFERENCES):
        _check_differences(leaves)
    if jac in ("torch", "jax"):
        _check_library(str(jac), leaves)
    if batches is not None and not callable(batches):
        if not isinstance(batches, Iterable):
            raise TypeError(f"`batches` is {batches!r}; expected an iterable, or a function of the iteration")
        if isinstance(batches, Iterator):
            raise TypeError(
                f"`batches` is {batches!r}, which can be walked only once; expected an iterable that can be walked "
                "again, or a function of the iteration"
            )


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


def fills_gradient(fun: Any, more: int) -> bool:
    """Whether a function takes one parameter more than ``(x, *args)``: the gradient that it fills."""
    return _requires(fun) == more + 2


def _requires(fun: Any) -> int | None:
    """How many positional arguments a function requires; None if that is not known or open."""
    try:
        parameters = inspect.signature(getattr(fun, "py_func", fun)).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def number_of(value: Any) -> float:
    """The value of the objective as a float.

    Raises
    ------
    TypeError
        If it is no real number.
    """
    try:
        if isinstance(value, (bool, int, float)):
            return float(value)
        size = int(np.prod(value.shape)) if hasattr(value, "shape") else None
        name = arrays.dtype_name(value) if size == 1 else ""
        if name and not name.startswith(("complex", "object", "str")):
            return float(value if value.shape == () else value.reshape(-1)[0])
    except (TypeError, AttributeError):
        pass
    except OverflowError:
        raise ValueError(f"`fun` returned {_brief(value)}; expected a number within the range of float64") from None
    raise TypeError(f"`fun` returned {_brief(value)}; expected a real number")


def _accepted(what: str, gradient: Any, x: Array) -> Array:
    """A gradient of the shape, library and dtype of its variable."""
    if not isinstance(x, np.ndarray):
        _check_shape(what, gradient, x)
        arrays.check_gradient(what.removeprefix(" of ").strip("'") or "x", gradient, x)
        return gradient
    if type(gradient) is not np.ndarray:
        if type(gradient).__module__.partition(".")[0] == "torch" and "torch" in sys.modules:
            gradient = gradient.detach()
        gradient = np.asarray(gradient)
    if gradient.dtype.kind not in "fiub":
        raise TypeError(f"the gradient{what} has dtype {gradient.dtype}; expected real numbers")
    if gradient.shape == () and x.shape == (1,):
        gradient = gradient.reshape(1)
    _check_shape(what, gradient, x)
    return gradient


def _check_shape(what: str, gradient: Any, x: Array) -> None:
    shape = tuple(getattr(gradient, "shape", ()))
    if arrays.is_array(gradient) and shape != tuple(x.shape):
        raise ValueError(f"the gradient{what} has shape {shape}; expected {tuple(x.shape)}, the shape of x")


def _split(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]


def _brief(value: Any) -> str:
    text = repr(value)
    kind = type(value).__name__
    return f"{text if len(text) <= 60 else text[:60] + '...'} of type {kind}"
