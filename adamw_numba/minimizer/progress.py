"""How far a minimization is: a bar of tqdm, or a function of the user's."""

import time
from typing import Any

from . import stopping
from .run import Run

_SECONDS = 0.1  # from one refresh of the bar to the next


class Progress:
    """A bar of tqdm, a function of the user's, or nothing.

    Parameters
    ----------
    wanted : bool or callable
    total : int
        The most iterations.
    """

    def __init__(self, wanted: Any, total: int) -> None:
        self.function = wanted if callable(wanted) else None
        self.bar: Any = None
        self.shown_at = 0.0
        if wanted is True:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, disable=None, unit="it")

    def show(self, run: Run) -> None:
        """Show the iteration and the value so far."""
        if self.function is not None:
            self.function(run.intermediate())
        if self.bar is not None and (run.reason or time.monotonic() - self.shown_at > _SECONDS):
            self.shown_at = time.monotonic()
            text = f"fun={run.values[stopping.FUN]:.6g}"
            if run.reason:  # a bar that ends before its end would look as if the run had been aborted
                message = stopping.STATUS[run.reason][1]
                text += f", {message.rpartition(': ')[2].rstrip('.')}"
                self.bar.total = run.nit
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(run.nit - self.bar.n)
            self.bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
