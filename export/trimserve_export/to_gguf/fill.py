"""From a model to the folder of a trimmed GGUF file, beside it the cut tokenizer and the compact configs."""

import logging
from importlib.metadata import version
from pathlib import Path

from trimserve.errors import UnsupportedModelError, require
from trimserve.files.hashes import sha256_file
from trimserve.files.scratch import scratch_beside
from trimserve.folder.manifest import CutTensor, Manifest
from trimserve.folder.names import VOCAB_NAME
from trimserve.folder.tasks import GENERATION_TASK
from trimserve.model.gguf.architectures import EMBEDDING, HEAD
from trimserve.model.gguf.model import open_gguf
from trimserve.model.source import ModelSource
from trimserve.vocab.file import save_vocab
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.checkpoint.configs import write_compact_configs
from trimserve_export.checkpoint.trim import check_vocab, trim_checkpoint
from trimserve_export.layouts.writing import CONFIG_FILES, copy_files, write_cut_files
from trimserve_export.manifest import MadeModel, assemble_manifest
from trimserve_export.options import Options
from trimserve_export.planning import Plan
from trimserve_export.to_gguf.formats import Formats
from trimserve_export.to_gguf.model import GGUF_NAME, format_of, write_from_checkpoint, write_from_gguf
from trimserve_export.to_gguf.settings import architecture_for
from trimserve_export.to_gguf.vocab import CutVocab

logger = logging.getLogger(__name__)


def formats_of(source: ModelSource, options: Options) -> Formats | None:
    """The formats that are asked for; None for a GGUF file's own, which stay unless others are named."""
    if source.gguf is not None and options.quantize is None and options.dtype == "fp32":
        return None
    return Formats.of(options.dtype, options.quantize, options.vocab_bits)


def fill_gguf(plan: Plan, staging: Path, *, progress: bool) -> Manifest:
    """Write everything but the model card and the manifest, which is returned.

    Args:
        plan: what to make.
        staging: an existing folder.
        progress: show a bar on a terminal.

    Raises:
        UnsupportedModelError: llama.cpp does not run such a model; the message says why.
        MissingExtraError: the gguf package is not installed, and numbers have to be rounded.
    """
    if plan.task != GENERATION_TASK:
        raise UnsupportedModelError(
            f"--to gguf writes models that generate text, and this task is {plan.task}."
        )
    source, formats = plan.source, formats_of(plan.source, plan.options)
    if source.gguf is None:
        architecture_for(load_config(source.path).get_text_config(), source.name)  # before the work, too
    if formats is not None:
        require("gguf", extra="export", purpose="--to gguf")
    segmentation = write_cut_files(source, plan.vocab, staging, plan.sample)
    cut, path = CutVocab(source, staging), staging / GGUF_NAME
    if source.gguf is None:
        removed, before = _fill_from_checkpoint(plan, cut, path, progress=progress)
    else:
        removed, before = _fill_from_gguf(plan, cut, formats, path)
    save_vocab(plan.vocab, staging / VOCAB_NAME)
    made = MadeModel(
        task=plan.task,
        graphs={},
        cut=removed,
        dtype=format_of(open_gguf(path)),
        bytes_before=before,
        weights={file.name: sha256_file(file) for file in source.recorded_files},
        exporter={"name": "gguf"} | ({} if formats is None else {"gguf": version("gguf")}),
        quantization=None if plan.quantization is None else plan.quantization.to_dict(),
        segmentation=segmentation,
    )
    return assemble_manifest(source, plan.vocab, plan.options.layout, staging, made)


def _fill_from_checkpoint(
    plan: Plan, cut: CutVocab, path: Path, *, progress: bool
) -> tuple[tuple[CutTensor, ...], int]:
    """Trim the checkpoint beside, and write it; gives what was cut, and the bytes of the source's weights."""
    with scratch_beside(cut.folder) as scratch:
        logger.info("trimming the checkpoint")
        trimmed = trim_checkpoint(
            plan.source,
            plan.vocab,
            scratch,
            model_class=plan.model_class,
            trust_remote_code=plan.options.trust_remote_code,
            progress=progress,
        )
        copy_files(CONFIG_FILES, scratch, cut.folder)
        logger.info("writing %s", path.name)
        formats = Formats.of(plan.options.dtype, plan.options.quantize, plan.options.vocab_bits)
        write_from_checkpoint(ModelSource(plan.source.name, None, scratch), cut, formats, path)
        return trimmed.cut, trimmed.bytes_before(None)


def _fill_from_gguf(
    plan: Plan, cut: CutVocab, formats: Formats | None, path: Path
) -> tuple[tuple[CutTensor, ...], int]:
    """Write the rows of a GGUF file that stay; see `_fill_from_checkpoint`."""
    source, vocab = plan.source, plan.vocab
    check_vocab(source, vocab)
    write_compact_configs(source.path, cut.folder, load_config(source.path), vocab)
    logger.info("writing %s", path.name)
    write_from_gguf(source, cut, vocab.kept_ids, formats, path)
    tensors = source.gguf.file.tensors if source.gguf is not None else {}
    removed = tuple(
        CutTensor(name, 0, tensors[name].rows, len(vocab), tensors[name].kind.name)
        for name in (EMBEDDING, HEAD)
        if name in tensors
    )
    return removed, sum(tensor.nbytes for tensor in tensors.values())
