"""SIGTERM and SIGINT, noted while a minimization runs that can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def caught_signals(wanted: bool) -> Iterator[list[int]]:
    """Inside, a first SIGTERM or SIGINT is only noted, in the list; a second one raises KeyboardInterrupt.

    Nothing is caught unless it is wanted, and none outside the main thread, where Python lets nobody set handlers.
    """
    caught: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        for number in numbers:
            signal.signal(number, note)
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_interrupts(agreement: Any) -> Iterator[None]:
    """Inside, a SIGINT in the middle of a decision of several ranks, which one cannot leave alone, waits for its end.

    Not the third one: the others may have gone.
    """
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        if agreement.is_deciding and len(caught) < 3:
            agreement.held = partial(before, number, None)
        else:
            before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        held, agreement.held = agreement.held, None
        if held is not None:
            held()
