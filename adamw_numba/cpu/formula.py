"""The arithmetic of one element, compiled by Numba."""

import math

import numpy as np

from ..arrays.compiled import jit
from ..update import make_update

update = jit(make_update(math.sqrt, np.maximum, np.minimum))
