"""Queries, keys and values: where they come from, and what is done to them on the way to their product."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve_export.fusion.chains import Region, regions_behind
from trimserve_export.fusion.probing import Probe
from trimserve_export.fusion.reasons import Unfused

Columns = npt.NDArray[np.int64]
# Whole numbers below it are exact in float16, and in bfloat16.
_DIGIT = 256


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys or values of all heads.

    Attributes:
        source: (B, T, width), which they are columns of.
        columns: which ones, int64 (heads * size,), a head after the other.
        norm: the node that normalises each head.
        rope: the region that turns them by their position.
        factor: what they are multiplied with.
    """

    source: ir.Value
    columns: Columns
    norm: ir.Node | None
    rope: Region | None
    factor: float

    @property
    def is_whole(self) -> bool:
        """Whether the source has them in their order, and nothing else."""
        return np.array_equal(self.columns, np.arange(len(self.columns)))


def heads_behind(value: ir.Value, size: int, probe: Probe, places: Mapping[ir.Node, int]) -> Heads:
    """Follow queries, keys or values back to their projection.

    Args:
        value: where they go into a product or behind a past, (B, heads, T, size).
        size: of a head.
        probe: of the graph.
        places: of its nodes.

    Raises:
        Unfused: they do not come from columns of one value (B, T, width).
    """
    norm: ir.Node | None = None
    rope: Region | None = None
    factor = 1.0
    apart = value  # before it, numbers are only moved
    source = value
    for region in regions_behind(value, probe, places):
        if region.moves or region.is_cast:
            pass
        elif region.factor is not None:
            factor *= region.factor
            apart = region.entry
        elif region.is_norm and probe.width(region.entry) == size and norm is None:
            norm, apart = region.node, region.entry
        elif rope is None and norm is None and is_rope(region, probe):
            rope, apart = region, region.entry
        else:
            break
        source = region.entry
    sizes, width = probe.sizes(source), probe.width(source)
    if sizes is None or len(sizes) != 3 or width is None:
        raise Unfused(f"{source.name} is no row of all heads for each token")
    return Heads(source, _columns(source, width, apart, size, probe), norm, rope, factor)


def is_rope(region: Region, probe: Probe) -> bool:
    """Whether a region multiplies with what depends on the position."""
    return len(turned_by(region, probe)) == 2


def turned_by(region: Region, probe: Probe) -> Sequence[ir.Value]:
    """The float values that a region multiplies with and that depend on the position: cosines and sines."""
    found: dict[ir.Value, None] = {}
    for node in region.nodes:
        for value in node.inputs if node.op_type == "Mul" else ():
            if value is not None and value.const_value is None and not probe.is_data(value):
                found[value] = None
    return list(found)


def _columns(source: ir.Value, width: int, apart: ir.Value, size: int, probe: Probe) -> Columns:
    """Which columns of the source the heads are: it is run on the columns' own numbers.

    On their digits, of which every type of float has all.
    """
    if apart is source:
        return np.arange(width)
    part = probe.part([apart], [source])
    dtype = (source.dtype or ir.DataType.FLOAT).numpy()
    found = np.zeros(1, np.int64)
    for base in (_DIGIT**2, _DIGIT, 1):
        row = (np.arange(width) // base % _DIGIT).astype(dtype)
        (moved,) = part.run({source: row[None, None]}, new=1, past=0)
        found = found * _DIGIT + moved.reshape(-1).astype(np.int64)
    if len(found) % size:
        raise Unfused(f"{apart.name} has {len(found)} numbers a token, which are no heads of {size}")
    return found
