"""Rotary positions as two constant tables, which the attention operator looks up by itself."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve_export.fusion.chains import Region
from trimserve_export.fusion.heads import turned_by
from trimserve_export.fusion.probing import Probe
from trimserve_export.fusion.reasons import Unfused

Table = npt.NDArray[np.floating]
# GroupQueryAttention takes no other widths of tables.
_COLUMNS = 8
# The first positions, computed by themselves and among all others.
_FEW = 5


@dataclass(frozen=True, slots=True)
class Rotary:
    """Tables of one kind of layers.

    Attributes:
        cosines: (positions, frequencies), in the graph's dtype.
        sines: likewise.
        interleaved: pairs of neighbours are turned, and not each number with the one half a head away.
    """

    cosines: Table
    sines: Table
    interleaved: bool


class Tables:
    """The tables of a graph; layers that read the same values share them."""

    def __init__(self, probe: Probe, positions: int) -> None:
        """Prepare to make tables.

        Args:
            probe: of the graph.
            positions: the longest text, in tokens.
        """
        self._probe = probe
        self._positions = positions
        self._tables: dict[ir.Value, Table] = {}
        self._made: dict[tuple[bytes, bytes], Rotary] = {}

    def of(self, region: Region) -> Rotary:
        """The tables that a region turns heads by.

        Raises:
            Unfused: its angles depend on more than the position, or lie in a way that is not understood.
        """
        first, second = (self._table(value) for value in turned_by(region, self._probe))
        # At position 0 every sine is 0, and no cosine is.
        cosines, sines = (second, first) if not first[0].any() else (first, second)
        if sines[0].any() or not cosines[0].all() or sines.shape != cosines.shape:
            raise Unfused("it turns heads by something else than cosines and sines of the position")
        key = (cosines.tobytes(), sines.tobytes())
        if key not in self._made:
            self._made[key] = _rotary(cosines, sines)
        return self._made[key]

    def _table(self, value: ir.Value) -> Table:
        """What a value is at every position, (positions, width)."""
        value = _without_axes(value)
        if value not in self._tables:
            whole = self._at(value, new=self._positions, past=0)
            few = min(_FEW, self._positions)
            starts, ends = self._at(value, new=few, past=0), self._at(value, new=1, past=self._positions - 1)
            if not np.array_equal(starts, whole[:few]) or not np.array_equal(ends, whole[-1:]):
                raise Unfused("its rotary frequencies depend on the length of the text")
            self._tables[value] = whole
        return self._tables[value]

    def _at(self, value: ir.Value, *, new: int, past: int) -> Table:
        (found,) = self._probe.run([value], {}, new=new, past=past)
        if found.size % new or found.ndim < 2 or found.shape[-1] != found.size // new:
            raise Unfused(f"{value.name} has no row for each position")
        table: Table = found.reshape(new, -1)
        return table


def _without_axes(value: ir.Value) -> ir.Value:
    """A table of a call before it gets an axis for the heads, which each layer may give it anew."""
    while (node := value.producer()) is not None and node.op_type in ("Unsqueeze", "Identity"):
        if node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


def _rotary(cosines: Table, sines: Table) -> Rotary:
    half = cosines.shape[1] // 2
    tables = (cosines, sines)
    if all(np.array_equal(table[:, :half], table[:, half:]) for table in tables):
        found = [table[:, :half] for table in tables]
        interleaved = False
    elif all(np.array_equal(table[:, ::2], table[:, 1::2]) for table in tables):
        found = [table[:, ::2] for table in tables]
        interleaved = True
    else:
        found, interleaved = list(tables), False
    width = found[0].shape[1]
    if width % _COLUMNS:
        raise Unfused(
            f"it turns {2 * width} numbers of a head: GroupQueryAttention takes multiples of {2 * _COLUMNS}"
        )
    return Rotary(np.ascontiguousarray(found[0]), np.ascontiguousarray(found[1]), interleaved)
