"""Gradients that another library finds: torch, JAX, or SciPy's finite differences."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from .. import arrays
from ..arrays import Array
from ..arrays.tree import Container, rebuild
from .bounds import Bounds
from .evaluation import Evaluation, gradient_of, number_of, returned
from .workers import mapper

DIFFERENCES = ("2-point", "3-point", "cs")
LIBRARIES = ("torch", "jax")
Function = Callable[..., Any]


def by_torch(fun: Function, container: Container, leaves: Sequence[Array], rest: tuple[Any, ...]) -> Evaluation:
    """The value, and the gradients of torch's autograd; NumPy arrays are given to `fun` as tensors."""
    import torch

    copies = [arrays.like(leaf, leaf) for leaf in leaves]
    tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x.detach() for x in copies]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        value = fun(rebuild(container, tensors), *rest)
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        raise TypeError(
            f"`fun` returned {returned(value)}, which does not depend on x through torch; expected a scalar tensor, "
            "since jac='torch'"
        )
    gradients: Any = torch.autograd.grad(value, tensors, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True)]
    back = [g.numpy() if isinstance(x, np.ndarray) else g for g, x in zip(filled, leaves, strict=True)]
    return Evaluation(number_of(value.detach()), _checked(back, leaves), 1)


def by_jax(fun: Function, container: Container, leaves: Sequence[Array], rest: tuple[Any, ...]) -> Evaluation:
    """The value, and the gradients of `jax.value_and_grad`; NumPy arrays are given to `fun` as arrays of JAX."""
    import jax

    with ExitStack() as stack:
        if any(arrays.dtype_name(leaf) == "float64" for leaf in leaves):
            stack.enter_context(jax.enable_x64(True))  # JAX would round them to float32
        differentiate = jax.value_and_grad(lambda xs: fun(rebuild(container, xs), *rest))
        value, gradients = differentiate([jax.numpy.asarray(leaf) for leaf in leaves])
        return Evaluation(number_of(value), _checked(gradients, leaves), 1)


def _checked(gradients: Sequence[Any], leaves: Sequence[Array]) -> list[Array]:
    return [gradient_of("", g, x) for g, x in zip(gradients, leaves, strict=True)]


class Differences:
    """Finite differences of SciPy, and the processes that compute them.

    Parameters
    ----------
    method : {"2-point", "3-point", "cs"}
    relative_step : float or array, optional
    workers : int or map-like, optional
    bounds : list of pairs of arrays, optional
        No point outside of them is evaluated.
    """

    def __init__(self, method: str, relative_step: Any, workers: Any, bounds: Bounds | None) -> None:
        self.method, self.relative_step, self.workers, self.bounds = method, relative_step, workers, bounds
        self._stack = ExitStack()
        self._map: Any = None

    def evaluate(
        self, fun: Function, container: Container, leaves: Sequence[Array], rest: tuple[Any, ...]
    ) -> Evaluation:
        """The value and the gradients; elements whose bounds are equal are left alone."""
        from scipy.optimize._numdiff import approx_derivative

        flat = np.concatenate([np.ravel(leaf) for leaf in leaves])
        lower, upper = self._flat_bounds(flat)
        free = lower < upper
        shapes = [leaf.shape for leaf in leaves]
        function = _FlatFunction(fun, rest, container, shapes, flat, free)
        value = number_of(function(flat[free]))
        gradient, calls = np.zeros_like(flat), 1
        if free.any():
            gradient[free], info = approx_derivative(
                function,
                flat[free],
                method=self.method,
                rel_step=self.relative_step,
                f0=value,
                bounds=(lower[free], upper[free]),
                full_output=True,
                workers=self._mapper(),
            )
            calls += info["nfev"]
        return Evaluation(value, _split(gradient, shapes), calls)

    def least_calls(self, leaves: Sequence[Array]) -> int:
        """How many evaluations one gradient takes at least."""
        free = sum(leaf.size for leaf in leaves)
        if self.bounds is not None:
            free = sum(int((lower < upper).sum()) for lower, upper in self.bounds)
        return int(1 + free * (2 if self.method == "3-point" else 1))

    def close(self) -> None:
        """End the processes."""
        self._stack.close()

    def _flat_bounds(self, flat: Array) -> tuple[Array, Array]:
        if self.bounds is None:
            return np.full_like(flat, -np.inf), np.full_like(flat, np.inf)
        lower, upper = (np.concatenate([np.ravel(pair[k]) for pair in self.bounds]) for k in range(2))
        return lower, upper

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
                f"`fun` returned {returned(value)} for complex x; expected a complex number, since jac='cs' "
                "(jac='3-point' takes functions of real numbers)"
            )
        return value


def _split(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]
