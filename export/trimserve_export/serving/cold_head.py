"""The cold head: hidden states -> logits of the cold ids, over the bytes of `cold_rows.safetensors`.

Each tile of cold rows W is multiplied as ``W @ hidden^T``: ONNX Runtime packs the right operand of a
product and takes the left one as it lies, so the mapped file is used in place, at the speed of a packed
copy from about 16 hidden states on. Rows of another dtype than the graph's are cast a tile at a time;
bench/cold_head.py compares that with a second copy of the rows.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve.exact import COLD_HEAD_NAME, COLD_MAX_NAME
from trimserve.tensorfile import TensorSpec, read_header
from trimserve_export.serving.flow import Head, describe, find_head, find_output

# A tile's rows in float32: larger ones leave the cache between cast, product and reduction.
_TILE_BYTES = 4 << 20
_OPSET = 20
_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F64": ir.DataType.DOUBLE,
}


@dataclass(frozen=True, slots=True)
class _ColdTensors:
    """Where the head's cold rows and, if it has one, their bias lie."""

    rows: TensorSpec
    bias: TensorSpec | None


def write_cold_head(graph_path: Path, cold_path: Path) -> tuple[str, ...]:
    """Write `cold_head.onnx` (all cold logits) and `cold_max.onnx` (the largest of each tile).

    Args:
        graph_path: a servable graph with a vocab head; the cold graphs are written beside it.
        cold_path: `cold_rows.safetensors` in the same folder, with at least one row.

    Returns:
        The names of the files.

    Raises:
        UnsupportedModelError: what stands between the head and `logits` cannot be repeated for cold ids.
    """
    source = ir.load(graph_path.resolve())
    head = find_head(source.graph)
    specs, _ = read_header(cold_path)
    tensors = _ColdTensors(specs.get("head", specs["embedding"]), specs.get("head_bias"))
    tail = _tail_nodes(source.graph, head)
    for name, reduced in ((COLD_HEAD_NAME, False), (COLD_MAX_NAME, True)):
        graph = _TiledGraph(head, tensors, tail, opset=source.graph.opset_imports.get("", _OPSET))
        ir.save(graph.build(reduced=reduced), graph_path.parent / name)
    return COLD_HEAD_NAME, COLD_MAX_NAME


def _tail_nodes(graph: ir.Graph, head: Head) -> list[ir.Node]:
    """The pointwise nodes from the head's product to `logits`, in order of execution."""
    nodes: list[ir.Node] = []
    value: ir.Value | None = find_output(graph, "logits")
    while value is not None and (node := value.producer()) is not None and node is not head.product:
        nodes.append(node)
        value = next(operand for operand in node.inputs if operand is not None and _constant(operand) is None)
    return nodes[::-1]


def _constant(value: ir.Value) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


class _TiledGraph:
    """Builds one cold graph."""

    def __init__(self, head: Head, tensors: _ColdTensors, tail: list[ir.Node], *, opset: int) -> None:
        self._head = head
        self._tensors = tensors
        self._tail = tail
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        hidden = ir.Value(
            name="hidden_states",
            type=ir.TensorType(head.dtype),
            shape=ir.Shape(["steps", head.width]),
        )
        self._hidden = hidden
        self._opset = opset

    def build(self, *, reduced: bool) -> ir.Model:
        """Make the model: its outputs are `logits`, or `maximum` and `row` a tile."""
        columns = self._op("Transpose", [self._hidden], perm=[1, 0])
        rows, width = self._tensors.rows.shape
        tile_rows = max(1, _TILE_BYTES // (4 * width))
        one = self._initial("one", ir.tensor(np.array([1], np.int64)))
        logits, maxima, places = [], [], []
        for start in range(0, rows, tile_rows):
            tile = self._tile(columns, start, min(start + tile_rows, rows))
            if not reduced:
                logits.append(tile)
                continue
            # TopK gives the lowest index first among equal values, and costs far less than ArgMax here.
            value, place = self._ops("TopK", [tile, one], 2, axis=0)
            offset = self._initial(f"offset_{start}", ir.tensor(np.array(start, np.int64)))
            maxima.append(value)
            places.append(self._op("Add", [place, offset]))
        if not reduced:
            return self._model([self._join("logits", logits)])
        return self._model([self._join("maximum", maxima), self._join("row", places)])

    def _tile(self, columns: ir.Value, start: int, stop: int) -> ir.Value:
        rows = self._stored(self._tensors.rows, start, stop)
        value = self._op("MatMul", [rows, columns])
        for node in self._tail:
            value = self._repeat(node, value, start, stop)
        return value

    def _repeat(self, node: ir.Node, value: ir.Value, start: int, stop: int) -> ir.Value:
        """Do to a tile what a node of the source does to the compact logits."""
        operands = []
        for operand in node.inputs:
            array = None if operand is None else _constant(operand)
            operands.append(value if array is None else self._operand(node, array, start, stop))
        result = ir.Value(name=f"value_{len(self._nodes)}")
        self._nodes.append(
            ir.Node(node.domain, node.op_type, operands, list(node.attributes.values()), outputs=[result])
        )
        return result

    def _operand(self, node: ir.Node, array: np.ndarray, start: int, stop: int) -> ir.Value:
        if array.size == 1:
            return self._initial(f"constant_{len(self._nodes)}_{start}", ir.tensor(array.reshape(())))
        bias = self._tensors.bias
        if node.op_type != "Add" or bias is None or array.shape[-1] != self._head.rows:
            raise UnsupportedModelError(
                f"{describe(node)} changes the logits by a constant of shape {array.shape} that has no cold "
                "rows: exact mode is not possible for this model. Export it with --no-cold."
            )
        return self._stored(bias, start, stop)

    def _stored(self, spec: TensorSpec, start: int, stop: int) -> ir.Value:
        """Rows of the cold file as a column vector or matrix, cast to the graph's dtype where they differ."""
        width = spec.shape[1] if len(spec.shape) > 1 else 1
        row_bytes = spec.nbytes // spec.shape[0]
        name = f"{spec.name}_{start}"
        dtype = _DTYPES[spec.dtype]
        tensor = ir.ExternalTensor(
            spec.path.name,
            spec.offset + start * row_bytes,
            (stop - start) * row_bytes,
            dtype,
            shape=ir.Shape([stop - start, width]),
            name=name,
            base_dir=spec.path.parent,
        )
        value = self._initial(name, tensor)
        if dtype == self._head.dtype:
            return value
        return self._op("Cast", [value], to=int(self._head.dtype))

    def _initial(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._initializers.append(value)
        return value

    def _op(self, op_type: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        return self._ops(op_type, inputs, 1, **attributes)[0]

    def _ops(
        self, op_type: str, inputs: list[ir.Value], outputs: int, **attributes: int | list[int]
    ) -> list[ir.Value]:
        results = [ir.Value(name=f"value_{len(self._nodes)}_{index}") for index in range(outputs)]
        made = ir.convenience.convert_attributes(attributes)
        self._nodes.append(ir.Node("", op_type, inputs, made, outputs=results))
        return results

    def _join(self, name: str, tiles: list[ir.Value]) -> ir.Value:
        joined = self._op("Concat", tiles, axis=0)
        joined.name = name
        return joined

    def _model(self, outputs: list[ir.Value]) -> ir.Model:
        for value in outputs:
            value.type = ir.TensorType(ir.DataType.INT64 if value.name == "row" else self._logits_dtype())
            value.shape = ir.Shape([None, "steps"])
        graph = ir.Graph(
            [self._hidden],
            outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports={"": self._opset},
            name="cold_head",
        )
        return ir.Model(graph, ir_version=10, producer_name="trimserve")

    def _logits_dtype(self) -> ir.DataType:
        casts = [node for node in self._tail if node.op_type == "Cast"]
        return ir.DataType(casts[-1].attributes["to"].as_int()) if casts else self._head.dtype
