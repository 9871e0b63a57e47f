"""The full model in the same runtime: exported as a trimmed folder was, with a vocab that keeps every id."""

from pathlib import Path
from typing import Any

import numpy as np

from trimserve.folder import TrimmedFolder
from trimserve.source import ModelSource
from trimserve.vocab import Reason, VocabMap
from trimserve_export.pipeline import ExportResult, export
from trimserve_export.quantize import SCHEMES


def export_untrimmed(like: TrimmedFolder, source: ModelSource, output: Path) -> ExportResult:
    """Export a model with all its rows: the same task, dtype and quantisation as a trimmed folder.

    Args:
        like: the folder that it is to be compared with.
        source: the model that `like` was made from.
        output: the folder to make.

    Raises:
        TrimserveError: see `pipeline.export`.
    """
    manifest, size = like.manifest, like.vocab.vocab_size
    kept = np.arange(size, dtype=np.int32)
    everything = VocabMap(kept, np.full(size, Reason.EXPLICIT, np.uint8), size, like.vocab.tokenizer_sha256)
    options: dict[str, Any] = {"task": manifest.task, "adapter": manifest.source.adapter}
    if source.graph is None:  # a graph is taken as it is, dtype and quantisation too
        schemes = (name for name, scheme in SCHEMES.items() if scheme.to_dict() == manifest.quantization)
        options |= {"dtype": manifest.dtype, "quantize": next(schemes, None)}
        options["exporter"] = manifest.exporter.get("name", "auto")
        options["device"] = manifest.exporter.get("device", "cpu")
    return export(source, everything, output, cold=False, progress=False, **options)
