"""Write the rows that a graph loses: floats of embedding and head, or the blocks of a quantised head."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from trimserve.arrays import Ids
from trimserve.errors import UnsupportedModelError
from trimserve.files.quantized import BlockScheme, BlockSpecs, block_specs
from trimserve.files.tensors import TensorSource, exhaust, write_tensors
from trimserve.folder.names import COLD_BLOCKS_NAME
from trimserve.runtime.cold_rows import table_name
from trimserve.vocab.map import VocabMap
from trimserve_export.graphs.embeddings import Embedding
from trimserve_export.graphs.head import Head
from trimserve_export.graphs.turned import Turned
from trimserve_export.graphs.values import describe, find_output
from trimserve_export.serving.quantize import block_attributes_of
from trimserve_export.serving.tied_head import same_numbers
from trimserve_export.trimming.dequantized import DequantizedRows, scale_of
from trimserve_export.trimming.plan import constant, optional_input
from trimserve_export.trimming.rows import ComputedRows, StoredColumns, StoredRows, dtype_name, looked_up

# What the runtime can read back.
BITS = (4, 8)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, slots=True)
class FullGraph:
    """An untrimmed graph, the tables that it looks ids up in and, if it has one, its vocab head.

    Attributes:
        model: the graph.
        embeddings: the token embedding, then further tables.
        head: the vocab head.
    """

    model: ir.Model
    embeddings: tuple[Embedding, ...]
    head: Head | None

    @property
    def embedding(self) -> Embedding:
        """The token embedding."""
        return self.embeddings[0]

    @property
    def bias(self) -> ir.TensorProtocol | None:
        """The head's bias: what an Add gives each token by itself.

        Raises:
            UnsupportedModelError: there are several.
        """
        found = [] if self.head is None else list(_biases(self.model.graph, self.head))
        if len(found) > 1:
            raise UnsupportedModelError("the head has several biases: exact mode is not possible for it.")
        return found[0] if found else None


# Which input of a product is its bias.
_OWN_BIAS = {"Gemm": 2, "MatMulNBits": 5, "MatMulIntegerToFloat": 6}


def _biases(graph: ir.Graph, head: Head) -> Iterator[ir.TensorProtocol]:
    value: ir.Value | None = find_output(graph, "logits")
    while value is not None and (node := value.producer()) is not None and node is not head.product:
        computed = [operand for operand in node.inputs if operand is not None and constant(operand) is None]
        if node.op_type == "Reshape":
            computed = computed[:1]
        elif len(computed) > 1:  # the scales of integers
            return
        else:
            tensors = [tensor for operand in node.inputs if (tensor := constant(operand)) is not None]
            yield from (tensor for tensor in tensors if tensor.size > 1)
        value = computed[0]
    own = constant(
        optional_input(head.product, _OWN_BIAS.get(head.product.op_type, len(head.product.inputs)))
    )
    if own is not None:
        yield own


def write_cold_rows(full: FullGraph, vocab: VocabMap, path: Path) -> None:
    """Write `cold_rows.safetensors`: embedding, head and bias of the ids that are not kept.

    A quantised embedding's rows are the floats that its graph makes of them. A quantised head's are not
    written here, see `write_cold_blocks`.
    """
    tied = is_tied(full.embedding, full.head)
    opsets = dict(full.model.graph.opset_imports)
    tensors: dict[str, TensorSource] = {
        table_name("embedding", table): embedding_rows(embedding, opsets, vocab.cold_ids)
        for table, embedding in enumerate(full.embeddings)
    }
    if full.head is not None and not tied and not has_plain_blocks(full.head):
        tensors["head"] = head_rows(full, vocab)
    if full.bias is not None:
        tensors["head_bias"] = StoredRows(full.bias, vocab.vocab_size, vocab.head.cold_ids, 1)
    exhaust(write_tensors(path, tensors, {"tied": str(tied).lower()}))


def is_tied(embedding: Embedding, head: Head | None) -> bool:
    """Whether the head's rows are the embedding's."""
    if head is None or head.is_quantized:
        return False
    if head.scales is not None:
        return _same_dequantized(embedding, head)
    table = constant(embedding.table)
    if isinstance(table, Turned) and table.source is constant(head.weight):
        return not head.by_row
    return same_numbers(embedding.table, head)


def _same_dequantized(embedding: Embedding, head: Head) -> bool:
    """Whether embedding and head make floats of the same integers by the same scale (dynamic int8)."""
    maker = embedding.output.producer()
    if maker is embedding.gather and embedding.gather.inputs[0] is not None:
        maker = embedding.gather.inputs[0].producer()
    weight = head.product.inputs[1]
    other = None if weight is None else weight.producer()
    while other is not None and other.op_type == "Transpose" and other.inputs[0] is not None:
        other = other.inputs[0].producer()
    made = maker is not None and other is not None and maker.op_type == other.op_type == "DequantizeLinear"
    if not made or maker is None or other is None or head.weight is not embedding.table:
        return False
    scale = constant(maker.inputs[1])
    return scale is not None and scale.size == 1 and tuple(maker.inputs[1:]) == tuple(other.inputs[1:])


def embedding_rows(embedding: Embedding, opsets: dict[str, int], ids: Ids) -> TensorSource:
    """Rows of a table as the untrimmed graph reads them for some ids."""
    ids, rows = looked_up(embedding, opsets, ids), embedding.rows
    table = constant(embedding.table)
    plain = embedding.gather.op_type == "Gather" and embedding.output is embedding.gather.outputs[0]
    if plain and isinstance(table, Turned):
        return StoredColumns(table.source, ids)
    if plain and table is not None and table.dtype in _FLOATS:
        return StoredRows(table, rows, ids, embedding.width)
    return ComputedRows(embedding, opsets, rows, ids)


def head_rows(full: FullGraph, vocab: VocabMap) -> TensorSource:
    """The floats that a head's rows stand for.

    Raises:
        UnsupportedModelError: it has no constant weight, or one in a layout that is not understood.
    """
    head = full.head
    weight = None if head is None else constant(head.weight)
    if head is None or weight is None:
        raise UnsupportedModelError("the head has no constant weight.")
    if head.scales is not None or head.is_quantized or scale_of(head.product) != 1:
        return DequantizedRows(
            head, dict(full.model.graph.opset_imports), vocab.vocab_size, vocab.head.cold_ids
        )
    if head.by_row:
        return StoredRows(weight, vocab.vocab_size, vocab.head.cold_ids, head.width)
    return StoredColumns(weight, vocab.head.cold_ids)


def has_plain_blocks(head: Head) -> bool:
    """Whether a head's cold rows are stored as the blocks that they are; other layouts' are also floats."""
    if not head.is_quantized or block_attributes_of(head.product)["bits"] not in BITS:
        return False
    zeros = constant(optional_input(head.product, 3))
    packed = zeros is None or zeros.dtype == ir.DataType.UINT8
    return packed and all(optional_input(head.product, index) is None for index in (4, 5))


def multiplied_by_graph(graph: ir.Graph, head: Head) -> bool:
    """Whether the head's own nodes, cut to the cold ids, make the cold logits."""
    own_nodes = not head.is_plain or (head.is_quantized and not has_plain_blocks(head))
    return own_nodes and not _multiplies_floats(graph, head)


def _multiplies_floats(graph: ir.Graph, head: Head) -> bool:
    """Whether ONNX Runtime multiplies the hidden states with what a DequantizeLinear gives.

    It makes MatMulNBits of such a product, which rounds the hidden states, too, but not where another node
    reads the weight's scale, as the lookup of a tied table does. Equal numbers are one constant to it (found
    by trying ONNX Runtime 1.31.1).
    """
    if head.scales is None or head.product.op_type not in ("MatMul", "FusedMatMul"):
        return False
    if len(list(head.scales.uses())) > 1:
        return True
    number = _single_number(head.scales)
    scales = [node.inputs[1] for node in graph if node.op_type in ("DequantizeLinear", "QuantizeLinear")]
    others = [scale for scale in scales if scale is not None and scale is not head.scales]
    return number is not None and number in map(_single_number, others)


def _single_number(value: ir.Value) -> tuple[ir.DataType, bytes] | None:
    """What a constant with one entry holds."""
    tensor = constant(value)
    return None if tensor is None or tensor.size != 1 else (tensor.dtype, tensor.tobytes())


def write_cold_blocks(head: Head, scheme: BlockScheme, vocab: VocabMap, folder: Path) -> BlockSpecs:
    """Write the head's own integers and scales of the ids that are not kept; nothing is rounded again.

    Its zero points too, if it has any.
    """
    integers, scales, zeros = (constant(optional_input(head.product, index)) for index in (1, 2, 3))
    if integers is None or scales is None:
        raise UnsupportedModelError(f"{describe(head.product)} has no constant weight.")
    count, blocks = len(vocab.head.cold_ids), scheme.blocks(head.width)
    stored = [(integers, blocks * scheme.block_bytes), (scales, blocks)]
    if zeros is not None:
        stored.append((zeros, scheme.zero_point_bytes(head.width)))
    specs = block_specs(
        folder / COLD_BLOCKS_NAME, count, head.width, scheme, dtype_name(scales.dtype, str(scales.name))
    )
    with specs.integers.path.open("wb", buffering=0) as file:
        for tensor, entries in stored:
            exhaust(StoredRows(tensor, vocab.vocab_size, vocab.head.cold_ids, entries).write_to(file))
    return specs
