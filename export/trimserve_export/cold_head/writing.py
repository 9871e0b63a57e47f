"""The cold head: hidden states -> logits of the cold ids, over the bytes of `cold_rows.safetensors`.

The cold rows of a quantised head are quantised alike, into `cold_head.onnx_data`. MatMulNBits reads its
matrix only in a packed form; that is stored in the same file, see `serving/packed.py`. `cold_graph.py` says
how the graphs are made.
"""

from pathlib import Path

import onnx_ir as ir

from trimserve.files.quantized import BlockSpecs
from trimserve.files.tensors import TensorSpec, WholeTensor, exhaust, read_header, write_tensors
from trimserve.folder.names import COLD_BLOCKS_NAME, COLD_HEAD_NAME, COLD_MAX_NAME
from trimserve_export.cold_head.graph import ColdGraph, ColdTensors
from trimserve_export.cold_head.packed import store_packed
from trimserve_export.graphs.head import Head, find_head
from trimserve_export.serving.quantize import scheme_of, write_blocks


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
    paths = [cold_path.parent / COLD_HEAD_NAME, cold_path.parent / COLD_MAX_NAME]

    def graph() -> ColdGraph:
        return ColdGraph(source.graph, head, tensors)

    for path, reduced in zip(paths, (False, True), strict=True):
        ir.save(graph().build(reduced=reduced), path)
    if tensors.blocks is None:
        return COLD_HEAD_NAME, COLD_MAX_NAME
    parts = (ir.to_proto(graph().build(reduced=False, tile=tile)) for tile in graph().tiles)
    store_packed(paths, tensors.blocks.integers.path, parts)
    return COLD_HEAD_NAME, COLD_MAX_NAME, COLD_BLOCKS_NAME


def quantize_cold_head(graph_path: Path, cold_path: Path) -> None:
    """Quantise the cold head rows of a quantised graph that has no need of cold graphs (fill-mask).

    Args:
        graph_path: a servable graph with a quantised vocab head.
        cold_path: see `write_cold_head`.
    """
    _cold_tensors(find_head(ir.load(graph_path.resolve()).graph), cold_path, None)


def _cold_tensors(head: Head, cold_path: Path, blocks: BlockSpecs | None) -> ColdTensors:
    specs, metadata = read_header(cold_path)
    rows = specs.get("head", specs["embedding"])
    if blocks is not None or not head.is_quantized:
        return ColdTensors(rows, specs.get("head_bias"), blocks)
    blocks = write_blocks(
        rows, cold_path.with_name(COLD_BLOCKS_NAME), scheme_of(head.product), head.dtype.numpy()
    )
    if "head" in specs:
        _leave_out(cold_path, "head", specs, metadata)
        specs = read_header(cold_path)[0]
    return ColdTensors(rows, specs.get("head_bias"), blocks)


def _leave_out(path: Path, name: str, specs: dict[str, TensorSpec], metadata: dict[str, str]) -> None:
    """Rewrite a safetensors file without one of its tensors."""
    rest = {other: WholeTensor(spec) for other, spec in specs.items() if other != name}
    shorter = path.with_name(f".{path.name}.part")
    exhaust(write_tensors(shorter, rest, metadata))
    shorter.replace(path)
