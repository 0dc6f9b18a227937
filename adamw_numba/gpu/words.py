"""What the host and the kernels tell each other through the GPU's memory: which word means what.

Both sides use these positions. A word is an int64; an address counts bytes.
"""

from ..update import Coefficients
from .memory import SIMULATED

THREADS = 2 if SIMULATED else 256  # of a block; also the number of lanes of a norm, so the bits depend on it
WARP = 1 if SIMULATED else 32  # threads that can tell each other numbers without shared memory
SQUARES = 64 * THREADS  # elements of one partial sum of squares
MOST_SCALES = 8  # of moments of 8 bits, in one chunk

# The descriptor of a group of arrays (those stored alike): addresses on the device, and numbers.
ARRAYS, RUNS, RUN_COUNT, ENDS, CHUNKS, CHUNK, CONTROL, HEADER, ROWS, ROWS_DOUBLE, SCALES = range(11)
SCALES_DOUBLE, GROUP, GROUPS, SQUARE_ENDS, SQUARE_CHUNKS, PARTIALS, RANGES, NORMS, SETS, PLACES = range(11, 21)
DESCRIPTOR_WORDS = 21
# Columns of the runs: positions and steps in bytes. WHICH is the row, of those of a step, that holds for the array.
ARRAY, COUNT, WHICH, P_AT, G_AT, S_AT, P_STEP, G_STEP, S_STEP, RUN_COLUMNS = range(10)
# Columns of the places, a row for each run: where in the whole variable its first element is, how far the next is from
# it, and what stands for the name of the variable. Only the rounding of moments asks for them.
PLACE, PLACE_STEP, NAME, PLACE_COLUMNS = range(4)
# The control words: whether the norms allow the step, what the host asks about, how many blocks of threads have
# finished with a step and with the norms, and from COUNTERS on how many steps each group has done.
GO, EXHAUSTED, SKIPPED, NORM, FINISHED, NORMED, COUNTERS = range(7)
# The header of the rows: the iteration that the first one is for, how many there are, and the seed of the rounding of
# moments.
FIRST, ROW_COUNT, SEED, HEADER_WORDS = range(4)
# A step has one row for each group of hyperparameters, SETS in all. The columns of a row: the coefficients in their
# order, then
OVERWRITE, IS_UPDATE, NORM_FACTOR, CLIPNORM, GLOBAL_CLIPNORM, ROW_COLUMNS = range(12, 18)
EPSILON, SCALE = map(Coefficients._fields.index, ("epsilon", "scale"))
# Flags of a launch: each array's scale comes from the norms; a step is skipped where a norm is not finite; the launch
# uses row 0 and counts nothing; nothing is decided by the norms.
CLIPPED, GUARDED, STILL, NORMS_ALONE = 1, 2, 4, 8
# What there is in place of the index of a row: it is not the group's turn, no row was sent for it, the step is skipped.
NOT_NOW, NO_ROW, SKIP = -1, -2, -3
# What a step does to an array.
UPDATE, ACCUMULATE, BLEND, NOTHING = range(4)
