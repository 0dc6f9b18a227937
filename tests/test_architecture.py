"""The package keeps to the rules of its architecture; and each rule finds what breaks it."""

from pathlib import Path

import pytest
from helpers.architecture import DOORS, FLOOR_OF, MOST_LINES_ELSEWHERE, RULES, Package

PACKAGE = Package(Path(__file__).parents[1] / "adamw_numba")


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_to(rule):
    assert not list(RULES[rule](PACKAGE))


# A rule, the files of a package, and what the rule finds in it: the beginning of a line for each
BROKEN = {
    "an import up": (
        "imports run down",
        {"state.py": "from .optimizer import AdamW"},
        ["state.py:1: state imports optimizer"],
    ),
    "inside a function": (
        "imports run down",
        {"step/prepare.py": "def f():\n    from ..saving import manifest", "saving/manifest.py": ""},
        ["step/prepare.py:2: step.prepare imports saving.manifest"],
    ),
    "by its whole name": (
        "imports run down",
        {"update.py": "import house.plot"},
        ["update.py:1: update imports plot"],
    ),
    "on the same floor": (
        "imports run down",
        {"gpu/plan.py": "from ..cpu.plan import Flag", "cpu/plan.py": ""},
        ["gpu/plan.py:1: gpu.plan imports cpu.plan"],
    ),
    "of a name at the top": (
        "imports run down",
        {"optimizer.py": "from . import AdamW"},
        ["optimizer.py:1: optimizer imports __init__"],
    ),
    "for types alone": (
        "imports run down",
        {"step/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import optimizer"},
        ["step/a.py:3: step.a imports optimizer"],
    ),
    "a store that knows the manifest": (
        "stores know arrays alone",
        {"saving/stores/npz.py": "from .. import manifest\nfrom ...arrays import tree\nfrom . import atomic",
         "saving/manifest.py": "", "saving/stores/atomic.py": ""},
        ["saving/stores/npz.py:1: saving.stores.npz imports saving.manifest"],
    ),
    "a circle": (
        "no import runs in a circle",
        {"cpu/a.py": "from . import b", "cpu/b.py": "from .c import d", "cpu/c.py": "def d():\n    import house.cpu.a"},
        ["cpu."],
    ),
    "a file that imports itself": (
        "no import runs in a circle",
        {"cpu/a.py": "from .a import b"},
        ["cpu.a <- cpu.a"],
    ),
    "an underscore": (
        "no underscore is imported",
        {"optimizer.py": "from .step import prepare as _prepare\nfrom .step.prepare import _pick as pick",
         "step/prepare.py": ""},
        ["optimizer.py:2: _pick of step.prepare"],
    ),
    "an underscore of a module": (
        "no underscore of somebody else is reached",
        {"optimizer.py": "from .step import prepare\nprepare._pick()"},
        ["optimizer.py:2: prepare._pick"],
    ),
    "an underscore of an object": (
        "no underscore of somebody else is reached",
        {"optimizer.py": "class A:\n    def f(self, b):\n        return self._x + self._y._z + b._w"},
        ["optimizer.py:3: b._w", "optimizer.py:3: self._y._z"],
    ),
    "an underscore by its name": (
        "no underscore of somebody else is reached",
        {"optimizer.py": "import operator\ngetattr(a, '_b')\noperator.attrgetter('c._d')\nsetattr(a, 'e', '_f')"},
        ["optimizer.py:2: getattr(a, '_b')", "optimizer.py:3: operator.attrgetter('c._d')", "optimizer.py:4: "],
    ),
    "an optional library": (
        "optional libraries are imported inside functions",
        {"update.py": "if True:\n    import torch.nn\ntry:\n    from scipy import optimize\nexcept ImportError:\n    pass\n"
                      "class A:\n    import h5py"},
        ["update.py:2: torch.nn", "update.py:4: scipy", "update.py:8: h5py"],
    ),
    "numba.cuda": (
        "optional libraries are imported inside functions",
        {"cpu/kernels.py": "from numba import cuda, njit\nimport numba.cuda.types", "gpu/kernels.py": "from numba import cuda",
         "gpu/plan.py": "from cuda.bindings import driver"},
        ["cpu/kernels.py:1: numba", "cpu/kernels.py:2: numba.cuda.types", "gpu/plan.py:1: cuda.bindings"],
    ),
    "Numba": (
        "Numba is imported by compiled code alone",
        {"state.py": "from numba import njit", "arrays/tree.py": "import llvmlite.ir"},
        ["arrays/tree.py:1: llvmlite.ir", "state.py:1: numba"],
    ),
    "a long file": (
        "files are short",
        {"state.py": "\n" * (MOST_LINES_ELSEWHERE + 1), "optimizer.py": "\n" * 721, "cpu/optimizer.py": "\n" * 451},
        ["cpu/optimizer.py: 451 lines", "optimizer.py: 721 lines", "state.py: 451 lines"],
    ),
    "many entries": ("the top is small", {f"data{k}.txt": "" for k in range(6)}, ["31 entries: "]),
    "a room on no floor": (
        "every room is on a floor, of which there are few",
        {"managers/base.py": "", "update.py": None},
        ["managers: on no floor", "update: not there"],
    ),
    "a room without a floor imports": (
        "imports run down",
        {"managers/base.py": "from .. import update"},
        ["managers/base.py:1: managers.base imports update"],
    ),
    "a module called cuda": ("no module is called cuda", {"gpu/cuda.py": ""}, ["gpu.cuda"]),
}  # fmt: skip


def house(folder, files):
    """A package with every room, and some files; `None` is a file that is not there."""
    rooms = {f"{room}.py": "" for room in {*FLOOR_OF, *DOORS}}
    for name, text in (rooms | files).items():
        if text is not None:
            path = folder / "house" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.parent.with_suffix(".py").unlink(missing_ok=True)  # a folder is the room itself
    return Package(folder / "house")


@pytest.mark.parametrize("case", BROKEN)
def test_a_rule_finds(case, tmp_path):
    rule, files, expected = BROKEN[case]
    found = sorted(RULES[rule](house(tmp_path, files)))
    assert len(found) == len(expected), found
    assert all(line.startswith(begin) for line, begin in zip(found, sorted(expected), strict=True)), found


def test_what_is_allowed(tmp_path):
    """Also imports at the top, of a door; underscores of one's own, of named tuples, and two underscores."""
    files = {
        "__init__.py": "from ._version import __version__\nfrom .optimizer import AdamW",
        "_version.py": "__version__ = '1'",
        "optimizer.py": (
            "from . import arrays, schedules\nfrom .arrays.tree import flatten as _flatten\nimport numpy as np\n"
            "class AdamW:\n    __slots__ = ('_x',)\n    def __init__(self):\n        self._x, self.state._y = 1, 2\n"
            "    def f(self, other):\n        import torch, numba.cuda\n        return other._x + other.g._replace(a=1)\n"
            "def f(optimizer):\n    return optimizer._x, optimizer.__dict__, getattr(optimizer, '__name__')"
        ),
        "arrays/__init__.py": "from .tree import flatten",
        "arrays/tree.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nfrom functools import cache",
        "arrays/compiled.py": "from numba import njit",
        "gpu/plan.py": "from numba import cuda\nfrom ..arrays.compiled import jit",
        "saving/stores/npz.py": "from ...arrays import tree\nfrom .atomic import write",
        "saving/stores/atomic.py": "",
    }  # fmt: skip
    package = house(tmp_path, files)
    found = {rule: list(RULES[rule](package)) for rule in RULES}
    assert found.pop("no underscore of somebody else is reached") == ["optimizer.py:7: self.state._y"]
    assert not any(found.values()), found


def test_no_two_test_files_share_a_name():
    """pytest imports them by their bare names: the second one of a pair is an error, but only where both are collected."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
