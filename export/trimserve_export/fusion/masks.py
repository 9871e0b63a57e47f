"""What an attention mask lets a token see: everything before it, or the last positions of a window."""

import numpy as np
import onnx_ir as ir

from trimserve_export.fusion.probing import Probe
from trimserve_export.fusion.reasons import Unfused

# What is added for a position that does not count is at least as low as float16's lowest number.
_HIDDEN = -1e4


class Windows:
    """The windows of a graph's masks; layers that read the same mask share the answer."""

    def __init__(self, probe: Probe, positions: int) -> None:
        """Prepare to read masks.

        Args:
            probe: of the graph.
            positions: the longest text, in tokens.
        """
        self._probe = probe
        self._positions = positions
        self._found: dict[tuple[ir.Value, ...], int | None] = {}

    def of(self, masks: tuple[ir.Value, ...]) -> int | None:
        """How many positions the last token of the longest text sees, itself included; None for all.

        Raises:
            Unfused: a mask does something else than to hide positions.
        """
        if masks not in self._found:
            self._found[masks] = self._window(masks)
        return self._found[masks]

    def _window(self, masks: tuple[ir.Value, ...]) -> int | None:
        length = self._positions
        sees = np.ones(length, bool)
        for mask in self._probe.run(masks, {}, new=1, past=length - 1) if masks else ():
            rows = np.asarray(mask).reshape(-1, mask.shape[-1])
            seen = rows if rows.dtype == bool else rows > _HIDDEN
            if rows.dtype != bool and rows[seen].any():
                raise Unfused("its mask adds numbers to scores, by the distance perhaps")
            if (seen != seen[:1]).any():
                raise Unfused("its heads see different positions")
            sees &= seen[0]
        window = int(sees.sum())
        if not sees[length - window :].all():
            raise Unfused("a token sees other positions than the last ones")
        return window if window < length else None
