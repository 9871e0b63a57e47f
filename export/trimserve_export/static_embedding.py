"""Static embeddings of sentence-transformers: a table alone, whose rows are averaged over a text's tokens.

There is no model to export. The graph that is written looks rows up, and the mean is the runtime's pooling,
so that such a folder is served, trimmed and verified as every other encoder's.
"""

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimserve.arrays import Ids
from trimserve.errors import UnsupportedModelError
from trimserve.files.hashes import sha256_file
from trimserve.files.tensors import (
    TensorRows,
    TensorSpec,
    exhaust,
    map_tensor,
    read_header,
    to_float32,
    write_tensors,
)
from trimserve.folder.manifest import CutTensor, Manifest
from trimserve.folder.names import COLD_NAME, VOCAB_NAME
from trimserve.model.source import ModelSource
from trimserve.vocab.file import save_vocab
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.sentence_config import read_declared
from trimserve_export.checkpoint.sentence_files import write_declared
from trimserve_export.checkpoint.sentence_modules import STATIC, is_sentence_transformers, list_modules
from trimserve_export.checkpoint.source_tokenizer import copy_tokenizer
from trimserve_export.checkpoint.stored import StoredVocab
from trimserve_export.checkpoint.trim import check_vocab
from trimserve_export.graphs.writing import GRAPH_NAME
from trimserve_export.layouts.writing import CONFIG_FILES, copy_files
from trimserve_export.manifest import MadeModel, assemble_manifest
from trimserve_export.options import Options
from trimserve_export.serving.servable import serve

TASK = "feature-extraction"
# As sentence-transformers and as model2vec store it.
_TABLES = ("embedding.weight", "embeddings")
_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
_OPSET = 18


def is_static(source: ModelSource) -> bool:
    """Tell whether a folder is a static embedding of sentence-transformers."""
    if source.graph is not None or not is_sentence_transformers(source):
        return False
    return list_modules(source)[0].kind == STATIC


def fill_from_static(source: ModelSource, vocab: VocabMap, options: Options, folder: Path) -> Manifest:
    """Write everything but the model card and the manifest, which is returned.

    Args:
        source: a static embedding.
        vocab: the kept ids.
        options: what was asked for.
        folder: an existing folder.

    Raises:
        UnsupportedModelError: an option that such a model has not, or tensors beside the table.
        MismatchError: the vocab was made for another tokenizer or vocab size.
    """
    check_vocab(source, vocab)
    _check_options(source, options)
    spec = find_table(source)
    write_lookup(_rows(spec, vocab.kept_ids, options.dtype), folder)
    if options.writes_cold:
        cold = TensorRows(spec, vocab.cold_ids)
        exhaust(write_tensors(folder / COLD_NAME, {"embedding": cold}, {"tied": "false"}))
    declared = read_declared(source, TASK, None)
    write_declared(source, declared, folder, options.layout)
    copy_tokenizer(source, folder)
    copy_files(CONFIG_FILES, source.path, folder)
    save_vocab(vocab, folder / VOCAB_NAME)
    width = _DTYPES[options.dtype].itemsize
    made = MadeModel(
        task=TASK,
        graphs={"model": GRAPH_NAME},
        cut=(CutTensor(spec.name, 0, spec.shape[0], len(vocab), spec.dtype),),
        dtype=options.dtype,
        bytes_before=math.prod(spec.shape) * width,
        weights={spec.path.name: sha256_file(spec.path)},
        exporter={"name": "static", "onnx-ir": version("onnx-ir")},
    )
    return assemble_manifest(source, vocab, options.layout, folder, made)


def serve_full_static(source: ModelSource, folder: Path, dtype: str) -> Path:
    """Write the graph with every row, the reference of `verify`; returns its path."""
    ids = np.arange(source.vocab_size, dtype=np.int32)
    return write_lookup(_rows(find_table(source), ids, dtype), folder)


def stored_static(source: ModelSource) -> StoredVocab:
    """The table, as the vocab tensors of a checkpoint are described."""
    spec = find_table(source)
    return StoredVocab({spec.name: (spec, 0)}, {"embedding": spec.name}, tied=False)


def find_table(source: ModelSource) -> TensorSpec:
    """Find the table in the weights.

    Raises:
        UnsupportedModelError: there is none, or another tensor beside it (model2vec's quantised vocabs have
            a mapping and weights).
    """
    (path,) = source.weight_files
    specs, _ = read_header(path)
    table = next((specs[name] for name in _TABLES if name in specs), None)
    others = sorted(specs.keys() - ({table.name} if table is not None else set()))
    if table is None or others:
        found = f"has {others[0]}" if others else "is empty"
        raise UnsupportedModelError(f"{path} {found}: expected one table, {' or '.join(_TABLES)}.")
    if len(table.shape) != 2 or table.dtype not in ("F32", "F16", "BF16", "F64"):
        raise UnsupportedModelError(
            f"{path}: {table.name} is {table.dtype} of {table.shape}: expected floats."
        )
    return table


def _check_options(source: ModelSource, options: Options) -> None:
    refused = {
        "--layout": options.layout != "runtime",
        f"--to {options.to}": options.to != "onnx",
        "--quantize": options.quantize is not None,
        "--dtype bf16": options.dtype not in _DTYPES,
        "--exporter": options.exporter != "auto",
        "--task": options.task not in ("auto", TASK),
    }
    if asked := next((name for name, is_asked in refused.items() if is_asked), None):
        raise UnsupportedModelError(
            f"{source.name} is a static embedding, a table without a model: {asked} does not apply to it."
        )


def _rows(spec: TensorSpec, ids: Ids, dtype: str) -> npt.NDArray[Any]:
    rows = to_float32(np.asarray(map_tensor(spec))[ids], spec.dtype)
    return rows.astype(_DTYPES[dtype], copy=False)


def write_lookup(table: npt.NDArray[Any], folder: Path) -> Path:
    """Write the graph ``last_hidden_state = table[input_ids]``, made servable; returns its path."""
    tensor = ir.tensor(np.ascontiguousarray(table), name="embedding.weight")
    weight = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(table.shape), const_value=tensor
    )
    ids = ir.Value(
        name="input_ids",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(["batch_size", "sequence_length"]),
    )
    lookup = ir.node("Gather", [weight, ids])
    # The lookup's own result is no output, so that the choice between kept and cold rows can stand behind it.
    result = ir.node("Identity", [lookup.outputs[0]])
    (rows,) = result.outputs
    rows.name, rows.type = "last_hidden_state", ir.TensorType(tensor.dtype)
    rows.shape = ir.Shape(["batch_size", "sequence_length", table.shape[1]])
    graph = ir.Graph(
        [ids],
        [rows],
        nodes=[lookup, result],
        initializers=[weight],
        opset_imports={"": _OPSET},
        name="static",
    )
    return serve(ir.Model(graph, ir_version=10), folder, rows=len(table), has_head=False).path
