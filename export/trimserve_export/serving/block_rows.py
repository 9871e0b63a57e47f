"""Rows of a matrix in blocks of integers, each by itself: ONNX Runtime's own quantiser, a slice at a time."""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.errors import require
from trimserve.files.quantized import BlockScheme
from trimserve_export.graphs.products import Matrix
from trimserve_export.serving.lattice import on_lattice

_SLICE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Blocks:
    """Quantised rows: uint8 (n, blocks, block bytes), and scales (n, blocks) in the dtype of the rows."""

    integers: npt.NDArray[np.uint8]
    scales: Matrix


def quantize_rows(rows: Matrix, scheme: BlockScheme) -> Blocks:
    """Quantise each row of a matrix by itself.

    Args:
        rows: float32 or float16 (n, H); may be a transposed view of a mapped file.
        scheme: see `BlockScheme`.
    """
    count, width = rows.shape
    shape = (count, scheme.blocks(width))
    made = Blocks(np.empty((*shape, scheme.block_bytes), np.uint8), np.empty(shape, rows.dtype))
    step = max(1, _SLICE_BYTES // (rows.itemsize * width))
    for start in range(0, count, step):
        part = slice(start, start + step)
        # The kernel reads the memory behind the array and ignores its strides.
        columns = np.ascontiguousarray(rows[part].T)
        made.integers[part], made.scales[part], _ = _quantizer(scheme).qbits_block_quant(columns)
        if rows.dtype == np.float32 and width % scheme.block_size == 0:
            _keep_lattice(rows[part], made.integers[part], made.scales[part], scheme)
    return made


def _keep_lattice(rows: Matrix, integers: Matrix, scales: Matrix, scheme: BlockScheme) -> None:
    """Give blocks that were quantised before the scale and the integers that they had, in place."""
    blocks = np.ascontiguousarray(rows).reshape(-1, scheme.block_size)
    found, known, whole = on_lattice(blocks, scheme.bits)
    shifted = (whole[found] + (1 << (scheme.bits - 1))).astype(np.uint8)
    if scheme.bits == 4:
        shifted = shifted[:, ::2] | (shifted[:, 1::2] << np.uint8(4))
    integers.reshape(-1, scheme.block_bytes)[found] = shifted
    scales.reshape(-1)[found] = known[found]


@cache
def _quantizer(scheme: BlockScheme) -> Any:  # noqa: ANN401 - onnxruntime has no types
    root = logging.getLogger()
    silent = logging.NullHandler()
    root.addHandler(
        silent
    )  # the module calls logging.basicConfig, which does nothing to a root with a handler
    try:
        module = require(
            "onnxruntime.quantization.matmul_nbits_quantizer", extra="cpu", purpose="export --quantize"
        )
    finally:
        root.removeHandler(silent)
    config = module.DefaultWeightOnlyQuantConfig(
        block_size=scheme.block_size, is_symmetric=True, bits=scheme.bits
    )
    return module.DefaultWeightOnlyQuantizer(config)
