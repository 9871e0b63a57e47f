"""Fill a folder from a model that has an ONNX graph: graph, tokenizer, configs, vocab and manifest."""

import logging
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from trimserve import __version__
from trimserve.artefacts import save_vocab, sha256_file
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.folder import VOCAB_NAME, Manifest, list_files
from trimserve.source import ModelSource
from trimserve.vocab import VocabMap
from trimserve_export.checkpoint import check_vocab
from trimserve_export.graph.export import trim_to_folder, write_generation_config
from trimserve_export.options import Options
from trimserve_export.pooling import read_pooling

logger = logging.getLogger(__name__)


def fill_from_graph(
    source: ModelSource, vocab: VocabMap, options: Options, folder: Path, texts: Iterable[str]
) -> Manifest:
    """Write everything but the model card and the manifest, which is returned.

    Args:
        source: a model with a graph.
        vocab: the kept ids.
        options: what was asked for.
        folder: an existing folder.
        texts: names of the tokenizer's and the configs' files, which are copied as they are.

    Raises:
        UsageError: an option that only a checkpoint has.
        UnsupportedModelError: the graph is not understood, or a layout cannot be made of it yet.
        MismatchError: the vocab was made for another tokenizer or vocab size.
    """
    _check_options(source, options)
    check_vocab(source, vocab)
    made = trim_to_folder(
        source, vocab, folder, task=options.task, layout=options.layout, cold=options.writes_cold
    )
    logger.info("%s: task %s, %s of %s rows", source.name, made.task, len(vocab), vocab.vocab_size)
    for name in texts:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    write_generation_config(source, folder)
    save_vocab(vocab, folder / VOCAB_NAME)
    return Manifest(
        source=made.source,
        tokenizer_sha256=sha256_file(source.tokenizer_path),
        vocab_size=vocab.vocab_size,
        kept=len(vocab),
        task=made.task,
        layout=options.layout,
        dtype=made.dtype,
        graphs=made.graphs,
        cut=made.cut,
        selection=vocab.rule,
        exporter={"trimserve": __version__} | made.exporter,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=list_files(folder),
        pooling=read_pooling(source) if made.task == "feature-extraction" else None,
        bytes_before=made.bytes_before,
        quantization=made.quantization,
    )


def _check_options(source: ModelSource, options: Options) -> None:
    what = f"{source.name} is an ONNX graph"
    if options.to != "onnx":
        raise UsageError(f"{what}: --to safetensors needs a checkpoint.")
    if options.quantize is not None:
        raise UsageError(f"{what}, which keeps the numbers it has: leave --quantize out.")
    if options.dtype != Options().dtype:
        raise UsageError(f"{what}, which keeps the numbers it has: leave --dtype out.")
    if options.exporter != "auto":
        raise UsageError(f"{what}, so there is nothing to export: leave --exporter out.")
    if options.layout == "tokenizer":
        raise UnsupportedModelError(
            f"{what}: layout tokenizer is not built for those yet, use runtime or graph, or its checkpoint."
        )
