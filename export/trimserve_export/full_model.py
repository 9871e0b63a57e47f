"""Export an untrimmed model as a trimmed one is exported: what `verify` and tests compare with."""

from pathlib import Path
from typing import Any

from trimserve.files.quantized import Quantization
from trimserve.files.scratch import scratch_beside
from trimserve.folder.names import CALIBRATION_NAME
from trimserve.folder.opening import TrimmedFolder
from trimserve.folder.tasks import has_vocab_head
from trimserve.model.source import ModelSource
from trimserve.vocab.map import VocabMap
from trimserve_export.exporters.exporter import GraphJob, load_exporter
from trimserve_export.from_checkpoint import make_graphs, stored_rows_of
from trimserve_export.from_graph.trimmed import serve_full
from trimserve_export.layouts.drop_in import save_plain
from trimserve_export.pipeline import ExportResult, export
from trimserve_export.serving.calibration import Calibration
from trimserve_export.static_embedding import is_static, serve_full_static


def export_full(  # noqa: PLR0913 - what a folder was made with
    source: ModelSource,
    output: Path,
    task: str,
    dtype: str,
    scheme: Quantization | None = None,
    *,
    exporter: str = "transformers",
    device: str = "cpu",
    layout: str = "runtime",
    calibration: Calibration | None = None,
) -> Path:
    """Export the untrimmed model with the same exporter and passes.

    Args:
        source: the model.
        output: an existing folder to write into.
        task: its task.
        dtype: fp32, fp16 or bf16.
        scheme: how to quantise it, if at all.
        exporter: one of `exporters.EXPORTERS`; a source with a graph needs none.
        device: one of `exporters.DEVICES`.
        layout: of the folder that it is compared with; a graph for other runtimes has no serving passes, and
            ONNX Runtime fuses what they change in another way. One with a vocab head has them all the same,
            for the head's input that its rounding bound is made of.
        calibration: what the folder's body was rounded by, see `calibration_of`.

    Returns:
        The path of the graph in `output`; its inputs and outputs are those of a trimmed one. For an
        encoder-decoder the decoder's, with the encoder beside it.
    """
    if source.graph is not None:
        return serve_full(source, output, task=task, fuses=layout == "runtime")
    if is_static(source):
        return serve_full_static(source, output, dtype)
    made_by = load_exporter(exporter)
    by_exporter = scheme is not None and scheme.by_exporter and made_by.QUANTIZES
    quantize = f"int{scheme.body.bits}" if scheme is not None and by_exporter else None
    with scratch_beside(output) as scratch:
        job = GraphJob(task, dtype, quantize, device)
        exported = made_by.export_checkpoint(source.path, scratch, job)
        if layout != "runtime" and scheme is None and not has_vocab_head(task):
            return save_plain(exported, output)
        ours = None if by_exporter else scheme
        graphs = make_graphs(
            exported,
            output,
            source.vocab_size,
            task,
            ours,
            calibration=calibration,
            fuses=layout == "runtime",
            stored=stored_rows_of(source),
        )
        return graphs.get("decoder") or graphs["model"]


def calibration_of(folder: TrimmedFolder) -> Calibration | None:
    """What a folder's body was rounded by, if by anything: the untrimmed model is rounded alike."""
    if CALIBRATION_NAME not in folder.manifest.files:
        return None
    return Calibration.stored(folder.opened(CALIBRATION_NAME))


def export_untrimmed(like: TrimmedFolder, source: ModelSource, output: Path) -> ExportResult:
    """Export a model with all its rows: the same task, dtype and quantisation as a trimmed folder.

    Args:
        like: the folder that it is to be compared with.
        source: the model that `like` was made from.
        output: the folder to make.

    Raises:
        TrimserveError: see `pipeline.export`.
    """
    manifest = like.manifest
    everything = VocabMap.everything(like.vocab.vocab_size, like.vocab.tokenizer_sha256)
    options: dict[str, Any] = {"task": manifest.task, "adapter": manifest.source.adapter}
    if source.graph is None:  # a graph is taken as it is, dtype and quantisation too
        quantization = Quantization.from_dict(manifest.quantization)
        options |= {"dtype": manifest.dtype}
        if quantization is not None:
            options["quantize"] = f"int{quantization.body.bits}"
            # A builder for another device quantises by itself.
            if "device" not in manifest.exporter and has_vocab_head(manifest.task):
                options["vocab_bits"] = quantization.rows.bits
            options["calibration"] = calibration_of(like)
        options["exporter"] = manifest.exporter.get("name", "auto")
        options["device"] = manifest.exporter.get("device", "cpu")
    return export(source, everything, output, cold=False, progress=False, **options)
