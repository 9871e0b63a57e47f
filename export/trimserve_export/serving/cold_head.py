"""The cold head: hidden states -> logits of the cold ids, over the bytes of `cold_rows.safetensors`.

Each tile of cold rows W is multiplied as ``W @ hidden^T``: ONNX Runtime packs the right operand of a
product and takes the left one as it lies, so the mapped file is used in place, at the speed of a packed
copy from about 32 hidden states on. Rows of another dtype than the graph's are cast a tile at a time;
bench/cold_head.py compares that with a second copy of the rows.

The cold rows of a quantised head are quantised alike, into `cold_head.onnx_data`. MatMulNBits reads its
matrix only in a packed form; that is stored in the same file, see `serving/packed.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trimserve.blocks import COLD_BLOCKS_NAME, BlockSpecs
from trimserve.errors import UnsupportedModelError
from trimserve.exact import COLD_HEAD_NAME, COLD_MAX_NAME
from trimserve.tensorfile import TensorSpec, WholeTensor, exhaust, read_header, write_tensors
from trimserve_export.quantize import block_attributes, scheme_of, write_blocks
from trimserve_export.serving.flow import Head, describe, find_head, find_output
from trimserve_export.serving.packed import store_packed

# A tile's rows in float32: larger ones leave the cache between cast, product and reduction.
_TILE_BYTES = 4 << 20
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
class _ColdTensors:
    """Where the head's cold rows (quantised or not) and, if it has one, their bias lie."""

    rows: TensorSpec
    bias: TensorSpec | None
    blocks: BlockSpecs | None = None


def write_cold_head(graph_path: Path, cold_path: Path, blocks: BlockSpecs | None = None) -> tuple[str, ...]:
    """Write `cold_head.onnx` (all cold logits) and `cold_max.onnx` (the largest of each tile).

    Args:
        graph_path: a servable graph with a vocab head.
        cold_path: `cold_rows.safetensors` with at least one row; the cold graphs are written beside it. If
            the graph's head is quantised, its own float rows leave that file.
        blocks: where the cold rows of a quantised head lie already; else they are quantised from the floats.

    Returns:
        The names of the files.

    Raises:
        UnsupportedModelError: what stands between the head and `logits` cannot be repeated for cold ids.
    """
    source = ir.load(graph_path.resolve())
    head = find_head(source.graph)
    tensors = _cold_tensors(head, cold_path, blocks)
    tail = _tail_nodes(source.graph, head)
    paths = [cold_path.parent / COLD_HEAD_NAME, cold_path.parent / COLD_MAX_NAME]
    for path, reduced in zip(paths, (False, True), strict=True):
        graph = _TiledGraph(head, tensors, tail, opset=source.graph.opset_imports.get("", _OPSET))
        ir.save(graph.build(reduced=reduced), path)
    if tensors.blocks is None:
        return COLD_HEAD_NAME, COLD_MAX_NAME
    store_packed(paths, tensors.blocks.integers.path)
    return COLD_HEAD_NAME, COLD_MAX_NAME, COLD_BLOCKS_NAME


def _cold_tensors(head: Head, cold_path: Path, blocks: BlockSpecs | None) -> _ColdTensors:
    specs, metadata = read_header(cold_path)
    rows = specs.get("head", specs["embedding"])
    if blocks is not None or not head.is_quantized:
        return _ColdTensors(rows, specs.get("head_bias"), blocks)
    blocks = write_blocks(
        rows, cold_path.with_name(COLD_BLOCKS_NAME), scheme_of(head.product), head.dtype.numpy()
    )
    if "head" in specs:
        _leave_out(cold_path, "head", specs, metadata)
        specs = read_header(cold_path)[0]
    return _ColdTensors(rows, specs.get("head_bias"), blocks)


def _leave_out(path: Path, name: str, specs: dict[str, TensorSpec], metadata: dict[str, str]) -> None:
    """Rewrite a safetensors file without one of its tensors."""
    rest = {other: WholeTensor(spec) for other, spec in specs.items() if other != name}
    shorter = path.with_name(f".{path.name}.part")
    exhaust(write_tensors(shorter, rest, metadata))
    shorter.replace(path)


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
        self._columns: ir.Value | None = None  # the hidden states, transposed
        hidden = ir.Value(
            name="hidden_states",
            type=ir.TensorType(head.dtype),
            shape=ir.Shape(["steps", head.width]),
        )
        self._hidden = hidden
        self._opset = opset

    def build(self, *, reduced: bool) -> ir.Model:
        """Make the model: its outputs are `logits`, or `maximum` and `row` a tile."""
        rows, width = self._tensors.rows.shape
        tile_rows = max(1, _TILE_BYTES // (4 * width)) if self._tensors.blocks is None else _BLOCK_TILE_ROWS
        one = self._initial("one", ir.tensor(np.array([1], np.int64)))
        logits, maxima, places = [], [], []
        for start in range(0, rows, tile_rows):
            tile = self._tile(start, min(start + tile_rows, rows))
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
        if self._columns is None:
            self._columns = self._op("Transpose", [self._hidden], perm=[1, 0])
        return self._op("MatMul", [self._stored(self._tensors.rows, start, stop), self._columns])

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
        result = ir.Value(name=f"value_{len(self._nodes)}")
        self._nodes.append(
            ir.Node(node.domain, node.op_type, operands, list(node.attributes.values()), outputs=[result])
        )
        return result

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
        self, op_type: str, inputs: list[ir.Value], *, domain: str = "", **attributes: int | list[int]
    ) -> ir.Value:
        return self._ops(op_type, inputs, 1, domain=domain, **attributes)[0]

    def _ops(
        self,
        op_type: str,
        inputs: list[ir.Value],
        outputs: int,
        *,
        domain: str = "",
        **attributes: int | list[int],
    ) -> list[ir.Value]:
        results = [ir.Value(name=f"value_{len(self._nodes)}_{index}") for index in range(outputs)]
        made = ir.convenience.convert_attributes(attributes)
        self._nodes.append(ir.Node(domain, op_type, inputs, made, outputs=results))
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
            opset_imports={"": self._opset, _CONTRIB: 1},
            name="cold_head",
        )
        return ir.Model(graph, ir_version=10, producer_name="trimserve")

    def _logits_dtype(self) -> ir.DataType:
        casts = [node for node in self._tail if node.op_type == "Cast"]
        return ir.DataType(casts[-1].attributes["to"].as_int()) if casts else self._head.dtype
