"""From a folder with an ONNX graph to a trimmed folder: no checkpoint, no exporter, nothing rounded again."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from trimserve.errors import UnsupportedModelError
from trimserve.folder.manifest import CutTensor
from trimserve.folder.tasks import GENERATOR_TASKS, TEXT2TEXT_TASK
from trimserve.model.source import ModelSource
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.head_ids import check_task_of_head, check_untied
from trimserve_export.checkpoint.lengths import lengths_of_graph
from trimserve_export.from_graph.other_layouts import PartJob
from trimserve_export.from_graph.runtime import (
    full_graph,
    load_seq2seq,
    serve_seq2seq,
    write_seq2seq,
    write_servable,
)
from trimserve_export.fusion.fuse import note_positions
from trimserve_export.graphs.reading import GraphFiles, load_graph
from trimserve_export.graphs.writing import GRAPH_NAME, LinkingWriter, write_copy
from trimserve_export.manifest import MadeModel
from trimserve_export.serving.servable import serve
from trimserve_export.trimming.cold_rows import is_tied
from trimserve_export.trimming.facts import (
    constant_bytes,
    dtype,
    file_hashes,
    infer_task,
    quantization,
)
from trimserve_export.trimming.parts import ENCODER, Part, find_parts, main_part, one_variant
from trimserve_export.trimming.sentence_outputs import gives_embeddings, name_hidden_states
from trimserve_export.trimming.stored import trim_stored

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
_HEAD_TASKS = ("fill-mask", *GENERATOR_TASKS)


@dataclass(frozen=True, slots=True)
class TrimmedGraph(MadeModel):
    """What was made of a graph.

    Attributes:
        gives_embeddings: the graph gives one embedding a text, which it pools by itself.
    """

    gives_embeddings: bool = False


def trim_to_folder(
    source: ModelSource,
    vocab: VocabMap,
    folder: Path,
    *,
    task: str,
    layout: str = "runtime",
    cold: bool = True,
    link: bool = False,
) -> TrimmedGraph:
    """Write trimmed graphs and, where the layout feeds cold ids, their rows.

    Args:
        source: a model with a graph.
        vocab: the kept ids, made for its tokenizer and vocab size.
        folder: an existing folder.
        task: ``"auto"`` or one of the runtime's tasks.
        layout: where ids are remapped, as in `pipeline.export`. ``"runtime"`` takes one variant of the
            graphs, the others all of them.
        cold: write the cold rows.
        link: hard-link the weights that nothing changes, instead of copying them.

    Raises:
        UnsupportedModelError: a graph, or a part of it, is not understood; the message names it.
        MismatchError: a file of the model is damaged.
        UsageError: the layout takes one variant and there are several, or the weights cannot be linked.
    """
    parts = find_parts(source)
    if not parts:
        raise UnsupportedModelError(f"{source.name} has no ONNX graph.")
    if layout == "runtime":
        parts = list(one_variant(parts).values())
    main = main_part(parts, source)
    if layout == "runtime" and not _is_seq2seq(parts):
        parts = [main]
    files = GraphFiles()
    model = files.copy(main.path)
    task = _task(parts, model.graph, vocab.vocab_size) if task == "auto" else task
    if vocab.output_ids is not None:
        check_task_of_head(vocab, task)
        full = full_graph(files.copy(main.path), has_head=True)
        check_untied(vocab, tied=is_tied(full.embedding, full.head))
    cold = cold and bool(vocab.head.cold_ids.size)
    if layout == "runtime":
        with _other_layouts_named():
            graphs, cut = _write_for_runtime(
                source, parts, files, vocab, folder, task=task, cold=cold, link=link
            )
    else:
        job = PartJob(files, vocab, folder, task in _HEAD_TASKS, layout == "graph", cold, link)
        graphs, cut = _write_parts(parts, job)
    parsed = {part.path: files.parsed(part.path) for part in parts}
    hashes = [file_hashes(path, parsed[path]) for path in parsed]
    return TrimmedGraph(
        task=task,
        graphs=graphs,
        cut=cut,
        dtype=dtype(model.graph),
        bytes_before=constant_bytes(parsed.values()),
        weights={name: sha for files in hashes for name, sha in files.items()},
        exporter=_exporter(source),
        quantization=quantization(model, has_head=task in _HEAD_TASKS),
        gives_embeddings=gives_embeddings(model.graph),
    )


def _exporter(source: ModelSource) -> dict[str, str]:
    variant = {} if source.variant is None else {"variant": source.variant}
    return {"name": "graph"} | variant | {name: version(name) for name in ("onnx", "onnx-ir")}


def _is_seq2seq(parts: list[Part]) -> bool:
    return len(parts) > 1 and any(part.name == ENCODER for part in parts)


def _task(parts: list[Part], graph: ir.Graph, rows: int) -> str:
    return TEXT2TEXT_TASK if _is_seq2seq(parts) else infer_task(graph, rows)


def _write_for_runtime(
    source: ModelSource,
    parts: list[Part],
    files: GraphFiles,
    vocab: VocabMap,
    folder: Path,
    *,
    task: str,
    cold: bool,
    link: bool,
) -> tuple[dict[str, str], tuple[CutTensor, ...]]:
    """Role -> file, and what was cut."""
    writer = LinkingWriter() if link else write_copy
    if task == TEXT2TEXT_TASK:
        named = {part.name: part for part in parts}
        if ENCODER not in named:
            raise UnsupportedModelError(f"{parts[0].path} has no {ENCODER}.onnx beside it: pass the folder.")
        return write_seq2seq(named, files, vocab, folder, cold=cold, writer=writer)
    (part,) = parts
    untrimmed, trimmed = files.copy(part.path), files.copy(part.path, turned=False)
    for model in (untrimmed, trimmed):
        name_hidden_states(model.graph)
    note_positions(trimmed, lengths_of_graph(source, part.path))
    has_head = task in _HEAD_TASKS
    cut = trim_stored(trimmed, vocab, has_head=has_head)
    made = write_servable(
        untrimmed, trimmed, vocab, folder, task=task, cold=cold, has_head=has_head, writer=writer
    )
    return made, cut


def _write_parts(parts: list[Part], job: PartJob) -> tuple[dict[str, str], tuple[CutTensor, ...]]:
    """Role -> file, and what was cut, of the layouts for other runtimes."""
    alone = len(parts) == 1 and not parts[0].folder
    graphs: dict[str, str] = {}
    cut: list[CutTensor] = []
    for part in parts:
        name = GRAPH_NAME if alone else part.file_name
        logger.info("trimming %s", part.path.name)
        cut += job.write(part, name)
        graphs["model" if alone else part.role] = name
    return graphs, tuple(cut)


@contextlib.contextmanager
def _other_layouts_named() -> Iterator[None]:
    """What the runtime does not take, others may."""
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error} The rows can be cut for other runtimes: --layout graph or --layout tokenizer."
        ) from error


def serve_full(source: ModelSource, folder: Path, *, task: str, fuses: bool = True) -> Path:
    """Write the untrimmed graph with the serving passes alone: the reference that `verify` uses.

    Args:
        source: a model with graphs.
        folder: an existing folder.
        task: its task.
        fuses: see `make_servable`.

    Returns:
        The path of the graph; of an encoder-decoder the decoder's, with the encoder beside it.
    """
    parts = one_variant(find_parts(source))
    if task == TEXT2TEXT_TASK:
        models = load_seq2seq(parts, GraphFiles())
        return serve_seq2seq(models, folder, rows=source.vocab_size)
    part = main_part(list(parts.values()), source)
    model = load_graph(part.path)
    name_hidden_states(model.graph)
    note_positions(model, lengths_of_graph(source, part.path))
    return serve(model, folder, rows=source.vocab_size, has_head=task in _HEAD_TASKS, fuses=fuses).path


def save_untrimmed(source: ModelSource, folder: Path, role: str = "model") -> Path:
    """Write an untrimmed graph as it is, with its weights beside it.

    Args:
        source: a model with graphs.
        folder: an existing folder.
        role: which graph, as the manifest calls it; ``"model"`` is also the only one.
    """
    parts = find_parts(source)
    found = {part.role: part for part in parts}.get(role, main_part(parts, source))
    write_copy(load_graph(found.path, turned=False), folder / GRAPH_NAME)
    return folder / GRAPH_NAME


def write_generation_config(source: ModelSource, folder: Path) -> None:
    """Write the ids that end generation where only onnxruntime-genai's config names them."""
    ids = {key: value for key, value in source.genai_model.items() if key.endswith("_token_id")}
    if ids and not (source.path / GENERATION_CONFIG).is_file() and not source.config:
        (folder / GENERATION_CONFIG).write_text(json.dumps(ids, indent=2) + "\n", "utf-8")
