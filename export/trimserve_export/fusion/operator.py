"""Write a layer's attention as one GroupQueryAttention, and prove on numbers that it is the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import onnx_ir as ir

from trimserve_export.fusion.attention import Attention
from trimserve_export.fusion.heads import Heads
from trimserve_export.fusion.linear import Linear, choose, linear_of, packed
from trimserve_export.fusion.probing import Array, Probe
from trimserve_export.fusion.reasons import Unfused
from trimserve_export.fusion.rotary import Rotary
from trimserve_export.graphs.nodes import NodeWriter
from trimserve_export.graphs.values import find_input

_CONTRIB = "com.microsoft"
# The operator takes no other sizes of heads.
_HEAD_SIZES = 8
# How far both ways of a layer may lie apart, as a share of its largest number.
_TOLERANCE = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 2e-2}


@dataclass(frozen=True, slots=True)
class SequenceLengths:
    """What the operator reads of the attention mask: int32 (B,), and a number.

    Attributes:
        last: place of each sequence's last token, counted from its first.
        longest: tokens of the longest sequence.
    """

    last: ir.Value
    longest: ir.Value


def write_lengths(graph: ir.Graph) -> SequenceLengths:
    """Count the tokens of each sequence by the attention mask."""
    mask = find_input(graph, "attention_mask")
    writer, int32 = NodeWriter(graph, "lengths"), int(ir.DataType.INT32)
    tokens = writer.op("ReduceSum", [mask, writer.constant([1])], keepdims=0)
    last = writer.op("Cast", [writer.op("Sub", [tokens, writer.constant(1)])], to=int32)
    width = writer.op("Squeeze", [writer.op("Shape", [mask], start=1, end=2), writer.constant([0])])
    lengths = SequenceLengths(last, writer.op("Cast", [width], to=int32))
    writer.insert_before(graph[0])
    return lengths


@dataclass(frozen=True, slots=True)
class Fused:
    """An attention and the values that take the place of its output and its present.

    Attributes:
        attention: what is replaced.
        values: output, keys and values.
        together: the one product that gives queries, keys and values side by side, if there is one.
    """

    attention: Attention
    values: tuple[ir.Value, ...]
    together: ir.Value | None

    @property
    def replaced(self) -> tuple[ir.Value, ...]:
        """What they take the place of."""
        return (self.attention.output, *self.attention.present)


class AttentionWriter:
    """Writes the attentions of one graph; layers share rotary tables."""

    def __init__(self, graph: ir.Graph, probe: Probe) -> None:
        """Write what all layers read.

        Args:
            graph: the graph.
            probe: of it.
        """
        self._graph = graph
        self._probe = probe
        self._lengths = write_lengths(graph)
        self._tables: dict[int, tuple[ir.Value, ir.Value]] = {}

    def write(self, layer: int, attention: Attention, rotary: Rotary | None, window: int | None) -> Fused:
        """Write an attention beside the nodes that it is to replace.

        Raises:
            Unfused: the operator takes no such heads.
        """
        if attention.size % _HEAD_SIZES:
            raise Unfused(
                f"its heads have {attention.size} numbers: the operator takes multiples of {_HEAD_SIZES}"
            )
        writer = NodeWriter(self._graph, f"attention/{layer}")
        fed, together = self._fed(attention, writer)
        tables: tuple[ir.Value | None, ...] = (None, None)
        if rotary is not None:
            tables = self._constant(rotary, writer)
        attributes: dict[str, float] = {
            "num_heads": attention.heads,
            "kv_num_heads": attention.kv_heads,
            "scale": attention.scale,
            "local_window_size": -1 if window is None else window,
        }
        if attention.scores.softcap:
            attributes["softcap"] = attention.scores.softcap
        if rotary is not None:
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(rotary.interleaved)}
        inputs = [*fed, *attention.past, self._lengths.last, self._lengths.longest, *tables]
        made = writer.ops("GroupQueryAttention", inputs, 3, domain=_CONTRIB, **attributes)
        maker = attention.output.producer()
        if maker is None:
            raise Unfused("its output is an input of the graph")
        writer.insert_before(maker)
        return Fused(attention, tuple(made), together)

    def _constant(self, rotary: Rotary, writer: NodeWriter) -> tuple[ir.Value, ir.Value]:
        if id(rotary) not in self._tables:
            found = [
                writer.array(name, table)
                for name, table in (("cosines", rotary.cosines), ("sines", rotary.sines))
            ]
            self._tables[id(rotary)] = (found[0], found[1])
        return self._tables[id(rotary)]

    def _fed(self, attention: Attention, writer: NodeWriter) -> tuple[list[ir.Value | None], ir.Value | None]:
        """Queries, keys and values, or all of them in the first; and the one product that gives them."""
        parts = (attention.queries, attention.keys, attention.values)
        width = self._probe.width(parts[0].source)
        columns = np.concatenate([part.columns for part in parts])
        bare = all(part.norm is None for part in parts)
        if (
            bare
            and all(part.source is parts[0].source for part in parts)
            and np.array_equal(columns, np.arange(width or 0))
        ):
            return [parts[0].source, None, None], None
        together: ir.Value | None = None
        linears = [self._linear(part) for part in parts]
        found = [linear for linear in linears if linear is not None]
        if len(found) == len(parts) and all(linear.fed is found[0].fed for linear in found):
            together = packed(found, writer, str(parts[0].source.name))
            together.type = ir.TensorType(parts[0].source.dtype or ir.DataType.FLOAT)
            if bare:
                return [together, None, None], together
            widths = writer.constant([linear.width for linear in found])
            apart = writer.ops("Split", [together, widths], len(parts), axis=-1)
        elif all(part.is_whole and self._probe.width(part.source) == len(part.columns) for part in parts):
            apart = [part.source for part in parts]
        else:
            raise Unfused("its queries, keys and values are no columns of products with constant matrices")
        size = attention.size
        pairs = zip(parts, apart, strict=True)
        made: list[ir.Value | None] = [self._normed(part, value, size, writer) for part, value in pairs]
        return made, together

    @staticmethod
    def _linear(part: Heads) -> Linear | None:
        linear = linear_of(part.source)
        return None if linear is None else choose(linear, part.columns)

    @staticmethod
    def _normed(part: Heads, value: ir.Value, size: int, writer: NodeWriter) -> ir.Value:
        if part.norm is None:
            return value
        heads = writer.op("Reshape", [value, writer.constant([0, 0, -1, size])])
        attributes = {name: found.value for name, found in part.norm.attributes.items() if name != "axis"}
        normed = writer.op(part.norm.op_type, [heads, *part.norm.inputs[1:]], axis=-1, **attributes)
        return writer.op("Reshape", [normed, writer.constant([0, 0, len(part.columns)])])


def check_same(fused: Fused, probe: Probe, window: int | None, positions: int) -> None:
    """Compute an attention both ways, at lengths within and beyond its window.

    Raises:
        Unfused: the numbers differ.
    """
    attention = fused.attention
    parts = (attention.queries, attention.keys, attention.values)
    fed = {part.source for part in parts} | {*attention.past}
    if fused.together is not None:
        fed.add(fused.together)
    layer = probe.part([*fused.replaced, *fused.values], fed)
    for new, past in _lengths(window, positions):
        feeds = {part.source: _noise(part.source, [1, new, probe.width(part.source) or 0]) for part in parts}
        if fused.together is not None:
            heads = [feeds[part.source][..., part.columns] for part in parts]
            feeds[fused.together] = np.concatenate(heads, axis=-1)
        for value in attention.past:
            feeds[value] = _noise(value, [1, attention.kv_heads, past, attention.size])
        found = layer.run(feeds, new=new, past=past)
        for before, after in zip(found[:3], found[3:], strict=True):
            _compare(before, after, attention.output, (new, past))


def _lengths(window: int | None, positions: int) -> Iterator[tuple[int, int]]:
    """(T, P) to compare at: a text, a step, several tokens after others, and the ends of the window."""
    yield from (
        (min(7, positions), 0),
        (1, min(5, positions - 1)),
        (min(3, positions), max(0, min(6, positions - 3))),
    )
    if window is not None:
        yield from (
            (new, window + past) for new, past in ((1, -1), (1, 0), (1, 2), (4, -2)) if window + past > 0
        )


def _noise(value: ir.Value, shape: list[int]) -> Array:
    # By the name: keys that are their values would hide that they were taken for each other.
    generator = np.random.default_rng(crc32(str(value.name).encode()))
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    noise: Array = generator.standard_normal(shape).astype(dtype)
    return noise


def _compare(before: Array, after: Array, value: ir.Value, lengths: tuple[int, int]) -> None:
    tolerance = _TOLERANCE.get(value.dtype or ir.DataType.FLOAT, 1e-4)
    one, other = before.astype(np.float64), after.astype(np.float64)
    largest = max(1.0, float(np.abs(one).max(initial=0)))
    if one.shape != other.shape or not np.allclose(one, other, rtol=0, atol=tolerance * largest):
        apart = "shape" if one.shape != other.shape else f"{np.abs(one - other).max() / largest:.1e}"
        raise Unfused(
            f"GroupQueryAttention gives other numbers ({apart}) for {lengths[0]} tokens after {lengths[1]}"
        )
