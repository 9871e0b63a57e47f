"""Export a trimmed folder: trim the checkpoint, export it, make the graph servable, write the manifest."""

import dataclasses
import logging
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from trimserve import __version__
from trimserve.artefacts import save_vocab, sha256_file
from trimserve.blocks import COLD_BLOCKS_NAME, BlockScheme
from trimserve.errors import UnsupportedModelError
from trimserve.exact import COLD_HEAD_NAME, COLD_MAX_NAME
from trimserve.folder import (
    COLD_NAME,
    GENERATION_TASK,
    GENERATOR_TASKS,
    MANIFEST_NAME,
    TEXT2TEXT_TASK,
    VOCAB_NAME,
    FileEntry,
    Manifest,
    Pooling,
    Source,
    list_files,
    staged_folder,
    write_manifest,
)
from trimserve.profiling import Profile
from trimserve.source import ModelSource, resolve_model
from trimserve.vocab import VocabMap
from trimserve_export.card import CARD_NAME, render_card
from trimserve_export.checkpoint import TrimmedCheckpoint, check_vocab, trim_checkpoint
from trimserve_export.exporters import optimum
from trimserve_export.graph.export import serve_full
from trimserve_export.graph.road import fill_from_graph
from trimserve_export.layouts.closure import close_vocab
from trimserve_export.layouts.genai_config import write_genai_config
from trimserve_export.layouts.segmentation import Sample
from trimserve_export.layouts.writing import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    copy_files,
    write_cut_files,
    write_layout_graph,
)
from trimserve_export.options import Options
from trimserve_export.pooling import is_sentence_transformers, read_pooling
from trimserve_export.quantize import SCHEMES, quantize_graph
from trimserve_export.serving import make_servable
from trimserve_export.serving.cold_head import write_cold_head
from trimserve_export.serving.seq2seq import make_seq2seq_servable
from trimserve_export.vocab_axes import load_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export made.

    Attributes:
        path: the trimmed folder.
        kept: K.
        vocab_size: V.
        bytes_before: bytes of the source's weights in the exported dtype, each tied tensor once.
        bytes_after: bytes of the trimmed weights (graph and its data, or the checkpoint).
        files: name -> bytes of every file of the folder.
        seconds: wall time.
        peak_rss_bytes: largest resident memory of this process so far; 0 where the system does not tell.
        segmentation: how the cut tokenizer segments the sample's texts (layout tokenizer), if there is one.
    """

    path: Path
    kept: int
    vocab_size: int
    bytes_before: int
    bytes_after: int
    files: dict[str, int]
    seconds: float
    peak_rss_bytes: int
    segmentation: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command line."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is settled before anything is written."""

    source: ModelSource
    vocab: VocabMap
    options: Options
    task: str
    pooling: Pooling | None
    sample: Sample | None = None


def export(  # noqa: PLR0913 - the options are the public interface
    model: str | Path | ModelSource,
    vocab: VocabMap,
    output: str | Path,
    *,
    task: str = "auto",
    exporter: str = "auto",
    dtype: str = "fp32",
    layout: str = "runtime",
    to: str = "onnx",
    cold: bool = True,
    quantize: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    profile: Profile | None = None,
    sample: Sample | None = None,
    progress: bool = True,
) -> ExportResult:
    """Make a trimmed folder from a model.

    The checkpoint's vocab rows are cut while it is streamed, the exporter makes a graph of what is left,
    and the serving passes make that graph servable. The folder appears complete or not at all.

    Args:
        model: a folder or hub id with a tokenizer.json and safetensors weights, or an ONNX graph, which is
            trimmed as it is, its quantisation kept; or the .onnx file itself.
        vocab: the kept ids, selected for this model.
        output: the folder to make; it must not exist or be empty.
        task: ``"auto"`` (by the checkpoint's architecture) or one of `exporters.optimum.TASKS`.
        exporter: ``"auto"`` or ``"optimum"``.
        dtype: of the graph's weights: fp32, fp16 or bf16.
        layout: where ids are remapped: ``"runtime"`` (original tokenizer, cold slots, exact mode),
            ``"tokenizer"`` (a tokenizer cut to the vocab, for any runtime) or ``"graph"`` (a drop-in for the
            full model); see docs/layouts.md.
        to: ``"onnx"``, or ``"safetensors"`` to stop at the trimmed checkpoint.
        cold: write the rows that were not kept, which the runtime needs to take any text.
        quantize: ``"int4"`` or ``"int8"``: round the weights of body and vocab head, in blocks of 32.
        overwrite: replace a folder that trimserve made.
        trust_remote_code: allow code that the model folder brings.
        revision: hub branch, tag or commit.
        profile: what the vocab was selected from, if at hand: layout tokenizer closes the vocab with it.
        sample: texts that the cut tokenizer is compared with the original one on (layout tokenizer).
        progress: show a bar on stderr if it is a terminal.

    Raises:
        UsageError: an unknown option, or a target that may not be replaced.
        UnsupportedModelError: a model or graph that is not understood; the message names what.
        MismatchError: the vocab was made for another tokenizer or vocab size.
    """
    start = time.perf_counter()
    options = Options(task, exporter, dtype, layout, to, cold, trust_remote_code, quantize)
    source = resolve_model(model, revision=revision)
    if layout == "tokenizer":
        check_vocab(source, vocab)
        vocab = close_vocab(vocab, source, profile)
    plan = dataclasses.replace(_plan(source, vocab, options), sample=sample) if source.graph is None else None
    target = Path(output)
    with staged_folder(target, overwrite=overwrite) as staging:
        if plan is not None:
            manifest = _fill(plan, staging, progress=progress)
        else:
            filled = fill_from_graph(source, vocab, options, staging, (*TOKENIZER_FILES, *CONFIG_FILES))
            manifest = with_card(filled, source, staging)
        write_manifest(staging, manifest)
    files = {name: entry.bytes for name, entry in manifest.files.items()}
    seconds = round(time.perf_counter() - start, 3)
    return ExportResult(
        path=target,
        kept=len(vocab),
        vocab_size=vocab.vocab_size,
        bytes_before=manifest.bytes_before,
        bytes_after=_weight_bytes(manifest.files),
        files=files | {MANIFEST_NAME: (target / MANIFEST_NAME).stat().st_size},
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes(),
        segmentation=manifest.segmentation,
    )


def export_full(
    source: ModelSource, output: Path, task: str, dtype: str, scheme: BlockScheme | None = None
) -> Path:
    """Export the untrimmed model with the same exporter and passes: the reference that `verify` uses.

    Args:
        source: the model.
        output: an existing folder to write into.
        task: its task.
        dtype: fp32, fp16 or bf16.
        scheme: how to quantise it, if at all.

    Returns:
        The path of the graph in `output`; its inputs and outputs are those of a trimmed one. For an
        encoder-decoder the decoder's, with the encoder beside it.
    """
    if source.graph is not None:
        return serve_full(source, output, task=task)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".full.") as scratch:
        exported = optimum.export_checkpoint(source.path, Path(scratch), task, dtype)
        graphs = _make_servable(exported, output, source.vocab_size, task, scheme)
        return graphs.get("decoder") or graphs["model"]


def _make_servable(
    exported: Path, output: Path, rows: int, task: str, scheme: BlockScheme | None
) -> dict[str, Path]:
    """Run the serving passes, then quantise; returns role -> graph."""
    if task == TEXT2TEXT_TASK:
        return make_seq2seq_servable(exported, output, rows=rows)
    has_head = has_vocab_head(task)
    if scheme is None:
        return {"model": make_servable(exported, output, rows=rows, has_head=has_head).path}
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".servable.") as scratch:
        graph = make_servable(exported, Path(scratch), rows=rows, has_head=has_head).path
        return {"model": quantize_graph(graph, output, scheme, has_head=has_head)}


def has_vocab_head(task: str) -> bool:
    """Tell whether a task's graph makes logits over the vocab."""
    return task in ("fill-mask", *GENERATOR_TASKS)


def _plan(source: ModelSource, vocab: VocabMap, options: Options) -> _Plan:
    config = load_config(source.path, trust_remote_code=options.trust_remote_code)
    task = options.task
    if task == "auto":
        task = optimum.infer_task(config, sentence_transformers=is_sentence_transformers(source))
    optimum.task_class(task, config)  # refuses what it cannot export
    _check_pad_is_kept(config, task, vocab)
    if options.layout != "runtime" and options.to == "onnx" and task == TEXT2TEXT_TASK:
        raise UnsupportedModelError(
            f"layout {options.layout} is not built for graphs of encoder-decoders yet: use --layout runtime, "
            "or --layout tokenizer with --to safetensors."
        )
    if options.quantize and task in ("fill-mask", TEXT2TEXT_TASK):
        raise UnsupportedModelError(f"quantize is not built for {task} yet: leave it out.")
    pooling = read_pooling(source) if task == "feature-extraction" else None
    logger.info("%s: task %s, %s of %s rows", source.name, task, len(vocab), vocab.vocab_size)
    return _Plan(source, vocab, options, task, pooling)


def _check_pad_is_kept(config: PretrainedConfig, task: str, vocab: VocabMap) -> None:
    # A decoder that classifies looks for the last token that is not the pad id.
    pad = config.get_text_config().pad_token_id
    if task == "text-classification" and pad is not None and pad not in vocab.kept_ids:
        raise UnsupportedModelError(
            f"{task} needs the pad id {pad}, which this vocab does not keep: "
            "select again (trimserve select keeps it, it is structural)."
        )


def _fill(plan: _Plan, staging: Path, *, progress: bool) -> Manifest:
    """Write everything but the manifest into the staging folder, and return the manifest."""
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f"{staging.name}.") as scratch:
        to_onnx = plan.options.to == "onnx"
        checkpoint = Path(scratch) if to_onnx else staging
        trimmed = _trim(plan, checkpoint, staging, progress=progress)
        graphs = _export_graph(plan, checkpoint, staging) if to_onnx else {}
        cut = plan.options.layout == "tokenizer"
        if to_onnx:
            copy_files(CONFIG_FILES, checkpoint if cut else plan.source.path, staging)
        if not cut:
            copy_files(TOKENIZER_FILES, plan.source.path, staging)
        segmentation = write_cut_files(plan.source, plan.vocab, staging, plan.sample) if cut else None
    if plan.options.layout != "runtime" and plan.task == GENERATION_TASK and graphs:
        columns = len(plan.vocab) if cut else plan.vocab.vocab_size
        write_genai_config(staging / graphs["model"], vocab_size=columns)
    save_vocab(plan.vocab, staging / VOCAB_NAME)
    manifest = _manifest(plan, trimmed, graphs, list_files(staging))
    manifest = dataclasses.replace(manifest, segmentation=segmentation)
    return with_card(manifest, plan.source, staging)


def _trim(plan: _Plan, checkpoint: Path, staging: Path, *, progress: bool) -> TrimmedCheckpoint:
    logger.info("trimming the checkpoint")
    trust = plan.options.trust_remote_code
    config = load_config(plan.source.path, trust_remote_code=trust)
    return trim_checkpoint(
        plan.source,
        plan.vocab,
        checkpoint,
        model_class=optimum.task_class(plan.task, config),
        cold_path=staging / COLD_NAME if plan.options.writes_cold else None,
        trust_remote_code=trust,
        progress=progress,
    )


def _export_graph(plan: _Plan, checkpoint: Path, staging: Path) -> dict[str, str]:
    """Export the trimmed checkpoint into the staging folder; returns role -> file name."""
    logger.info("exporting with optimum-onnx")
    exported = checkpoint / "exported"
    trust = plan.options.trust_remote_code
    made = optimum.export_checkpoint(
        checkpoint, exported, plan.task, plan.options.dtype, trust_remote_code=trust
    )
    scheme = SCHEMES[plan.options.quantize] if plan.options.quantize else None
    if plan.options.layout != "runtime":
        path = write_layout_graph(
            made,
            staging,
            plan.vocab,
            drop_in=plan.options.layout == "graph",
            has_head=has_vocab_head(plan.task),
            scheme=scheme,
            cold_path=staging / COLD_NAME if plan.options.writes_cold else None,
        )
        return {"model": path.name}
    logger.info("making the graph servable")
    graphs = _make_servable(made, staging, len(plan.vocab), plan.task, scheme)
    if plan.task in GENERATOR_TASKS and plan.options.cold and plan.vocab.cold_ids.size:
        write_cold_head(graphs.get("decoder") or graphs["model"], staging / COLD_NAME)
    return {role: path.name for role, path in graphs.items()}


def _manifest(
    plan: _Plan, trimmed: TrimmedCheckpoint, graphs: dict[str, str], files: dict[str, FileEntry]
) -> Manifest:
    source, options = plan.source, plan.options
    to_onnx = options.to == "onnx"
    return Manifest(
        source=Source(
            source.name, source.revision, {path.name: sha256_file(path) for path in source.weight_files}
        ),
        tokenizer_sha256=sha256_file(source.tokenizer_path),
        vocab_size=plan.vocab.vocab_size,
        kept=len(plan.vocab),
        task=plan.task,
        layout=options.layout,
        dtype=options.dtype if to_onnx else trimmed.dtype,
        graphs=graphs,
        cut=trimmed.cut,
        selection=plan.vocab.rule,
        exporter={"trimserve": __version__} | (optimum.versions() if to_onnx else {}),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        pooling=plan.pooling,
        bytes_before=trimmed.bytes_before(options.dtype if to_onnx else None),
        quantization=SCHEMES[options.quantize].to_dict() if options.quantize else None,
    )


def with_card(manifest: Manifest, source: ModelSource, folder: Path) -> Manifest:
    """Write a folder's model card and return the manifest that lists it."""
    path = folder / CARD_NAME
    path.write_text(render_card(manifest, source, _weight_bytes(manifest.files)), "utf-8")
    entry = FileEntry(path.stat().st_size, sha256_file(path))
    return dataclasses.replace(manifest, files=manifest.files | {CARD_NAME: entry})


def _weight_bytes(files: Mapping[str, FileEntry]) -> int:
    """Bytes of the graph and its data, or of the trimmed checkpoint; never of vocab map or cold rows."""
    ours = (VOCAB_NAME, COLD_NAME, COLD_HEAD_NAME, COLD_MAX_NAME, COLD_BLOCKS_NAME)
    names = (name for name in files if name not in ours)
    return sum(files[name].bytes for name in names if name.endswith((".onnx", ".onnx_data", ".safetensors")))


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
