"""Checks of quantised vocab rows: the integers, kept and cold, are those that the source's rows give."""

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from trimserve.arrays import Ids
from trimserve.errors import MismatchError
from trimserve.files.quantized import BlockScheme, Quantization, block_specs, dequantize
from trimserve.files.tensors import TensorSpec, map_tensor, read_header, to_float32
from trimserve.folder.names import COLD_BLOCKS_NAME, COLD_NAME
from trimserve.runtime.cold_rows import GRAPH_DTYPES
from trimserve_export.graphs.head import find_head
from trimserve_export.graphs.values import find_output
from trimserve_export.layouts.drop_in import COMPACT_LOGITS_NAME
from trimserve_export.serving.block_rows import Blocks, quantize_rows
from trimserve_export.serving.quantized_embedding import RoundedRows, lookup_scheme
from trimserve_export.verify.context import Context
from trimserve_export.verify.result import Check

_SLICE_BYTES = 16 << 20


def quantized_checks(context: Context) -> Iterator[tuple[str, Callable[[Context], Check]]]:
    """The checks of the vocab rows that a folder made of a checkpoint stores in blocks of integers."""
    if context.source.graph is not None:
        return
    if "head" in context.quantized_roles:
        yield "quantized-head", check_quantized_head
    if "embedding" in context.quantized_roles:
        yield "quantized-embedding", check_quantized_embedding


def check_quantized_head(context: Context) -> Check:
    """Quantise the source's head rows again and compare integers and scales, bit for bit."""
    vocab = context.folder.vocab.head
    parts = [("kept", vocab.kept_ids, _kept_blocks(context))]
    if COLD_BLOCKS_NAME in context.folder.manifest.files:
        parts.append(("cold", vocab.cold_ids, _cold_blocks(context)))
    for kind, ids, stored in parts:
        for start, expected in _requantized(context, ids):
            part = slice(start, start + len(expected.scales))
            same = (stored.integers[part] == expected.integers).all(axis=(1, 2))
            same &= (stored.scales[part] == expected.scales).all(axis=1)
            if not same.all():
                return _differing("quantized-head", kind, int(ids[start + int(same.argmin())]), context)
    counts = " and ".join(f"{len(ids):,} {kind}" for kind, ids, _ in parts)
    return Check("quantized-head", True, 0.0, f"{counts} rows quantised again from the checkpoint")


def check_quantized_embedding(context: Context) -> Check:
    """Round the source's embedding rows again and compare what the graph looks up and what is stored cold."""
    folder, lookup = context.folder, context.quantized_lookup
    if lookup is None:
        raise MismatchError(f"the embedding in {folder.path} is not quantised: export the folder again.")
    spec, _ = context.stored.cut[context.stored.roles["embedding"]]
    dtype = "F16" if folder.manifest.dtype == "fp16" else "F32"
    rounded, rows = RoundedRows(spec, lookup_scheme(lookup), dtype), map_tensor(spec)
    parts = [("kept", folder.vocab.kept_ids, _table(lookup, spec.shape[1]))]
    if folder.has_cold and len(folder.vocab.cold_ids):
        parts.append(
            ("cold", folder.vocab.cold_ids, map_tensor(read_header(folder.file(COLD_NAME))[0]["embedding"]))
        )
    step = max(1, _SLICE_BYTES // (4 * spec.shape[1]))
    for kind, ids, stored in parts:
        for start in range(0, len(ids), step):
            expected = rounded.read(np.asarray(rows[ids[start : start + step]]))
            same = (stored[start : start + step] == expected).all(axis=1)
            if not same.all():
                return _differing("quantized-embedding", kind, int(ids[start + int(same.argmin())]), context)
    counts = " and ".join(f"{len(ids):,} {kind}" for kind, ids, _ in parts)
    return Check("quantized-embedding", True, 0.0, f"{counts} rows rounded again from the checkpoint")


def _differing(name: str, kind: str, token_id: int, context: Context) -> Check:
    detail = f"the quantised {kind} row of token id {token_id:,} is not that of {context.source.name}"
    return Check(name, False, None, detail)


def _table(lookup: ir.Node, width: int) -> np.ndarray:
    """The floats (K, H) that a quantised embedding holds."""
    scheme = lookup_scheme(lookup)
    integers, scales = (_constant(lookup.inputs[index]) for index in (0, 2))
    packed = integers.reshape(*scales.shape, scheme.block_bytes)
    return dequantize(packed, scales, width, scheme).astype(scales.dtype)


def _constant(value: ir.Value | None) -> np.ndarray:
    """A constant, perhaps in another shape than it is stored in."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    if value is None or value.const_value is None:
        raise MismatchError("the graph's quantised embedding is no constant: export the folder again.")
    return value.const_value.numpy()


def _scheme(context: Context) -> BlockScheme:
    quantization = Quantization.from_dict(context.folder.manifest.quantization)
    if quantization is None:
        raise MismatchError(f"{context.folder.path} is not quantised.")
    return quantization.rows


def _kept_blocks(context: Context) -> Blocks:
    graphs = context.folder.manifest.graphs
    graph = ir.load(context.folder.file(graphs.get("decoder") or graphs["model"])).graph
    _take_compact_logits(graph)
    head = find_head(graph)
    values = head.product.inputs[1:3]
    tensors = [value.const_value for value in values if value is not None]
    if not head.is_quantized or None in tensors:
        raise MismatchError(f"the head in {context.folder.path} is not quantised: export the folder again.")
    integers, scales = (tensor.numpy() for tensor in tensors if tensor is not None)
    return Blocks(integers, scales)


def _take_compact_logits(graph: ir.Graph) -> None:
    """Let a drop-in, in memory, give the logits of the kept ids as its head does."""
    pads = [node for node in graph if node.op_type == "Pad" and node.name == COMPACT_LOGITS_NAME]
    if pads and pads[0].inputs[0] is not None:
        logits = find_output(graph, "logits")
        graph.outputs[graph.outputs.index(logits)] = pads[0].inputs[0]
        logits.name, pads[0].inputs[0].name = "all_logits", "logits"


def _cold_blocks(context: Context) -> Blocks:
    spec, axis = _head_spec(context)
    dtype = "F16" if context.folder.manifest.dtype == "fp16" else "F32"
    path, count = context.folder.file(COLD_BLOCKS_NAME), len(context.folder.vocab.head.cold_ids)
    specs = block_specs(path, count, spec.shape[1 - axis], _scheme(context), dtype)
    return Blocks(map_tensor(specs.integers), map_tensor(specs.scales))


def _head_spec(context: Context) -> tuple[TensorSpec, int]:
    roles = context.stored.roles
    return context.stored.cut[roles.get("head", roles["embedding"])]


def _requantized(context: Context, ids: Ids) -> Iterator[tuple[int, Blocks]]:
    """The source's rows of some ids in slices, converted to the graph's dtype and quantised."""
    spec, axis = _head_spec(context)
    rows = map_tensor(spec).reshape(spec.shape[axis], -1)
    dtype = GRAPH_DTYPES[context.folder.manifest.dtype]
    step = max(1, _SLICE_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(ids), step):
        part = to_float32(np.asarray(rows[ids[start : start + step]]), spec.dtype).astype(dtype, copy=False)
        yield start, quantize_rows(part, _scheme(context))
