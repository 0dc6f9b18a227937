"""What `torch.compile` calls and does not trace: the tensors of a trace have no addresses."""

import inspect
import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import TypeVar

Class = TypeVar("Class", bound=type)
_codes: list[CodeType] = []  # what torch has not been told of yet


def outside_graphs(traced: tuple[str, ...]) -> Callable[[Class], Class]:
    """Mark the public methods of a class, except for those traced: a graph ends before a call, another begins after it.

    `torch.compiler.disable` says the same. But it wraps each method, which takes as long at every call as a small step
    does, and it imports the compiler, which takes seconds. What it leaves behind costs nothing: an attribute for when a
    method is about to be traced, and a note on its code (see `tell_torch`) for when it is called after all: neither it
    nor anything that it calls is looked at.
    """

    def mark(kind: Class) -> Class:
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", member)
            if isinstance(function, FunctionType) and not name.startswith("_") and name not in traced:
                own = inspect.unwrap(function)  # the code around it is contextlib's, and everybody's
                for each in (function, own):
                    vars(each).update(_torchdynamo_disable=True, _torchdynamo_disable_msg="it needs addresses")
                _codes.append(own.__code__)
        return kind

    return mark


def tell_torch() -> None:
    """Have torch note which methods it is to leave alone, if it has been imported and does not know yet."""
    if not _codes or "torch" not in sys.modules:
        return
    try:
        from torch._C._dynamo import eval_frame

        skip = vars(eval_frame)["_FrameAction"].SKIP
        strategy = vars(eval_frame)["_FrameExecStrategy"](skip, skip)  # for the method, and for all that it calls
        for code in _codes:
            eval_frame.set_code_exec_strategy(code, strategy)
    except (
        ImportError,
        AttributeError,
        KeyError,
        TypeError,
    ):  # another torch, for which a first step has to be taken outside of graphs
        pass
    _codes.clear()
