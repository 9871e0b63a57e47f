"""Count the tokens of a corpus: Profile, its coverage, and how much is still unseen."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.artefacts import load_artefact, save_artefact, sha256_file
from trimserve.chat import ChatTemplate
from trimserve.corpus import Corpus, CorpusSource, Reading, Unit
from trimserve.counting import Counts, Engine, How, Interrupted, Shard, Tally, count_corpus, limit_threads
from trimserve.errors import MismatchError, UsageError
from trimserve.estimates import guaranteed_bound, likely_bound
from trimserve.report import progress as progress_bar
from trimserve.source import ModelSource, resolve_model
from trimserve.structural import newline_ids, structural_ids
from trimserve.vocab import Ids

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Profile:
    """How often each token id occurs in a corpus.

    Attributes:
        counts: int64 (V,), occurrences of each token id.
        tokenizer_sha256: hash of the tokenizer.json that made the ids.
        tokenizer_name: the model's path or hub id.
        texts: number of documents.
        characters: number of characters in them.
        beyond_rows: occurrences of ids >= V, which the model has no row for; not in `counts`.
        sources: the files that were read.
        structural: int32, ids that are never dropped.
        padding_ids: int32, rows below V that no token of the tokenizer names.
        linear_widths: widths of the model's linear layers.
        row_bytes: bytes of one id's rows as stored in the checkpoint; 0 if unknown.
        shares: float64 (V,), probability of each id in a weighted merge; None means counts / tokens.
        effective_tokens: number of equally weighted tokens that a weighted merge is worth.
        output_counts: int64 (V,), those of `counts` that stand in completions; None where prompts and
            completions were not told apart.
        document_counts: int64 (V,), number of documents that hold each id; None in older files.
        skipped: bad rows and bytes of the corpus that were left out, by kind.
        unfinished: what it takes to go on counting (JSON), if counting was interrupted; else None.
    """

    counts: Counts
    tokenizer_sha256: str
    tokenizer_name: str
    texts: int
    characters: int
    beyond_rows: int
    sources: tuple[CorpusSource, ...]
    structural: Ids
    padding_ids: Ids
    linear_widths: tuple[int, ...] = ()
    row_bytes: int = 0
    shares: npt.NDArray[np.float64] | None = None
    effective_tokens: float = 0.0
    output_counts: Counts | None = None
    document_counts: Counts | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    unfinished: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_arrays(self)
        for name in (*_ARRAYS, *_OPTIONAL_ARRAYS):
            if (array := getattr(self, name)) is not None:
                locked = array.view()  # the caller's own array stays writable
                locked.setflags(write=False)
                object.__setattr__(self, name, locked)
        if self.effective_tokens == 0.0:
            object.__setattr__(self, "effective_tokens", float(self.tokens))

    @property
    def vocab_size(self) -> int:
        """V, rows of the model's embedding."""
        return int(self.counts.size)

    @property
    def tokens(self) -> int:
        """Number of counted token occurrences."""
        return int(self.counts.sum())

    @property
    def distinct(self) -> int:
        """Number of different ids that occur."""
        return int(np.count_nonzero(self.counts))

    @property
    def mass(self) -> npt.NDArray[np.float64]:
        """Estimated probability of each id, float64 (V,): its share of the (weighted) occurrences."""
        return self.shares if self.shares is not None else self.counts / max(self.tokens, 1)

    def coverage(self, kept_ids: npt.ArrayLike) -> float:
        """Share of the profile's token occurrences whose id is kept, weighted if the profile is.

        Args:
            kept_ids: distinct token ids, int, any order.
        """
        ids = np.asarray(kept_ids, np.int64)
        if self.shares is not None:
            return min(1.0, float(self.shares[ids].sum()))
        return int(self.counts[ids].sum()) / max(self.tokens, 1)

    @property
    def missing_mass(self) -> float:
        """Estimated share of future tokens whose id is not in the profile.

        The Good-Turing estimate N1 / N: the share of occurrences whose id occurs once. In a weighted
        merge each such occurrence counts with its own weight (law of total probability over the parts).

        Source: I. J. Good, The population frequencies of species, Biometrika 40 (1953), 237-264,
        https://doi.org/10.1093/biomet/40.3-4.237
        """
        return float(self.mass[self.counts == 1].sum())

    @property
    def missing_mass_bound(self) -> float:
        """Upper bound of the missing mass at `CONFIDENCE`, whatever the distribution of independent draws.

        Tokens of a text are not independent, so another domain or genre can exceed it. See
        `estimates.guaranteed_bound`.
        """
        return guaranteed_bound(self.missing_mass, self.effective_tokens)

    @property
    def missing_mass_likely(self) -> float:
        """Upper bound of the missing mass at `CONFIDENCE`, by its normal limit: `estimates.likely_bound`."""
        once, twice = self.mass[self.counts == 1], self.mass[self.counts == 2]
        return likely_bound(once, twice, self.effective_tokens)

    @property
    def document_missing_mass(self) -> float | None:
        """Estimated share of a further document's tokens whose id is not in the profile.

        Each document is held back in turn: the tokens that no other document holds, over all tokens. Words
        come in bursts, so it exceeds `missing_mass`, which takes tokens for independent. None where the
        documents of each id were not counted, or there is one document alone.
        """
        if self.document_counts is None or self.texts < 2:
            return None
        return float(self.mass[self.document_counts == 1].sum())

    def save(self, path: str | Path) -> None:
        """Write the profile as one safetensors file, atomically."""
        arrays: dict[str, npt.NDArray[Any]] = {name: getattr(self, name) for name in _ARRAYS}
        optional = {name: getattr(self, name) for name in _OPTIONAL_ARRAYS}
        arrays |= {name: array for name, array in optional.items() if array is not None}
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        facts["sources"] = [[source.name, source.sha256, source.bytes] for source in self.sources]
        save_artefact(Path(path), "profile", arrays, facts | {"tokens": self.tokens})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile.

        Raises:
            UsageError: there is no such file.
            MismatchError: it is no profile, or damaged.
        """
        arrays, facts = load_artefact(Path(path), "profile")
        try:
            tokens = facts.pop("tokens")
            facts["sources"] = tuple(CorpusSource(*source) for source in facts["sources"])
            facts["linear_widths"] = tuple(facts["linear_widths"])
            values: dict[str, Any] = arrays | facts
            loaded = cls(**values)
        except (KeyError, TypeError) as error:
            raise MismatchError(f"{path} is damaged ({error}): make the profile again.") from error
        if loaded.tokens != tokens:
            raise MismatchError(
                f"{path} should count {tokens:,} tokens but counts {loaded.tokens:,}: make the profile again."
            )
        return loaded


def _check_arrays(profile: Profile) -> None:
    counts, size = profile.counts, profile.counts.size
    whole = counts.ndim == 1 and counts.dtype == np.int64 and counts.min(initial=0) >= 0
    ids = np.concatenate([profile.structural, profile.padding_ids])
    inside = ids.min(initial=0) >= 0 and ids.max(initial=-1) < size
    optional = [getattr(profile, name) for name in _OPTIONAL_ARRAYS]
    fits = all(array is None or array.shape == counts.shape for array in optional)
    parts = [profile.output_counts, profile.document_counts]  # neither can exceed the occurrences
    within = fits and all(part is None or bool(np.all((part >= 0) & (part <= counts))) for part in parts)
    if not (whole and inside and fits and within):
        raise MismatchError(
            f"a profile needs int64 counts of at least 0 and ids below their number: found {counts.dtype} "
            f"counts of shape {counts.shape} and ids up to {ids.max(initial=-1):,}. Make the profile again."
        )


_ARRAYS = ("counts", "structural", "padding_ids")
_OPTIONAL_ARRAYS = ("shares", "output_counts", "document_counts")
_FACTS = (
    "tokenizer_sha256",
    "tokenizer_name",
    "texts",
    "characters",
    "beyond_rows",
    "linear_widths",
    "row_bytes",
    "effective_tokens",
    "skipped",
    "unfinished",
)


class ProfileOptions(TypedDict, total=False):
    """Options of `profile`."""

    texts: Iterable[str]
    text_column: str
    output_column: str
    chat: bool
    unit: Unit
    skip_bad: bool
    workers: int
    engine: Engine
    shard: str
    resume: Profile
    progress: bool


class ProfileInterrupted(KeyboardInterrupt):
    """Ctrl-C while counting; `partial` is a valid profile of what was counted before."""

    def __init__(self, partial: Profile) -> None:
        super().__init__()
        self.partial = partial


def profile(
    corpus: Sequence[str | Path] | str | Path,
    model: str | Path | ModelSource,
    **options: Unpack[ProfileOptions],
) -> Profile:
    """Count the tokens that a model's own tokenizer makes of a corpus.

    Each document is encoded whole, with its newlines and with the tokens that serving adds around a
    text (such as [CLS] and [SEP]), never truncated.

    Args:
        corpus: files, folders, globs, ``hf://`` datasets, "-" for stdin; see `trimserve.corpus.Corpus`.
        model: a folder or hub id with a tokenizer.json.
        **options: all of them optional:

            - texts: documents to count besides the files, or instead (with an empty `corpus`).
            - text_column: field of a row that holds its text, dots between the names of nested fields.
            - output_column: field of the completion, which is counted in `output_counts` too.
            - chat: rows hold messages (in `text_column`, by default "messages"), which go through the
              model's chat template; what the assistant says is counted in `output_counts` too.
            - unit: "document" (default), "line" or "paragraph".
            - skip_bad: count and leave out bad rows and bytes instead of refusing them.
            - workers: cores to use; all by default. The tokenizer's threads can only be limited before
              anything else in the process tokenises.
            - engine: "local" (default) or "ray".
            - shard: "i/n", from "1/n": count this part of the corpus; `merge` puts the parts together.
            - resume: an unfinished profile of the same corpus and options, to go on with.
            - progress: show a bar on stderr if it is a terminal (default True).

    Raises:
        UsageError: an empty corpus, unreadable text, no tokenizer.json, or options that do not go together.
        MissingExtraError: a format or an engine needs a package that is not installed.
        ProfileInterrupted: Ctrl-C, when something was counted already.
    """
    files = [corpus] if isinstance(corpus, str | Path) else corpus
    shard, resume, workers = options.get("shard"), options.get("resume"), options.get("workers")
    how = How(options.get("engine", "local"), workers, Shard.parse(shard) if shard else None)
    source = resolve_model(model, weights=False)
    read = Corpus(
        [str(file) for file in files], texts=options.get("texts"), reading=_reading(source, options)
    )
    before = None if resume is None else _tally_of(resume, source)
    if workers is not None:
        limit_threads(workers)
    tokenizer, content = source.tokenizer(), source.tokenizer_path.read_text("utf-8")
    with progress_bar(read.total_bytes, "profiling", "B", show=options.get("progress", True)) as bar:
        try:
            tally = count_corpus(
                read, tokenizer, content, source.vocab_size, how, before=before, on_bytes=bar.update
            )
        except Interrupted as stop:
            raise ProfileInterrupted(_profile_of(stop.tally, source, tokenizer)) from None
    _warn_without_newlines(tally.counts, tokenizer)
    return _profile_of(tally, source, tokenizer)


def _reading(source: ModelSource, options: ProfileOptions) -> Reading:
    return Reading(
        text_column=options.get("text_column"),
        output_column=options.get("output_column"),
        template=ChatTemplate.of_model(source) if options.get("chat") else None,
        unit=options.get("unit", "document"),
        skip_bad=options.get("skip_bad", False),
    )


def _profile_of(tally: Tally, source: ModelSource, tokenizer: Tokenizer) -> Profile:
    facts = {entry.name: getattr(tally, entry.name) for entry in fields(tally) if entry.name != "state"}
    return Profile(
        **facts,
        unfinished=tally.state,
        tokenizer_sha256=sha256_file(source.tokenizer_path),
        tokenizer_name=source.name,
        structural=structural_ids(source, tokenizer),
        linear_widths=tuple(sorted(source.linear_widths())),
        row_bytes=source.row_bytes(),
    )


def _tally_of(partial: Profile, source: ModelSource) -> Tally:
    if partial.unfinished is None or partial.document_counts is None:
        raise UsageError("the profile to resume is complete: there is nothing left to count.")
    if partial.tokenizer_sha256 != sha256_file(source.tokenizer_path):
        raise MismatchError(
            f"the profile to resume counts the ids of {partial.tokenizer_name}, another tokenizer than that "
            f"of {source.name}: resume it with its own model."
        )
    facts = {entry.name: getattr(partial, entry.name) for entry in fields(Tally) if entry.name != "state"}
    return Tally(**facts, state=partial.unfinished)


def _warn_without_newlines(counts: Counts, tokenizer: Tokenizer) -> None:
    newlines = np.array([id_ for id_ in newline_ids(tokenizer) if id_ < counts.size], np.int64)
    if newlines.size and not counts[newlines].any():
        log.warning(
            "no newline token was counted: if the corpus was split into lines, profile whole documents "
            "instead, or line breaks will be cold."
        )
