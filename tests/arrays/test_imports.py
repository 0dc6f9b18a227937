"""What an array is can be asked without loading Numba, which takes longer than most programs that only save or load."""

import subprocess
import sys

CODE = """
import sys, numpy as np
from adamw_numba import arrays
from adamw_numba.arrays import tree
tree.flatten({"w": np.ones(3)})
arrays.check_variable("w", np.ones(3))
print(*(name for name in ("numba", "llvmlite", "torch", "jax") if name in sys.modules))
"""


def test_no_numba():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
