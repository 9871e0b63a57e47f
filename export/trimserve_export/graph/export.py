"""From a folder with an ONNX graph to a trimmed folder: no checkpoint, no exporter, nothing rounded again."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trimserve.artefacts import sha256_file
from trimserve.errors import UnsupportedModelError
from trimserve.folder import COLD_NAME, GENERATION_TASK, GENERATOR_TASKS, CutTensor, Source
from trimserve.source import ModelSource
from trimserve.vocab import VocabMap
from trimserve_export.graph.cold import FullGraph, head_scheme, write_cold_blocks, write_cold_rows
from trimserve_export.graph.loading import load_graph
from trimserve_export.graph.plan import VocabPlan, optional_input
from trimserve_export.graph.rows import DTYPES
from trimserve_export.graph.trim import LOGITS, trim_graph
from trimserve_export.graph.turned import Turned, turn_tables
from trimserve_export.layouts.remap import make_drop_in
from trimserve_export.quantize import block_attributes_of
from trimserve_export.serving import ALIGNMENT, GRAPH_NAME, serve
from trimserve_export.serving.cold_head import write_cold_head
from trimserve_export.serving.flow import find_embedding, find_head

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
_DTYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_HEAD_TASKS = ("fill-mask", *GENERATOR_TASKS)


@dataclass(frozen=True, slots=True)
class TrimmedGraph:
    """What was made of a graph; fields as in `Manifest`."""

    task: str
    graphs: dict[str, str]
    cut: tuple[CutTensor, ...]
    dtype: str
    bytes_before: int
    source: Source
    exporter: dict[str, str]
    quantization: dict[str, Any] | None


def infer_task(graph: ir.Graph, rows: int) -> str:
    """Tell the task of a graph by its inputs and outputs.

    Args:
        graph: the untrimmed graph.
        rows: V; logits with as many entries are the vocab's.

    Raises:
        UnsupportedModelError: no task of this runtime has such outputs.
    """
    outputs = {value.name: value.shape for value in graph.outputs}
    if any(str(value.name).startswith("past_key_values.") for value in graph.inputs):
        return GENERATION_TASK
    if "last_hidden_state" in outputs:
        return "feature-extraction"
    shape = outputs.get("logits")
    if shape is None:
        raise UnsupportedModelError(
            f"the graph has the outputs {', '.join(map(str, outputs))}: expected logits or last_hidden_state."
        )
    if len(shape) == 2:
        return "text-classification"
    return "fill-mask" if shape[-1] == rows else "token-classification"


def trim_to_folder(
    source: ModelSource,
    vocab: VocabMap,
    folder: Path,
    *,
    task: str,
    layout: str = "runtime",
    cold: bool = True,
) -> TrimmedGraph:
    """Write a trimmed graph and, where the layout feeds cold ids, their rows.

    Args:
        source: a model with a graph.
        vocab: the kept ids, made for its tokenizer and vocab size.
        folder: an existing folder.
        task: ``"auto"`` or one of the runtime's tasks.
        layout: where ids are remapped, as in `pipeline.export`.
        cold: write the cold rows.

    Raises:
        UnsupportedModelError: the graph, or a part of it, is not understood; the message names it.
        MismatchError: a file of the model is damaged.
    """
    path = _graph(source)
    untrimmed = load_graph(path)
    task = infer_task(untrimmed.graph, vocab.vocab_size) if task == "auto" else task
    job = _Job(vocab, folder, task, layout, cold and bool(vocab.cold_ids.size))
    trimmed = load_graph(path)
    plan = trim_graph(trimmed, vocab, has_head=job.has_head)
    cut = _cut_tensors(plan, len(vocab))
    for model in (untrimmed, trimmed):
        turn_tables(model.graph)
    if layout == "tokenizer":
        _save(trimmed, folder)
    elif layout == "graph":
        _write_drop_in(untrimmed, trimmed, job)
    else:
        with _other_layouts_named():
            _write_servable(untrimmed, trimmed, job)
    return TrimmedGraph(
        task=task,
        graphs={"model": GRAPH_NAME},
        cut=cut,
        dtype=_dtype(untrimmed.graph),
        bytes_before=_weight_bytes(untrimmed),
        source=Source(source.name, source.revision, _hashes(path, untrimmed)),
        exporter={"name": "graph"} | {name: version(name) for name in ("onnx", "onnx-ir")},
        quantization=_quantization(untrimmed, has_head=job.has_head),
    )


@contextlib.contextmanager
def _other_layouts_named() -> Iterator[None]:
    """The graph has been trimmed: what the runtime does not take, others may."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error} The rows can be cut for other runtimes: --layout graph or --layout tokenizer."
        ) from error


@dataclass(frozen=True, slots=True)
class _Job:
    """What is settled before anything is written."""

    vocab: VocabMap
    folder: Path
    task: str
    layout: str
    cold: bool

    @property
    def has_head(self) -> bool:
        return self.task in _HEAD_TASKS


def _full(model: ir.Model, *, has_head: bool) -> FullGraph:
    return FullGraph(model, find_embedding(model.graph), find_head(model.graph) if has_head else None)


def _write_servable(untrimmed: ir.Model, trimmed: ir.Model, job: _Job) -> None:
    """The runtime's layout: cold slots, and for decoders the cold head."""
    logger.info("making the graph servable")
    full = _full(untrimmed, has_head=job.has_head)
    exact = job.cold and job.task in GENERATOR_TASKS
    scheme = head_scheme(full.head) if full.head is not None and exact else None
    served = serve(trimmed, job.folder, rows=len(job.vocab), has_head=job.has_head).path
    if job.cold:
        write_cold_rows(full, job.vocab, job.folder / COLD_NAME)
    if full.head is not None and exact:
        blocks = None if scheme is None else write_cold_blocks(full.head, scheme, job.vocab, job.folder)
        write_cold_head(served, job.folder / COLD_NAME, blocks)


def _write_drop_in(untrimmed: ir.Model, trimmed: ir.Model, job: _Job) -> None:
    """The graph's own layout: token ids in, V logits out, cold rows mapped by the graph."""
    cold_path = job.folder / COLD_NAME if job.cold else None
    if cold_path is not None:
        write_cold_rows(_full(untrimmed, has_head=False), job.vocab, cold_path)
    with tempfile.TemporaryDirectory(dir=job.folder.parent, prefix=".layout.") as scratch:
        plain = _save(trimmed, Path(scratch))
        make_drop_in(plain, job.folder, job.vocab, has_head=job.has_head, cold_path=cold_path)


def _save(model: ir.Model, folder: Path) -> Path:
    path = folder / GRAPH_NAME
    ir.save(model, path, external_data=f"{path.name}_data", alignment=ALIGNMENT)
    return path


def serve_full(source: ModelSource, folder: Path, *, task: str) -> Path:
    """Write the untrimmed graph with the serving passes alone: the reference that `verify` uses."""
    model = load_graph(_graph(source))
    turn_tables(model.graph)
    return serve(model, folder, rows=source.vocab_size, has_head=task in _HEAD_TASKS).path


def save_untrimmed(source: ModelSource, folder: Path) -> Path:
    """Write the untrimmed graph as it is, with its weights beside it."""
    return _save(load_graph(_graph(source)), folder)


def _graph(source: ModelSource) -> Path:
    if source.graph is None:
        raise UnsupportedModelError(f"{source.name} has no ONNX graph.")
    return source.graph


def _cut_tensors(plan: VocabPlan, kept: int) -> tuple[CutTensor, ...]:
    return tuple(
        CutTensor(str(value.name), cut.axis, plan.rows, kept, _dtype_name(value))
        for value, cut in plan.cuts.items()
    )


def _dtype_name(value: ir.Value) -> str:
    """In safetensors' words where it has one."""
    if value.const_value is None:
        return ""
    return DTYPES.get(value.const_value.dtype, value.const_value.dtype.name)


def _weight_bytes(model: ir.Model) -> int:
    """Bytes of all constants, one that is stored once counted once."""
    sizes = {}
    for tensor in _tensors(model):
        stored = (tensor.path, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else id(tensor)
        sizes[stored] = tensor.nbytes
    return sum(sizes.values())


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    tensors = (value.const_value for value in values if value.const_value is not None)
    return [tensor.source if isinstance(tensor, Turned) else tensor for tensor in tensors]


def _hashes(path: Path, model: ir.Model) -> dict[str, str]:
    """sha256 of the graph and of the files with its weights, by their names beside it."""
    used = {Path(tensor.path) for tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)}
    beside = {file.resolve(): file.name for file in path.parent.rglob("*") if file.is_file()}
    return {path.name: sha256_file(path)} | {beside[file]: sha256_file(file) for file in sorted(used)}


def _quantization(model: ir.Model, *, has_head: bool) -> dict[str, Any] | None:
    """How the head, or else the body, is quantised: the runtime opens such graphs another way."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    if has_head and logits is not None:
        nodes.sort(key=lambda node: node is not logits.producer())
    if not nodes:
        return None
    return block_attributes_of(nodes[0]) | {"zero_points": optional_input(nodes[0], 3) is not None}


def _dtype(graph: ir.Graph) -> str:
    """The dtype of embedding rows, which is that of activations."""
    try:
        dtype = find_embedding(graph).dtype
    except UnsupportedModelError:  # several tables, or one that only other layouts take
        dtype = graph.outputs[0].dtype or ir.DataType.FLOAT
    return _DTYPES.get(dtype, dtype.name.lower())


def write_generation_config(source: ModelSource, folder: Path) -> None:
    """Write the ids that end generation where only onnxruntime-genai's config names them."""
    ids = {key: value for key, value in source.genai_model.items() if key.endswith("_token_id")}
    if ids and not (source.path / GENERATION_CONFIG).is_file() and not source.config:
        (folder / GENERATION_CONFIG).write_text(json.dumps(ids, indent=2) + "\n", "utf-8")
