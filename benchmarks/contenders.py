"""Every optimizer that is compared, doing the same step on its own arrays.

Each function makes a `Contender` from the variables' values and a `Step`. It raises `Absent` if a library is not
installed, or `Unable` if the library has no such step. Libraries are imported where they are used.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from adamw_numba import AdamW

from .workloads import EMA_MOMENTUM, EPSILON, LEARNING_RATE, LOSS_SCALE, WEIGHT_DECAY, Arrays, Contender, Step

Maker = Callable[[Arrays, Step], Contender]


class Absent(Exception):  # noqa: N818 - a finding, not a mistake
    """A library is not installed, or does not work here."""


class Unable(Exception):  # noqa: N818
    """A library has no such step."""


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken installation raises all kinds of things
        raise Absent(f"{name} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from None


def _options(step: Step) -> dict[str, Any]:
    """The step as arguments of Keras's AdamW, which are also ours."""
    options: dict[str, Any] = {
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "epsilon": EPSILON,
        "global_clipnorm": step.clip,
    }
    if step.full:
        options |= {
            "amsgrad": True,
            "use_ema": True,
            "ema_momentum": EMA_MOMENTUM,
            "loss_scale_factor": LOSS_SCALE,
        }
    return options


# Ours


def ours(values: Arrays, step: Step, **options: Any) -> Contender:
    """On NumPy arrays, or on torch tensors for 16 bits: NumPy has no bfloat16 of its own."""
    if step.bits == 16:
        return ours_on_torch(values, step, **options)
    return _ours([v.copy() for v in values], step, lambda g: list(g), lambda v: v, **options)


def ours_on_torch(values: Arrays, step: Step, **options: Any) -> Contender:
    """On torch tensors, in bfloat16 for a 16-bit step."""
    torch = _library("torch")
    dtype = torch.bfloat16 if step.bits == 16 else torch.float32
    variables = [torch.nn.Parameter(torch.tensor(v).to(dtype)) for v in values]
    return _ours(
        variables,
        step,
        lambda g: [torch.from_numpy(a).to(dtype) for a in g],
        lambda v: v.detach().float().numpy(),
        **options,
    )


def ours_in(moments: str) -> Maker:
    """With moments of fewer bits and, of 16-bit variables, what rounding leaves over instead of master copies."""

    def make(values: Arrays, step: Step) -> Contender:
        return ours(values, step, moments=moments, master_weights="remainder")

    return make


def _ours(
    variables: list[Any], step: Step, convert: Callable[[Arrays], Any], look: Callable[[Any], Any], **options: Any
) -> Contender:
    optimizer = AdamW(**_options(step) | options)
    optimizer.build(variables)
    given: list[Any] = []

    def give(gradients: Arrays) -> None:
        given[:] = convert(gradients)

    return Contender(give, lambda: optimizer.apply(given), lambda: [look(v) for v in variables])


def ours_for_torch(values: Arrays, step: Step) -> Contender:
    """As a `torch.optim.Optimizer`: gradients are those of the parameters."""
    torch = _library("torch")
    from adamw_numba.torch import AdamW as TorchAdamW

    dtype = torch.bfloat16 if step.bits == 16 else torch.float32
    parameters = [torch.nn.Parameter(torch.tensor(v).to(dtype)) for v in values]
    options: dict[str, Any] = {"global_clipnorm": step.clip, "amsgrad": step.full}
    if step.full:
        options |= {"use_ema": True, "ema_momentum": EMA_MOMENTUM, "loss_scale_factor": LOSS_SCALE}
    optimizer = TorchAdamW(parameters, LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY, **options)

    def give(gradients: Arrays) -> None:
        for parameter, g in zip(parameters, gradients, strict=True):
            parameter.grad = torch.from_numpy(g).to(dtype)

    return Contender(give, optimizer.step, lambda: [p.detach().float().numpy() for p in parameters])


# What the machine can do


def limit(values: Arrays, step: Step) -> Contender:
    """The memory traffic of plain AdamW: four arrays read, three written, one addition each, all in one array."""
    if step != Step():
        raise Unable("there is a limit for the plain step only")
    from . import limit_loop

    p, m, v = (np.concatenate([a.ravel() for a in values]) for _ in range(3))
    held: list[Any] = [None]

    def give(gradients: Arrays) -> None:
        if held[0] is None:  # neither the values nor their addresses matter
            held[0] = np.concatenate([g.ravel() for g in gradients])

    return Contender(give, lambda: limit_loop.run(p, held[0], m, v), list)


# Peers


def plain_numpy(values: Arrays, step: Step) -> Contender:
    """As you would write it by hand: whole arrays, in place."""
    if step.bits == 16:
        raise Unable("NumPy has no bfloat16")
    variables = [v.copy() for v in values]
    m, v, top, average = ([np.zeros_like(a) for a in values] for _ in range(4))
    given: Arrays = []
    count = 0

    def one(k: int, scale: float, alpha: float) -> None:
        p, g = variables[k], given[k] * np.float32(scale) if scale != 1 else given[k]
        m[k] += (g - m[k]) * np.float32(0.1)
        v[k] += (g * g - v[k]) * np.float32(0.001)
        second = np.maximum(top[k], v[k], out=top[k]) if step.full else v[k]
        p *= np.float32(1 - LEARNING_RATE * WEIGHT_DECAY)
        p -= np.float32(alpha) * m[k] / (np.sqrt(second) + np.float32(EPSILON))
        if step.full:
            average[k] += (p - average[k]) * np.float32(1.0 if count == 1 else 1 - EMA_MOMENTUM)

    def take() -> None:
        nonlocal count
        count += 1
        scale = 1 / LOSS_SCALE if step.full else 1.0
        if step.clip:
            norm = scale * np.sqrt(sum(float(np.vdot(g, g)) for g in given))
            scale *= min(1.0, step.clip / norm)
        alpha = LEARNING_RATE * np.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        for k in range(len(variables)):
            one(k, scale, alpha)

    def give(gradients: Arrays) -> None:
        given[:] = gradients

    return Contender(give, take, lambda: variables)


def _torch(kind: str) -> Callable[[Arrays, Step], Contender]:
    """torch.optim.AdamW, with the usual calls around it: unscale, clip_grad_norm_, foreach average of the weights."""

    def make(values: Arrays, step: Step) -> Contender:
        torch = _library("torch")
        if step.bits == 16 and kind != "fused":
            raise Unable("only the fused one is compared here")
        parameters = [torch.nn.Parameter(torch.tensor(v)) for v in values]
        flags = {"fused": kind == "fused", "foreach": kind == "foreach"}
        optimizer = torch.optim.AdamW(
            parameters, LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY, amsgrad=step.full, **flags
        )
        return _torch_contender(torch, parameters, optimizer.step, step)

    return make


def _torch_contender(torch: Any, parameters: list[Any], update: Callable[[], object], step: Step) -> Contender:
    kept: list[Any] = []
    averages = [p.detach().clone() for p in parameters] if step.full else []

    def give(gradients: Arrays) -> None:
        kept[:] = [torch.from_numpy(g) for g in gradients]
        for parameter, g in zip(parameters, kept, strict=True):
            parameter.grad = g.clone() if step.clip else g

    def again() -> None:
        if step.clip:
            with torch.no_grad():
                torch._foreach_copy_([p.grad for p in parameters], kept)

    def take() -> None:
        if step.full:
            torch._foreach_mul_([p.grad for p in parameters], 1 / LOSS_SCALE)
        if step.clip:
            torch.nn.utils.clip_grad_norm_(parameters, step.clip)
        update()
        if step.full:
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - EMA_MOMENTUM)

    return Contender(give, take, lambda: [p.detach().numpy() for p in parameters], again)


def torch_master(values: Arrays, step: Step) -> Contender:
    """bfloat16 tensors over float32 masters: gradients widened, masters updated by the fused AdamW, and copied back."""
    if step.bits == 32:
        raise Unable("a master copy is for 16 bits")
    torch = _library("torch")
    masters = [torch.nn.Parameter(torch.tensor(v).bfloat16().float()) for v in values]
    variables = [m.detach().bfloat16() for m in masters]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW(masters, LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True)
    given: list[Any] = []

    def give(gradients: Arrays) -> None:
        given[:] = [torch.from_numpy(g).bfloat16() for g in gradients]

    def take() -> None:
        with torch.no_grad():
            torch._foreach_copy_([m.grad for m in masters], given)
            optimizer.step()
            torch._foreach_copy_(variables, masters)

    return Contender(give, take, lambda: [v.float().numpy() for v in variables])


def _cpu_optimizer(library: str, name: str, **options: Any) -> Callable[[Arrays, Step], Contender]:
    """A torch optimizer from another library that works on the CPU, for the steps that it has."""

    def make(values: Arrays, step: Step) -> Contender:
        if step.full or step.bits == 16:
            raise Unable(f"{name} has no AMSGrad and no master copy")
        torch, module = _library("torch"), _library(library)
        parameters = [torch.nn.Parameter(torch.tensor(v)) for v in values]
        try:
            optimizer = getattr(module, name)(
                parameters, lr=LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY, **options
            )
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.zero_grad()
        except Exception as error:  # a missing compiler or device, for example
            raise Absent(f"{library}: {type(error).__name__}: {str(error).splitlines()[0]}") from None
        return _torch_contender(torch, parameters, optimizer.step, step)

    return make


def optax(values: Arrays, step: Step) -> Contender:
    """Compiled by XLA, with donated buffers."""
    if step.bits == 16:
        raise Unable("optax has no master copy")
    jax, optax = _library("jax"), _library("optax")
    chain = [optax.clip_by_global_norm(step.clip)] if step.clip else []
    adam = optax.scale_by_amsgrad if step.full else optax.scale_by_adam
    chain += [adam(eps=EPSILON), optax.add_decayed_weights(WEIGHT_DECAY), optax.scale_by_learning_rate(LEARNING_RATE)]
    transform = optax.chain(*chain)

    def update(p: Any, state: Any, average: Any, g: Any) -> Any:
        if step.full:
            g = jax.tree.map(lambda a: a * (1 / LOSS_SCALE), g)
        change, state = transform.update(g, state, p)
        p = optax.apply_updates(p, change)
        if step.full:
            average = jax.tree.map(lambda a, b: a + (b - a) * (1 - EMA_MOMENTUM), average, p)
        return p, state, average

    p = [jax.numpy.array(v) for v in values]
    average = [jax.numpy.array(v) for v in values] if step.full else []
    return _jitted(jax, update, [p, transform.init(p), average])


def _jitted(jax: Any, function: Any, state: list[Any]) -> Contender:
    """A compiled function of variables, two kinds of state and gradients; the first three are donated."""
    update = jax.jit(function, donate_argnums=(0, 1, 2))
    given: list[Any] = []

    def give(gradients: Arrays) -> None:
        given[:] = [jax.block_until_ready([jax.numpy.array(g) for g in gradients])]

    def take() -> None:
        state[:] = jax.block_until_ready(update(*state, given[0]))

    return Contender(give, take, lambda: [np.array(a) for a in state[0]])


def ours_for_optax(values: Arrays, step: Step) -> Contender:
    """As a transformation of optax: compiled by XLA, with donated buffers."""
    if step.bits == 16:
        raise Unable("the optax front has no master copy")
    jax, optax = _library("jax"), _library("optax")
    from adamw_numba.optax import adamw

    options = {"use_ema": True, "ema_momentum": EMA_MOMENTUM, "amsgrad": True} if step.full else {}
    transform = adamw(LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY, global_clipnorm=step.clip, **options)
    scale = LOSS_SCALE if step.full else 1.0

    def update(p: Any, state: Any, _: Any, g: Any) -> Any:
        change, state = transform.update(g, state, p, loss_scale=scale)
        return optax.apply_updates(p, change), state, []

    p = [jax.numpy.array(v) for v in values]
    return _jitted(jax, update, [p, transform.init(p), []])


def _keras(step: Step, values: Arrays, kind: Any = None) -> tuple[Any, Any, list[Any]]:
    keras = _library("keras")
    if step.bits == 16 and kind is None:
        raise Unable("Keras has no master copy")
    dtype = "bfloat16" if step.bits == 16 else "float32"
    variables = [keras.Variable(v, dtype=dtype) for v in values]
    optimizer = (kind or keras.optimizers.AdamW)(**_options(step))
    optimizer.build(variables)
    return keras, optimizer, variables


def keras_eager(values: Arrays, step: Step) -> Contender:
    """Keras's own AdamW on this process's backend."""
    return _keras_contender(*_keras(step, values))


def ours_for_keras(values: Arrays, step: Step) -> Contender:
    """As a `keras.optimizers.Optimizer`, given gradients and variables as Keras's trainer gives them."""
    _library("keras")
    from adamw_numba.keras import AdamW as KerasAdamW

    return _keras_contender(*_keras(step, values, KerasAdamW))


def _keras_contender(keras: Any, optimizer: Any, variables: list[Any]) -> Contender:
    is_jax = keras.backend.backend() == "jax"  # whose steps return before they are complete
    given: list[Any] = []

    def give(gradients: Arrays) -> None:
        given[:] = [keras.ops.convert_to_tensor(g.copy(), variables[0].dtype) for g in gradients]

    def take() -> None:
        optimizer.apply(given, variables[:])  # as its trainer does
        if is_jax:
            _library("jax").block_until_ready([v.value for v in variables])

    return Contender(give, take, lambda: [_look_at(keras, v) for v in variables])


def _look_at(keras: Any, variable: Any) -> np.ndarray[Any, Any]:
    return np.array(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")))


def keras_stateless(values: Arrays, step: Step) -> Contender:
    """`stateless_apply` of Keras on JAX, compiled, with donated buffers."""
    jax = _library("jax")
    _, optimizer, variables = _keras(step, values)

    def update(p: Any, state: Any, _: Any, g: Any) -> Any:
        p, state = optimizer.stateless_apply(state, g, p)
        return p, state, []

    return _jitted(jax, update, [[jax.numpy.array(v.value) for v in variables],
                                 [jax.numpy.array(v.value) for v in optimizer.variables], []])  # fmt: skip


# By the process that can hold them: Keras has one backend per process.
PROCESSES: dict[str, dict[str, Maker]] = {
    "torch": {
        "limit": limit,
        "NumPy": plain_numpy,
        "ours on torch": ours_on_torch,
        "ours, bfloat16 moments": ours_in("bfloat16"),
        "ours, 8-bit moments": ours_in("8bit"),
        "ours, torch front": ours_for_torch,
        "ours, Keras front": ours_for_keras,
        "torch fused": _torch("fused"),
        "torch foreach": _torch("foreach"),
        "torch for-loop": _torch("for-loop"),
        "torch fused, masters": torch_master,
        "Keras on torch": keras_eager,
        "DeepSpeed CPUAdam": _cpu_optimizer("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
        "bitsandbytes AdamW": _cpu_optimizer("bitsandbytes.optim", "AdamW"),
    },
    "jax": {
        "ours, optax front": ours_for_optax,
        "optax": optax,
        "Keras on JAX": keras_eager,
        "Keras on JAX, jitted": keras_stateless,
    },
}
