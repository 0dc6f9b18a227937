"""The cache of compiled kernels on disk, which many processes fill at once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import adamw_numba

STEPS = """
import sys
import numpy as np
import adamw_numba

for dtype in sys.argv[1:]:
    variable = np.linspace(-1, 1, 7).astype(dtype)
    optimizer = adamw_numba.AdamW(0.1, clipnorm=1.0, gradient_accumulation_steps=2)
    optimizer.build([variable])
    for _ in range(4):
        optimizer.apply([np.linspace(-2, 3, 7).astype(dtype)])
    print(dtype, variable.tolist())
"""


def steps(cache, *dtypes, sources=None):
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *dtypes],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        cwd=sources,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_file_that_holds_another_kernel(tmp_path):
    """What two processes leave behind that gave one number to two kernels, each of its own types: it is not loaded."""
    dtypes = ["float32", "float64", "float16"]
    expected = steps(tmp_path, *dtypes)
    exchanged = 0
    for index in tmp_path.rglob("*.nbi"):
        files = sorted(index.parent.glob(f"{index.stem}.*.nbc"))
        contents = [file.read_bytes() for file in files]
        for file, content in zip(files, np.roll(np.array(contents, dtype=object), 1), strict=True):
            file.write_bytes(content)
        exchanged += len(files) > 1
    assert exchanged >= 4
    assert steps(tmp_path, *dtypes) == expected
    assert steps(tmp_path, *reversed(dtypes)) == expected[::-1]


def test_a_constant_of_another_file(tmp_path):
    """It is in the machine code of files that have not changed: all are compiled anew, as after `git pull`."""
    sources = tmp_path / "sources"
    shutil.copytree(Path(adamw_numba.__file__).parent, sources / "adamw_numba", ignore=shutil.ignore_patterns("*.nb?"))
    expected = steps(tmp_path / "cache", "float32", sources=sources)
    blocks = sources / "adamw_numba" / "cpu" / "blocks.py"
    text = blocks.read_text()
    assert text.count("\nKNOWN = SEEDS + 3\n") == 1
    blocks.write_text(text.replace("\nKNOWN = SEEDS + 3\n", "\nKNOWN = SEEDS + 7\n"))
    with (blocks.parent / "walk.py").open("a") as walk:  # which tells the loops, which stay, where things are
        walk.write("# changed\n")
    assert steps(tmp_path / "cache", "float32", sources=sources) == expected
