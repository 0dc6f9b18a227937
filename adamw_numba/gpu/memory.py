"""A GPU's memory by address: the only file that knows how the CUDA compiler spells a load, a store or an atomic.

Kernels are written with these functions alone, so another compiler, or a successor of numba-cuda, needs only another
version of this file. There are two: intrinsics for numba-cuda, and plain Python for its simulator
(``NUMBA_ENABLE_CUDASIM=1``), which reads the host's memory, where the simulator's "device" arrays lie.

`word`, `put_word` and `add_word` (atomic; returns the old value) access one int64. `number(dtype)` makes a pair of
functions that read and write one float. `elements(storage, width, streaming)` makes a pair ``load(out, address)`` and
``store(values, address)`` for `width` neighbours, between memory and a local array of the compute type: in accesses of
128 bits where the neighbours fill them; `streaming` says that nobody reads the same bytes again soon. With `times` and
`apart`, for as many such groups of neighbours, so many elements from one to the next. `rounded(storage)` is what a
number becomes when it is stored and loaded again. `codes(bits, width, streaming)` makes the same pair as `elements` for
unsigned integers of 8 or 16 bits and a local array of uint32. `unsigned`, `bits_of`, `number_of` and `choose` are what
arrays/moments.py and arrays/masters.py make their functions of. `most_of_warp` is the largest of what the threads of a
warp have: one number below 2^31 each. `ask_for` has the bytes at an address brought nearer, and does not wait for them.
"""

import ctypes
from functools import cache

import numpy as np
from llvmlite import ir
from numba import config, cuda, types

SIMULATED = bool(config.ENABLE_CUDASIM)
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
FLOATS = {"float32": types.float32, "float64": types.float64}  # the types that kernels compute in
ACCESS = 16  # bytes: the widest access of one thread
_GLOBAL = 1  # the address space


def _simulated():
    import ml_dtypes  # a package of the tests

    dtypes = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}

    def memory(address, dtype, count=1):
        size = np.dtype(dtype).itemsize * count
        return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)

    def check(address, width, least=ACCESS):
        """What a GPU would answer with an error of its own."""
        if width > 1 and address % least:
            raise RuntimeError(f"{width} elements are accessed at address {address}; expected a multiple of {least}")

    def word(address):
        return int(memory(address, np.int64)[0])

    def put_word(address, value):
        memory(address, np.int64)[0] = value

    def add_word(address, value):
        old = word(address)
        put_word(address, old + value)
        return old

    def number(dtype):
        def get(address):
            return memory(address, dtypes[dtype])[0]

        def put(address, value):
            memory(address, dtypes[dtype])[0] = value

        return get, put

    def elements(storage, width, streaming, times=1, apart=0):
        step = apart * SIZES[storage]

        def load(out, address):
            for k in range(times):
                check(address + k * step, width)
                out[k * width :][:width] = memory(address + k * step, dtypes[storage], width)

        def store(values, address):
            for k in range(times):
                check(address + k * step, width)
                with np.errstate(over="ignore"):
                    memory(address + k * step, dtypes[storage], width)[:] = values[k * width :][:width]

        return load, store

    def rounded(storage):
        def round_trip(x):
            with np.errstate(over="ignore"):
                return np.float32(np.float32(x).astype(dtypes[storage]))

        return round_trip

    def codes(bits, width, streaming):
        dtype, size = np.dtype(f"uint{bits}"), bits // 8 * width

        def load(out, address):
            check(address, width, size)
            out[:width] = memory(address, dtype, width)

        def store(values, address):
            check(address, width, size)
            memory(address, dtype, width)[:] = values[:width]

        return load, store

    def unsigned(x):
        return int(x) & 0xFFFFFFFF

    def bits_of(x):
        return int(np.float32(x).view(np.uint32))

    def number_of(bits):
        return np.uint32(bits).view(np.float32)

    def most_of_warp(x):
        return x

    def ask_for(address):
        return

    rounding = unsigned, bits_of, number_of
    return word, put_word, add_word, number, elements, rounded, codes, *rounding, most_of_warp, ask_for


def _compiled():
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    word_type, byte2, float_type, unsigned_type = ir.IntType(64), ir.IntType(16), ir.FloatType(), ir.IntType(32)
    floats = {"float32": (types.float32, float_type), "float64": (types.float64, ir.DoubleType())}
    raw = {"float16": byte2, "bfloat16": byte2, "float32": float_type, "float64": ir.DoubleType()}

    def pointer(builder, address, kind):
        return builder.inttoptr(address, ir.PointerType(kind, _GLOBAL))

    def index(i):
        return ir.Constant(unsigned_type, i)

    def plain(kind, numba_type):
        """Read and write one value."""

        @intrinsic
        def get(typingctx, address):
            def codegen(context, builder, signature, args):
                return builder.load(pointer(builder, args[0], kind))

            return numba_type(types.int64), codegen

        @intrinsic
        def put(typingctx, address, value):
            def codegen(context, builder, signature, args):
                builder.store(args[1], pointer(builder, args[0], kind))
                return context.get_dummy_value()

            return types.void(types.int64, numba_type), codegen

        return get, put

    word, put_word = plain(word_type, types.int64)

    @intrinsic
    def add_word(typingctx, address, value):
        def codegen(context, builder, signature, args):
            return builder.atomic_rmw("add", pointer(builder, args[0], word_type), args[1], "monotonic")

        return types.int64(types.int64, types.int64), codegen

    def number(dtype):
        numba_type, kind = floats[dtype]
        return plain(kind, numba_type)

    def widen(builder, x, storage):
        if storage == "bfloat16":
            return builder.bitcast(builder.shl(builder.zext(x, unsigned_type), index(16)), float_type)
        if storage == "float16":
            return builder.fpext(builder.bitcast(x, ir.HalfType()), float_type)
        return x

    def narrow(builder, x, storage):
        if storage == "bfloat16":  # to nearest, ties to even; GPUs before generation 8.0 have no instruction for it
            bits = builder.bitcast(x, unsigned_type)
            upper = builder.lshr(bits, index(16))
            half = builder.add(index(0x7FFF), builder.and_(upper, index(1)))
            rounded = builder.lshr(builder.add(bits, half), index(16))
            is_nan = builder.fcmp_unordered("uno", x, x)
            return builder.trunc(builder.select(is_nan, builder.or_(upper, index(0x40)), rounded), byte2)
        if storage == "float16":
            return builder.bitcast(builder.fptrunc(x, ir.HalfType()), byte2)
        return x

    def together(builder, storage, count, address, values=None):
        """Read, or write, all registers of one access by an instruction of our own."""
        letter, kind, suffix = {
            "float32": ("f", float_type, "f32"),
            "float64": ("d", ir.DoubleType(), "f64"),
            "pairs": ("r", unsigned_type, "b32"),
            "pairs once": ("r", unsigned_type, "b32"),
        }[storage]
        hint = "" if storage == "pairs" else ".cs"
        names = ", ".join(f"${i + (values is not None)}" for i in range(count))
        vector, names = (f".v{count}", f"{{{names}}}") if count > 1 else ("", names)
        if values is None:
            text, constraints = (
                f"ld.global{hint}{vector}.{suffix} {names}, [${count}];",
                [f"={letter}"] * count + ["l"],
            )
            result = ir.LiteralStructType([kind] * count) if count > 1 else kind
            function = ir.FunctionType(result, [word_type])
            value = builder.asm(function, text, ",".join(constraints), [address], side_effect=True)
            return [builder.extract_value(value, i) for i in range(count)] if count > 1 else [value]
        text, constraints = f"st.global{hint}{vector}.{suffix} [$0], {names};", ["l"] + [letter] * count
        function = ir.FunctionType(ir.VoidType(), [word_type] + [kind] * count)
        return builder.asm(function, text, ",".join(constraints), [address, *values], side_effect=True)

    def read(builder, address, storage, count, streaming):
        """A few raw elements in one access."""
        kind = raw[storage]
        if count == 1:
            return [builder.load(pointer(builder, address, kind))]
        if kind is byte2:  # the compiler would make two accesses of it
            pairs = together(builder, "pairs", count // 2, address)
            halves = [(pair, builder.lshr(pair, index(16))) for pair in pairs]
            return [builder.trunc(half, byte2) for two in halves for half in two]
        if streaming:
            return together(builder, storage, count, address)
        value = builder.load(pointer(builder, address, ir.VectorType(kind, count)))
        value.align = ACCESS
        return [builder.extract_element(value, index(i)) for i in range(count)]

    def write(builder, address, values, storage, streaming):
        kind, count = raw[storage], len(values)
        if count == 1:
            builder.store(values[0], pointer(builder, address, kind))
        elif kind is byte2:
            wide = [builder.zext(value, unsigned_type) for value in values]
            pairs = [builder.or_(wide[i], builder.shl(wide[i + 1], index(16))) for i in range(0, count, 2)]
            together(builder, "pairs", count // 2, address, pairs)
        elif streaming:
            together(builder, storage, count, address, values)
        else:
            vector = ir.Constant(ir.VectorType(kind, count), ir.Undefined)
            for i, value in enumerate(values):
                vector = builder.insert_element(vector, value, index(i))
            builder.store(vector, pointer(builder, address, vector.type)).align = ACCESS

    def accesses(storage, width, times, apart):
        """How many elements one access takes; for each access, which lane is its first, and the byte it begins at."""
        size, count = SIZES[storage], min(width, ACCESS // SIZES[storage])
        starts = [(k * width + i, (k * apart + i) * size) for k in range(times) for i in range(0, width, count)]
        return count, starts

    def elements(storage, width, streaming, times=1, apart=0):
        count, starts = accesses(storage, width, times, apart)

        @intrinsic
        def load(typingctx, out, address):
            def codegen(context, builder, signature, args):
                data = context.make_array(signature.args[0])(context, builder, args[0]).data
                for start, byte in starts:
                    at = builder.add(args[1], ir.Constant(word_type, byte))
                    for i, x in enumerate(read(builder, at, storage, count, streaming)):
                        builder.store(widen(builder, x, storage), builder.gep(data, [index(start + i)]))
                return context.get_dummy_value()

            return types.void(out, types.int64), codegen

        @intrinsic
        def store(typingctx, values, address):
            def codegen(context, builder, signature, args):
                data = context.make_array(signature.args[0])(context, builder, args[0]).data
                for start, byte in starts:
                    at = builder.add(args[1], ir.Constant(word_type, byte))
                    numbers = [builder.load(builder.gep(data, [index(start + i)])) for i in range(count)]
                    write(builder, at, [narrow(builder, x, storage) for x in numbers], storage, streaming)
                return context.get_dummy_value()

            return types.void(values, types.int64), codegen

        return load, store

    def rounded(storage):
        @intrinsic
        def round_trip(typingctx, x):
            def codegen(context, builder, signature, args):
                return widen(builder, narrow(builder, args[0], storage), storage)

            return types.float32(types.float32), codegen

        return round_trip

    def codes(bits, width, streaming):
        """Of one access; several elements are the bytes, or pairs, of a few registers."""
        single, held = ir.IntType(bits), 32 // bits
        storage = "pairs once" if streaming else "pairs"

        @intrinsic
        def load(typingctx, out, address):
            def codegen(context, builder, signature, args):
                data = context.make_array(signature.args[0])(context, builder, args[0]).data
                if width == 1:
                    found = [builder.zext(builder.load(pointer(builder, args[1], single)), unsigned_type)]
                else:
                    registers = together(builder, storage, width // held, args[1])
                    shifted = [builder.lshr(x, index(bits * k)) for x in registers for k in range(held)]
                    found = [builder.and_(x, index((1 << bits) - 1)) for x in shifted]
                for i, x in enumerate(found):
                    builder.store(x, builder.gep(data, [index(i)]))
                return context.get_dummy_value()

            return types.void(out, types.int64), codegen

        @intrinsic
        def store(typingctx, values, address):
            def codegen(context, builder, signature, args):
                data = context.make_array(signature.args[0])(context, builder, args[0]).data
                given = [builder.load(builder.gep(data, [index(i)])) for i in range(width)]
                if width == 1:
                    builder.store(builder.trunc(given[0], single), pointer(builder, args[1], single))
                    return context.get_dummy_value()
                registers = []
                for i in range(0, width, held):
                    register = given[i]
                    for k in range(1, held):
                        register = builder.or_(register, builder.shl(given[i + k], index(bits * k)))
                    registers.append(register)
                together(builder, storage, len(registers), args[1], registers)
                return context.get_dummy_value()

            return types.void(values, types.int64), codegen

        return load, store

    def bits_as(to, of):
        """What reinterprets 32 bits."""

        @intrinsic
        def view(typingctx, x):
            def codegen(context, builder, signature, args):
                return builder.bitcast(args[0], context.get_value_type(to))

            return to(of), codegen

        return view

    @device_function
    def unsigned(x):
        return np.uint32(x)

    @device_function
    def most_of_warp(x):
        x = np.int32(x)  # which the compiler's shuffles take
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, 16))
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, 8))
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, 4))
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, 2))
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, 1))
        return np.uint32(x)

    @intrinsic
    def ask_for(typingctx, address):
        def codegen(context, builder, signature, args):
            function = ir.FunctionType(ir.VoidType(), [word_type])
            builder.asm(function, "prefetch.global.L2 [$0];", "l", [args[0]], side_effect=True)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    rounding = unsigned, bits_as(types.uint32, types.float32), bits_as(types.float32, types.uint32)
    return word, put_word, add_word, number, elements, rounded, codes, *rounding, most_of_warp, ask_for


device_function = cuda.jit(device=True)
# For functions of numbers and memory, which ask nothing of `cuda`: the simulator would spend most of its time wrapping.
scalar_function = (lambda function: function) if SIMULATED else device_function
_made = _simulated() if SIMULATED else _compiled()
word, put_word, add_word, number, elements, rounded, codes, unsigned, bits_of, number_of, most_of_warp, ask_for = _made
number, elements, rounded, codes = cache(number), cache(elements), cache(rounded), cache(codes)


@scalar_function
def choose(condition, yes, no):
    return yes if condition else no
