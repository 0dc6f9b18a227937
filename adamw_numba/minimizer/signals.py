"""SIGTERM and SIGINT, noted while a minimization runs that can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
