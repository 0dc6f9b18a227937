"""Locks in a forked child: the threads that held them do not exist there."""

import os
import threading
import weakref
from typing import Any

_HOLDERS: "weakref.WeakSet[Any]" = weakref.WeakSet()


def renew_lock(holder: Any) -> None:
    """Have a forked child give an object, which holds a ``lock``, another one."""
    _HOLDERS.add(holder)


def _renew_locks() -> None:
    for holder in list(_HOLDERS):
        holder.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
