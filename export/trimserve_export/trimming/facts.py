"""What the manifest says of a graph: its task, dtype, quantisation, bytes and hashes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve.files.hashes import sha256_file
from trimserve.folder.manifest import CutTensor
from trimserve.folder.tasks import ANSWERING_TASK, GENERATION_TASK
from trimserve_export.graphs.embeddings import find_embeddings
from trimserve_export.graphs.turned import Turned
from trimserve_export.serving.quantize import block_attributes_of
from trimserve_export.trimming.plan import VocabPlan, optional_input
from trimserve_export.trimming.rows import DTYPES
from trimserve_export.trimming.sentence_outputs import gives_embeddings
from trimserve_export.trimming.trim import LOGITS

_DTYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


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
    if "last_hidden_state" in outputs or gives_embeddings(graph):
        return "feature-extraction"
    if "start_logits" in outputs and "end_logits" in outputs:
        return ANSWERING_TASK
    shape = outputs.get(LOGITS)
    if shape is None:
        raise UnsupportedModelError(
            f"the graph has the outputs {', '.join(map(str, outputs))}: expected logits or last_hidden_state."
        )
    if len(shape) == 2:
        return "text-classification"
    return "fill-mask" if shape[-1] == rows else "token-classification"


def cut_tensors(plan: VocabPlan, kept: int) -> tuple[CutTensor, ...]:
    """The constants that a plan cuts."""
    return tuple(
        CutTensor(str(value.name), cut.axis, plan.rows_of(value), plan.kept(value, kept), _dtype_name(value))
        for value, cut in plan.cuts.items()
    )


def _dtype_name(value: ir.Value) -> str:
    """In safetensors' words where it has one."""
    if value.const_value is None:
        return ""
    return DTYPES.get(value.const_value.dtype, value.const_value.dtype.name)


def constant_bytes(models: Iterable[ir.Model]) -> int:
    """Bytes of all constants, one that is stored once counted once."""
    sizes = {}
    for model in models:
        for tensor in constants(model):
            stored = (tensor.path, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else id(tensor)
            sizes[stored] = tensor.nbytes
    return sum(sizes.values())


def constants(model: ir.Model) -> list[ir.TensorProtocol]:
    """All constants of a graph and of its branches."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    tensors = (value.const_value for value in values if value.const_value is not None)
    return [tensor.source if isinstance(tensor, Turned) else tensor for tensor in tensors]


def has_external_data(model: ir.Model) -> bool:
    """Whether some of a graph's weights lie in files beside it."""
    return any(isinstance(tensor, ir.ExternalTensor) for tensor in constants(model))


def file_hashes(path: Path, model: ir.Model) -> dict[str, str]:
    """sha256 of a graph and of the files with its weights, by their names beside it."""
    used = {Path(tensor.path) for tensor in constants(model) if isinstance(tensor, ir.ExternalTensor)}
    beside = {file.resolve(): file.name for file in path.parent.rglob("*") if file.is_file()}
    return {path.name: sha256_file(path)} | {beside[file]: sha256_file(file) for file in sorted(used)}


def quantization(model: ir.Model, *, has_head: bool) -> dict[str, Any] | None:
    """How the head, or else the body, is quantised: the runtime opens such graphs another way."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    if has_head and logits is not None:
        nodes.sort(key=lambda node: node is not logits.producer())
    if not nodes:
        return None
    return block_attributes_of(nodes[0]) | {"zero_points": optional_input(nodes[0], 3) is not None}


def dtype(graph: ir.Graph) -> str:
    """The dtype of embedding rows, which is that of activations."""
    try:
        found = find_embeddings(graph)[0].dtype
    except UnsupportedModelError:  # a table that only other layouts take
        found = graph.outputs[0].dtype or ir.DataType.FLOAT
    return _DTYPES.get(found, found.name.lower())
