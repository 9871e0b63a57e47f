"""Count the tokens of a corpus with a model's own tokenizer."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
from tokenizers import Tokenizer

from trimserve.arguments import Threads, checked
from trimserve.arrays import Counts, Ids
from trimserve.console import progress as progress_bar
from trimserve.corpus.corpus import Corpus
from trimserve.corpus.documents import MAX_LINE, Reading, Unit
from trimserve.counting.count import Interrupted, Tally, count_corpus
from trimserve.counting.encoding.encoders import limited_threads
from trimserve.counting.plan import How, Shard, Where
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.model.resolve import resolve_model
from trimserve.model.source import ModelSource
from trimserve.model.structural import structural_ids
from trimserve.process import release_free_memory
from trimserve.profiles.profile import Profile
from trimserve.text.chat import ChatTemplate
from trimserve.text.tokenizer import newline_ids, tokenizer_border

log = logging.getLogger(__name__)


class ProfileOptions(TypedDict, total=False):
    """Options of `profile`."""

    texts: Iterable[str] | None
    text_column: str | None
    output_column: str | None
    chat: bool
    unit: Unit
    skip_bad: bool
    max_line: int
    workers: Threads | None
    engine: Where
    shard: str | None
    resume: Profile | None
    progress: bool


class ProfileInterrupted(KeyboardInterrupt):
    """Ctrl-C while counting; `partial` is a valid profile of what was counted before."""

    def __init__(self, partial: Profile) -> None:
        super().__init__()
        self.partial = partial


@checked
def profile(
    corpus: Sequence[str | Path] | str | Path,
    model: str | Path | ModelSource,
    **options: Unpack[ProfileOptions],
) -> Profile:
    """Count the tokens that a model's own tokenizer makes of a corpus.

    Each document is encoded whole, with its newlines and with the tokens that serving adds around a
    text (such as [CLS] and [SEP]), never truncated.

    Args:
        corpus: files, folders, globs, ``hf://`` datasets, "-" for stdin; see `Corpus`.
        model: a folder or hub id with a tokenizer.
        **options: all of them optional:

            - texts: documents to count besides the files, or instead (with an empty `corpus`).
            - text_column: field of a row that holds its text, dots between the names of nested fields.
            - output_column: field of the completion, which is counted in `output_counts` too.
            - chat: rows hold messages (in `text_column`, by default "messages"), which go through the
              model's chat template; what the assistant says is counted in `output_counts` too.
            - unit: "document" (default), "line" or "paragraph".
            - skip_bad: count and leave out bad rows and bytes instead of refusing them.
            - max_line: the longest line, row or cell that is read, 64 Mi characters by default; so that no
              file takes all the memory.
            - workers: cores to use; all by default. The tokenizer's threads can only be limited before
              anything else in the process tokenises.
            - engine: "local" (default) or "ray".
            - shard: "i/n", from "1/n": count this part of the corpus; `merge` puts the parts together.
            - resume: an unfinished profile of the same corpus and options, to go on with.
            - progress: show a bar on stderr if it is a terminal (default True).

    Raises:
        UsageError: an empty corpus, unreadable text, no tokenizer, or options that do not go together.
        MissingExtraError: a format or an engine needs a package that is not installed.
        ProfileInterrupted: Ctrl-C, when something was counted already.
    """
    files = [corpus] if isinstance(corpus, str | Path) else corpus
    shard, resume, workers = options.get("shard"), options.get("resume"), options.get("workers")
    how = How(options.get("engine", "local"), workers, Shard.parse(shard) if shard else None)
    source = resolve_model(model, weights=False)
    read = Corpus(
        [str(file) for file in files], texts=options.get("texts"), reading=reading_of(source, options)
    )
    read.check_first_rows()
    before = None if resume is None else _tally_of(resume, source)
    with limited_threads(workers):
        tokenizer, content = source.tokenizer(), source.effective.content
        if tokenizer.encode_special_tokens:
            raise UnsupportedModelError(
                f"{source.name} splits special tokens that stand in a text (split_special_tokens), and "
                "profiling counts them whole: profile a copy of its tokenizer files without that setting."
            )
        structural = structural_ids(source, tokenizer)
        release_free_memory()  # of parsing the tokenizer, more than counting takes
        with progress_bar(read.total_bytes, "profiling", "B", show=options.get("progress", True)) as bar:
            try:
                tally = count_corpus(
                    read, tokenizer, content, source.vocab_size, how, before=before, on_bytes=bar.update
                )
            except Interrupted as stop:
                raise ProfileInterrupted(_profile_of(stop.tally, source, structural)) from None
    _warn_without_newlines(tally.counts, tokenizer)
    _warn_without_completions(tally, chat=bool(options.get("chat")))
    return _profile_of(tally, source, structural)


def reading_of(source: ModelSource, options: ProfileOptions) -> Reading:
    """How `profile` reads rows with these options; `chat` takes the model's chat template.

    Raises:
        UsageError: the model has no chat template, or the options do not go together.
    """
    return Reading(
        text_column=options.get("text_column"),
        output_column=options.get("output_column"),
        template=ChatTemplate.of(source) if options.get("chat") else None,
        unit=options.get("unit", "document"),
        skip_bad=options.get("skip_bad", False),
        max_line=options.get("max_line", MAX_LINE),
    )


def _profile_of(tally: Tally, source: ModelSource, structural: Ids) -> Profile:
    facts = {entry.name: getattr(tally, entry.name) for entry in fields(tally) if entry.name != "state"}
    return Profile(
        **facts,
        unfinished=tally.state,
        tokenizer_sha256=source.tokenizer_sha256,
        tokenizer_name=source.name,
        structural=structural,
        linear_widths=tuple(sorted(source.linear_widths())),
        row_bytes=source.row_bytes(),
    )


def _tally_of(partial: Profile, source: ModelSource) -> Tally:
    if partial.unfinished is None or partial.document_counts is None:
        raise UsageError("the profile to resume is complete: there is nothing left to count.")
    if not source.has_tokenizer(partial.tokenizer_sha256):
        raise MismatchError(
            f"the profile to resume counts the ids of {partial.tokenizer_name}, another tokenizer than that "
            f"of {source.name}: resume it with its own model."
        )
    facts = {entry.name: getattr(partial, entry.name) for entry in fields(Tally) if entry.name != "state"}
    return Tally(**facts, state=partial.unfinished)


@tokenizer_border
def _warn_without_newlines(counts: Counts, tokenizer: Tokenizer) -> None:
    newlines = np.array([id_ for id_ in newline_ids(tokenizer) if id_ < counts.size], np.int64)
    if newlines.size and not counts[newlines].any():
        log.warning(
            "no newline token was counted: if the corpus was split into lines, profile whole documents "
            "instead, or line breaks will be cold."
        )


def _warn_without_completions(tally: Tally, *, chat: bool) -> None:
    if tally.output_counts is not None and not tally.output_counts.any():
        what = "no message of an assistant" if chat else "no text in the output column"
        log.warning(
            "no token of a completion was counted in %d texts: the corpus has %s, so the profile is one of "
            "prompts alone.",
            tally.texts,
            what,
        )
