"""Refuse early a graph that this runtime could not run: by what it takes, what it gives, and its sizes."""

from functools import lru_cache
from pathlib import Path

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.folder.tasks import TEXT2TEXT_TASK
from trimserve.model.source import ModelSource
from trimserve.runtime.contract import Port, contract_of
from trimserve_export.from_graph.runtime import load_seq2seq
from trimserve_export.graphs.reading import GraphFiles, load_graph
from trimserve_export.shapes.fixed_sizes import fixed_size
from trimserve_export.trimming.facts import infer_task
from trimserve_export.trimming.parts import ENCODER, LATER, MERGED, Part

_OTHER_LAYOUTS = "or cut its rows for other runtimes with --layout graph or --layout tokenizer"
_DECODER_ENDINGS = ("ForCausalLM", "LMHeadModel")


def check_feedable(source: ModelSource, parts: dict[str, Part], main: Part, task: str) -> None:
    """Refuse a graph that the runtime could not feed or read, or that takes one shape of input alone.

    Args:
        source: a model with a graph.
        parts: the graphs of one variant by name.
        main: the one that is the model, unless it is an encoder-decoder.
        task: ``"auto"`` or one of the runtime's tasks.

    Raises:
        UnsupportedModelError: the message names file, input, output or node, and what to do.
        MismatchError: a file is damaged.
    """
    stamps = tuple((part.name, part.path, part.path.stat().st_mtime_ns) for part in parts.values())
    architecture = next(iter(source.config.get("architectures") or ()), "")
    # The command line and the export both ask, before and after a corpus is read.
    _check(stamps, main, task, _rows(source), architecture)


def _rows(source: ModelSource) -> int:
    """V, where the folder tells it; a graph by itself is inspected without."""
    try:
        return source.vocab_size
    except UsageError:
        return 0


@lru_cache(maxsize=8)
def _check(
    stamps: tuple[tuple[str, Path, int], ...], main: Part, task: str, rows: int, architecture: str
) -> None:
    parts = {name: Part(name, "", path, "") for name, path, _ in stamps}
    if ENCODER in parts and len(parts) > 1:
        if not {LATER, MERGED} & parts.keys() and task == "auto":
            raise UnsupportedModelError(
                f"{main.path.parent} has an encoder, {', '.join(sorted(parts.keys() - {ENCODER}))} and no "
                f"decoder with a past: export it again with optimum-cli and --task {TEXT2TEXT_TASK}."
            )
        models = load_seq2seq(parts, GraphFiles())
        _check_graph(models[ENCODER].graph, parts[ENCODER].path, TEXT2TEXT_TASK, "encoder")
        _check_graph(
            models[LATER].graph, parts.get(LATER, parts.get(MERGED, main)).path, TEXT2TEXT_TASK, "decoder"
        )
        return
    graph = load_graph(main.path).graph
    if task == "auto":
        task = infer_task(graph, rows)
        if task == "fill-mask" and architecture.endswith(_DECODER_ENDINGS):
            raise UnsupportedModelError(
                f"{main.path} is a decoder ({architecture}) without past_key_values, so each token would "
                "cost all tokens before it: export it again with optimum-cli and "
                "--task text-generation-with-past."
            )
    _check_graph(graph, main.path, task, "model")


def _check_graph(graph: ir.Graph, path: Path, task: str, role: str) -> None:
    inputs = {str(value.name): _port(value) for value in graph.inputs}
    outputs = [str(value.name) for value in graph.outputs]
    if (fault := contract_of(task, role).fault(inputs, outputs)) is not None:
        raise UnsupportedModelError(
            f"{path}: as {task}, the graph {fault}: export it again with optimum-cli from the model's "
            f"checkpoint, {_OTHER_LAYOUTS}."
        )
    if (found := fixed_size(graph)) is not None:
        raise UnsupportedModelError(
            f"{path} takes one shape of input alone, since {found}: export it again with dynamic axes "
            f"(optimum-cli without --no-dynamic-axes, torch.onnx.export with dynamic_shapes), "
            f"{_OTHER_LAYOUTS}."
        )


def _port(value: ir.Value) -> Port:
    shape = None
    if value.shape is not None:
        shape = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return Port("float" if value.dtype is None else value.dtype.name.lower(), shape)
