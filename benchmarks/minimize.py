"""What an iteration of `minimize` costs, next to loops written by hand, SciPy's L-BFGS-B, optax and torch.

    python -m benchmarks.minimize [--part loop] [--before FOLDER]

Contenders take turns in one process; figures are medians. `--before` names the folder of another version of the
repository, whose `minimize` takes turns as well. The parts:

loop        an objective in Python of 10, 1,000 and 100,000 unknowns: ours has its history, best point and, where a row
            says so, bounds and tolerances that it never reaches; the loops by hand have none of these
containers  an objective of other libraries' arrays, and of several arrays
libraries   jac="jax" and jac="torch" next to gradients written by hand
compiled    the compiled loop around a Numba function, next to optax in `jax.lax.scan`
start       seconds from the start of a process to the result; and from how many iterations on compiling pays

The exit status says whether what the parts have measured is within the bounds that they print.
"""

import argparse
import importlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numba
import numpy as np
import optax
import scipy.optimize
import torch

import adamw_numba
from adamw_numba import AdamW

RATE, ROUNDS = 1e-3, 9
NEVER = 1e-300  # a tolerance that no run of these reaches
Contender = tuple[Callable[[int], object], int]  # a run of so many iterations, or one that returns how many it took
Medians = dict[str, float]


def take_turns(contenders: dict[str, Contender]) -> Medians:
    """Microseconds per iteration of each: the medians of turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 1):  # the first does not count
        for name, (call, steps) in contenders.items():
            start = time.perf_counter()
            taken = call(steps)
            spent = time.perf_counter() - start
            if turn:
                times[name].append(1e6 * spent / (taken if isinstance(taken, int) else steps))
    return {name: statistics.median(each) for name, each in times.items()}


def show(title: str, medians: Medians) -> None:
    """Print a part of the report."""
    print(f"\n{title}")
    for name, each in medians.items():
        print(f"    {name:48s} {each:10.2f} us per iteration", flush=True)


def bound(what: str, value: float, most: float) -> bool:
    """Print a ratio or a time with its bound; whether it is within."""
    within = value <= most
    print(f"    {what}: {value:.2f} ({most:g} allowed){'' if within else '   TOO SLOW'}", flush=True)
    return within


# The loop


def curved(n: int) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """A quadratic function whose curvatures span five orders of magnitude, with its gradient."""
    scale, target = np.geomspace(1e-3, 1e2, n), np.linspace(-1, 1, n)

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        r = x - target
        g = scale * r
        return 0.5 * float(g @ r), g

    return fun


def numpy_adam(fun: Callable[[Any], Any], x: np.ndarray, steps: int) -> np.ndarray:
    """Adam as people paste it."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, steps + 1):
        _, g = fun(x)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        x = x - RATE * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x


def with_apply(fun: Callable[[Any], Any], x: np.ndarray, steps: int) -> np.ndarray:
    """A loop around `AdamW.apply`."""
    x = x.copy()
    optimizer = AdamW(RATE, weight_decay=0)
    optimizer.build([x])
    for _ in range(steps):
        optimizer.apply([fun(x)[1]])
    return x


def with_optax(fun: Callable[[Any], Any], x: np.ndarray, steps: int) -> np.ndarray:
    """A loop around a jitted step of optax, which moves the arrays between NumPy and JAX."""
    optimizer = optax.adam(RATE)
    state, point = optimizer.init(x), jax.numpy.asarray(x)

    for _ in range(steps):
        point, state = _optax_step(fun(np.asarray(point))[1], state, point)
    return np.asarray(point)


@jax.jit
def _optax_step(gradient: Any, state: Any, point: Any) -> Any:
    updates, state = optax.adam(RATE).update(gradient, state, point)
    return optax.apply_updates(point, updates), state


def with_scipy(fun: Callable[[Any], Any], x: np.ndarray, steps: int) -> int:
    """L-BFGS-B; the evaluations that it took."""
    options = {"maxiter": steps, "maxfun": steps, "ftol": 0.0, "gtol": 0.0}
    return int(scipy.optimize.minimize(fun, x, jac=True, method="L-BFGS-B", options=options).nfev)


def plain(package: Any, fun: Callable[[Any], Any], x: Any, steps: int, **options: Any) -> Any:
    """`minimize` by a given rate, with its history and best point; it stops for nothing else."""
    options = {"learning_rate": RATE, "maxiter": steps, "gtol": None, "jac": True} | options
    return package.minimize(fun, x, **options).x


def bounded(package: Any, fun: Callable[[Any], Any], x: Any, steps: int) -> Any:
    """The same with bounds and all tolerances."""
    return plain(package, fun, x, steps, bounds=[(-3, 3)] * x.size, gtol=NEVER, ftol=NEVER, xtol=NEVER)


def part_loop(before: Any) -> bool:
    """An objective in Python."""
    good = True
    for n, steps in ((10, 5000), (1000, 3000), (100_000, 500)):
        fun, x0 = curved(n), np.full(n, 2.0)

        def alone(count: int, fun: Any = fun, x0: Any = x0) -> None:
            for _ in range(count):
                fun(x0)

        calls: dict[str, Callable[[int], object]] = {
            "the objective alone": alone,
            "by hand, NumPy": lambda k, fun=fun, x0=x0: numpy_adam(fun, x0, k),
            "by hand, AdamW.apply": lambda k, fun=fun, x0=x0: with_apply(fun, x0, k),
            "minimize": lambda k, fun=fun, x0=x0: plain(adamw_numba, fun, x0, k),
            "minimize, bounds and tolerances": lambda k, fun=fun, x0=x0: bounded(adamw_numba, fun, x0, k),
            "L-BFGS-B, for each evaluation": lambda k, fun=fun, x0=x0: with_scipy(fun, x0, k),
            "optax": lambda k, fun=fun, x0=x0: with_optax(fun, x0, k),
        }
        if before is not None:
            calls["minimize, before"] = lambda k, fun=fun, x0=x0: plain(before, fun, x0, k)
            calls["minimize, bounds and tolerances, before"] = lambda k, fun=fun, x0=x0: bounded(before, fun, x0, k)
        few = {"L-BFGS-B, for each evaluation": 100}
        medians = take_turns({name: (call, min(steps, few.get(name, steps))) for name, call in calls.items()})
        show(f"n = {n:,}", medians)
        both = max(medians["minimize"], medians["minimize, bounds and tolerances"])
        good &= bound("minimize over NumPy by hand", both / medians["by hand, NumPy"], 2 if n < 1000 else 1)
        if n == 100_000:
            good &= bound("minimize over AdamW.apply by hand", both / medians["by hand, AdamW.apply"], 1.15)
    return good


# Other libraries, and several arrays


def containers() -> dict[str, tuple[Any, Callable[[Any], Any], int]]:
    """By name: x0, an objective with its gradient, and how many arrays there are."""
    target = np.linspace(-1, 1, 10)
    torch_target, jax_target = torch.as_tensor(target), jax.numpy.asarray(target)

    def with_numpy(x: Any) -> tuple[Any, Any]:
        r = x - target
        return 0.5 * r @ r, r

    def with_torch(x: Any) -> tuple[Any, Any]:
        r = x - torch_target
        return 0.5 * (r @ r), r

    def of_dict(x: Any) -> tuple[Any, Any]:
        pairs = {name: with_torch(each) if torch.is_tensor(each) else with_numpy(each) for name, each in x.items()}
        return sum(value for value, _ in pairs.values()), {name: g for name, (_, g) in pairs.items()}

    jitted = jax.jit(lambda x: (0.5 * (x - jax_target) @ (x - jax_target), x - jax_target))
    several = {f"layer_{k}": np.full(10, 2.0) for k in range(10)}
    tensors = {name: torch.as_tensor(each) for name, each in several.items()}
    return {
        "a NumPy array of 2 dimensions": (
            np.full((2, 5), 2.0),
            lambda x: (0.5 * ((x - 1) ** 2).sum(), x - 1),
            1,
        ),
        "a torch tensor": (torch.full((10,), 2.0, dtype=torch.float64), with_torch, 1),
        "a JAX array": (jax.numpy.full(10, 2.0), jitted, 1),
        "a dict of 1 NumPy array": ({"x": np.full(10, 2.0)}, of_dict, 1),
        "a dict of 10 NumPy arrays": (several, of_dict, 10),
        "a dict of 10 torch tensors": (tensors, of_dict, 10),
    }


def part_containers(before: Any) -> bool:
    """The time over the objective's."""
    good = True
    for name, (x0, fun, count) in containers().items():

        def alone(steps: int, x0: Any = x0, fun: Any = fun) -> None:
            for _ in range(steps):
                jax.block_until_ready(fun(x0)) if isinstance(x0, jax.Array) else fun(x0)

        calls: dict[str, Callable[[int], object]] = {
            "the objective alone": alone,
            "minimize": lambda k, fun=fun, x0=x0: plain(adamw_numba, fun, x0, k),
        }
        if before is not None:
            calls["minimize, before"] = lambda k, fun=fun, x0=x0: plain(before, fun, x0, k)
        medians = take_turns({each: (call, 2000) for each, call in calls.items()})
        show(name, medians)
        good &= bound("over the objective", medians["minimize"] - medians["the objective alone"], 25 + 3 * count)
    return good


# Differentiation by libraries


def rosenbrock_of(x: Any) -> Any:
    """The Rosenbrock function as whole-array operations."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def part_libraries(before: Any) -> bool:
    """Gradients by JAX and torch. Each run traces the function, whoever differentiates it."""
    good = True

    def by_hand_with_jax() -> Callable[[Any], tuple[float, Any]]:
        both = jax.jit(jax.value_and_grad(lambda x: rosenbrock_of(x)))

        def fun(x: Any) -> tuple[float, Any]:
            value, gradient = both(x)
            return float(value), np.asarray(gradient)

        return fun

    def by_hand_with_torch() -> Callable[[Any], tuple[float, Any]]:
        def fun(x: Any) -> tuple[float, Any]:
            leaf = torch.from_numpy(x).requires_grad_()
            value = rosenbrock_of(leaf)
            value.backward()
            return value.item(), leaf.grad.numpy()

        return fun

    for n in (10, 10_000):
        for jac, by_hand in (("jax", by_hand_with_jax), ("torch", by_hand_with_torch)):
            x0 = np.full(n, -1.2)
            calls: dict[str, Callable[[int], object]] = {
                "gradient by hand": lambda k, x0=x0, by_hand=by_hand: plain(adamw_numba, by_hand(), x0, k),
                f"jac={jac!r}": lambda k, x0=x0, jac=jac: plain(adamw_numba, rosenbrock_of, x0, k, jac=jac),
            }
            contenders: dict[str, Contender] = {name: (call, 1000) for name, call in calls.items()}
            if before is not None:
                old = lambda k, x0=x0, jac=jac: plain(before, rosenbrock_of, x0, k, jac=jac)  # noqa: E731
                contenders[f"jac={jac!r}, before"] = old, 50
            medians = take_turns(contenders)
            show(f'jac="{jac}", n = {n:,}, a run of 1,000 iterations', medians)
            good &= bound("over the gradient by hand", medians[f"jac={jac!r}"] / medians["gradient by hand"], 1.3)
    return good


# The compiled loop

SIZE = 10
START = np.full(SIZE, -1.2)


@numba.njit
def rosenbrock(x, gradient):
    """Return the value and fill the gradient."""
    value = 0.0
    for i in range(x.size - 1):
        a, b = x[i + 1] - x[i] * x[i], 1 - x[i]
        value += 100 * a * a + b * b
        gradient[i] += -400 * a * x[i] - 2 * b
        gradient[i + 1] += 200 * a
    return value


def scan_of(steps: int, losses: bool) -> Callable[[int], np.ndarray]:
    """optax, compiled for a number of steps; with the loss of every step, or only with the final point."""
    optimizer = optax.adamw(RATE, weight_decay=0.01)
    differentiate = jax.value_and_grad(rosenbrock_of)

    def step(carry, _):
        x, state = carry
        value, gradient = differentiate(x)
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), value if losses else None

    @jax.jit
    def run(x):
        (x, _), values = jax.lax.scan(step, (x, optimizer.init(x)), length=steps)
        return x, values

    return lambda _: np.asarray(jax.block_until_ready(run(jax.numpy.asarray(START)))[0])


def torch_loop(steps: int) -> np.ndarray:
    """A Python loop around torch's own optimizer."""
    x = torch.tensor(START, requires_grad=True)
    optimizer = torch.optim.AdamW([x], lr=RATE, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        rosenbrock_of(x).backward()
        optimizer.step()
    return x.detach().numpy()


def part_compiled(before: Any) -> bool:
    """A Numba function of 10 unknowns, in float64, in every library's own loop."""
    steps, options = 200_000, {"weight_decay": 0.01, "return_best": False}
    ours = lambda k: plain(adamw_numba, rosenbrock, START, k, **options)  # noqa: E731
    contenders: dict[str, Contender] = {
        "minimize": (ours, steps),
        "optax": (scan_of(steps, losses=False), steps),
        "optax, losses": (scan_of(steps, losses=True), steps),
        "torch": (torch_loop, 300),
    }
    if before is not None:
        contenders["minimize, before"] = lambda k: plain(before, rosenbrock, START, k, **options), steps
    medians = take_turns(contenders)
    show(f"compiled, n = {SIZE}", medians)
    distance = float(np.abs(ours(steps) - contenders["optax"][0](steps)).max())
    print(f"    minimize and optax end {distance:.1e} apart (their epsilons differ)")
    good = bound("minimize over optax", medians["minimize"] / medians["optax"], 0.7)
    good &= bound("minimize over torch", medians["minimize"] / medians["torch"], 0.01)
    return good and distance < 1e-3


# The start of a process

PROGRAM = """
import time
start = time.perf_counter()
import numba, numpy as np
import adamw_numba

@numba.njit(cache={cache})
def fun(x, gradient):
    value = 0.0
    for i in range(x.size - 1):
        a, b = x[i + 1] - x[i] * x[i], 1 - x[i]
        value += 100 * a * a + b * b
        gradient[i] += -400 * a * x[i] - 2 * b
        gradient[i + 1] += 200 * a
    return value

options = dict(jac=True, learning_rate=1e-3, gtol=None, compiled={compiled})
adamw_numba.minimize(fun, np.full(10, -1.2), maxiter={steps}, **options)
print(time.perf_counter() - start)
"""


def seconds_of(folder: Path, cache: bool, compiled: bool, steps: int) -> float:
    """Of a new process, from its first line to the result."""
    program = folder / f"program_{cache}.py"
    text = PROGRAM.format(cache=cache, compiled=compiled, steps=steps)
    if not program.exists() or program.read_text() != text:
        program.write_text(text)
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    return float(run.stdout)


def part_start(before: Any) -> bool:
    """A function that Numba has cached on disk, and one that it compiles again."""
    cases = {"cached": (True, True), "not cached": (False, True), "not cached, compiled=False": (False, False)}
    found: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(6):
            for case, (cache, compiled) in cases.items():
                seconds = seconds_of(Path(name), cache, compiled, 1000)
                if turn:
                    found[case].append(seconds)
        slow = [seconds_of(Path(name), False, False, steps) for steps in (1000, 101_000)]
        fast = [seconds_of(Path(name), False, True, steps) for steps in (1000, 1_001_000)]
    medians = {case: statistics.median(each) for case, each in found.items()}
    print("\nseconds from the first line of a process to the result of 1,000 iterations")
    for case, seconds in medians.items():
        print(f"    {case:30s} {seconds:.2f}")
    saved = (slow[1] - slow[0]) / 1e5 - (fast[1] - fast[0]) / 1e6
    price = medians["not cached"] - medians["not cached, compiled=False"]
    print(f"    compiling takes {price:.2f} s and saves {1e6 * saved:.2f} us an iteration: it pays from ", end="")
    print(f"{max(price, 0) / saved:,.0f} iterations on")
    return bound("seconds, cached", medians["cached"], 1.0)


def version_at(folder: str) -> ModuleType:
    """Another version of the package, under another name, so that both live in one process."""
    home = Path(tempfile.mkdtemp())
    shutil.copytree(Path(folder) / "adamw_numba", home / "adamw_numba_before")
    sys.path.append(str(home))
    return importlib.import_module("adamw_numba_before")


PARTS: dict[str, Callable[[Any], bool]] = {
    "loop": part_loop,
    "containers": part_containers,
    "libraries": part_libraries,
    "compiled": part_compiled,
    "start": part_start,
}


def main(arguments: list[str] | None = None) -> int:
    """Print the parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minimize", description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--before", metavar="FOLDER")
    chosen = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    before = version_at(chosen.before) if chosen.before else None
    print(f"{platform.machine()}; Python {platform.python_version()}, NumPy {np.__version__}, ", end="")
    print(f"Numba {numba.__version__}, jax {jax.__version__}, optax {optax.__version__}, torch {torch.__version__}")
    good = [PARTS[name](before) for name in chosen.part or PARTS]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
