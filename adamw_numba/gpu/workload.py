"""The work of every step on one GPU: the arrays in groups that are stored alike, each walked by one launch.

An array is a list of evenly spaced runs, a run is cut into chunks, and a block of threads takes one chunk after
another. For norms the chunks have a fixed size, so that the order of additions does not depend on the GPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from .. import arrays
from ..arrays import gpu as gpu_arrays
from ..arrays.masters import kept_by
from ..arrays.moments import BLOCK, name_word
from ..arrays.runs import ARRAY, COUNT, P_AT, PLACE, S_STEP, Matrix
from ..arrays.table import AddressTable
from ..update import Storage
from . import words as w
from .memory import SIMULATED
from .streams import wait_for_all

_cuda: Any = cuda  # without stubs
_SUMS = 24  # bytes of the three sums of a chunk

# The dtypes of a variable and its gradient, whether there is velocity_hat, and what the moments are kept in
Kind = tuple[str, str, bool, str]


class Group(NamedTuple):
    """Variables and gradients stored alike."""

    storage: Storage
    chunks: int
    square_chunks: int
    lists: tuple[Any, ...]  # on the device: the runs, the chunks that end with each, and places
    descriptor: Any  # on the device
    address: int  # of the descriptor
    words: Matrix  # the descriptor, on the host


class Workload:
    """The groups, and the memory that their kernels work in. Made again when an array is laid out in another way.

    Parameters
    ----------
    table : AddressTable
    which : list of int
        Which of the sets of coefficients holds for each variable.
    sets : int
        How many there are.

    Attributes
    ----------
    groups : list of Group
        At least one, since the GPU's count of steps needs one.
    arrays : int
        How many variables there are, with those that lie elsewhere.
    norms : Numba's device array, float64, shape (arrays,)
    """

    def __init__(self, table: AddressTable, which: Sequence[int], sets: int) -> None:
        self.arrays = count = len(table.names)
        kinds, places = _runs_by_kind(table, which)
        square_ends = [_ends(runs, w.SQUARES) for runs in kinds.values()]
        starts = np.cumsum([0, *map(_last, square_ends)])  # of each group's partial sums
        self.norms: Any = cuda.to_device(np.zeros(count))
        self._partials: Any = cuda.to_device(np.zeros((max(starts[-1], 1), 3)))
        self._ranges: Any = cuda.to_device(_ranges(which, list(kinds.values()), square_ends, starts))
        self._scales: tuple[Any, Any] = cuda.to_device(np.zeros(count, np.float32)), cuda.to_device(np.zeros(count))
        chunk = chunk_of(sum(int(runs[:, w.COUNT].sum()) for runs in kinds.values()), _processors())
        self.groups: list[Group] = []
        for k, (kind, runs) in enumerate(kinds.items()):
            group = _group(kind, runs, places[kind], chunk, square_ends[k], _master_of(table, runs))
            group.words[[w.ARRAYS, w.GROUP, w.GROUPS, w.SETS]] = count, k, len(kinds), sets
            group.words[w.PARTIALS] = gpu_arrays.address(self._partials) + _SUMS * int(starts[k])
            self.groups.append(group)

    def describe(self, addresses: dict[int, int]) -> None:
        """Tell the kernels where everything is: here, and at `addresses`, by entries of the descriptor."""
        own = {
            w.SCALES: gpu_arrays.address(self._scales[0]),
            w.SCALES_DOUBLE: gpu_arrays.address(self._scales[1]),
            w.RANGES: gpu_arrays.address(self._ranges),
            w.NORMS: gpu_arrays.address(self.norms),
        }
        for group in self.groups:
            lists = zip((w.RUNS, w.ENDS, w.SQUARE_ENDS, w.PLACES), map(gpu_arrays.address, group.lists), strict=True)
            for entry, address in (addresses | own | dict(lists)).items():
                group.words[entry] = address
            group.descriptor.copy_to_device(group.words)
        wait_for_all()  # such a copy, from ordinary memory, may still be under way, in the order of no stream


def chunk_of(elements: int, processors: int) -> int:
    """How many elements a block treats at once: enough chunks for all processors, and not too little in each.

    No more than two units: an H100 moved 64 million elements at 96.4 % of its bandwidth with two, at 95.2 % with eight.
    """
    unit = 4 * w.THREADS
    return unit * int(np.clip(elements // (8 * processors * unit), 1, 2))


def _group(kind: Kind, runs: Matrix, places: Matrix, chunk: int, square_ends: Matrix, master: str) -> Group:
    p_type, g_type, amsgrad, moments = kind
    if moments == "8bit":  # chunks are cut at blocks; only in the simulator a chunk is smaller than one
        chunk = -(-chunk // BLOCK) * BLOCK
    ends = _ends(runs, chunk)
    words = np.zeros(w.DESCRIPTOR_WORDS, np.int64)
    words[[w.CHUNK, w.RUN_COUNT, w.CHUNKS, w.SQUARE_CHUNKS]] = chunk, len(runs), _last(ends), _last(square_ends)
    storage = Storage(p_type, g_type, arrays.COMPUTE[p_type], False, master, amsgrad, moments)
    descriptor = cuda.to_device(words)
    lists = _on_device(runs), _on_device(ends), _on_device(square_ends), _on_device(places)
    return Group(storage, _last(ends), _last(square_ends), lists, descriptor, gpu_arrays.address(descriptor), words)


def _runs_by_kind(table: AddressTable, which: Sequence[int]) -> tuple[dict[Kind, Matrix], dict[Kind, Matrix]]:
    """The runs of all variables, by how they and their gradients are stored; and their places, for what is rounded."""
    kinds, places = {}, {}
    of_each = [("velocity_hat" in own, table.moments.get(i, "float32")) for i, own in enumerate(table.slots)]
    numbers = {each: k for k, each in enumerate(dict.fromkeys(of_each))}
    number_of = np.array([numbers[each] for each in of_each], np.int64)
    words = np.array(list(map(name_word, table.names)), np.int64)
    for (p_type, g_type), runs in table.runs():
        found = number_of[runs[:, ARRAY]]
        for (amsgrad, moments), number in numbers.items():
            own = runs[found == number]
            if len(own):
                kind = p_type, g_type, amsgrad, moments
                kinds[kind] = _with_sets(own, which)
                places[kind] = np.column_stack([own[:, PLACE:], words[own[:, ARRAY]]])
    if not kinds:
        kind = "float32", "float32", False, "float32"
        kinds[kind], places[kind] = np.zeros((0, w.RUN_COLUMNS), np.int64), np.zeros((0, w.PLACE_COLUMNS), np.int64)
    return kinds, places


def _with_sets(runs: Matrix, which: Sequence[int]) -> Matrix:
    """The runs that an address table gives, in the columns that kernels read."""
    result = np.zeros((len(runs), w.RUN_COLUMNS), np.int64)
    result[:, w.ARRAY], result[:, w.COUNT] = runs[:, ARRAY], runs[:, COUNT]
    result[:, w.WHICH] = np.asarray(which)[runs[:, ARRAY]]
    result[:, w.P_AT :] = runs[:, P_AT : S_STEP + 1]
    return result


def _ends(runs: Matrix, size: int) -> Matrix:
    """How many chunks of a size there are up to the end of each run."""
    ends: Matrix = np.cumsum(-(-runs[:, w.COUNT] // size))
    return ends


def _last(ends: Matrix) -> int:
    return int(ends[-1]) if len(ends) else 0


def _ranges(which: Sequence[int], kinds: list[Matrix], square_ends: list[Matrix], starts: Matrix) -> Matrix:
    """Which of all partial sums are of which array: the first, and the one after the last; and its set."""
    ranges = np.zeros((len(which), 3), np.int64)
    ranges[:, 2] = which
    for runs, ends, start in zip(kinds, square_ends, starts, strict=False):
        before = start + np.concatenate([[0], ends])
        own, first, runs_each = np.unique(runs[:, w.ARRAY], return_index=True, return_counts=True)
        ranges[own, 0], ranges[own, 1] = before[first], before[first + runs_each]
    return ranges


def _master_of(table: AddressTable, runs: Matrix) -> str:
    """What the variables of a group have beside themselves: all of one dtype the same."""
    return kept_by(table.slots[runs[0, w.ARRAY]]) if len(runs) else ""


def _on_device(x: Matrix) -> Any:
    """A copy there, of at least one row, since an empty array has no address."""
    return cuda.to_device(np.ascontiguousarray(x if len(x) else np.zeros((1, *x.shape[1:]), x.dtype)))


def _processors() -> int:
    return 1 if SIMULATED else int(_cuda.get_current_device().MULTIPROCESSOR_COUNT)
