"""Rows of an untrimmed graph's embedding and head, as floats, streamed: what the graph itself would read."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve.arrays import Ids
from trimserve.errors import UnsupportedModelError, require
from trimserve.vocab.map import Reason, VocabMap
from trimserve_export.graphs.embeddings import Embedding
from trimserve_export.graphs.kept_tensors import Cut, KeptEntries, release, stored_bytes
from trimserve_export.trimming.plan import constant
from trimserve_export.trimming.trim import trim_graph

DTYPES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.UINT8: "U8",
}
_BLOCK_BYTES = 8 << 20


def dtype_name(dtype: ir.DataType, what: str) -> str:
    """Safetensors' name of a type.

    Raises:
        UnsupportedModelError: rows of that type cannot be stored.
    """
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"{what} has the type {dtype.name}: expected floats of 16 or 32 bits.")
    return DTYPES[dtype]


@dataclass(frozen=True)  # no slots: the cut tensor is made once
class StoredRows:
    """Rows that lie in a constant one after the other: (V, H), V numbers, or blocks of rows.

    Attributes:
        tensor: the constant.
        rows: V.
        ids: the rows to give.
        entries: numbers of a row.
    """

    tensor: ir.TensorProtocol
    rows: int
    ids: Ids
    entries: int

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return dtype_name(self.tensor.dtype, str(self.tensor.name))

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, entries), or (n,) for single numbers."""
        return (len(self.ids), self.entries) if self.entries > 1 else (len(self.ids),)

    @cached_property
    def _kept(self) -> KeptEntries:
        flat = Cut(0, 1, self.entries)
        if self.tensor.size != self.rows * self.entries:
            raise ValueError(f"{self.tensor.name} holds {self.tensor.size} entries")
        return KeptEntries(_first_axis(self.tensor, self.rows), flat, self.rows, self.ids)

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the rows' bytes to an unbuffered file; yield their sizes."""
        for chunk in self._kept.chunks():
            yield _write(file, chunk.tobytes())


def _first_axis(tensor: ir.TensorProtocol, rows: int) -> ir.TensorProtocol:
    """A bias may be stored as (1, V)."""
    sizes = tensor.shape.numpy()
    if len(sizes) and sizes[0] % rows == 0:
        return tensor
    return ir.tensor(tensor.numpy().reshape(rows, -1), name=tensor.name)


@dataclass(frozen=True, slots=True)
class StoredColumns:
    """Rows that are the columns of a constant (H, V)."""

    tensor: ir.TensorProtocol
    ids: Ids

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return dtype_name(self.tensor.dtype, str(self.tensor.name))

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, H)."""
        return (len(self.ids), self.tensor.shape.numpy()[0])

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the rows' bytes to an unbuffered file, a block of rows at a time; yield their sizes."""
        width, rows = self.tensor.shape.numpy()
        data = stored_bytes(self.tensor)
        columns = data.view(f"u{self.tensor.dtype.itemsize:.0f}").reshape(width, rows)
        step = max(1, _BLOCK_BYTES // (columns.itemsize * width))
        for start in range(0, len(self.ids), step):
            part = np.take(columns, self.ids[start : start + step], axis=1)
            yield _write(file, np.ascontiguousarray(part.T).tobytes())
        release(data)


@dataclass(frozen=True, slots=True)
class ComputedRows:
    """Rows that a graph makes of quantised ones: its own nodes are run, in ONNX Runtime, on the asked rows.

    Attributes:
        embedding: the lookup, in the untrimmed graph.
        opsets: the graph's opset imports.
        rows: V.
        ids: the rows to give.
    """

    embedding: Embedding
    opsets: dict[str, int]
    rows: int
    ids: Ids

    @property
    def dtype(self) -> str:
        """Safetensors dtype name."""
        return dtype_name(self.embedding.dtype, str(self.embedding.output.name))

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, H)."""
        return (len(self.ids), self.embedding.width)

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the rows' bytes to an unbuffered file, a block of rows at a time; yield their sizes."""
        step = max(1, _BLOCK_BYTES // (4 * self.embedding.width))
        for start in range(0, len(self.ids), step):
            yield _write(file, self.read(self.ids[start : start + step]).tobytes())

    def read(self, ids: Ids) -> np.ndarray:
        """Compute rows (n, H)."""
        embedding = self.embedding
        model = _copied(embedding.output, embedding.ids, embedding.dtype, self.opsets)
        # A guard gives many ids the same row.
        distinct, places = np.unique(ids, return_inverse=True)
        reason = np.full(len(distinct), Reason.EXPLICIT, np.uint8)
        trim_graph(model, VocabMap(distinct, reason, self.rows), has_head=False)
        return _run(model, places)


def looked_up(embedding: Embedding, opsets: dict[str, int], ids: Ids) -> Ids:
    """The rows of its table that a lookup reads for token ids: other ones where the graph replaces ids."""
    if not embedding.is_guarded:
        return ids
    return _run(_copied(embedding.ids, embedding.fed, ir.DataType.INT64, opsets), ids)


def _run(model: ir.Model, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
    runtime = require("onnxruntime", extra="cpu", purpose="trimming this graph")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        ir.to_proto(inline(model)).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (made,) = session.run(None, {"input_ids": ids.astype(np.int64)})
    return np.asarray(made)


def inline(model: ir.Model) -> ir.Model:
    """The model with the small constants that lie in files in memory; cut ones are made when written."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return model


def _copied(made: ir.Value, given: ir.Value, dtype: ir.DataType, opsets: dict[str, int]) -> ir.Model:
    """The nodes that make a value of token ids, in their own graph: `input_ids` (n,) -> (n, ...)."""
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    output, nodes, constants = copy_nodes(made, {given: ids})
    output.type = ir.TensorType(dtype)
    graph = ir.Graph(
        [ids], [output], nodes=nodes, initializers=constants, opset_imports=opsets, name="lookup"
    )
    return ir.Model(graph, ir_version=10)


def copy_nodes(
    output: ir.Value, given: Mapping[ir.Value, ir.Value], prefix: str = ""
) -> tuple[ir.Value, list[ir.Node], list[ir.Value]]:
    """Copy the nodes that a value is made by, for a graph of their own.

    Args:
        output: the value.
        given: values that the new graph gets from elsewhere, and what stands for them in it.
        prefix: goes before all names.

    Returns:
        The copied value, the nodes in order of execution, and the constants that they read.

    Raises:
        UnsupportedModelError: the value depends on an input of the graph that is not given.
    """
    copies = dict(given)
    nodes: list[ir.Node] = []
    constants: list[ir.Value] = []

    def copy(value: ir.Value) -> ir.Value:
        if value in copies:
            return copies[value]
        node = value.producer()
        if node is None:
            if constant(value) is None:
                raise UnsupportedModelError(f"the vocab's rows depend on the input {value.name}.")
            copies[value] = _named_copy(value, prefix)
            constants.append(copies[value])
            return copies[value]
        inputs = [None if operand is None else copy(operand) for operand in node.inputs]
        outputs = [_named_copy(made, prefix) for made in node.outputs]
        copies.update(zip(node.outputs, outputs, strict=True))
        attributes = list(node.attributes.values())
        name = f"{prefix}{node.name or f'{node.op_type}_{len(nodes)}'}"
        nodes.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=name))
        return copies[value]

    return copy(output), nodes, constants


def _named_copy(value: ir.Value, prefix: str) -> ir.Value:
    return ir.Value(
        name=f"{prefix}{value.name}", type=value.type, shape=value.shape, const_value=constant(value)
    )


def _write(file: IO[bytes], data: bytes) -> int:
    view: Any = memoryview(data)
    while view:
        view = view[os.write(file.fileno(), view) :]
    return len(data)
