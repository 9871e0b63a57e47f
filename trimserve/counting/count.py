"""Count the tokens of a corpus: encoders, counters, and the engines that run them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trimserve.arrays import Counts, Ids
from trimserve.corpus.corpus import Corpus
from trimserve.corpus.files import CorpusSource
from trimserve.counting.engine import CorpusCounter
from trimserve.counting.plan import How
from trimserve.counting.slice_counts import OnBytes, ignore
from trimserve.text.tokenizer import tokenizer_border


@dataclass(frozen=True, slots=True)
class Tally:
    """What was counted, with the tokens that serving adds around each text.

    Attributes:
        counts: int64 (V,), occurrences of each token id.
        output_counts: int64 (V,), those in completions; None where they are not told apart.
        document_counts: int64 (V,), documents that hold each id.
        beyond_rows: occurrences of ids >= V.
        texts: number of documents.
        characters: number of characters in them.
        padding_ids: int32, increasing: rows below V that no token of the tokenizer names.
        sources: what was read.
        skipped: bad rows and bytes that were left out, by kind.
        state: what it takes to go on counting (JSON); None when all is counted.
    """

    counts: Counts
    output_counts: Counts | None
    document_counts: Counts
    beyond_rows: int
    texts: int
    characters: int
    padding_ids: Ids
    sources: tuple[CorpusSource, ...]
    skipped: Mapping[str, int]
    state: Mapping[str, Any] | None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while counting; `tally` holds what was counted before."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally


@tokenizer_border
def count_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    tokenizer_json: bytes,
    vocab_size: int,
    how: How,
    *,
    before: Tally | None = None,
    on_bytes: OnBytes = ignore,
) -> Tally:
    """Count the tokens of a corpus, with those that serving adds around each text.

    Args:
        corpus: what to read.
        tokenizer: with padding and truncation off.
        tokenizer_json: the content of its file, for other processes and libraries; bytes, as a str of it
            takes up to four times as much memory.
        vocab_size: V, rows of the model's embedding.
        how: engine, workers, shard.
        before: an interrupted count of the same corpus, to go on with.
        on_bytes: called with the number of further bytes that were read.

    Raises:
        Interrupted: Ctrl-C, when something was counted already.
        TrimserveError: what cannot be read; or no text at all.
    """
    finish = _Finish(tokenizer, vocab_size, corpus)
    counter = CorpusCounter(corpus, tokenizer, tokenizer_json, finish.rows, how)
    if before is not None:
        finish.take_up(counter, before)
    try:
        counter.count(on_bytes)
    except KeyboardInterrupt:
        if counter.sums.total.characters == 0:
            raise
        raise Interrupted(finish.tally(counter, state=counter.sums.state())) from None
    return finish.tally(counter, state=None)


class _Finish:
    """Between sums over all the tokenizer's ids and a tally over the model's rows."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, corpus: Corpus) -> None:
        self._vocab_size = vocab_size
        self._apart = corpus.options.apart
        named = np.fromiter(tokenizer.get_vocab(with_added_tokens=True).values(), np.int64)
        self.rows = max(vocab_size, int(named.max(initial=-1)) + 1)
        unnamed = np.ones(self.rows, np.bool_)
        unnamed[named] = False
        self._padding_ids = np.flatnonzero(unnamed[:vocab_size]).astype(np.int32)
        # A chat template writes the special tokens itself.
        frame = [] if corpus.options.template is not None else tokenizer.encode("").ids
        self._frame = np.bincount(np.array(frame, np.int64), minlength=self.rows)

    def take_up(self, counter: CorpusCounter, before: Tally) -> None:
        """Enter an earlier count into the sums of a counter."""
        sums, total = counter.sums, counter.sums.total
        sums.restore(before.state or {}, "the profile")
        size = self._vocab_size
        total.counts[:size] = before.counts - before.texts * self._frame[:size]
        total.document_counts[:size] += before.document_counts
        if before.output_counts is not None:
            total.output_counts[:size] = before.output_counts
        total.texts, total.characters = before.texts, before.characters
        total.skipped.update(before.skipped)
        sums.sources += before.sources
        sums.beyond_rows = before.beyond_rows - before.texts * int(self._frame[size:].sum())

    def tally(self, counter: CorpusCounter, state: Mapping[str, Any] | None) -> Tally:
        """Add the tokens around each text, and part ids with a row from those without."""
        sums, total, size = counter.sums, counter.sums.total, self._vocab_size
        counts = total.counts + total.texts * self._frame
        document_counts = sums.document_counts()
        document_counts[self._frame > 0] = total.texts
        return Tally(
            counts=counts[:size].copy(),
            output_counts=total.output_counts[:size].copy() if self._apart else None,
            document_counts=document_counts[:size].copy(),
            beyond_rows=int(counts[size:].sum()) + sums.beyond_rows,
            texts=total.texts,
            characters=total.characters,
            padding_ids=self._padding_ids,
            sources=tuple(sums.sources),
            skipped=dict(total.skipped),
            state=state,
        )
