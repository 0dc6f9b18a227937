"""The arithmetic of one element, compiled for a GPU."""

import math

import numpy as np

from .. import update as formula
from .memory import scalar_function

update = scalar_function(formula.make_update(math.sqrt, np.maximum, np.minimum, scalar_function(formula.plain_muladd)))
accumulate = scalar_function(formula.accumulate)
blend = scalar_function(formula.blend)
