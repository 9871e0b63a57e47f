"""Export a trimmed folder: trim the checkpoint, export it, make the graph servable, write the manifest."""

import dataclasses
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimserve.arguments import checked
from trimserve.errors import UsageError
from trimserve.files.space import check_space
from trimserve.folder.manifest import Manifest, stored_weight_bytes, write_manifest
from trimserve.folder.names import MANIFEST_NAME
from trimserve.folder.opening import TrimmedFolder
from trimserve.folder.staging import staged_folder
from trimserve.model.prize import read_weight_bytes
from trimserve.model.resolve import resolve_model
from trimserve.model.source import ModelSource
from trimserve.process import peak_resident
from trimserve.profiles.profile import Profile
from trimserve.vocab.map import VocabMap
from trimserve_export.card import with_card
from trimserve_export.checkpoint.head_ids import check_layout
from trimserve_export.checkpoint.source_tokenizer import ask_library
from trimserve_export.checkpoint.trim import check_vocab
from trimserve_export.cold_head.sketch import SKETCH_BITS, wants_sketch, write_sketch
from trimserve_export.from_checkpoint import fill_from_checkpoint
from trimserve_export.from_graph.fill import check_options, fill_from_graph
from trimserve_export.layouts.closure import close_vocab
from trimserve_export.layouts.segmentation import Sample
from trimserve_export.layouts.writing import CONFIG_FILES
from trimserve_export.options import Options
from trimserve_export.planning import Plan, plan_export
from trimserve_export.serving.calibration import Calibration
from trimserve_export.serving.quality import Quality
from trimserve_export.source.admission import check_source
from trimserve_export.source.whole import whole_source
from trimserve_export.static_embedding import fill_from_static, is_static
from trimserve_export.to_gguf.fill import fill_gguf
from trimserve_export.tokenizer_tables import with_tables
from trimserve_export.trial import try_folder

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
        exporter: name of what made the graph, and reason; None where none was needed.
        head_rows: rows of the head where it has fewer than K, else None.
        quality: what quantising cost on held-out texts, see `Manifest.quality`.
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
    exporter: dict[str, str] | None = None
    head_rows: int | None = None
    quality: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of the command line."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


@checked
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
    vocab_bits: int | None = None,
    device: str = "cpu",
    link: bool = False,
    variant: str | None = None,
    sketch: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    adapter: str | Path | None = None,
    profile: Profile | None = None,
    sample: Sample | None = None,
    calibration: Iterable[str] | Calibration | None = None,
    progress: bool = True,
) -> ExportResult:
    """Make a trimmed folder from a model.

    The checkpoint's vocab rows are cut while it is streamed, the exporter makes a graph of what is left,
    and the serving passes make that graph servable. The folder appears complete or not at all.

    Args:
        model: a folder or hub id with a tokenizer.json and safetensors weights, or an ONNX graph, which is
            trimmed as it is, its quantisation kept; or the .onnx file itself. A compact checkpoint of
            fine-tuning counts as the full model that `trimserve.finetune.restoring` makes of it.
        vocab: the kept ids, selected for this model.
        output: the folder to make; it must not exist or be empty.
        task: ``"auto"`` (by the checkpoint's architecture) or one of `tasks.TASKS`.
        exporter: ``"auto"`` (by what is installed and exports the model) or one of `exporters.EXPORTERS`;
            see docs/export.md.
        dtype: of the graph's weights: fp32, fp16 or bf16.
        layout: where ids are remapped: ``"runtime"`` (original tokenizer, cold slots, exact mode),
            ``"tokenizer"`` (a tokenizer cut to the vocab, for any runtime) or ``"graph"`` (a drop-in for the
            full model); see docs/layouts.md.
        to: ``"onnx"``, ``"safetensors"`` to stop at the trimmed checkpoint, or ``"gguf"`` for llama.cpp
            (layout tokenizer); see docs/gguf.md.
        cold: write the rows that were not kept, which the runtime needs to take any text.
        quantize: ``"int4"`` or ``"int8"``: round the weights, in blocks of 32.
        vocab_bits: 4 or 8, of the vocab head's rows where the rest is quantised: 8 by default.
        device: one of `exporters.DEVICES`: what genai's builder makes the graph for.
        link: of an ONNX graph, hard-link the weights that nothing changes instead of copying them; see
            docs/onnx-in.md.
        variant: of a folder with ONNX graphs in several precisions, the one to take, e.g. ``"q4"`` of
            `onnx/model_q4.onnx`; also where the folder has safetensors weights.
        sketch: ``"int8"``, ``"int4"`` or ``"none"``: the bounds of the cold rows that exact mode proves most
            steps with; int8 by default unless the head is quantised. See docs/certificate.md.
        overwrite: replace a folder that trimserve made.
        trust_remote_code: allow code that the model folder brings.
        revision: hub branch, tag or commit.
        adapter: a folder or hub id of an adapter, which peft merges into the model first.
        profile: what the vocab was selected from, if at hand: layout tokenizer closes the vocab with it.
        calibration: texts of the domain: `quantize` rounds by them, and says what it cost on those that it
            holds out; see docs/quantization.md.
        sample: texts that the cut tokenizer is compared with the original one on (layout tokenizer).
        progress: show a bar on stderr if it is a terminal.

    Raises:
        UsageError: an unknown option, or a target that may not be replaced.
        UnsupportedModelError: a model or graph that is not understood; the message names what.
        MismatchError: the vocab was made for another tokenizer or vocab size.
        MissingExtraError: a package that the export needs is not installed.
        TrimserveError: there is no room for it on the disk, or not enough memory.
    """
    start = time.perf_counter()
    options = Options(
        task=task,
        exporter=exporter,
        dtype=dtype,
        layout=layout,
        to=to,
        cold=cold,
        trust_remote_code=trust_remote_code,
        quantize=quantize,
        vocab_bits=vocab_bits,
        device=device,
        link=link,
        variant=variant,
        sketch=sketch,
    )
    if calibration is not None and (quantize is None or device != "cpu" or to == "gguf"):
        raise UsageError("calibration says what quantize rounds by on a CPU: leave it out, or add quantize.")
    target = Path(output)
    found = resolve_model(model, revision=revision)
    with whole_source(
        found,
        adapter=adapter,
        near=target.parent,
        trust_remote_code=trust_remote_code,
        dequantize=to != "gguf",
    ) as source:
        source = ask_library(check_early(source, options), trust_remote_code=trust_remote_code)
        check_layout(vocab, layout=layout, to=to)
        if layout == "tokenizer":
            check_vocab(source, vocab)
            vocab = close_vocab(vocab, source, profile)
        static = is_static(source)
        plan = (
            plan_export(source, vocab, options, sample, calibration)
            if source.graph is None and not static
            else None
        )
        if plan is not None and (weights := read_weight_bytes(source)) is not None:
            check_space(target.absolute(), weights.at(len(vocab)), "the trimmed checkpoint")
        with staged_folder(target, overwrite=overwrite) as staging:
            manifest = _fill(staging, source, vocab, options, plan, progress=progress)
            try_folder(staging, manifest, device=device)
    return _result(target, manifest, time.perf_counter() - start)


def check_early(source: ModelSource, options: Options) -> ModelSource:
    """Refuse what files and options tell, before a corpus is read; gives the source with the chosen variant.

    Raises:
        TrimserveError: see `admission.check_source`; or options that the source does not have.
    """
    if options.variant is not None:
        source = dataclasses.replace(source, variant=options.variant)
    check_options(source, options)
    check_source(
        source, task=options.task, layout=options.layout, trust_remote_code=options.trust_remote_code
    )
    return source


def _fill(
    folder: Path, source: ModelSource, vocab: VocabMap, options: Options, plan: Plan | None, *, progress: bool
) -> Manifest:
    """Write everything into an empty folder; a plan is there for a checkpoint of transformers alone."""
    if plan is not None and options.to == "gguf":
        filled = fill_gguf(plan, folder, progress=progress)
    elif plan is not None:
        filled = fill_from_checkpoint(plan, folder, progress=progress)
    elif is_static(source):
        filled = fill_from_static(source, vocab, options, folder)
    else:
        filled = fill_from_graph(source, vocab, options, folder, CONFIG_FILES)
    _warn_of_quality(filled, options)
    manifest = with_card(filled, source, folder)
    if wants_sketch(manifest, options.sketch):
        manifest = write_sketch(TrimmedFolder(folder, manifest, vocab), SKETCH_BITS[options.sketch or "int8"])
    manifest = with_tables(manifest, source, folder)
    write_manifest(folder, manifest)
    return manifest


def _warn_of_quality(manifest: Manifest, options: Options) -> None:
    """Say of a model that rounding harmed what would harm it less."""
    quality = None if manifest.quality is None else Quality.from_dict(manifest.quality)
    if quality is None or not quality.is_poor:
        return
    has_head = quality.measure != "cosine"
    if options.vocab_bits == 4 and has_head:
        better = "leave --vocab-bits 4 out"
    else:
        better = "use --quantize int8" if options.quantize == "int4" else "leave --quantize out"
    logger.warning("quantising changes this model: %s For a better one %s.", quality.describe(), better)


def _result(target: Path, manifest: Manifest, seconds: float) -> ExportResult:
    files = {name: entry.bytes for name, entry in manifest.files.items()}
    known = manifest.exporter
    chosen = {"name": known["name"], "reason": known["reason"]} if "reason" in known else None
    return ExportResult(
        path=target,
        kept=manifest.kept,
        vocab_size=manifest.vocab_size,
        bytes_before=manifest.bytes_before,
        bytes_after=stored_weight_bytes(manifest.files),
        files=files | {MANIFEST_NAME: (target / MANIFEST_NAME).stat().st_size},
        seconds=round(seconds, 3),
        peak_rss_bytes=peak_resident(),
        segmentation=manifest.segmentation,
        exporter=chosen,
        head_rows=manifest.head_rows,
        quality=manifest.quality,
    )
