"""How this package compiles with Numba: one set of options, a cache on disk, and memory reached by its address."""

from contextlib import suppress
from functools import cache
from pathlib import Path
from zlib import crc32

from llvmlite import ir
from numba import config, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic

# `contract` allows a product and a sum to become one instruction. Nothing else of "fast math" is allowed: it would
# reorder sums, and the same inputs would no longer give the same bits. An option that is not set here would be that of
# the function of a user in which one of ours happens to be compiled first (njit/), and so get into the cache.
OPTIONS = {"error_model": "numpy", "fastmath": {"contract"}, "forceinline": False}


class _File(IndexDataCacheFile):
    """The files of one function's cache, each of which says what it is for.

    Numba numbers these files, and two processes that compile at once may give one number to two kernels. The file that
    an index names would then hold the other kernel: a float64 one for float32 arrays.
    """

    def save(self, key, data):
        super().save(key, (key, self._source_stamp, data))

    def load(self, key):
        found = super().load(key)
        return found[2] if found is not None and found[:2] == (key, self._source_stamp) else None


@cache
def _stamp():
    """Of all sources that are compiled together: constants of one file are in the machine code of others."""
    package = Path(__file__).parents[1]
    folders = package, *(package / room for room in ("arrays", "cpu", "minimizer", "njit"))
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    return crc32(repr([(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]).encode())


class _Cache(FunctionCache):
    """Numba's cache on disk, of files that say what they are for, and are for these sources."""

    def __init__(self, function):
        super().__init__(function)
        self._cache_file = _File(self.cache_path, filename_base=self._impl.filename_base, source_stamp=_stamp())


class _Compiled(CPUDispatcher):
    """What ``njit`` returns, with our cache."""

    def enable_caching(self):
        self._cache = _Cache(self.py_func)


class _CFunction(CFunc):
    """What ``cfunc`` returns, with our cache."""

    def enable_caching(self):
        self._cache = _Cache(self._pyfunc)


def cached(*signature, **options):
    """Numba's ``njit`` with a cache on disk: compiled now if the signature is given, otherwise at the first call."""

    def decorate(function):
        if config.DISABLE_JIT:
            return function
        compiled = _Compiled(function, targetoptions={"nopython": True, "boundscheck": None} | OPTIONS | options)
        with suppress(RuntimeError):  # no folder can be written
            compiled.enable_caching()
        if signature:
            compiled.compile(*signature)
            compiled.disable_compile()
        return compiled

    return decorate


def c_function(signature):
    """Numba's ``cfunc`` with a cache on disk."""

    def decorate(function):
        compiled = _CFunction(function, (signature.args, signature.return_type), {}, OPTIONS)
        with suppress(RuntimeError):
            compiled.enable_caching()
        compiled.compile()
        return compiled

    return decorate


def entry_point(function):
    """The compiled form of a function of fixed types, whose calls skip Numba's look at the types of their arguments.

    With ``NUMBA_DISABLE_JIT`` there is none: the function stays Python, and nothing calls it.
    """
    if config.DISABLE_JIT:
        return function
    (compiled,) = function.overloads.values()
    return compiled.entry_point


jit = cached(no_cpython_wrapper=True, no_cfunc_wrapper=True)  # for compiled code only
inlined = cached(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)  # whatever its size
jit_for_python = cached()


def cache_folder() -> Path | None:
    """Where what is compiled is kept; None where no folder can be written."""
    try:
        return Path(_Cache(cache_folder).cache_path)
    except RuntimeError:
        return None


@intrinsic
def pointer(typingctx, address, like):
    """An address as a pointer to elements of the type of `like`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.intp, like), codegen


def _pointer_to(kind):
    @intrinsic
    def at(typingctx, address):
        """An address as a pointer to numbers of a type."""

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), codegen

    return at


words_at, numbers_at = _pointer_to(types.int64), _pointer_to(types.float64)


@intrinsic
def call_plain(typingctx, address):
    """Call a C function that takes nothing, by its address, and ignore what it returns."""

    def codegen(context, builder, signature, args):
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.intp), codegen
