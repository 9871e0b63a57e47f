"""Write what depends on the layout of a folder: tokenizer, configs, and graphs for other runtimes."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trimserve.files.quantized import Quantization
from trimserve.files.scratch import scratch_beside
from trimserve.model.source import ModelSource
from trimserve.vocab.map import VocabMap
from trimserve_export.layouts.drop_in import make_drop_in, save_plain, save_tied
from trimserve_export.layouts.segmentation import Sample, compare_segmentation
from trimserve_export.layouts.tokenizer_cut import write_cut_tokenizer
from trimserve_export.serving.calibration import Calibration, quantize_calibrated
from trimserve_export.serving.quantized_embedding import round_cold_embedding
from trimserve_export.serving.shared_table import map_shared
from trimserve_export.serving.stored_rows import StoredRows

# Copied as they are, unless the checkpoint itself is the result.
CONFIG_FILES = ("config.json", "generation_config.json")


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy those of the named files that a folder has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_cut_files(
    source: ModelSource, vocab: VocabMap, target: Path, sample: Sample | None
) -> dict[str, Any] | None:
    """Write the tokenizer cut to a closed vocab.

    Args:
        source: the model.
        vocab: the closed vocab.
        target: the folder to write into.
        sample: texts to compare both tokenizers on.

    Returns:
        The comparison as JSON values; None without a sample.
    """
    tokenizer = write_cut_tokenizer(source, vocab, target)
    if sample is None:
        return None
    return compare_segmentation(source.tokenizer(), tokenizer, vocab, sample).to_dict()


def write_layout_graph(  # noqa: PLR0913 - how a folder's graph is made
    made: Path,
    target: Path,
    vocab: VocabMap,
    *,
    drop_in: bool,
    has_head: bool,
    scheme: Quantization | None = None,
    calibration: Calibration | None = None,
    cold_path: Path | None = None,
    stored: StoredRows | None = None,
) -> Path:
    """Write an exporter's graph for another runtime.

    Args:
        made: the exporter's graph of the trimmed checkpoint.
        target: the folder to write into.
        vocab: the kept ids.
        drop_in: take token ids and give V logits (layout graph); else compact ones (layout tokenizer).
        has_head: the graph makes logits over the vocab.
        scheme: how to quantise it, if at all.
        calibration: by what texts to do so, if there are any.
        cold_path: cold rows in `target` that a drop-in feeds.
        stored: see `quantize_products`.
    """
    with scratch_beside(target) as scratch:
        if scheme is not None:
            tied = save_tied(made, scratch / "tied") if has_head else made
            made = quantize_calibrated(
                tied,
                scratch,
                scheme,
                has_head=has_head,
                calibration=calibration,
                shares=not scheme.by_exporter,
                stored=stored,
            )
            if cold_path is not None and vocab.head.cold_ids.size:
                round_cold_embedding(made, cold_path)
        if drop_in:
            path = make_drop_in(made, target, vocab, has_head=has_head, cold_path=cold_path)
        else:
            path = save_plain(made, target)
        map_shared(path)
        return path
