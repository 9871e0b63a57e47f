"""Names for the array types that packages hand to each other."""

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Rows = npt.NDArray[Any]
Array = npt.NDArray[Any]
