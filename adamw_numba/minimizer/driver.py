"""Prepares runs and drives them until they stop: in Python or in a compiled loop, one alone or many together."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from ..optimizer import AdamW
from ..step.workspace import compiles
from . import stopping
from .automatic import schedule_for
from .checkpointing import Checkpointing
from .objective import Objective, is_compiled
from .options import Settings
from .polish import check_polish, polish
from .problem import read_problem
from .progress import Progress
from .result import short
from .run import Run
from .signals import caught_signals
from .together import Together
from .warm_start import iteration_of, read_start

Callback = Callable[[Run], Any]
_WORTHWHILE = 16  # iterations that the compiled loop takes at once


def prepare(
    fun: Any, x0: Any, args: Any, jac: Any, bounds: Any, settings: Settings, on_ranks: Callable[..., Run] | None = None
) -> Run:
    """Check everything and prepare a run, which may be one `on_ranks`; nothing is evaluated yet."""
    fun, jac = _unwrapped(fun, None if jac is False else jac)
    x0, state = read_start(x0, settings["state"])
    noisy, x_scale = settings["batches"] is not None, settings["x_scale"]
    problem = read_problem(x0, bounds, x_scale, settings["automatic"], may_be_empty=on_ranks is not None)
    args = args if isinstance(args, tuple) else (args,)
    steps = (settings["finite_diff_rel_step"], settings["eps"])
    objective = Objective(fun, jac, args, problem, settings["batches"], settings["workers"], *steps)
    least, most = objective.least_calls(), settings["maxfev"]
    if most is not None and most < least:
        raise ValueError(
            f"`maxfev` is {most}, while a value and its gradient take {least} evaluations of `fun`; expected as many"
        )
    # With batches, the values at two points belong to different functions: the lower one is not the better point.
    best = not noisy if settings["return_best"] is None else settings["return_best"]
    hyper = settings["hyper"]
    automatic = settings["automatic"] and not noisy
    if settings["automatic"]:
        start = iteration_of(state)
        length = min(math.inf if limit is None else limit for limit in (settings["maxiter"], most and most // least))
        rates = schedule_for(length, start, noisy)
        hyper = {"beta_2": 0.999 if noisy else 0.9} | hyper | {"learning_rate": rates}
    optimizer = AdamW(**hyper)
    keep_best = automatic or settings["polish"] is not None
    limits = stopping.limits_of(settings)
    make = on_ranks or Run
    run = make(objective, problem, optimizer, limits, settings["history"], best, keep_best, automatic)
    if settings["polish"] is not None:
        check_polish(run)
    if state is not None:
        run.take_state(state)
    return run


def _unwrapped(fun: Any, jac: Any) -> tuple[Any, Any]:
    """SciPy passes ``jac=True`` on as a function that remembers its last value: undone, so that both doors are one."""
    owner: Any = getattr(jac, "__self__", None)
    if type(owner).__name__ == "MemoizeJac" and owner is fun:
        return owner.fun, True
    return fun, jac


def drive(run: Run, settings: Settings, callback: Callback | None) -> Any:
    """Advance one run until it stops; its result."""
    checkpointing = Checkpointing(settings["checkpoint"], run)
    progress = Progress(settings["progress"], settings["maxiter"])
    path: list[Any] = []
    loop = None
    with caught_signals(checkpointing.is_on) as signals:

        def after_iterations() -> None:
            if settings["return_all"]:
                path.append(run.intermediate().x)
            _after_iterations(run, settings, callback, checkpointing, signals)
            progress.show(run)

        try:
            checkpointing.restore()
            run.start()
            run.recover()  # where a resumed run is at a point whose value is NaN
            if settings["return_all"]:
                path.append(run.intermediate().x)
            loop = _loop_of(run, settings, callback)
            while not run.reason:
                run.begin_stage()
                if loop is None:
                    run.advance()
                else:
                    loop.advance(_iterations_alone(run, settings, callback, checkpointing))
                run.recover()
                after_iterations()
            if settings["polish"] is not None:
                polish(run, settings["polish"], after_iterations)
            checkpointing.finish()
            run.end()
        except BaseException as error:
            _explain(error, run, checkpointing)
            raise
        finally:
            progress.close()
            run.objective.close()
            if loop is not None:
                loop.close()
    result = run.result()
    if settings["return_all"]:
        result["allvecs"] = path
    return result


def drive_all(runs: Sequence[Run], loop: Any, settings: Settings) -> None:
    """Advance many runs together, in a compiled loop, until all have stopped."""
    with _shown(runs, settings) as progress:
        for run in runs:
            run.start()
        while going := [run for run in runs if not run.reason]:
            for run in going:
                run.begin_stage()
            loop.advance(min(run.left_in_stage() for run in going))
            for run in going:
                run.recover()
                _stop_in_time(run, settings)
            progress.show(min(going, key=lambda run: run.nit))
        if settings["polish"] is not None:
            for run in runs:
                polish(run, settings["polish"], partial(_stop_in_time, run, settings))


def drive_together(runs: Sequence[Run], settings: Settings, callback: Callback | None) -> None:
    """Advance many runs in step, with one evaluation for all of them, until all have stopped."""
    together, going = Together(runs), list(runs)
    with _shown(runs, settings) as progress:
        while going:
            shown = runs if together.keeps_all else going
            for run, evaluation in zip(shown, together.evaluate(shown), strict=True):
                if run.reason:
                    continue
                run.take(evaluation)
                run.decide()
                run.recover()
                if run.nit:
                    _call_back(run, settings, callback)
                    _stop_in_time(run, settings)
            progress.show(min(going, key=lambda run: run.nit))
            going = [run for run in going if not run.reason]
            for run in going:
                run.begin_stage()
                run.update()


@contextmanager
def _shown(runs: Sequence[Run], settings: Settings) -> Iterator[Progress]:
    """The progress of many runs; an error says how far the best of them got."""
    progress = Progress(settings["progress"], settings["maxiter"])
    try:
        yield progress
    except BaseException as error:
        best = min(runs, key=lambda run: float(run.values[stopping.BEST]))
        _explain(error, best, Checkpointing(None, best))
        raise
    finally:
        progress.close()
        for run in runs:
            run.objective.close()


def _loop_of(run: Run, settings: Settings, callback: Callback | None) -> Any:
    """The compiled loop that is to take the iterations, or None for Python."""
    if not settings["compiled"] or settings["return_all"]:
        return None
    loop = compiled([run])
    looked_at = callable(settings["progress"]) or (callback is not None and settings["callback_every"] < _WORTHWHILE)
    if loop is None and not looked_at and compiles():
        from .compiled_loop import loop_around_python

        loop = loop_around_python(run, settings["maxtime"])
    return loop


def compiled(runs: Sequence[Run]) -> Any:
    """The compiled loop over runs of one objective, or None where Python is needed at each step."""
    if not is_compiled(runs[0].objective.fun):
        return None
    from .compiled_loop import compiled_loop  # which takes Numba to compile

    return compiled_loop(runs)


def _iterations_alone(run: Run, settings: Settings, callback: Callback | None, checkpointing: Checkpointing) -> int:
    """How many iterations the compiled loop may take before Python has something to do."""
    most = min(checkpointing.iterations_left(), run.left_in_stage())
    if callback is not None:
        most = min(most, settings["callback_every"] - run.nit % settings["callback_every"])
    return most


def _after_iterations(
    run: Run, settings: Settings, callback: Callback | None, checkpointing: Checkpointing, signals: list[int]
) -> None:
    """What is due after an iteration, or after a block of them."""
    _call_back(run, settings, callback)
    _stop_in_time(run, settings)
    if not run.reason and signals:
        run.stop(stopping.INTERRUPTED)
    if not run.reason:
        checkpointing.save_if_due()


def _call_back(run: Run, settings: Settings, callback: Callback | None) -> None:
    finite = run.reason != stopping.NONFINITE
    is_due = finite and (run.reason or run.nit % settings["callback_every"] == 0)
    if callback is not None and is_due and wants_to_stop(callback, run):
        run.stop(stopping.CALLBACK)


def wants_to_stop(callback: Callback, run: Run) -> bool:
    """What a callback says: to raise `StopIteration` or to return True stops."""
    try:
        stops = callback(run)
    except StopIteration:
        return True
    return isinstance(stops, (bool, np.bool_)) and bool(stops)  # a callback may return anything else


def _stop_in_time(run: Run, settings: Settings) -> None:
    if not run.reason and settings["maxtime"] is not None and run.elapsed > settings["maxtime"]:
        run.stop(stopping.TIME)


def _explain(error: BaseException, run: Run, checkpointing: Checkpointing) -> None:
    """Say in the exception's notes how far the run got, and save it where there is a place for it."""
    result = run.result()
    best = (
        f"best value so far {result.fun!r} at x = {short(repr(result.x))}" if result.nfev else "nothing evaluated yet"
    )
    error.add_note(f"adamw_numba.minimize: at iteration {run.nit}; {best}")
    try:
        error.intermediate_result = result  # type: ignore[attr-defined]
        error.add_note("the result so far is the `intermediate_result` of this exception")
    except AttributeError:  # a class with slots has no room for it
        pass
    if checkpointing.is_read and checkpointing.is_on:
        try:
            checkpointing.finish()
            error.add_note(f"the state is saved in {checkpointing.place}")
        except Exception as failure:
            error.add_note(f"the state could not be saved: {short(repr(failure))}")
