"""Run every check that applies to a folder, against the full model exported the same way for the occasion."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from trimserve.arguments import checked
from trimserve.console import progress as progress_bar
from trimserve.errors import MismatchError, TrimserveError
from trimserve.files.claim import claim
from trimserve.files.quantized import Quantization
from trimserve.files.scratch import scratch_folder
from trimserve.folder.manifest import Manifest, read_manifest, with_verification
from trimserve.folder.opening import TrimmedFolder, open_folder
from trimserve.folder.tasks import ENCODER_TASKS, GENERATOR_TASKS, has_vocab_head
from trimserve.interrupts import came
from trimserve.model.resolve import resolve_source
from trimserve.model.source import ModelSource
from trimserve_export.card import CARD_NAME, update_card
from trimserve_export.checkpoint.axes import architecture_class, find_vocab_axes, load_config
from trimserve_export.checkpoint.source_tokenizer import ask_library
from trimserve_export.checkpoint.stored import StoredVocab, find_stored_vocab, read_specs
from trimserve_export.checkpoint.tasks import task_class
from trimserve_export.full_model import calibration_of, export_full
from trimserve_export.source.whole import whole_source
from trimserve_export.static_embedding import is_static, stored_static
from trimserve_export.to_gguf.model import GGUF_NAME
from trimserve_export.verify.checks.generation import check_generated_ids
from trimserve_export.verify.checks.layouts import layout_checks
from trimserve_export.verify.checks.numbers import (
    check_cold_slots,
    check_hidden_states,
    check_kept_logits,
    check_runtime_outputs,
)
from trimserve_export.verify.checks.parts import has_parts
from trimserve_export.verify.checks.quantized import quantized_checks
from trimserve_export.verify.checks.retrimmed import check_retrimmed
from trimserve_export.verify.checks.rows import check_files, check_kept_rows, check_tokenizer
from trimserve_export.verify.context import Context
from trimserve_export.verify.result import Check, VerifyResult
from trimserve_export.verify.source.check import NAME as SOURCE_CHECK
from trimserve_export.verify.source.check import check_source
from trimserve_export.verify.source.original import check_library
from trimserve_export.verify.texts import BUILT_IN, HOSTILE

logger = logging.getLogger(__name__)

NamedCheck = tuple[str, Callable[[Context], Check]]


@checked
def verify(
    folder: str | Path,
    model: str | Path | ModelSource | None = None,
    *,
    texts: Iterable[str] | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    store: bool = True,
    progress: bool = True,
) -> VerifyResult:
    """Compare a trimmed folder with the full model it was made from.

    The full model is exported like the folder, but with every row, into a temporary folder.

    Args:
        folder: the trimmed folder.
        model: the full model, a folder or hub id; by default the source that the manifest names.
        texts: texts to compare on, beside the built-in hostile ones; by default ordinary built-in ones.
        revision: hub revision of `model`.
        adapter: what was merged into it; by default the adapter that the manifest names, if any.
        store: write the result into the folder's manifest and model card.
        progress: show a bar on a terminal.

    Returns:
        One check for each property; a folder that cannot even be opened has one failed check, "files".

    Raises:
        UsageError: `folder` is not a trimmed folder, or there is no such model.
        UnsupportedModelError: the full model cannot be exported.
        MissingExtraError: the source is a sentence-transformers model, and that is not installed.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    source = resolve_source(manifest.source, model, revision)
    if variant := manifest.exporter.get("variant"):
        source = dataclasses.replace(source, variant=variant)
    check_library(source)
    try:
        opened = open_folder(path)
    except MismatchError as error:
        return VerifyResult((Check("files", False, None, str(error)),))
    with (
        scratch_folder("full") as scratch,
        whole_source(
            source,
            adapter=adapter or manifest.source.adapter,
            renamed=True,
            dequantize=GGUF_NAME not in manifest.files,
        ) as source,
    ):
        source = ask_library(source)
        full = _export_full(source, opened, scratch)
        chosen = BUILT_IN if texts is None else (*texts, *HOSTILE)
        context = Context(opened, source, _stored_vocab(source, manifest.task), full, chosen)
        result = VerifyResult(tuple(_run(context, progress=progress)))
        if store and "files" not in result.failed:
            _store(context, result)
    return result


def _export_full(source: ModelSource, folder: TrimmedFolder, scratch: Path) -> Path | None:
    manifest = folder.manifest
    if not manifest.graphs:
        return None
    if has_parts(manifest):
        return scratch  # each graph is compared with the one that it was cut from
    scheme = Quantization.from_dict(manifest.quantization) if source.graph is None else None
    made_by = manifest.exporter if source.graph is None else {}
    return export_full(
        source,
        scratch,
        manifest.task,
        manifest.dtype,
        scheme,
        exporter=made_by.get("name", "transformers"),
        device=made_by.get("device", "cpu"),
        layout=manifest.layout,
        calibration=calibration_of(folder),
    ).parent


def _stored_vocab(source: ModelSource, task: str) -> StoredVocab:
    if source.graph is not None:
        return StoredVocab({}, {}, tied=False)
    if is_static(source):
        return stored_static(source)
    config = load_config(source.path)
    classes = (task_class(task, config), architecture_class(config))
    axes = [find_vocab_axes(config, found) for found in classes if found is not None]
    return find_stored_vocab(read_specs(source), axes, source.vocab_size)


def _applicable(context: Context) -> Iterator[NamedCheck]:
    task = context.folder.manifest.task
    if context.folder.manifest.layout != "runtime":
        yield from layout_checks(context)
        if context.folder.manifest.graphs:
            yield SOURCE_CHECK, check_source
        return
    yield "files", check_files
    yield "tokenizer", check_tokenizer
    yield "kept-rows", check_kept_rows if context.source.graph is None else check_retrimmed
    if not context.folder.manifest.graphs:  # a trimmed checkpoint: nothing to run
        return
    yield from quantized_checks(context)
    yield "hidden-states", check_hidden_states
    if has_vocab_head(task):
        yield "kept-logits", check_kept_logits
    if context.folder.has_cold and len(context.folder.vocab.cold_ids):
        yield "cold-slots", check_cold_slots
    if task in ENCODER_TASKS:
        yield "runtime-outputs", check_runtime_outputs
    if task in GENERATOR_TASKS:
        yield "generated-ids", check_generated_ids
    yield SOURCE_CHECK, check_source


def _run(context: Context, *, progress: bool) -> Iterator[Check]:
    checks = list(_applicable(context))
    with progress_bar(len(checks), "verifying", "check") as bar:
        for name, check in checks:
            yield _outcome(name, check, context)
            if progress:
                bar.update()


def _outcome(name: str, check: Callable[[Context], Check], context: Context) -> Check:
    try:
        return check(context)
    except Exception as error:  # a damaged folder may fail anywhere on its way to the numbers
        ours = isinstance(error, TrimserveError) or type(error).__module__.startswith("onnxruntime")
        if came() or not ours:  # of a signal a library may make any error
            raise
        return Check(name, False, None, str(error).partition("\n")[0])


def _store(context: Context, result: VerifyResult) -> None:
    """Write the result into manifest and card of the folder that was verified, and of no other one.

    Where that cannot be done the folder keeps its old ones, and one line says so: the result is the same.
    """
    folder = context.folder
    entry = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), **result.to_dict()}
    try:
        with _unreplaced(folder.path):
            if _apart(read_manifest(folder.path)) != _apart(folder.manifest):
                raise MismatchError("another export has replaced it meanwhile")
            update_card(with_verification(folder.manifest, entry), context.source, folder.path)
    except (OSError, TrimserveError) as error:
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        logger.warning("the result could not be recorded in %s: %s", folder.path, why)


@contextlib.contextmanager
def _unreplaced(path: Path) -> Iterator[None]:
    """Let no export of this version replace a folder in the block; where its parent is closed, none can."""
    target = path.resolve()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(claim(target))
        yield


def _apart(manifest: Manifest) -> Manifest:
    """What of a manifest no verification changes."""
    files = {name: entry for name, entry in manifest.files.items() if name != CARD_NAME}
    return dataclasses.replace(manifest, verification=None, files=files)
