"""From a checkpoint to a trimmed folder: trim it, export it, make the graph servable."""

import dataclasses
import logging
from pathlib import Path

from trimserve.files.hashes import sha256_file
from trimserve.files.quantized import Quantization
from trimserve.files.scratch import scratch_beside
from trimserve.folder.manifest import Lengths, Manifest
from trimserve.folder.names import CALIBRATION_NAME, COLD_NAME, VOCAB_NAME
from trimserve.folder.tasks import GENERATION_TASK, GENERATOR_TASKS, TEXT2TEXT_TASK, has_vocab_head
from trimserve.model.source import GENAI_NAME, ModelSource
from trimserve.vocab.file import save_vocab
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.checkpoint.head_ids import compact_head
from trimserve_export.checkpoint.lengths import lengths_of
from trimserve_export.checkpoint.sentence_files import write_declared
from trimserve_export.checkpoint.source_tokenizer import copy_tokenizer
from trimserve_export.checkpoint.trim import TrimmedCheckpoint, trim_checkpoint
from trimserve_export.cold_head.writing import quantize_cold_head, write_cold_head
from trimserve_export.exporters.choice import Choice
from trimserve_export.exporters.compared import export_compared
from trimserve_export.graphs.reading import load_graph
from trimserve_export.layouts.genai_config import write_genai_config
from trimserve_export.layouts.writing import (
    CONFIG_FILES,
    copy_files,
    write_cut_files,
    write_layout_graph,
)
from trimserve_export.manifest import MadeModel, assemble_manifest
from trimserve_export.planning import Plan
from trimserve_export.serving.calibration import Calibration, quantize_calibrated
from trimserve_export.serving.quantized_embedding import round_cold_embedding
from trimserve_export.serving.seq2seq import make_seq2seq_servable
from trimserve_export.serving.servable import make_servable, serve
from trimserve_export.serving.shared_table import map_shared
from trimserve_export.serving.stored_rows import StoredRows, stored_rows
from trimserve_export.trimming.trim import trim_head

logger = logging.getLogger(__name__)


def fill_from_checkpoint(plan: Plan, staging: Path, *, progress: bool) -> Manifest:
    """Write everything but the model card and the manifest, which is returned.

    Args:
        plan: what to make.
        staging: an existing folder.
        progress: show a bar on a terminal.
    """
    with scratch_beside(staging) as scratch:
        to_onnx = plan.options.to == "onnx"
        checkpoint = scratch if to_onnx else staging
        trimmed = _trim(plan, checkpoint, staging, progress=progress)
        calibration = _calibration(plan, progress=progress)
        graphs: dict[str, str] = {}
        choice = plan.choice
        if choice is not None:
            exported, choice = export_compared(choice, checkpoint, checkpoint / "exported", plan.job)
            logger.info("exported with %s: %s", choice.name, choice.reason)
            graphs = _make_graphs(plan, exported, staging, calibration)
        if calibration is not None and calibration.moments:
            calibration.save(staging / CALIBRATION_NAME)
        cut = plan.options.layout == "tokenizer"
        if to_onnx:
            copy_files(CONFIG_FILES, checkpoint if cut else plan.source.path, staging)
        if not cut:
            copy_tokenizer(plan.source, staging)
        segmentation = write_cut_files(plan.source, plan.vocab, staging, plan.sample) if cut else None
    if plan.options.layout != "runtime" and plan.task == GENERATION_TASK and graphs:
        columns = len(plan.vocab) if cut else plan.vocab.vocab_size
        write_genai_config(staging / graphs["model"], vocab_size=columns)
    if to_onnx or cut:  # a checkpoint of compact ids beside the original tokenizer is for no library
        write_declared(plan.source, plan.declared, staging, plan.options.layout)
    save_vocab(plan.vocab, staging / VOCAB_NAME)
    quality = None if calibration is None or calibration.quality is None else calibration.quality.to_dict()
    made = _made(plan, trimmed, graphs, choice)
    made = dataclasses.replace(made, segmentation=segmentation, quality=quality)
    return assemble_manifest(plan.source, plan.vocab, plan.options.layout, staging, made)


def _trim(plan: Plan, checkpoint: Path, staging: Path, *, progress: bool) -> TrimmedCheckpoint:
    logger.info("trimming the checkpoint")
    return trim_checkpoint(
        plan.source,
        plan.vocab,
        checkpoint,
        model_class=plan.model_class,
        cold_path=staging / COLD_NAME if plan.options.writes_cold else None,
        trust_remote_code=plan.options.trust_remote_code,
        progress=progress,
    )


def _make_graphs(plan: Plan, made: Path, staging: Path, calibration: Calibration | None) -> dict[str, str]:
    """Make what an exporter gave of the trimmed checkpoint servable, in the staging folder: role -> file."""
    has_cold = plan.options.writes_cold and bool(plan.vocab.head.cold_ids.size)
    if has_cold and plan.job.quantize is not None:
        round_cold_embedding(made, staging / COLD_NAME)
    if plan.options.layout != "runtime":
        path = write_layout_graph(
            made,
            staging,
            plan.vocab,
            drop_in=plan.options.layout == "graph",
            has_head=has_vocab_head(plan.task),
            scheme=plan.scheme,
            calibration=calibration,
            cold_path=staging / COLD_NAME if plan.options.writes_cold else None,
            stored=stored_rows_of(plan.source),
        )
        copy_files((GENAI_NAME,), made.parent, staging)
        return {"model": path.name}
    logger.info("making the graph servable")
    rows, head = len(plan.vocab), compact_head(plan.vocab)
    graphs = make_graphs(
        made,
        staging,
        rows,
        plan.task,
        plan.scheme,
        head,
        calibration,
        stored=stored_rows_of(plan.source),
    )
    with_head = graphs.get("decoder") or graphs["model"]
    if has_cold and plan.scheme is not None:  # a tied embedding reads the head's rows: cold ones alike
        round_cold_embedding(with_head, staging / COLD_NAME)
    if plan.task in GENERATOR_TASKS and has_cold:
        write_cold_head(with_head, staging / COLD_NAME)
    elif has_vocab_head(plan.task) and plan.options.quantize and has_cold:
        quantize_cold_head(with_head, staging / COLD_NAME)
    return {role: path.name for role, path in graphs.items()}


def _calibration(plan: Plan, *, progress: bool) -> Calibration | None:
    """The texts to quantise by, where there are any and a graph that takes a text by itself."""
    if plan.scheme is None or plan.calibration is None:
        return None
    if plan.task == TEXT2TEXT_TASK:
        logger.warning("an encoder-decoder is quantised without calibration: its weights count alike.")
        return None
    if isinstance(plan.calibration, Calibration):
        return plan.calibration
    return Calibration.of_texts(
        plan.calibration,
        plan.source.tokenizer(),
        plan.vocab,
        longest=_lengths(plan).longest,
        progress=progress,
    )


def _lengths(plan: Plan) -> Lengths:
    config = load_config(plan.source.path, trust_remote_code=plan.options.trust_remote_code)
    return lengths_of(config, plan.task)


def _made(plan: Plan, trimmed: TrimmedCheckpoint, graphs: dict[str, str], choice: Choice | None) -> MadeModel:
    source, options = plan.source, plan.options
    to_onnx = options.to == "onnx"
    return MadeModel(
        task=plan.task,
        graphs=graphs,
        cut=trimmed.cut,
        dtype=options.dtype if to_onnx else trimmed.dtype,
        bytes_before=trimmed.bytes_before(options.dtype if to_onnx else None),
        weights={path.name: sha256_file(path) for path in source.recorded_files},
        exporter=_exporter_facts(plan, choice),
        quantization=None if plan.quantization is None else plan.quantization.to_dict(),
        lengths=_lengths(plan),
        generation=plan.generation,
    )


def _exporter_facts(plan: Plan, choice: Choice | None) -> dict[str, str]:
    if choice is None:
        return {}
    device = {} if plan.options.device == "cpu" else {"device": plan.options.device}
    return choice.exporter.versions() | device | {"reason": choice.reason}


def make_graphs(  # noqa: PLR0913 - how a folder's graphs are made
    exported: Path,
    output: Path,
    rows: int,
    task: str,
    scheme: Quantization | None,
    head: VocabMap | None = None,
    calibration: Calibration | None = None,
    *,
    fuses: bool = True,
    stored: StoredRows | None = None,
) -> dict[str, Path]:
    """Run the serving passes on what an exporter made, then quantise.

    Args:
        exported: the graph, or an encoder-decoder's folder of graphs.
        output: the folder to write into.
        rows: of embedding and head.
        task: one of `tasks.TASKS`.
        scheme: how to quantise, if at all.
        head: the compact ids that stay in the head, where not all do.
        calibration: by what texts to quantise, if there are any; an encoder-decoder's weights count alike.
        fuses: see `make_servable`.
        stored: see `quantize_products`.

    Returns:
        Role -> graph.
    """
    if task == TEXT2TEXT_TASK:
        return make_seq2seq_servable(exported, output, rows=rows, scheme=scheme)
    has_head = has_vocab_head(task)
    if scheme is None:
        return {"model": _make_servable(exported, output, rows, head, has_head=has_head, fuses=fuses)}
    with scratch_beside(output) as scratch:
        graph = _make_servable(exported, scratch, rows, head, has_head=has_head, fuses=fuses)
        made = quantize_calibrated(
            graph,
            output,
            scheme,
            has_head=has_head,
            calibration=calibration,
            shares=not scheme.by_exporter,  # folders of earlier versions have a table of floats
            stored=stored,
        )
        map_shared(made)
        return {"model": made}


def stored_rows_of(source: ModelSource) -> StoredRows | None:
    """The rows that a source stores as integers in blocks, if it does."""
    return stored_rows(source.packed_matrices())


def _make_servable(
    exported: Path, output: Path, rows: int, head: VocabMap | None, *, has_head: bool, fuses: bool
) -> Path:
    if head is None:
        return make_servable(exported, output, rows=rows, has_head=has_head, fuses=fuses).path
    model = load_graph(exported)
    trim_head(model, head)
    return serve(model, output, rows=rows, has_head=True, head_rows=len(head), fuses=fuses).path
