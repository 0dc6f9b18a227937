"""The CUDA kernels as machine code, compiled without a GPU: what they must hold, and what they must not."""

import itertools
import multiprocessing
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("numba_cuda")

NO_YES = (None, True)
STORAGES = [("float32", "float32", "float32", None), ("float64", "float64", "float64", None)] + [
    (p, g, "float32", master) for p in ("float16", "bfloat16") for g in (p, "float32") for master in NO_YES
]
UPDATES = [
    ("update_function", (p, g, compute, *options, master))
    for (p, g, compute, master), options in itertools.product(STORAGES, itertools.product(NO_YES, repeat=3))
]
SQUARES = [
    ("square_function", (g, "float64" if g == "float64" else "float32", total))
    for g in ("float16", "bfloat16", "float32", "float64")
    for total in NO_YES
]
OTHERS = [("norm_function", ()), ("decide_function", ())]
CAPABILITIES = [(8, 0), (9, 0)]


def ptx_of(job):
    """One kernel variant for each GPU generation; the parts that are the same are compiled once."""
    import numba.cuda.dispatcher as dispatcher
    from numba.cuda import compiler

    from adamw_numba.gpu import kernels

    function, arguments = job
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=CAPABILITIES[0])  # there is no GPU
    options = dict.fromkeys(("debug", "opt", "abi_info", "launch_bounds")) | dict.fromkeys(
        ("lineinfo", "device", "fastmath", "forceinline", "lto"), False
    )
    library, _ = compiler._compile_pyfunc_with_fixup(
        getattr(kernels, function)(*arguments), kernels.SIGNATURE, cc=CAPABILITIES[0], abi="numba", **options
    )
    return ["".join(library.get_asm_strs(cc=capability)) for capability in CAPABILITIES]


@pytest.fixture(scope="module")
def compiled():
    """The PTX of every kernel variant for every GPU generation, made by two processes."""
    jobs = [*UPDATES, *SQUARES, *OTHERS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        results = pool.map(ptx_of, jobs, chunksize=4)
        return {
            (job, at): ptx
            for job, made in zip(jobs, results, strict=True)
            for at, ptx in zip(CAPABILITIES, made, strict=True)
        }


def accesses(ptx, instruction):
    return Counter(re.findall(rf"\s{instruction}\.global((?:\.cs)?\.v\d\.\w+)", ptx))


def test_every_variant_is_made_for_its_generation(compiled):
    assert len(compiled) == 2 * (80 + 8 + 2)
    for (_, (major, minor)), ptx in compiled.items():
        assert f".target sm_{major}{minor}" in ptx
        assert ".local" not in ptx  # everything stays in registers
        assert "call.uni" not in ptx


def test_a_float32_update_has_no_float64(compiled):
    found = [
        ptx
        for ((name, arguments), _), ptx in compiled.items()
        if name == "update_function" and "float64" not in arguments
    ]
    assert len(found) == 2 * 72
    for ptx in found:
        assert ".f64" not in ptx


def test_main_loops_move_128_bits(compiled):
    """How many wide accesses there are: each array once in the main loop of each of what a kernel can do."""
    for ((name, arguments), _), ptx in compiled.items():
        if name != "update_function":
            continue
        p, g, compute, top, average, total, master = arguments
        width = 16 // min({"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[kind] for kind in (p, g))
        size = {"float32": 4, "float64": 8}[compute]
        per_slot = width * size // 16
        loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
        slots = 2 + sum(x is True for x in (top, average, total, master))
        blends = (1 + (master is True)) * per_slot if average else 0
        sums = per_slot if total else 0
        streaming = f".cs.v{16 // size}.f{8 * size}"
        assert loads[streaming] >= slots * per_slot + blends + sums, (arguments, loads)
        assert stores[streaming] >= slots * per_slot + (per_slot if average else 0) + sums, (arguments, stores)
        narrow = ".v4.b32" if size == 4 and p != "float32" else f".v{16 // size}.f{8 * size}"
        assert loads[narrow] >= 1, (arguments, loads)
        assert stores[narrow] >= 1, (arguments, stores)
        assert all(kind in (streaming, narrow, ".v4.f32") for kind in loads | stores), (loads, stores)


def test_the_norm_reads_128_bits(compiled):
    for ((name, (g, *_)), _), ptx in ((job, ptx) for job, ptx in compiled.items() if job[0][0] == "square_function"):
        wide = {"float32": ".v4.f32", "float64": ".v2.f64"}.get(g, ".v4.b32")
        assert accesses(ptx, "ld")[wide] >= 1, name


def shapes_of_results(ptx):
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

    stored = re.findall(r"st\.global(?:\.cs)?(?:\.v4)?\.f32\s+\[[^\]]+\], \{?([^;}]*)\}?;", ptx)
    return Counter(shape(register.strip()) for group in stored for register in group.split(","))


def test_an_element_has_the_same_arithmetic_in_vectors_and_alone(compiled):
    """Which product and sum are fused must not depend on where an element lies."""
    for capability in CAPABILITIES:
        ptx = compiled[UPDATES[0], capability]
        found = shapes_of_results(ptx)
        moments = [s for s in found if s != "x" and s[0].startswith(("fma", "add"))]
        assert found
        assert len(moments) == 2, found  # the first and the second moment, each computed in one way
        assert len({found[s] for s in moments}) == 1
        assert min(found[s] for s in moments) >= 5  # four lanes and the element alone
