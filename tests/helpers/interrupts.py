"""A KeyboardInterrupt at a chosen line of the package."""

import sys
from pathlib import Path

import adamw_numba

HOME = str(Path(adamw_numba.__file__).parent)


class Injector:
    """Raises at the n-th event that Python reports from code of ours, and keeps a list of them.

    Parameters
    ----------
    n : int
    where : str or tuple of str
        How the names of the files begin that count.
    opcodes : bool
        Whether every opcode is an event, not every line.
    """

    def __init__(self, n, where=HOME, opcodes=False):
        self.n, self.where, self.opcodes, self.line, self.lines = n, where, opcodes, None, []

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.where):
            return None
        frame.f_trace_opcodes = self.opcodes
        if event == ("opcode" if self.opcodes else "line"):
            self.n -= 1
            self.lines.append((frame.f_code, frame.f_lineno))
            if self.n == 0:
                self.line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def interrupted(optimizer, given, injector):
    """Take a step that may be interrupted: where it was."""
    old = sys.gettrace()
    sys.settrace(injector)
    try:
        optimizer.apply(given)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(old)
    return injector.line
