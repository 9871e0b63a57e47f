"""Cold rows of an embedding that is looked up in integers: the floats that its graph would make of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir

from trimserve.files.quantized import BlockScheme, dequantize
from trimserve.files.tensors import (
    TensorSource,
    TensorSpec,
    WholeTensor,
    exhaust,
    map_tensor,
    read_header,
    to_float32,
    write_tensors,
)
from trimserve_export.serving.block_rows import quantize_rows

_SLICE_BYTES = 16 << 20
_DTYPES = {ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16"}


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """Stored rows, quantised in blocks and made floats again.

    Attributes:
        spec: where the rows (n, H) lie.
        scheme: how they are quantised.
        dtype: of the graph, F32 or F16; the rows are converted to it first, as the exporter does.
    """

    spec: TensorSpec
    scheme: BlockScheme
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, H)."""
        return self.spec.shape

    def write_to(self, file: IO[bytes]) -> Iterator[int]:
        """Append the rows' bytes to an unbuffered file, a slice at a time; yield their sizes."""
        count, width = self.shape
        step = max(1, _SLICE_BYTES // (4 * width))
        stored = map_tensor(self.spec)
        for start in range(0, count, step):
            yield file.write(self.read(np.asarray(stored[start : start + step])).tobytes())

    def read(self, stored: np.ndarray) -> np.ndarray:
        """Round stored rows."""
        numbers = np.float16 if self.dtype == "F16" else np.float32
        rows = to_float32(stored, self.spec.dtype).astype(numbers, copy=False)
        blocks = quantize_rows(rows, self.scheme)
        return dequantize(blocks.integers, blocks.scales, self.shape[1], self.scheme).astype(numbers)


def quantized_lookup(graph: ir.Graph) -> ir.Node | None:
    """The node that looks ids up in blocks of integers, also in a servable graph; else None."""
    return next((node for node in graph if node.op_type == "GatherBlockQuantized"), None)


def lookup_scheme(lookup: ir.Node) -> BlockScheme:
    """How the table of a GatherBlockQuantized is quantised."""
    sizes = {"bits": 4, "block_size": 128}
    sizes |= {name: lookup.attributes[name].as_int() for name in sizes if name in lookup.attributes}
    return BlockScheme(sizes["bits"], sizes["block_size"])


def round_cold_embedding(graph_path: Path, cold_path: Path) -> bool:
    """Replace cold embedding rows by what the graph's quantised embedding would hold for them.

    Args:
        graph_path: the exporter's graph, or the servable one.
        cold_path: `cold_rows.safetensors`, with rows as the checkpoint has them.

    Returns:
        Whether the embedding is quantised; else nothing is changed.
    """
    graph = ir.load(graph_path.resolve()).graph
    lookup = quantized_lookup(graph)
    if lookup is None:
        return False
    specs, metadata = read_header(cold_path)
    tensors: dict[str, TensorSource] = {name: WholeTensor(spec) for name, spec in specs.items()}
    scales = lookup.inputs[2]
    dtype = _DTYPES[scales.dtype if scales is not None and scales.dtype is not None else ir.DataType.FLOAT]
    tensors["embedding"] = RoundedRows(specs["embedding"], lookup_scheme(lookup), dtype)
    rounded = cold_path.with_name(f".{cold_path.name}.part")
    exhaust(write_tensors(rounded, tensors, metadata))
    rounded.replace(cold_path)
    return True
