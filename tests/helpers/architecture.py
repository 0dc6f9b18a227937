"""The rules of docs/architecture.md, read off the source of a package: each rule yields what breaks it.

Nothing is imported; the files are parsed. An import counts wherever it stands, in a function too.
"""

import ast
import math
import re
from collections.abc import Iterator
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

# A room is a file or a folder at the top of the package; its imports run down, to rooms on lower floors.
_TABLE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
FLOOR_OF = {room: int(number) for number, room in re.findall(r"^\| (\d+) \| (\w+)(?:\.py|/) \|", _TABLE, re.M)}
DOORS = {"__init__", "__main__"}  # above all floors
MOST_FLOORS, MOST_ENTRIES = 9, 26
MOST_LINES = {"optimizer.py": 720}  # its lines are docstrings
MOST_LINES_ELSEWHERE = 450
FOUNDATION = {"saving.stores": {"saving.stores", "arrays"}}  # what a folder may import of ours

OPTIONAL = {
    "cuda", "cupy", "cupyx", "h5py", "jax", "keras", "matplotlib", "ml_dtypes", "mpi4py", "numba_cuda", "optax", "safetensors",
    "scipy", "torch", "tqdm", "warp", "zarr",
}  # fmt: skip
COMPILERS = {"llvmlite", "numba"}
COMPILED = (
    "arrays.compiled", "arrays.reader", "cpu.", "gpu.", "minimizer.loop_kernel", "minimizer.objective_kernel", "njit."
)  # fmt: skip
ON_GPUS = "gpu."  # only these may import numba.cuda when they are loaded
PUBLIC = {"_replace", "_fields", "_asdict", "_make"}  # of named tuples, whose fields have no underscore
SIMULATOR = {"_ary"}  # where Numba's simulator keeps a "device" array: it has no public name
READERS = {"attrgetter", "delattr", "getattr", "hasattr", "setattr"}


class Import(NamedTuple):
    """One name taken from a module, or the module itself."""

    module: str  # dotted; within the package without the package's name
    name: str
    line: int
    at_top: bool  # runs when the file is loaded
    ours: bool


class Package:
    """The parsed files of a package, by dotted name; a folder's own file goes by the folder's name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = {self._name_of(path): path for path in sorted(folder.rglob("*.py"))}
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.files.items()}

    def _name_of(self, path: Path) -> str:
        parts = path.relative_to(self.folder).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    def at(self, name: str, line: int) -> str:
        return f"{self.files[name].relative_to(self.folder)}:{line}"

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        return {name: [*self._imports_of(name)] for name in self.files}

    def _imports_of(self, name: str) -> Iterator[Import]:
        for node, at_top in walk(self.trees[name]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield self._found(alias.name, "", node.lineno, at_top)
            elif isinstance(node, ast.ImportFrom):
                module = self._absolute(name, node)
                yield from (self._found(module, alias.name, node.lineno, at_top) for alias in node.names)

    def _absolute(self, name: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        folder = self.files[name].parent
        for _ in range(node.level - 1):
            folder = folder.parent
        return ".".join([*folder.relative_to(self.folder.parent).parts, *filter(None, [node.module])])

    def _found(self, module: str, name: str, line: int, at_top: bool) -> Import:
        root, _, inner = module.partition(".")
        if root != self.folder.name:
            return Import(module, name, line, at_top, ours=False)
        whole = ".".join(filter(None, [inner, name]))
        if whole in self.files:  # the name is a module
            return Import(whole, "", line, at_top, ours=True)
        return Import(inner or "__init__", name, line, at_top, ours=True)


def walk(node: ast.AST, at_top: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs when the file is loaded."""
    yield node, at_top
    later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        yield from walk(child, at_top and not later and not for_types)


def room_of(name: str) -> str:
    return name.partition(".")[0]


def floor_of(name: str) -> float:
    """The number of a module's floor, the doors' above all others; 0 of a room that is not in the table."""
    room = room_of(name)
    return math.inf if room in DOORS else FLOOR_OF.get(room, 0)


def ours(package: Package) -> Iterator[tuple[str, Import]]:
    return ((name, found) for name, all_found in package.imports.items() for found in all_found if found.ours)


def rooms(package: Package) -> Iterator[str]:
    """Rooms that are on no floor, and floors' rooms that do not exist."""
    there = {room_of(name) for name in package.files} - DOORS
    for room in sorted(there ^ FLOOR_OF.keys()):
        yield f"{room}: {'on no floor' if room in there else 'not there'}"
    floors = {*FLOOR_OF.values()}
    if floors != {*range(1, len(floors) + 1)} or len(floors) > MOST_FLOORS:
        yield f"floors {sorted(floors)}; expected 1 to {MOST_FLOORS} at most"


def imports_up(package: Package) -> Iterator[str]:
    """From another room that is not on a lower floor."""
    for name, found in ours(package):
        if room_of(name) != room_of(found.module) and floor_of(found.module) >= floor_of(name):
            yield f"{package.at(name, found.line)}: {name} imports {found.module}"


def foundations(package: Package) -> Iterator[str]:
    """Imports of a folder from outside the few places that it may know."""
    for name, found in ours(package):
        for folder, allowed in FOUNDATION.items():
            if inside(name, folder) and not any(inside(found.module, place) for place in allowed):
                yield f"{package.at(name, found.line)}: {name} imports {found.module}"


def inside(name: str, folder: str) -> bool:
    return f"{name}.".startswith(f"{folder}.")


def circles(package: Package) -> Iterator[str]:
    """The first circle of modules."""
    graph = {name: {each.module for each in found if each.ours} for name, found in package.imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " <- ".join(error.args[1])


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC | SIMULATOR


def imported_underscores(package: Package) -> Iterator[str]:
    """Private names imported from another module of the package."""
    for name, found in ours(package):
        if is_private(found.name):
            yield f"{package.at(name, found.line)}: {found.name} of {found.module}"


def reached_underscores(package: Package) -> Iterator[str]:
    """Private attributes of anything but `self` and `cls`, also by their name, where the file has none of that name."""
    for name, tree in package.trees.items():
        own = own_underscores(tree)
        for node, attribute in reached(tree):
            if is_private(attribute) and attribute not in own:
                yield f"{package.at(name, node.lineno)}: {ast.unparse(node)}"


def own_underscores(tree: ast.Module) -> set[str]:
    """The private names that classes of a file give to their methods, class attributes, slots and `self`."""
    found = set()
    for node in (node for kind in ast.walk(tree) if isinstance(kind, ast.ClassDef) for node in ast.walk(kind)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            is_own = isinstance(node, ast.Name) or ast.unparse(node.value) in ("self", "cls")
            found |= {node.id if isinstance(node, ast.Name) else node.attr} if is_own else set()
    return found


def reached(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """Every `x.name` of which x is neither `self` nor `cls`, and every `getattr(x, "name")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node, node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in READERS:
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield from ((node, part) for part in argument.value.split("."))


def optional_libraries(package: Package) -> Iterator[str]:
    """Libraries that may be missing, imported where a file is loaded; numba.cuda among them, but for GPU modules.

    A room that has the name of a library is loaded by those who have it.
    """
    for name, found in foreign_at_top(package):
        on_gpu = (found.module, found.name) == ("numba", "cuda") or inside(found.module, "numba.cuda")
        if (room_of(found.module) in OPTIONAL and room_of(found.module) != room_of(name)) or (
            on_gpu and not name.startswith(ON_GPUS)
        ):
            yield f"{package.at(name, found.line)}: {found.module}"


def compilers(package: Package) -> Iterator[str]:
    """Numba, imported where a file is loaded that holds no compiled code."""
    for name, found in foreign_at_top(package):
        if room_of(found.module) in COMPILERS and not name.startswith(COMPILED):
            yield f"{package.at(name, found.line)}: {found.module}"


def foreign_at_top(package: Package) -> Iterator[tuple[str, Import]]:
    for name, all_found in package.imports.items():
        yield from ((name, found) for found in all_found if found.at_top and not found.ours)


def long_files(package: Package) -> Iterator[str]:
    for path in package.files.values():
        name, lines = str(path.relative_to(package.folder)), len(path.read_text().splitlines())
        if lines > MOST_LINES.get(name, MOST_LINES_ELSEWHERE):
            yield f"{name}: {lines} lines"


def entries(package: Package) -> Iterator[str]:
    """How many files and folders lie at the top, where they are too many."""
    found = sorted(path.name for path in package.folder.iterdir() if path.name != "__pycache__")
    if len(found) > MOST_ENTRIES:
        yield f"{len(found)} entries: {', '.join(found)}"


def forbidden_names(package: Package) -> Iterator[str]:
    """Modules called cuda: numba-cuda's import hook takes every dotted name that holds `numba.cuda` for its own."""
    yield from (name for name in package.files if name.endswith("cuda") and name.rpartition(".")[2] == "cuda")


RULES = {
    "every room is on a floor, of which there are few": rooms,
    "imports run down": imports_up,
    "stores know arrays alone": foundations,
    "no import runs in a circle": circles,
    "no underscore is imported": imported_underscores,
    "no underscore of somebody else is reached": reached_underscores,
    "optional libraries are imported inside functions": optional_libraries,
    "Numba is imported by compiled code alone": compilers,
    "files are short": long_files,
    "the top is small": entries,
    "no module is called cuda": forbidden_names,
}
