"""Tokenise documents in batches and count the ids."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.corpus import MAX_CHARACTERS, Document
from trimserve.errors import UsageError
from trimserve.vocab import Ids

Counts = npt.NDArray[np.int64]
_BATCH_TEXTS = 1 << 14


@dataclass(frozen=True, slots=True)
class Tally:
    """What was counted.

    Attributes:
        counts: int64 (V,), occurrences of each token id.
        beyond_rows: occurrences of ids >= V.
        texts: number of documents.
        characters: number of characters in them.
        padding_ids: int32, increasing: rows below V that no token of the tokenizer names.
    """

    counts: Counts
    beyond_rows: int
    texts: int
    characters: int
    padding_ids: Ids


def count_tokens(
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    vocab_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Tally:
    """Count the tokens of documents, with those that serving adds around each text.

    Args:
        tokenizer: with padding and truncation off.
        documents: whole or in parts, the parts of one in order.
        vocab_size: V, rows of the model's embedding.
        on_batch: called after each batch.
    """
    named = np.fromiter(tokenizer.get_vocab(with_added_tokens=True).values(), np.int64)
    size = max(vocab_size, int(named.max(initial=-1)) + 1)
    counts = np.zeros(size, np.int64)
    texts = parts = characters = 0
    for batch in _batches(documents):
        # A part is encoded behind the newline it was cut at: some tokenizers put a space before the
        # first word of a text, which the middle of a document does not have.
        pieces = ["\n" + document.text if document.part else document.text for document in batch]
        counts += _count(tokenizer, pieces, size)
        parts += sum(document.part > 0 for document in batch)
        texts += sum(document.part == 0 for document in batch)
        characters += sum(len(document.text) for document in batch)
        on_batch()
    counts -= parts * _count(tokenizer, ["\n"], size)
    counts += texts * np.bincount(np.array(tokenizer.encode("").ids, np.int64), minlength=size)
    unnamed = np.ones(size, np.bool_)
    unnamed[named] = False
    padding_ids = np.flatnonzero(unnamed[:vocab_size]).astype(np.int32)
    beyond_rows = int(counts[vocab_size:].sum())
    return Tally(counts[:vocab_size].copy(), beyond_rows, texts, characters, padding_ids)


def _count(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> Counts:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = itertools.chain.from_iterable(encoding.ids for encoding in encodings)
    return np.bincount(np.fromiter(ids, np.int64), minlength=size)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    # Two parts a core keep every core busy; more would only hold memory.
    enough = 2 * MAX_CHARACTERS * max(4, os.cpu_count() or 1)
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= enough or len(batch) == _BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def limit_threads(workers: int) -> None:
    """Let the tokenizer use this many threads, if nothing was tokenised in this process before.

    Raises:
        UsageError: less than one.
    """
    if workers < 1:
        raise UsageError(f"workers should be at least 1 but is {workers}.")
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers == 1 else "true"
