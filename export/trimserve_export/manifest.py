"""Assemble the manifest of a folder: what every way of making one says in the same words, said once."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from trimserve.folder.manifest import CutTensor, Layout, Lengths, Manifest, Source
from trimserve.folder.opening import list_files
from trimserve.folder.tasks import Task
from trimserve.model.source import ModelSource
from trimserve.version import __version__
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.head_ids import head_rows
from trimserve_export.checkpoint.source_tokenizer import tokenizer_entry
from trimserve_export.fusion.fuse import fusion_of


@dataclass(frozen=True, slots=True)
class MadeModel:
    """What was made of a model; fields as in `Manifest`, but for one.

    Attributes:
        weights: each weight file of the source -> its sha256.
    """

    task: str
    graphs: dict[str, str]
    cut: tuple[CutTensor, ...]
    dtype: str
    bytes_before: int
    weights: dict[str, str]
    exporter: dict[str, str]
    quantization: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    lengths: Lengths | None = None
    generation: dict[str, Any] | None = None
    segmentation: dict[str, Any] | None = None


def assemble_manifest(
    source: ModelSource, vocab: VocabMap, layout: str, folder: Path, made: MadeModel
) -> Manifest:
    """The manifest of a folder to which all but the model card was written.

    Args:
        source: the model.
        vocab: the kept ids, as they lie in the folder.
        layout: where ids are remapped, as `Options` has checked it.
        folder: its files are hashed.
        made: what was made; its task is one that the exporter knows.
    """
    return Manifest(
        source=Source(source.name, source.revision, made.weights, source.adapter),
        tokenizer_sha256=source.tokenizer_sha256,
        tokenizer=tokenizer_entry(source, layout),
        vocab_size=vocab.vocab_size,
        kept=len(vocab),
        head_rows=head_rows(vocab),
        task=cast(Task, made.task),
        layout=cast(Layout, layout),
        dtype=made.dtype,
        graphs=made.graphs,
        cut=made.cut,
        selection=vocab.rule,
        exporter={"trimserve": __version__} | made.exporter,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=list_files(folder),
        bytes_before=made.bytes_before,
        quantization=made.quantization,
        quality=made.quality,
        segmentation=made.segmentation,
        lengths=made.lengths,
        generation=made.generation,
        fusion=_fusion(folder, made.graphs) if layout == "runtime" else None,
    )


def _fusion(folder: Path, graphs: Mapping[str, str]) -> dict[str, Any] | None:
    """What fusing the decoder came to, as its graph says."""
    return fusion_of(folder / graphs["model"]) if "model" in graphs else None
