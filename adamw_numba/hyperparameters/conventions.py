"""Other libraries' AdamW by their own arguments and defaults: paste the call, and get the numbers.

What the libraries do differently is in the arguments of `AdamW`; here they are only translated.
"""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from ..arrays.brief import brief
from ..arrays.torch_graphs import outside_graphs
from .groups import Override


@outside_graphs(traced=())
class Conventional:
    """An optimizer with the arguments of `AdamW` that can be made by those of other libraries."""

    hyper: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Leave variables out of weight decay: see `AdamW.exclude_from_weight_decay`."""
        raise NotImplementedError

    @classmethod
    def like_torch(
        cls,
        *params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Any = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        **kwargs: Any,
    ) -> Self:
        """An optimizer that does what `torch.optim.AdamW` does with these arguments.

        The arrays go to `build`. ``foreach``, ``capturable``, ``differentiable`` and ``fused`` are accepted, and mean
        nothing here.

        Parameters
        ----------
        *params
            None: torch takes its parameters here, and an error says where they go.
        lr : float, schedule or callable, default 0.001
        betas : pair of float
        eps : float, default 1e-8
            Added after the bias correction.
        weight_decay : float, schedule or callable, default 0.01
            Multiplied by the learning rate.
        amsgrad, maximize : bool
        **kwargs
            Further arguments of `AdamW`.

        Examples
        --------
        >>> from adamw_numba import AdamW
        >>> AdamW.like_torch(lr=3e-4, betas=(0.9, 0.95)).get_config()["epsilon_mode"]
        'corrected'
        """
        if params:
            raise TypeError(
                f"`like_torch` was given {brief(params[0])}; expected keywords alone: parameters go to `build`, those "
                "of groups to `override`"
            )
        _check_fixed("like_torch", kwargs, ("epsilon_mode", "decouple_lr"))
        for name in ("foreach", "capturable", "differentiable", "fused"):
            kwargs.pop(name, None)
        beta_1, beta_2 = pair("betas", betas)
        return cls(
            lr, weight_decay, beta_1, beta_2, eps, amsgrad, maximize=maximize, epsilon_mode="corrected", **kwargs
        )

    @classmethod
    def like_optax(
        cls,
        learning_rate: Any,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
        eps_root: float = 0.0,
        mu_dtype: Any = None,
        weight_decay: Any = 1e-4,
        mask: Any = None,
        *,
        nesterov: bool = False,
        **kwargs: Any,
    ) -> Self:
        """An optimizer that does what `optax.adamw` does with these arguments.

        Parameters
        ----------
        learning_rate : float, schedule or callable
            Of the step, as in optax: its own schedules are callables.
        b1, b2 : float
        eps : float, default 1e-8
            Added after the bias correction.
        eps_root : float
            0, since nothing is added under the square root here.
        mu_dtype : None
            ``moments`` says what both moments are kept in.
        weight_decay : float, schedule or callable, default 0.0001
            Multiplied by the learning rate.
        mask : dict or list of bool, optional
            Nested like the parameters: False leaves one, or all below it, out of the decay.
        nesterov : bool
        **kwargs
            Further arguments of `AdamW`.
        """
        _check_fixed("like_optax", kwargs, ("epsilon_mode", "decouple_lr"))
        if eps_root:
            raise ValueError(f"`eps_root` is {brief(eps_root)}; expected 0: nothing is added under the root here")
        if mu_dtype is not None:
            raise ValueError(f"`mu_dtype` is {brief(mu_dtype)}; expected None: `moments` says what both are kept in")
        if callable(mask):
            raise TypeError(f"`mask` is {brief(mask)}; expected what it returns for your parameters")
        optimizer = cls(learning_rate, weight_decay, b1, b2, eps, nesterov=nesterov, epsilon_mode="corrected", **kwargs)
        unmasked = () if mask is None else tuple(_unmasked(mask, ""))
        if unmasked:
            own = {"weight_decay": 0.0}
            optimizer.hyper.overrides = [Override([], [], own, beneath=unmasked, is_exclusion=True)]
        return optimizer

    @classmethod
    def like_tfa(
        cls,
        weight_decay: Any,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        name: str = "AdamW",
        *,
        exclude_from_weight_decay: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """An optimizer that does what `tfa.optimizers.AdamW` of TensorFlow Addons does with these arguments.

        Parameters
        ----------
        weight_decay : float, schedule or callable
            **Not** multiplied by the learning rate: with a schedule on it, and the same one on the learning rate, this
            is Loshchilov & Hutter (2019), algorithm 2 (see `schedules.scaled`).
        learning_rate : float, schedule or callable, default 0.001
        beta_1, beta_2 : float
        epsilon : float, default 1e-7
            Added before the bias correction.
        amsgrad : bool
        name : str
        exclude_from_weight_decay : list of str, optional
            Regular expressions for the names of variables.
        **kwargs
            Further arguments of `AdamW`.
        """
        _check_fixed("like_tfa", kwargs, ("epsilon_mode", "decouple_lr"))
        optimizer = cls(
            learning_rate, weight_decay, beta_1, beta_2, epsilon, amsgrad, name=name, decouple_lr=True, **kwargs
        )
        if exclude_from_weight_decay is not None:
            optimizer.exclude_from_weight_decay(var_names=exclude_from_weight_decay)
        return optimizer


def _check_fixed(what: str, given: dict[str, Any], fixed: tuple[str, ...]) -> None:
    """Refuse what a convention has decided."""
    found = [name for name in fixed if name in given]
    if found:
        raise TypeError(f"`{found[0]}` is what `{what}` decides; expected it without, or `AdamW(...)` itself")


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """Check that there are two values; what they are is checked where they are used."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"`{name}` is {brief(value)}; expected a pair of floats")
    return value[0], value[1]


def _unmasked(mask: Any, path: str) -> Iterable[str]:
    """The paths of what a mask leaves out, with all that is below them."""
    if isinstance(mask, (bool, np.bool_)):
        if not mask:
            yield path
        return
    if not isinstance(mask, (dict, list, tuple)):
        raise TypeError(f"`mask` holds {brief(mask)}; expected booleans, nested like the parameters")
    for key, child in mask.items() if isinstance(mask, dict) else enumerate(mask):
        yield from _unmasked(child, f"{path}/{key}" if path else str(key))
