"""The CUDA kernels as machine code, compiled without a GPU: what they must hold, and what they must not.

One test for each kernel: compiling it takes nearly all the time.
"""

import itertools
import re
from collections import Counter
from functools import cache
from types import SimpleNamespace

import pytest

from adamw_numba.update import Storage, Variant

pytest.importorskip("numba_cuda")

NO_YES = (False, True)
STORAGES = [
    Storage("float32", "float32", "float32", strided=False, master=""),
    Storage("float64", "float64", "float64", strided=False, master=""),
    *(
        Storage(p, g, "float32", strided=False, master=master)
        for p in ("float16", "bfloat16")
        for g in (p, "float32")
        for master in ("", "float32")
    ),
]
OPTIONS = [
    (amsgrad, Variant(average, accumulate, clip=False, nesterov=False))
    for amsgrad, average, accumulate in itertools.product(NO_YES, repeat=3)
]
OPTIONS += [(True, Variant(True, True, clip=False, nesterov=True))]
UPDATES = [("update", storage._replace(amsgrad=own), variant) for storage in STORAGES for own, variant in OPTIONS]
# Of moments of fewer bits some: how they are loaded and stored does not depend on what else there is.
SMALL = [
    ("update", Storage(p, g, "float32", False, "float32" if p != "float32" else "", own, moments), variant)
    for p, g in (("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16"))
    for moments in ("bfloat16", "8bit")
    for own, variant in (OPTIONS[0], OPTIONS[-1])
]
REMAINDERS = [
    ("update", Storage("bfloat16", g, "float32", False, "remainder", own, moments), variant)
    for g, moments in (
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "8bit"),
        ("float32", "8bit"),
    )
    for own, variant in (OPTIONS[0], OPTIONS[-1])
]
SQUARES = [
    ("square", g, "float64" if g == "float64" else "float32", accumulates)
    for g in ("float16", "bfloat16", "float32", "float64")
    for accumulates in NO_YES
]
KERNELS = [*UPDATES, *SMALL, *REMAINDERS, *SQUARES, ("decision",)]
IN_FLOAT32 = [kernel for kernel in UPDATES + SMALL + REMAINDERS if kernel[1].compute == "float32"]
QUICK = [UPDATES[0], UPDATES[-1], SMALL[0], SMALL[2], REMAINDERS[0], SQUARES[-1], ("decision",)]
CAPABILITIES = [(8, 0, ""), (9, 0, "a")]  # as numba-cuda asks for them: with all that a GPU can do, from 9.0 on


def name_of(kernel):
    """What pytest calls a kernel's test."""
    if kernel[0] != "update":
        return "-".join(map(str, kernel))
    _, storage, variant = kernel
    wanted = {"amsgrad": storage.amsgrad, **variant._asdict()}
    options = {"": [], "float32": ["master"], "remainder": ["remainder"]}[storage.master]
    options = [*options, *(name for name in wanted if wanted[name])]
    small = [] if storage.moments == "float32" else [f"moments={storage.moments}"]
    return "-".join(["update", storage.p, storage.g, *small, *options])


def function_of(kernel):
    from adamw_numba.gpu import kernels, norm_kernels

    name, *arguments = kernel
    if name == "update":
        return kernels.update_function(*arguments)
    if name == "square":
        return norm_kernels.square_function(*arguments)
    return norm_kernels.decision_function


def compiled(kernel):
    """A kernel as `parts.kernel` compiles it, all but loaded, since there is no GPU."""
    from numba.cuda import codegen, dispatcher

    from adamw_numba.gpu import parts

    device = SimpleNamespace(compute_capability=CAPABILITIES[0][:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "get_current_device", lambda: device)
        patch.setattr(dispatcher._Kernel, "bind", lambda kernel: None)
        patch.setattr(codegen.CUDACodeLibrary, "_ensure_cc", lambda library, cc: cc or CAPABILITIES[0])
        (found,) = parts.kernel(function_of(kernel)).overloads.values()
    return found


def ptx_for(found, capability):
    """The PTX that a GPU's assembler is given: of the linker, where that optimizes."""
    return found.inspect_lto_ptx(capability) if found.library._lto else found.inspect_asm(capability)


@cache
def ptx_of(kernel):
    """The PTX of a kernel for each GPU generation; what is the same for both is compiled once."""
    found = compiled(kernel)
    return {capability: ptx_for(found, capability) for capability in CAPABILITIES}


def accesses(ptx, instruction):
    return Counter(re.findall(rf"\s{instruction}\.global((?:\.cs)?(?:\.v\d\.\w+|\.b32))", ptx))


def test_what_is_read_here_is_compiled_like_what_runs(monkeypatch):
    """By the same call with the same options: another option is seen in the code."""
    from adamw_numba.gpu import parts

    assert parts.OPTIONS == {"lto": False}
    assert ".maxntid" not in ptx_of(UPDATES[0])[CAPABILITIES[0]]
    monkeypatch.setitem(parts.OPTIONS, "launch_bounds", 96)
    monkeypatch.setitem(parts.OPTIONS, "lto", True)
    found = compiled(UPDATES[0])
    assert found.library._lto
    assert re.search(r"\.maxntid 96\b", ptx_for(found, CAPABILITIES[0]))


def test_these_are_all_variants():
    assert len({name_of(kernel) for kernel in KERNELS}) * len(CAPABILITIES) == 2 * (80 + 10 + 12 + 10 + 8 + 1)
    assert len(IN_FLOAT32) == 81 + 12 + 10


def marks_of(kernel):
    """No options, each one alone, and all: that is enough, and where a gradient has another dtype, the first and the last."""
    marks = [pytest.mark.slow]
    if kernel[0] == "update":
        count = sum((kernel[1].amsgrad, *kernel[2]))
        marks += [pytest.mark.thorough] * (count == 2 or (kernel[1].p != kernel[1].g and count in (1, 3)))
    return marks


@pytest.mark.parametrize(
    "kernel", [k if k in QUICK else pytest.param(k, marks=marks_of(k)) for k in KERNELS], ids=name_of
)
def test_machine_code(kernel):
    for (major, minor, letter), ptx in ptx_of(kernel).items():
        assert f".target sm_{major}{minor}{letter}\n" in ptx
        assert ".local" not in ptx  # everything stays in registers
        assert "call.uni" not in ptx
        if kernel in IN_FLOAT32:
            assert ".f64" not in ptx
        if kernel[0] == "update":
            check_that_main_loops_move_128_bits(ptx, *kernel[1:])
        if kernel[0] == "update" and kernel[1].moments != "float32":
            check_that_scales_are_found_first(ptx, *kernel[1:])
        if kernel[0] == "square":
            check_that_several_loads_are_under_way(ptx, *kernel[1:])
        if kernel[0] == "decision":  # a norm is written before its block is counted, and others' are read after that
            order = r"st\.global\.f64.*membar\.gl;.*atom\.global\.add.*membar\.gl;.*bar\.sync.*ld\.global\.f64"
            assert re.search(order, ptx, re.S)


def check_that_main_loops_move_128_bits(ptx, storage, variant):
    """How many wide accesses there are: each array once in the main loop of each of what a kernel can do."""
    width = 16 // min({"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[kind] for kind in storage[:2])
    size = {"float32": 4, "float64": 8}[storage.compute]
    per_slot = width * size // 16
    loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
    has_copy = storage.master == "float32"
    slots = sum((storage.amsgrad, variant.average, variant.accumulate, has_copy))
    slots += 2 if storage.moments == "float32" else 0
    others = others_than_floats(loads, stores, width, storage, variant)
    blends = (1 + has_copy) * per_slot if variant.average else 0
    sums = per_slot if variant.accumulate else 0
    streaming = f".cs.v{16 // size}.f{8 * size}"
    assert loads[streaming] >= slots * per_slot + blends + sums, loads
    assert stores[streaming] >= slots * per_slot + (per_slot if variant.average else 0) + sums, stores
    narrow = ".v4.b32" if size == 4 and storage.p != "float32" else f".v{16 // size}.f{8 * size}"
    assert loads[narrow] >= 1, loads
    assert stores[narrow] >= 1, stores
    assert all(kind in (streaming, narrow, ".v4.f32", *others) for kind in loads | stores), (loads, stores)


def others_than_floats(loads, stores, width, storage, variant):
    """As many neighbours of remainders and small moments as of the rest, in one access; once more where looked at."""
    kinds = {4: ".b32", 8: ".v2.b32", 16: ".v4.b32"}
    expected = Counter()
    if storage.master == "remainder":
        expected[f".cs{kinds[2 * width]}"] += 1 + variant.average
    if storage.moments != "float32":
        kind = kinds[width * {"bfloat16": 2, "8bit": 1}[storage.moments]]
        expected[f".cs{kind}"] += 2
    for each, count in expected.items():
        assert loads[each] == stores[each] == count, (loads, stores)
    if storage.moments != "8bit":
        return [*expected]
    assert loads[kind] == 2, loads
    return [*expected, kind, ".v4.u32"]  # the last of what is looked at in float32


def check_that_scales_are_found_first(ptx, storage, variant):
    """In 8 bits: all that is needed is asked for, looked at and compared; then the old scales are read and overwritten."""
    asked, compared = ptx.count("prefetch.global.L2"), ptx.count("shfl.sync.bfly.b32")
    if storage.moments == "bfloat16":
        assert (asked, compared, ptx.count("bar.sync")) == (0, 0, 1)
        return
    values = 3 + variant.accumulate
    arrays = 4 + sum((storage.amsgrad, variant.average, variant.accumulate, storage.master != ""))
    assert asked > 0 == asked % arrays  # in a loop that the compiler has unrolled
    assert compared == 2 * 5 * values  # of whole accesses, and of single elements
    assert ptx.count("atom.shared.max.u32") == 2 * values
    order = (
        r"prefetch.*bar\.sync.*ld\.global\.v.*shfl.*atom\.shared.*bar\.sync"
        r".*ld\.global\.f32.*ld\.global\.f32.*st\.shared.*st\.global.*st\.global.*bar\.sync.*ld\.shared\.f32"
    )
    assert re.search(order, ptx, re.S)


def check_that_several_loads_are_under_way(ptx, g, compute, accumulates):
    """The loop over whole vectors loads all of them before it uses the first, and does not look where they lie."""
    loops = [block for block in re.split(r"\n\$L__\w+:", ptx) if re.search(r"ld\.global\S*\.v\d", block)]
    assert len(loops) == 1
    size, g_size = ({"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[kind] for kind in (compute, g))
    assert accesses(loops[0], "ld").total() == (2 * (1 + size // g_size) if accumulates else 4)
    before, *_ = re.split(r"\b(?:fma|add|mul|abs)\.(?:rn\.)?f\d", loops[0])
    assert accesses(before, "ld") == accesses(loops[0], "ld")
    assert not re.search(r"\b(?:rem|div|setp\.\S+\.[bsu]\d+)\b.*(?=ld\.global)", loops[0], re.S)


def shapes_of_results(ptx, results=r"st\.global(?:\.cs)?(?:\.v4)?\.f32\s+\[[^\]]+\], \{?([^;}]*)\}?;"):
    """For each number that is stored, the tree of floating-point instructions it comes from; leaves are alike."""
    made = {}
    for line in ptx.splitlines():
        found = re.match(r"\s+((?:fma|mul|add|sub|div|sqrt|neg)[.\w]*\.f32)\s+(%f\d+), (.*);", line)
        if found:
            made.setdefault(found[2], []).append((found[1], found[3].split(", ")))

    def shape(register, depth=0):
        ways = made.get(register, [])
        if depth > 12 or len(ways) != 1:
            return "x"
        name, operands = ways[0]
        return (name, *(shape(operand, depth + 1) for operand in operands))

    stored = re.findall(results, ptx)
    return Counter(shape(register.strip()) for group in stored for register in group.split(","))


def test_an_element_has_the_same_arithmetic_in_vectors_and_alone():
    """Which product and sum are fused must not depend on where an element lies."""
    for ptx in ptx_of(UPDATES[0]).values():
        found = shapes_of_results(ptx)
        moments = [s for s in found if s != "x" and s[0].startswith(("fma", "add"))]
        assert found
        assert len(moments) == 2, found  # the first and the second moment, each computed in one way
        assert len({found[s] for s in moments}) == 1
        assert min(found[s] for s in moments) >= 5  # four lanes and the element alone


def test_remainders_have_the_arithmetic_of_master_copies():
    """So they have the same bits."""
    kernel = REMAINDERS[0]
    kernels = kernel, (*kernel[:1], kernel[1]._replace(master="float32"), *kernel[2:])
    for ptx, other in zip(*(ptx_of(each).values() for each in kernels), strict=True):
        found, expected = (
            Counter(re.findall(r"\s(?:fma|mul|add|sub|div|sqrt|neg)\S*\.f32", each)) for each in (ptx, other)
        )
        assert found == expected != Counter()


def test_bounds_have_the_arithmetic_of_the_elements():
    """Of moments of 8 bits: no element may exceed the bound that its block's scale comes from."""
    for ptx in ptx_of(SMALL[2]).values():
        found = shapes_of_results(ptx, r"mov\.b32\s+%r\d+, (%f\d+);")  # whatever is taken apart as bits
        product = ("mul.f32", "x", "x")
        # What old moments are moved by is taken from them.
        old_m, old_v = (("mul.f32", "x", (minus, "x", "x")) for minus in ("sub.f32", "add.f32"))
        momentum = ("fma.rn.f32", "x", old_m, product)
        velocity = ("fma.rn.f32", "x", old_v, ("mul.f32", "x", product))
        assert found[momentum] == found[velocity] == 4 + 1 + 1  # four lanes, the element alone, and the bound
        assert found["fma.rn.f32", "x", velocity, "x"] == 4 + 1  # divided by the scale, and moved by the offset
        assert not [s for s in found if s != "x" and s[0].startswith("fma") and len(str(s)) > len(str(momentum))
                    and s not in (velocity, ("fma.rn.f32", "x", velocity, "x"))]  # fmt: skip
