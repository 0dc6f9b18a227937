"""Functions that `torch.compile` calls and does not trace: the tensors of a trace have no addresses."""

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
_codes: list[CodeType] = []  # what torch has not been told of yet


def outside_graphs(function: F) -> F:
    """Mark a function so that a graph ends before a call of it, and the next one begins after it.

    `torch.compiler.disable` says the same. But it wraps the function, which takes as long at every call as a small
    step does; and it imports the compiler, which takes seconds. What it leaves behind can be had for nothing: an
    attribute for when the function is about to be traced, and a note on its code (see `tell_torch`) for when it is
    called after all: neither it nor what it calls is looked at.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "it works on the addresses of tensors"  # type: ignore[attr-defined]
    _codes.append(function.__code__)
    return function


def tell_torch() -> None:
    """Have torch note which functions it is to leave alone, if it has been imported and does not know yet."""
    if not _codes or "torch" not in sys.modules:
        return
    try:
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)  # for the function, and for all that it calls
        for code in _codes:
            eval_frame.set_code_exec_strategy(code, strategy)
    except (ImportError, AttributeError):  # another torch, in which a step has to be taken before one is compiled
        pass
    _codes.clear()
