"""Folders of ONNX graphs as other tools leave them, vocabs for them, and spoiling what was made of them."""

import dataclasses
import logging
import shutil

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import quant_utils

from tests.support.models import FAMILIES, PLAIN_EXPORTER, save_model
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.opening import list_files
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve.vocab.map import Reason, VocabMap
from trimserve_export.exporters.exporter import GraphJob, load_exporter

TEXTS = ["the cat sat on the mat", "a", "Grüße, Welt! 🎉", "数学 ábc\n\ndef", "dog"]


def save_graph(root, family: str, kind: str, **options):
    """A folder as another tool would leave it: a graph, perhaps quantised, a tokenizer and configs."""
    source = save_model(family, root / "checkpoint", **options)
    exporter = load_exporter(PLAIN_EXPORTER)
    graph = exporter.export_checkpoint(source, root / "onnx", GraphJob(FAMILIES[family].task))
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, root / "onnx" / name)
    if kind in ("int4", "uint4"):
        _quantize_blocks(graph, symmetric=kind == "int4")
    elif kind == "qdq":
        _quantize_blocks(graph, symmetric=True, quant_format=quant_utils.QuantFormat.QDQ)
    elif kind in ("int8", "int8_fused"):
        _quantize_dynamic(graph)
    if kind == "int8_fused":
        fuse(graph)
    return resolve_model(root / "onnx")


def _quantize_blocks(graph, *, symmetric: bool, **options):
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.WARNING)
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        str(graph), block_size=32, is_symmetric=symmetric, **options
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(graph), True)


def _quantize_dynamic(graph):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx.load(graph)
    whole = graph.rename(graph.with_name("whole.onnx"))
    quantize_dynamic(whole, graph, weight_type=QuantType.QUInt8)
    whole.unlink()


def fuse(graph):
    """As ONNX Runtime's optimiser stores a graph: integer products and their scales are one operator."""
    whole = graph.rename(graph.with_name("whole.onnx"))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(graph)
    options.log_severity_level = 3
    ort.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
    whole.unlink()


def vocab_of(source, others: int = 20) -> VocabMap:
    """The structural ids and a few others."""
    structural = structural_ids(source)
    rest = np.setdiff1d(np.arange(source.vocab_size), structural)
    picked = np.random.default_rng(1).choice(rest, min(others, len(rest) // 2), replace=False)
    kept = np.sort(np.concatenate([structural, picked]))
    reason = np.full(kept.shape, Reason.PROFILE, np.uint8)
    return VocabMap(kept, reason, source.vocab_size, source.tokenizer_sha256)


def accept_files(folder):
    """Record the files as they are now: only what is in them shall be found wrong."""
    write_manifest(folder, dataclasses.replace(read_manifest(folder), files=list_files(folder)))


def shift_rows(path, offset: int, row_bytes: int, rows: int):
    """Move the rows of a stored table on by one."""
    stored = np.memmap(path, np.uint8, "r+", offset=offset, shape=(rows, row_bytes))
    stored[:] = np.roll(np.array(stored), 1, axis=0)
    stored.flush()
