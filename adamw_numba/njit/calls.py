"""Calls between compiled functions that Numba itself does not offer: apart from their caller, and by address."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FAILED = 1  # what is left in the first word behind an objective that raised, as in objective_kernel.py


def _compiled(context, builder, function, arguments):
    """The compilation of a function for some types, declared in the present module and linked to it."""
    found = function.dispatcher.get_compile_result(function.get_call_type(context.typing_context, arguments, {}))
    context.add_linking_libs([found.library])
    return found, context.declare_function(builder.module, found.fndesc)


@intrinsic
def call_apart(typingctx, function, arguments):
    """Call a compiled function with a tuple of arguments, and have LLVM leave it out of the code around the call.

    There it might be optimized together with that code: which product and sum become one instruction, or what is
    computed in which mode of the processor, would depend on the caller.
    """
    signature = function.get_call_type(typingctx, arguments.types, {})

    def codegen(context, builder, whole, args):
        found, callee = _compiled(context, builder, function, arguments.types)
        values = cgutils.unpack_tuple(builder, args[1])
        status, result = context.call_conv.call_function(
            builder, callee, found.signature.return_type, found.signature.args, values, attrs=("noinline",)
        )
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return result

    return signature.return_type(function, arguments), codegen


@intrinsic
def as_c_function(typingctx, function, data):
    """The addresses of a C function ``double(x, g, words)`` of three integers, and of `words`, for as long as the
    calling function runs.

    It returns ``function(x, g, data)``; where that raises, it leaves `FAILED` in the first word. Its address belongs
    to the code that is compiled, so that the code can be cached.
    """
    arguments = (types.intp, types.intp, data)
    function.get_call_type(typingctx, arguments, {})  # an error in the objective is one of the caller's types

    def codegen(context, builder, whole, args):
        word = ir.IntType(64)
        found, callee = _compiled(context, builder, function, arguments)
        kind = ir.LiteralStructType([word, args[1].type])
        place = cgutils.alloca_once(builder, kind)
        builder.store(ir.Constant(word, 0), builder.gep(place, [_index(0), _index(0)]))
        builder.store(args[1], builder.gep(place, [_index(0), _index(1)]))

        name = builder.module.get_unique_name(f"{found.fndesc.mangled_name}.as_c")
        outer = ir.Function(builder.module, ir.FunctionType(ir.DoubleType(), [word] * 3), name)
        outer.linkage = "internal"
        inside = ir.IRBuilder(outer.append_basic_block())
        words = inside.inttoptr(outer.args[2], kind.as_pointer())
        given = inside.load(inside.gep(words, [_index(0), _index(1)]))
        status, value = context.call_conv.call_function(
            inside, callee, found.signature.return_type, found.signature.args, [*outer.args[:2], given]
        )
        with cgutils.if_unlikely(inside, status.is_error):
            inside.store(ir.Constant(word, FAILED), inside.gep(words, [_index(0), _index(0)]))
        inside.ret(value)
        addresses = [builder.ptrtoint(address, word) for address in (outer, place)]
        return context.make_tuple(builder, whole.return_type, addresses)

    return types.UniTuple(types.intp, 2)(function, data), codegen


def _index(number):
    return ir.Constant(ir.IntType(32), number)
