"""TODO: trimserve/arrays.py."""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
