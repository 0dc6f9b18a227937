"""Gradients that another library finds: torch, JAX, or SciPy's finite differences."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.brief import brief
from ..arrays.tree import Container, rebuild
from .evaluation import Evaluation, number_of, returned
from .options import warn
from .problem import Problem
from .workers import check_workers, mapper

DIFFERENCES = ("2-point", "3-point", "cs")
Function = Callable[..., Any]


class ByTorch:
    """Values and gradients of torch's autograd; NumPy arrays are given to the function as tensors."""

    def differentiate(
        self, fun: Function, container: Container, leaves: Sequence[Array], rest: tuple[Any, ...]
    ) -> tuple[Any, list[Array]]:
        """What the function returns, and the gradients of its sum: of many values, each depends on a row of x alone."""
        import torch

        copies = [arrays.copied(leaf) for leaf in leaves]
        tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x.detach() for x in copies]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            value = fun(rebuild(container, tensors), *rest)
            total = value.sum() if isinstance(value, torch.Tensor) else value
        if not any(tensor.numel() for tensor in tensors):  # of a process without unknowns
            return total, copies
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            raise TypeError(
                f"`fun` returned {returned(value)}, which does not depend on x through torch; expected a tensor, since "
                "jac='torch'"
            )
        gradients: Any = torch.autograd.grad(total, tensors, allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True)]
        return value.detach(), [
            g.numpy() if isinstance(x, np.ndarray) else g for g, x in zip(filled, leaves, strict=True)
        ]


class ByJax:
    """Values and gradients of `jax.value_and_grad`; NumPy arrays are given to the function as arrays of JAX.

    The function is traced once a run, as `jax.jit` does. One that cannot be (it branches on a value, say) is
    differentiated again at each call.
    """

    def __init__(self) -> None:
        self._jitted: Any = None
        self._others: Any = None  # what is no array among the further arguments, as it was when the function was traced
        self._is_traceable = True

    def differentiate(
        self, fun: Function, container: Container, leaves: Sequence[Array], rest: tuple[Any, ...]
    ) -> tuple[Any, list[Array]]:
        """What the function returns, and the gradients of its sum: of many values, each depends on a row of x alone."""
        import jax

        with ExitStack() as stack:
            if any(arrays.dtype_name(leaf) == "float64" for leaf in leaves):
                stack.enter_context(jax.enable_x64(True))  # JAX would round them to float32
            (_, value), gradients = self._differentiated(fun, container, list(leaves), rest)
            return value, gradients

    def _differentiated(self, fun: Function, container: Container, xs: list[Any], rest: tuple[Any, ...]) -> Any:
        import jax

        if self._is_traceable:
            given, structure = jax.tree.flatten(rest)
            traced = [isinstance(one, (np.ndarray, jax.Array)) for one in given]
            others = (structure, [None if is_array else one for one, is_array in zip(given, traced, strict=True)])
            if self._jitted is None:
                self._others, self._jitted = others, jax.jit(_with_gradient(fun, container, others, traced))
            try:
                if _are_same(others, self._others):
                    return self._jitted(xs, [one for one, is_array in zip(given, traced, strict=True) if is_array])
            except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
                self._is_traceable = False
        return _summed_gradient(fun, container, [jax.numpy.asarray(x) for x in xs], rest)


def _summed_gradient(fun: Function, container: Container, xs: list[Any], rest: tuple[Any, ...]) -> Any:
    import jax

    def total(xs: list[Any]) -> Any:
        value = fun(rebuild(container, xs), *rest)
        return jax.numpy.sum(value), value

    return jax.value_and_grad(total, has_aux=True)(xs)


def _with_gradient(fun: Function, container: Container, others: tuple[Any, list[Any]], traced: list[bool]) -> Function:
    """The function to trace: of the arrays of x, and of those among the further arguments."""
    import jax

    structure, constants = others

    def value_and_gradients(xs: list[Any], given: list[Any]) -> Any:
        following = iter(given)
        rest = [next(following) if is_array else one for one, is_array in zip(constants, traced, strict=True)]
        arguments = jax.tree.unflatten(structure, rest)
        return _summed_gradient(fun, container, xs, arguments)

    return value_and_gradients


def _are_same(one: tuple[Any, list[Any]], other: tuple[Any, list[Any]]) -> bool:
    """Whether further arguments differ in arrays only; equal numbers of two types are not the same."""
    if one[0] != other[0]:
        return False
    pairs = zip(one[1], other[1], strict=True)
    return all(a is b or (isinstance(a, (int, float)) and type(a) is type(b) and a == b) for a, b in pairs)


BY_LIBRARY: dict[str, Any] = {"torch": ByTorch, "jax": ByJax}


class Differences:
    """Finite differences of SciPy, and the processes that compute them.

    Parameters
    ----------
    method : {"2-point", "3-point", "cs"}
    relative_step, absolute_step : float or array, optional
        At most one of them.
    workers : int or map-like, optional
    problem : Problem
        No point outside of its bounds is evaluated.

    Raises
    ------
    TypeError, ValueError
        If a step or `workers` cannot be used.
    """

    def __init__(self, method: str, relative_step: Any, absolute_step: Any, workers: Any, problem: Problem) -> None:
        self.method, self.workers, self._container = method, workers, problem.container
        check_workers(workers)
        leaves = problem.leaves
        self._shapes, self._dtypes = [leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves]
        flat = _flat(leaves)
        self._lower, self._upper = np.full_like(flat, -np.inf), np.full_like(flat, np.inf)
        if problem.bounds is not None:
            self._lower, self._upper = map(_flat, zip(*problem.bounds, strict=True))
        self._free = self._lower < self._upper  # the others have no derivative
        self._relative = self._step("finite_diff_rel_step", relative_step)
        self._absolute = self._step("eps", absolute_step)
        if relative_step is not None and absolute_step is not None:
            raise ValueError(
                f"`finite_diff_rel_step` is {brief(relative_step)} and `eps` is {brief(absolute_step)}; expected one "
                "of them: a relative or an absolute step"
            )
        self._stack = ExitStack()
        self._map: Any = None
        self._has_warned = False

    def _step(self, name: str, step: Any) -> Any:
        """A step for all free elements, or one for each of them."""
        if step is None:
            return None
        count = self._free.size
        try:
            given = np.asarray(step, np.float64)
        except (TypeError, ValueError, OverflowError):
            given = np.array(np.nan)
        if given.shape not in ((), (1,), (count,)) or not np.isfinite(given).all():
            raise ValueError(
                f"`{name}` is {brief(step)}; expected a finite number, or one for each of the {count} elements"
            )
        return np.broadcast_to(given, count)[self._free]

    def evaluate(self, fun: Function, leaves: Sequence[Array], rest: tuple[Any, ...]) -> Evaluation:
        """The value and the gradients; those of elements whose bounds are equal are 0."""
        from scipy.optimize._numdiff import approx_derivative

        flat, free = _flat(leaves), self._free
        function = _FlatFunction(fun, rest, self._container, self._shapes, self._dtypes, flat, free)
        value = function(flat[free])
        gradient, calls = np.zeros_like(flat), 1
        if free.any():
            gradient[free], info = approx_derivative(
                function,
                flat[free],
                method=self.method,
                rel_step=self._relative,
                abs_step=self._absolute_steps(flat[free], value),
                f0=value,
                bounds=(self._lower[free], self._upper[free]),
                full_output=True,
                workers=self._mapper(),
            )
            calls += info["nfev"]
            self._look_at(gradient[free])
        return Evaluation(float(value), _split(gradient, self._shapes), calls)

    def _absolute_steps(self, x: Array, value: Any) -> Any:
        """The steps, where SciPy cannot know that some elements are rounded to float32; else those asked for."""
        if len(set(self._dtypes)) == 1 or self._absolute is not None:
            return self._absolute
        sizes = [math.prod(shape) for shape in self._shapes]
        precision = [max(np.finfo(dtype).eps, np.finfo(np.asarray(value).dtype).eps) for dtype in self._dtypes]
        least = np.repeat(precision, sizes)[self._free] ** (1 / 3 if self.method == "3-point" else 1 / 2)
        size = np.maximum(np.abs(x), 1.0) * least if self._relative is None else np.abs(x) * self._relative
        steps = np.where(x >= 0, 1.0, -1.0) * np.where(size == 0, least, size)
        ends = np.zeros_like(self._lower)
        ends[self._free] = x + steps
        rounded = [part.astype(dtype) for part, dtype in zip(_split(ends, self._shapes), self._dtypes, strict=True)]
        return _flat(rounded)[self._free].astype(np.float64) - x  # the steps that are really taken

    def _look_at(self, gradient: Array) -> None:
        if not self._has_warned and not gradient.any():
            self._has_warned = True
            warn(
                "All finite differences of `fun` are exactly 0: if its value is rounded (to float32, or in a file), "
                "give a larger step as `finite_diff_rel_step` or `eps`.",
                RuntimeWarning,
            )

    def fixed(self) -> list[Array]:
        """Where the gradient is not known, since the bounds are equal."""
        return _split(~self._free, self._shapes)

    def least_calls(self) -> int:
        """How many evaluations a value and its gradient take at least."""
        return int(1 + self._free.sum() * (2 if self.method == "3-point" else 1))

    def close(self) -> None:
        """End the processes."""
        self._stack.close()

    def _mapper(self) -> Any:
        """What maps a function over points: processes are started once, for all iterations."""
        if self._map is None:
            self._map = self._stack.enter_context(mapper(self.workers))
        return self._map


class _FlatFunction(NamedTuple):
    """The function of the free elements, all in one vector; unlike a closure, it can be sent to another process."""

    fun: Function
    rest: tuple[Any, ...]
    container: Container
    shapes: list[tuple[int, ...]]
    dtypes: list[Any]
    flat: Array
    free: Array

    def __call__(self, free_elements: Array) -> Any:
        is_complex = np.iscomplexobj(free_elements)
        x = self.flat.astype(np.result_type(self.flat, free_elements))
        x[self.free] = free_elements
        parts = _split(x, self.shapes)
        if len(set(self.dtypes)) > 1:
            dtypes = [np.result_type(dtype, np.complex64) if is_complex else dtype for dtype in self.dtypes]
            parts = [part.astype(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        value = self.fun(rebuild(self.container, parts), *self.rest)
        if not is_complex:
            return _in_its_precision(value)
        if not np.iscomplexobj(value):
            raise TypeError(
                f"`fun` returned {returned(value)} for complex x; expected a complex number, since jac='cs' "
                "(jac='3-point' takes functions of real numbers)"
            )
        return value


def _in_its_precision(value: Any) -> Any:
    """A float, or what tells SciPy that the value was rounded, so that it takes larger steps."""
    number = number_of(value)
    name = arrays.dtype_name(value) if hasattr(value, "dtype") else ""
    return np.dtype(name).type(number) if name in ("float16", "float32") else number


def _flat(leaves: Sequence[Array]) -> Array:
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def _split(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]
