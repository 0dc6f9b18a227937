"""Moments of fewer bits in trees: what was asked for in optax's words or in ours, and what is kept of each leaf."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ..array_api import moments as whole_arrays
from ..arrays import Array, dtype_name
from ..arrays.brief import brief
from ..step.slots import new_slots
from . import trees

KEPT = {"mu": "momentum", "nu": "velocity", "mu_scale": "momentum_scale", "nu_scale": "velocity_scale"}
SCALES = ("mu_scale", "nu_scale")


def asked(mu_dtype: Any, nu_dtype: Any, moments: str) -> tuple[str, dict[str, Any]]:
    """What moments are kept in by our own word, and the dtypes that they are rounded to by JAX: see `adamw`."""
    given = {"mu": mu_dtype, "nu": nu_dtype}
    dtypes = {key: None if dtype is None else trees.real_dtype(f"{key}_dtype", dtype) for key, dtype in given.items()}
    mu, nu = (None if dtype is None else dtype.name for dtype in dtypes.values())
    both = f"`mu_dtype` is {brief(mu)} and `nu_dtype` is {brief(nu)}"
    if moments == "float32" and nu in (None, "float32"):
        return moments, dtypes
    if moments in ("float32", "bfloat16") and mu == nu == "bfloat16":
        return "bfloat16", {}
    if moments == "float32":
        raise ValueError(f"{both}; expected `nu_dtype` None or float32, or bfloat16 for both")
    if mu or nu:
        raise ValueError(f"{both} beside moments={moments!r}; expected None for both")
    return moments, {}


def zeros(moments: str, name: str, leaf: Array) -> dict[str, Array]:
    """The moments of a parameter by the fields of the state, and their scales where it has some.

    Raises
    ------
    ValueError
        If they cannot be kept in the bits that were asked for.
    """
    alone = SimpleNamespace(moments=moments, use_ema=False, gradient_accumulation_steps=None, master_weights=False)
    slots = new_slots(alone, leaf, False, name, None)
    return {field: slots[ours] for field, ours in KEPT.items() if ours in slots}


def zeros_of(moments: str, trained: trees.Trained) -> dict[str, Any]:
    """The same of all parameters, as trees."""
    each = [
        zeros(moments, name, leaf) if is_float else {"mu": trees.zeros(leaf), "nu": trees.zeros(leaf)}
        for name, leaf, is_float in zip(trained.names, trained.leaves, trained.is_float, strict=True)
    ]
    made = {field: trained.tree([own.get(field) for own in each]) for field in KEPT if field not in SCALES}
    for field in SCALES if moments == "8bit" else ():
        # Of a tree without leaves a leaf: by such trees `optax.tree.map_params` finds out what is like the parameters,
        # and scales, which have other shapes, are not.
        made[field] = trained.tree([own.get(field) for own in each]) if each else trees.counter(())
    return made


def check(moments: str, trained: trees.Trained, kept: dict[str, list[Any]]) -> None:
    """Refuse a state that holds other arrays than `zeros` has made: their dtypes say what their bits are."""
    import jax

    for k, (name, leaf) in enumerate(zip(trained.names, trained.leaves, strict=True)):
        if not trained.is_float[k]:
            continue
        expected = jax.eval_shape(lambda leaf, name=name: zeros(moments, name, leaf), leaf)
        for field, leaves in kept.items():
            found, wanted = (None if x is None else (dtype_name(x), x.shape) for x in (leaves[k], expected.get(field)))
            if field in KEPT and found != wanted:
                raise ValueError(
                    f"`state`: {field} at {brief(name)}: {_told(found)}; expected {_told(wanted)}, as `init` makes it "
                    f"for moments={moments!r}"
                )


def _told(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return "None" if kind is None else f"{kind[0]} of shape {kind[1]}"


def noises(
    hyper: Any, number: Array, trained: trees.Trained, variables: Sequence[Array], slots: Sequence[Any]
) -> list[Any] | None:
    """What the moments of each variable are rounded by at a step: by its path, which is its name elsewhere too."""
    if hyper.moments == "float32":
        return None
    each = zip((trained.names[k] for k in trained.own), variables, slots, strict=True)
    return [
        None if whole_arrays.kind(p, own) == "float32" else whole_arrays.noise_of(hyper.seed, name, number)
        for name, p, own in each
    ]
