"""The machine code of the CPU kernels, read: vectors of fused operations, and no float64 in a float32 loop."""

import platform
import re
import subprocess
import sys

import pytest

from adamw_numba.update import Storage, Variant

ASSEMBLY = """
import numba, sys
from adamw_numba.cpu.kernels import update_loop
from adamw_numba.update import Storage, Variant
kernel = update_loop({storage!r}, {variant!r})
print(kernel._library.get_asm_str())
"""

PLAIN, FULL = Variant(False, False, False, False), Variant(True, True, True, True)
KINDS = {
    "float32": (Storage("float32", "float32", "float32", False, ""), PLAIN),
    "float32, everything": (Storage("float32", "float32", "float32", False, "", True), FULL),
    "float64": (Storage("float64", "float64", "float64", False, ""), PLAIN),
    "bfloat16": (Storage("bfloat16", "bfloat16", "float32", False, "float32"), PLAIN),
    "float16": (Storage("float16", "float16", "float32", False, "float32"), PLAIN),
}
OLD = {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": ""}  # vectors of 4, and nothing for float16


def assembly(storage, variant, tmp_path, **environment):
    environment |= {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": ""}
    code = ASSEMBLY.format(storage=storage, variant=variant)
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")
@pytest.mark.parametrize(
    "kind", [kind if kind == "float32" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_update_loop(kind, tmp_path):
    code = assembly(*KINDS[kind], tmp_path)
    suffix = "pd" if kind == "float64" else "ps"
    for operation in (rf"vfn?m(?:add|sub)\w*{suffix}\s", rf"vsqrt{suffix}\s", rf"vdiv{suffix}\s"):
        assert re.search(rf"{operation}.*%[yz]mm", code), operation
    # One sqrt and one division for each vector: the packed ones in the loop's body, a scalar one in its tail.
    assert len(re.findall(rf"vsqrt{suffix}\s", code)) == len(re.findall(rf"vdiv{suffix}\s", code))
    if kind != "float64":
        assert not re.search(r"vcvtps2pd|vcvtss2sd|vsqrtpd|vsqrtsd|vfn?m(?:add|sub)\w*[ps]d\s", code)
    if kind == "float16":
        assert re.search(r"vcvtph2ps", code)
        assert re.search(r"vcvtps2ph", code)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")
def test_float16_without_an_instruction_for_it(tmp_path):
    """Vectors of integers, and no call of a function that may not be there."""
    code = assembly(*KINDS["float16"], tmp_path, **OLD)
    assert re.search(r"sqrtps\s.*%xmm", code)
    assert not re.search(r"extendhfsf2|truncsfhf2|vcvtph2ps", code)
