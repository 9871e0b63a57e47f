"""Export a checkpoint folder with transformers' own exporter (transformers >= 5, torch.export, opset 20).

It writes a graph for the prompt and one for each step after it, with the weights twice. The second one,
traced with several tokens and a cache of any length, takes an empty cache too: it alone is made here, and
its inputs and outputs get the names and axes that other exporters give them. Encoder-decoders are in
`transformers_seq2seq`.
"""

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from trimserve.errors import UnsupportedModelError, require
from trimserve.folder.tasks import GENERATION_TASK, TEXT2TEXT_TASK
from trimserve.runtime.contract import is_state
from trimserve_export.checkpoint.lengths import lengths_of
from trimserve_export.checkpoint.tasks import check_task, load_model, task_class
from trimserve_export.exporters import tracing
from trimserve_export.exporters.axes import name_axes
from trimserve_export.exporters.exporter import GraphJob
from trimserve_export.exporters.real_rotation import real_rotation
from trimserve_export.exporters.recurrent import StateLayer, planned_cache, states_in_graph, traceable
from trimserve_export.exporters.rope import rope_by_length
from trimserve_export.exporters.sparsity import sparse_by_constant
from trimserve_export.exporters.tracing import write_graph
from trimserve_export.exporters.transformers_seq2seq import COMPARED, export_pair
from trimserve_export.fusion.fuse import note_positions

QUANTIZES = False
# Sizes of the example: all different, and none of them 0 or 1, which torch.export takes for constants.
_BATCH, _CACHED, _FED = 2, 4, 3
_AXES = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "past": ("batch_size", None, "past_sequence_length"),
}
_OUTPUTS = ("logits", "last_hidden_state", "start_logits", "end_logits")


def check_model(config: PretrainedConfig, task: str) -> None:
    """Refuse a model or a task that is not exported this way.

    Raises:
        UnsupportedModelError: see above.
    """
    check_task(task)
    if task == TEXT2TEXT_TASK and config.model_type not in COMPARED and config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"of encoder-decoders {_name()} is taken for {', '.join(sorted(COMPARED))}, not for "
            f"{config.model_type!r} models: use --exporter optimum in its environment, if that exports them."
        )
    if type(config) not in task_class(task, config)._model_mapping:
        raise UnsupportedModelError(
            f"{_name()} has no {task} class for {config.model_type!r} models: choose another task."
        )


def check_job(job: GraphJob) -> None:
    """Graphs for the CPU can have any dtype here; see `Exporter`."""


def export_checkpoint(folder: Path, output: Path, job: GraphJob) -> Path:
    """Export a checkpoint folder to ONNX; see `Exporter`."""
    require("onnxscript", extra="export", purpose="export --exporter transformers")
    with tracing.quiet():
        model = load_model(folder, job.task, job.dtype, trust_remote_code=job.trust_remote_code)
        with (
            tracing.failures_named(_name(), model.config.model_type, job.task),
            torch.no_grad(),
            rope_by_length(model),
            real_rotation(model),
            sparse_by_constant(model),
        ):
            if job.task == TEXT2TEXT_TASK:
                return export_pair(model, output, _trace)
            example = _decoder_example(model) if job.task == GENERATION_TASK else _encoder_example(model)
            with states_in_graph(model):
                program = _trace(model, example)
    if "past_key_values" in example:
        _name_caches(program.graph, example)
        note_positions(program, lengths_of(model.config, job.task))
    _rename(program.graph)
    return write_graph(program, output / "model.onnx")


def _trace(
    model: torch.nn.Module, example: dict[str, Any], varying: dict[str, Any] | None = None
) -> ir.Model:
    """The graph of a module; without `varying`, any axis may vary that the tracer does not find fixed."""
    exporters = require("transformers.exporters", extra="export", purpose="export --exporter transformers")
    settings = exporters.OnnxConfig(dynamic=True, dynamic_shapes=varying)
    program: ir.Model = exporters.OnnxExporter().export_program(model, example, config=settings)[0]
    return program


def _ids(model: PreTrainedModel, length: int) -> torch.Tensor:
    size: int = model.config.get_text_config().vocab_size
    return torch.arange(_BATCH * length).remainder(size).reshape(_BATCH, length)


def _encoder_example(model: PreTrainedModel) -> dict[str, Any]:
    ids = _ids(model, _FED)
    known = inspect.signature(model.forward).parameters
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in known and getattr(model.config, "type_vocab_size", None):
        example["token_type_ids"] = torch.zeros_like(ids)
    return example


def _decoder_example(model: PreTrainedModel) -> dict[str, Any]:
    """A step of several tokens after a cache; the second sequence begins with a padded position."""
    mask = torch.ones(_BATCH, _CACHED + _FED, dtype=torch.int64)
    mask[1, 0] = 0
    filled = model(
        input_ids=_ids(model, _CACHED),
        attention_mask=mask[:, :_CACHED],
        past_key_values=planned_cache(model),
        use_cache=True,
    )
    cache = traceable(model, filled.past_key_values)
    example = {"input_ids": _ids(model, _FED), "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        example["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, _CACHED:]
    return example | {"past_key_values": cache, "use_cache": True}


def _name_caches(graph: ir.Graph, example: dict[str, Any]) -> None:
    """Name each cache as other exporters do, by what it is: every version of transformers spells it anew.

    The cache's inputs come in the order in which torch takes the example's cache apart, and its output is
    the value in which the graph puts new positions behind those of the input.
    """
    cache = example["past_key_values"]
    known = {
        id(tensor): f"{number}.{kind}"
        for number, layer in enumerate(cache.layers)
        for kind, tensor in _parts_of(layer).items()
    }
    fed = [value for value in graph.inputs if value.name not in example]
    leaves = [leaf for leaf in tree_leaves(cache) if isinstance(leaf, torch.Tensor)]
    if len(fed) != len(leaves):
        raise UnsupportedModelError(
            f"{_name()} gives the graph {len(fed)} inputs for a cache of {len(leaves)} tensors: use another "
            "exporter, or the version of transformers in constraints.txt."
        )
    # torch takes the cache that the graph gives apart like the one that it is fed.
    given = [value for value in graph.outputs if value.name not in _OUTPUTS]
    for place, (value, leaf) in enumerate(zip(fed, leaves, strict=True)):
        if (name := known.get(id(leaf))) is None:
            continue
        if is_state(name):
            if len(given) != len(leaves):
                raise UnsupportedModelError(
                    f"{_name()} gives {len(given)} outputs for a cache of {len(leaves)} tensors: use the "
                    "version of transformers in constraints.txt."
                )
            present = given[place]
            # The tracer knows no sizes of what the operators take and give.
            value.shape = present.shape = ir.Shape(["batch_size", *leaf.shape[1:]])
        else:
            present = _longer(value, graph)
        value.name, present.name = f"past_key_values.{name}", f"present.{name}"


def _parts_of(layer: Any) -> dict[str, Any]:  # noqa: ANN401 - a layer of transformers' cache
    """The tensors of one layer that the runtime keeps, by the end of their names."""
    if isinstance(layer, StateLayer):
        return {"conv": layer.conv_states[0], "recurrent": layer.recurrent_states[0]}
    return {"key": layer.keys, "value": layer.values}


def _longer(past: ir.Value, graph: ir.Graph) -> ir.Value:
    """The output that holds a past cache and the new positions behind it."""
    joined = [use.node.outputs[0] for use in past.uses() if use.node.op_type == "Concat" and use.idx == 0]
    outputs = [output for output in graph.outputs if any(_is_same(output, value) for value in joined)]
    if len(outputs) != 1:
        raise UnsupportedModelError(
            f"{_name()} gives no output that holds {past.name} and the new positions behind it: use another "
            "exporter."
        )
    return outputs[0]


def _is_same(output: ir.Value, value: ir.Value) -> bool:
    """Whether an output is a value, or a copy of it."""
    node = output.producer()
    while node is not None and node.op_type == "Identity" and output is not value:
        (source,) = node.inputs
        if source is None:
            return False
        output, node = source, source.producer()
    return output is value


def _rename(graph: ir.Graph) -> None:
    """Give outputs and axes the names that the serving passes and other runtimes know."""
    kept = [value for value in graph.outputs if value.name in _OUTPUTS or _is_present(value)]
    graph.outputs[:] = kept
    name_axes(graph, _axes_of)


def _is_present(value: ir.Value) -> bool:
    return str(value.name).startswith("present.")


def _axes_of(name: str) -> Sequence[str | None]:
    return _AXES.get("past" if name.startswith("past_key_values.") and not is_state(name) else name, ())


def _name() -> str:
    return f"transformers {version('transformers')}"


def versions() -> dict[str, str]:
    """Name of this exporter and the versions of what it used, for the manifest."""
    names = ("transformers", "torch", "onnxscript", "onnx", "onnx-ir")
    return {"name": "transformers"} | {name: version(name) for name in names}
