"""The graphs of the cold head: the cold rows tile by tile, in parts that threads work on.

Each tile of cold rows W is multiplied as ``W @ hidden^T``: ONNX Runtime packs the right operand of a
product and takes the left one as it lies, so the mapped file is used in place, at the speed of a packed
copy from about 32 hidden states on. Rows of another dtype than the graph's are cast a tile at a time. A float
graph is cut into parts, and its input `part` chooses one through nested Ifs (`trimserve.runtime.cold_head`).
bench/cold_head.py compares all this with other ways.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve.files.quantized import BlockSpecs
from trimserve.files.tensors import TensorSpec
from trimserve.runtime.cold_head import PARTS_KEY
from trimserve_export.graphs.head import Head
from trimserve_export.graphs.values import describe, find_output
from trimserve_export.serving.quantize import block_attributes, scheme_of

# A tile's rows in float32: larger ones leave a core's cache between cast, product and reduction.
_TILE_BYTES = 2 << 20
# A part costs a call of ONNX Runtime; few of them leave threads idle while the last ones are at work.
_TILES_A_PART = 8
MOST_PARTS = 32
# Rows of a quantised tile, which is packed: only its logits have to stay in the cache.
_BLOCK_TILE_ROWS = 8192
_OPSET = 20
_CONTRIB = "com.microsoft"
_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F64": ir.DataType.DOUBLE,
    "U8": ir.DataType.UINT8,
}


@dataclass(frozen=True, slots=True)
class ColdTensors:
    """Where the head's cold rows (quantised or not) and, if it has one, their bias lie."""

    rows: TensorSpec
    bias: TensorSpec | None
    blocks: BlockSpecs | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Cold rows, H. Beside the blocks of a graph, `rows` are the embedding's, which can be fewer."""
        rows, width = self.rows.shape
        return (rows if self.blocks is None else self.blocks.integers.shape[0]), width


def _tail_nodes(graph: ir.Graph, head: Head) -> list[ir.Node]:
    """The pointwise nodes from the head's product to `logits`, in order of execution."""
    nodes: list[ir.Node] = []
    value: ir.Value | None = find_output(graph, "logits")
    while value is not None and (node := value.producer()) is not None and node is not head.product:
        nodes.append(node)
        value = next(operand for operand in node.inputs if operand is not None and _constant(operand) is None)
    return nodes[::-1]


def _fed(name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _constant(value: ir.Value) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


class ColdGraph:
    """Builds one graph of the cold head."""

    def __init__(self, source: ir.Graph, head: Head, tensors: ColdTensors) -> None:
        """For the head of a servable graph.

        Raises:
            UnsupportedModelError: what follows the head cannot be repeated for cold ids (see `build`).
        """
        self._head = head
        self._tensors = tensors
        self._tail = _tail_nodes(source, head)
        self._opset = source.opset_imports.get("", _OPSET)
        self._nodes: list[ir.Node] = []  # of the graph that is being written, the main one or a branch
        self._made = 0
        self._initializers: list[ir.Value] = []
        self._hidden = _fed("hidden_states", head.dtype, ["steps", head.width])
        self._number = _fed("part", ir.DataType.INT64, [])
        self._one = self._initial("one", ir.tensor(np.array([1], np.int64)))
        self._columns = None if tensors.blocks else self._op("Transpose", [self._hidden], perm=[1, 0])

    def build(self, *, reduced: bool, tile: slice | None = None) -> ir.Model:
        """Make the model: its outputs are `logits`, or `maximum` and `row` a tile, of one part.

        Args:
            reduced: the largest logits alone.
            tile: the only rows to multiply, one of `tiles`; all of them by default.

        Raises:
            UnsupportedModelError: what stands between the head and `logits` cannot be repeated.
        """
        names = ["maximum", "row"] if reduced else ["logits"]
        parts = self._parts() if tile is None else [[tile]]
        outputs = self._choose(parts, 0, names)
        for name, value in zip(names, outputs, strict=True):
            value.name = name
        graph = ir.Graph(
            [self._hidden, *([self._number] if len(parts) > 1 else [])],
            outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports={"": self._opset, _CONTRIB: 1},
            name="cold_head",
        )
        rows = json.dumps([part[-1].stop - part[0].start for part in parts])
        return ir.Model(graph, ir_version=10, producer_name="trimserve", metadata_props={PARTS_KEY: rows})

    @property
    def tiles(self) -> list[slice]:
        """The rows that are multiplied together."""
        rows, width = self._tensors.shape
        step = max(1, _TILE_BYTES // (4 * width)) if self._tensors.blocks is None else _BLOCK_TILE_ROWS
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _parts(self) -> list[list[slice]]:
        """The tiles of each part."""
        tiles, packed = self.tiles, self._tensors.blocks is not None
        # Packed matrices are stored for the main graph alone; their kernel divides its work by itself.
        count = 1 if packed else min(max(len(tiles) // _TILES_A_PART, 1), MOST_PARTS)
        ends = [len(tiles) * number // count for number in range(count + 1)]
        return [tiles[start:end] for start, end in pairwise(ends)]

    def _choose(self, parts: Sequence[list[slice]], first: int, names: Sequence[str]) -> list[ir.Value]:
        """The outputs of the part that is asked for; the parts are numbered from `first` on."""
        if len(parts) == 1:
            return self._part_outputs(parts[0], names)
        half = len(parts) // 2
        middle = self._initial(f"part_{first + half}", ir.tensor(np.array(first + half, np.int64)))
        before = self._op("Less", [self._number, middle])
        lower = self._branch(parts[:half], first, names)
        upper = self._branch(parts[half:], first + half, names)
        chosen = self._ops("If", [before], len(names), then_branch=lower, else_branch=upper)
        return self._typed(names, chosen)

    def _branch(self, parts: Sequence[list[slice]], first: int, names: Sequence[str]) -> ir.Graph:
        outside, self._nodes = self._nodes, []
        outputs = self._choose(parts, first, names)
        branch = ir.Graph([], outputs, nodes=self._nodes, name=f"parts_{first}_to_{first + len(parts) - 1}")
        self._nodes = outside
        return branch

    def _part_outputs(self, tiles: Sequence[slice], names: Sequence[str]) -> list[ir.Value]:
        columns: list[list[ir.Value]] = [[] for _ in names]
        for tile in tiles:
            logits = self._tile(tile.start, tile.stop)
            found = [logits] if len(names) == 1 else self._maximum(logits, tile.start)
            for column, value in zip(columns, found, strict=True):
                column.append(value)
        return self._typed(names, [self._op("Concat", column, axis=0) for column in columns])

    def _maximum(self, logits: ir.Value, start: int) -> list[ir.Value]:
        # TopK gives the lowest index first among equal values, and costs far less than ArgMax here.
        value, place = self._ops("TopK", [logits, self._one], 2, axis=0)
        offset = self._initial(f"offset_{start}", ir.tensor(np.array(start, np.int64)))
        return [value, self._op("Add", [place, offset])]

    def _typed(self, names: Sequence[str], values: list[ir.Value]) -> list[ir.Value]:
        for name, value in zip(names, values, strict=True):
            value.type = ir.TensorType(ir.DataType.INT64 if name == "row" else self._logits_dtype())
            value.shape = ir.Shape([None, "steps"])
        return values

    def _tile(self, start: int, stop: int) -> ir.Value:
        """Logits (rows, steps) of some cold ids."""
        value = (
            self._float_product(start, stop)
            if self._tensors.blocks is None
            else self._block_product(start, stop)
        )
        for node in self._tail:
            value = self._repeat(node, value, start, stop)
        return value

    def _float_product(self, start: int, stop: int) -> ir.Value:
        rows = self._stored(self._tensors.rows, start, stop)
        return self._op("MatMul", [rows, self._columns])

    def _block_product(self, start: int, stop: int) -> ir.Value:
        blocks = self._tensors.blocks
        if blocks is None:
            raise ValueError("the head is not quantised")
        integers = self._part(blocks.integers, start, stop)
        scales = self._part(blocks.scales, start, stop)
        operands = [self._hidden, integers, scales]
        if blocks.zero_points is not None:
            operands.append(self._part(blocks.zero_points, start, stop))
        attributes = block_attributes(self._head.width, stop - start, scheme_of(self._head.product))
        product = self._op("MatMulNBits", operands, domain=_CONTRIB, **attributes)
        return self._op("Transpose", [product], perm=[1, 0])

    def _repeat(self, node: ir.Node, value: ir.Value, start: int, stop: int) -> ir.Value:
        """Do to a tile what a node of the source does to the compact logits."""
        if self._adds_nothing(node):
            return value
        operands = []
        for operand in node.inputs:
            array = None if operand is None else _constant(operand)
            operands.append(value if array is None else self._operand(node, array, start, stop))
        return self._add(node.domain, node.op_type, operands, list(node.attributes.values()), 1)[0]

    def _adds_nothing(self, node: ir.Node) -> bool:
        # BART's class makes a bias of zeros where the checkpoint stores none.
        arrays = [
            array
            for operand in node.inputs
            if operand is not None and (array := _constant(operand)) is not None
        ]
        return node.op_type == "Add" and self._tensors.bias is None and not any(map(np.any, arrays))

    def _operand(self, node: ir.Node, array: np.ndarray, start: int, stop: int) -> ir.Value:
        if array.size == 1:
            return self._initial(f"constant_{self._made}_{start}", ir.tensor(array.reshape(())))
        bias = self._tensors.bias
        if node.op_type != "Add" or bias is None or array.shape[-1] != self._head.rows:
            raise UnsupportedModelError(
                f"{describe(node)} changes the logits by a constant of shape {array.shape} that has no cold "
                "rows: exact mode is not possible for this model. Export it with --no-cold."
            )
        return self._stored(bias, start, stop)

    def _stored(self, spec: TensorSpec, start: int, stop: int) -> ir.Value:
        """Rows of the cold file as a column vector or matrix, cast to the graph's dtype where they differ."""
        value = self._part(
            spec if len(spec.shape) > 1 else replace(spec, shape=(*spec.shape, 1)), start, stop
        )
        if value.dtype == self._head.dtype:
            return value
        return self._op("Cast", [value], to=int(self._head.dtype))

    def _part(self, spec: TensorSpec, start: int, stop: int) -> ir.Value:
        """Rows of a stored tensor, mapped where they lie."""
        row_bytes = spec.nbytes // spec.shape[0]
        name = f"{spec.name}_{start}"
        tensor = ir.ExternalTensor(
            spec.path.name,
            spec.offset + start * row_bytes,
            (stop - start) * row_bytes,
            _DTYPES[spec.dtype],
            shape=ir.Shape([stop - start, *spec.shape[1:]]),
            name=name,
            base_dir=spec.path.parent,
        )
        return self._initial(name, tensor)

    def _initial(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._initializers.append(value)
        return value

    def _op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        **attributes: int | list[int],
    ) -> ir.Value:
        return self._ops(op_type, inputs, 1, domain=domain, **attributes)[0]

    def _ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        *,
        domain: str = "",
        **attributes: int | list[int] | ir.Graph,
    ) -> list[ir.Value]:
        return self._add(domain, op_type, inputs, ir.convenience.convert_attributes(attributes), outputs)

    def _add(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr],
        outputs: int,
    ) -> list[ir.Value]:
        results = [ir.Value(name=f"value_{self._made}_{index}") for index in range(outputs)]
        self._made += 1
        self._nodes.append(ir.Node(domain, op_type, inputs, attributes, outputs=results))
        return results

    def _logits_dtype(self) -> ir.DataType:
        casts = [node for node in self._tail if node.op_type == "Cast"]
        return ir.DataType(casts[-1].attributes["to"].as_int()) if casts else self._head.dtype
