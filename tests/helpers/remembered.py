"""Puts an optimizer back to what it was, faster than another one is built: for tests that begin anew a thousand times."""

import types
from collections import deque

import array_api_compat
import numpy as np

_MISSING = object()


class Remembered:
    """What all objects that can be reached hold: the package's own, containers, closures, and the numbers of arrays."""

    def __init__(self, *roots):
        self.seen, self.undo = {}, []
        waiting = deque(roots)
        while waiting:
            one = waiting.popleft()
            if id(one) not in self.seen:
                self.seen[id(one)] = one  # kept, so that its id stays its own
                waiting.extend(self._note(one))

    def put_back(self):
        for undo, *arguments in self.undo:
            undo(*arguments)

    def _note(self, one):
        """Note what an object holds, and give what can be reached from it."""
        if isinstance(one, np.ndarray) and one.flags.writeable:
            self.undo.append((np.copyto, one, one.copy()))
        elif array_api_compat.is_torch_array(one):
            self.undo.append((one.data.copy_, one.detach().clone()))
        elif isinstance(one, list):
            self.undo.append((one.__setitem__, slice(None), one[:]))
            return one
        elif isinstance(one, dict):
            self.undo.append((_refill, one, dict(one)))
            return [*one, *one.values()]
        elif isinstance(one, tuple):
            return one
        elif isinstance(one, types.FunctionType):
            return [cell.cell_contents for cell in one.__closure__ or ()]
        elif isinstance(one, types.MethodType):
            return [one.__self__, one.__func__]
        elif type(one).__module__.startswith(("adamw_numba.", "helpers.")):
            held = {name: getattr(one, name, _MISSING) for name in _attributes(one)}
            self.undo.append((_set_all, one, held))
            return [value for value in held.values() if value is not _MISSING]
        return ()


def _attributes(one):
    slots = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
    return {*slots, *getattr(one, "__dict__", ())} - {"__weakref__", "__dict__"}


def _refill(mapping, held):
    mapping.clear()
    mapping.update(held)


def _set_all(one, held):
    for name in _attributes(one) - held.keys():
        object.__delattr__(one, name)
    for name, value in held.items():
        if value is not _MISSING:
            object.__setattr__(one, name, value)
        elif getattr(one, name, _MISSING) is not _MISSING:
            object.__delattr__(one, name)
