"""Fill a folder from a model that has an ONNX graph: graph, tokenizer, configs, vocab and manifest."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trimserve.errors import UsageError
from trimserve.folder.manifest import Manifest, is_trimmed, read_manifest
from trimserve.folder.names import VOCAB_NAME
from trimserve.folder.tasks import GENERATOR_TASKS
from trimserve.model.source import CONFIG_NAME, GENAI_NAME, ModelSource
from trimserve.vocab.file import save_vocab
from trimserve.vocab.map import VocabMap
from trimserve_export.checkpoint.configs import compact_config
from trimserve_export.checkpoint.generation_settings import read_generation
from trimserve_export.checkpoint.lengths import lengths_of_graph
from trimserve_export.checkpoint.sentence_config import read_declared, task_of_modules
from trimserve_export.checkpoint.sentence_files import write_declared
from trimserve_export.checkpoint.sentence_modules import is_sentence_transformers
from trimserve_export.checkpoint.source_tokenizer import copy_tokenizer
from trimserve_export.checkpoint.trim import check_vocab
from trimserve_export.from_graph.trimmed import GENERATION_CONFIG, trim_to_folder, write_generation_config
from trimserve_export.graphs.writing import GRAPH_NAME
from trimserve_export.layouts.tokenizer_cut import write_cut_tokenizer
from trimserve_export.manifest import assemble_manifest
from trimserve_export.options import Options
from trimserve_export.planning import check_cold

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
        texts: names of the configs' files, which are copied as they are unless the layout cuts the tokenizer.

    Raises:
        UsageError: the weights cannot be linked, or the layout takes one variant and there are several.
        UnsupportedModelError: the graph, or a part of it, is not understood.
        MismatchError: the vocab was made for another tokenizer or vocab size.
    """
    check_vocab(source, vocab)
    task = options.task
    if task == "auto" and is_sentence_transformers(source):
        task = task_of_modules(source)
    made = trim_to_folder(
        source,
        vocab,
        folder,
        task=task,
        layout=options.layout,
        cold=options.writes_cold,
        link=options.link,
    )
    logger.info("%s: task %s, %s of %s rows", source.name, made.task, len(vocab), vocab.vocab_size)
    if options.layout == "tokenizer":
        write_cut_tokenizer(source, vocab, folder)
        _write_compact_configs(source, vocab, folder)
    else:
        copy_tokenizer(source, folder)
        _copy_texts(source, folder, texts)
        if options.layout == "graph" and source.genai_model:
            _write_json(folder / GENAI_NAME, _with_filename(source.read_json(GENAI_NAME)))
    declared = None
    if options.layout == "runtime":
        declared = read_declared(source, made.task, None, in_graph=made.gives_embeddings)
        check_cold(declared, options)
    write_declared(source, declared, folder, options.layout)
    save_vocab(vocab, folder / VOCAB_NAME)
    made = dataclasses.replace(
        made,
        generation=_generation(source, made.task, options.layout),
        lengths=None if source.graph is None else lengths_of_graph(source, source.graph),
    )
    return assemble_manifest(source, vocab, options.layout, folder, made)


def _generation(source: ModelSource, task: str, layout: str) -> dict[str, Any] | None:
    return read_generation(source) if task in GENERATOR_TASKS and layout == "runtime" else None


def _copy_texts(source: ModelSource, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    write_generation_config(source, folder)


def _write_compact_configs(source: ModelSource, vocab: VocabMap, folder: Path) -> None:
    """Write the configs that the folder has, with compact ids and K instead of V."""
    for name in (CONFIG_NAME, GENERATION_CONFIG, GENAI_NAME):
        if (source.path / name).is_file():
            content = _compact(source.read_json(name), vocab)
            _write_json(folder / name, _with_filename(content) if name == GENAI_NAME else content)


def _with_filename(genai: dict[str, Any]) -> dict[str, Any]:
    """The graph may have had another name than the one that it is written by."""
    model = genai["model"]
    return genai | {"model": model | {"decoder": model.get("decoder", {}) | {"filename": GRAPH_NAME}}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _compact(config: dict[str, Any], vocab: VocabMap) -> dict[str, Any]:
    """Move token ids and vocab_size, also in the sections that name the language model."""
    moved = compact_config(config, vocab)
    if moved.get("vocab_size") == vocab.vocab_size:
        moved["vocab_size"] = len(vocab)
    sections = ((key, value) for key, value in config.items() if key == "model" or key.endswith("_config"))
    return moved | {key: _compact(value, vocab) for key, value in sections if isinstance(value, dict)}


def check_options(source: ModelSource, options: Options) -> None:
    """Refuse options that only the other kind of source has.

    Raises:
        UsageError: a checkpoint's option for a graph, or a graph's for a checkpoint; or a model that was
            trimmed for this runtime, whose graph takes compact ids.
    """
    if is_trimmed(source.path) and (manifest := read_manifest(source.path)).layout == "runtime":
        raise UsageError(
            f"{source.name} was trimmed already: name the model that it was made from "
            f"({manifest.source.name}), or one trimmed with --layout tokenizer."
        )
    if source.graph is None:
        if options.link or options.variant is not None:
            raise UsageError(f"{source.name} has no ONNX graph to trim: leave --link and --variant out.")
        return
    what = f"{source.name} is an ONNX graph"
    if options.to != "onnx":
        raise UsageError(f"{what}: --to safetensors needs a checkpoint.")
    if options.quantize is not None:
        raise UsageError(f"{what}, which keeps the numbers it has: leave --quantize out.")
    if options.dtype != Options().dtype:
        raise UsageError(f"{what}, which keeps the numbers it has: leave --dtype out.")
    if options.exporter != "auto":
        raise UsageError(f"{what}, so there is nothing to export: leave --exporter out.")
