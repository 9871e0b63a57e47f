"""Count the tokens of documents, and the documents that hold each token."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Counts
from trimserve.corpus.documents import CUT_CONTEXT, Document
from trimserve.counting.encoding.encoders import Flat, IdEncoder
from trimserve.counting.slice_counts import SliceCounts
from trimserve.interrupts import uninterrupted
from trimserve.process import release_free_memory

# More documents a batch would only hold memory.
_BATCH_TEXTS = 1 << 14
# Slots of 4 bytes that still fit a core's cache; more than documents in a batch.
_SLOT_BITS = 18
_GOLDEN = 0x278DD  # odd, near 2^18 over the golden ratio (Knuth, TAOCP 3, 6.4): neighbours lie far apart
# Between batches the heap keeps some 50 MB of holes; giving them back takes time, so not after each.
_RELEASE_SECONDS = 1.0
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class DocumentCounter:
    """Adds documents up, batch by batch; what it holds is whole after every batch, also after Ctrl-C."""

    def __init__(self, encoder: IdEncoder, rows: int) -> None:
        """Count with an encoder that gives ids below `rows`."""
        self._encoder = encoder
        self._block = SliceCounts.empty(rows)
        self._presence = _Presence(rows)
        self._drop_cuts = newline_is_space(encoder)

    def add_all(self, documents: Iterable[Document], after: Callable[[], None] = lambda: None) -> None:
        """Count documents batch by batch, whole or in parts; the parts of one in order.

        Where the encoder leaves the interpreter free, a batch is encoded while the next one is read.

        Args:
            documents: what to count.
            after: called after each batch.
        """
        found = batches(documents, self._encoder.batch_characters)
        encoded = (
            _ahead(self._encode, found) if self._encoder.beside else (self._encode(batch) for batch in found)
        )
        released = time.monotonic()
        with contextlib.closing(encoded):
            for batch, flat in encoded:
                self.add(batch, flat)
                after()
                if time.monotonic() - released > _RELEASE_SECONDS:
                    release_free_memory()
                    released = time.monotonic()

    def _encode(self, batch: list[Document]) -> tuple[list[Document], Flat]:
        return batch, encode_parts(self._encoder, batch, drop_cuts=self._drop_cuts)

    def add(self, batch: Sequence[Document], flat: Flat) -> None:
        """Count documents by their ids."""
        begins = np.array([document.part == 0 for document in batch])
        outputs = np.repeat([document.output for document in batch], flat.lengths)
        with uninterrupted():
            block, rows = self._block, self._block.counts.size
            block.counts += np.bincount(flat.ids, minlength=rows)
            if outputs.any():
                block.output_counts += np.bincount(flat.ids[outputs], minlength=rows)
            self._presence.add(flat, begins)
            block.texts += int(np.count_nonzero(begins))
            block.characters += sum(len(document.text) for document in batch)

    def finish(self, *, shared: bool = False) -> SliceCounts:
        """The sums; `shared` where all of it was one document, of which there are further parts elsewhere."""
        if shared:
            self._block.open_ids = self._presence.open_ids
        else:
            self._block.document_counts = self._presence.finish()
        return self._block


def _ahead(function: Callable[[_In], _Out], values: Iterable[_In]) -> Generator[_Out]:
    """As `map`, with the next value fetched while a thread works on this one."""
    pool = ThreadPoolExecutor(1)
    try:
        running: Future[_Out] | None = None
        for value in values:
            before, running = running, pool.submit(function, value)
            if before is not None:
                yield before.result()
        if running is not None:
            yield running.result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Documents in lists of about so many characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters or len(batch) == _BATCH_TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def newline_is_space(encoder: IdEncoder) -> bool:
    """Whether the tokenizer takes a newline for the space before the next word, as XLM-R's does."""
    broken, spaced = _split(encoder.encode(["a\nb", "a b"]))
    return np.array_equal(broken, spaced)


def encode_parts(encoder: IdEncoder, documents: Sequence[Document], *, drop_cuts: bool = False) -> Flat:
    """Encode documents; a part behind its context, whose own tokens are then taken off.

    Some tokenizers put a space before the first word of a text, which the middle of a document does not
    have. Where a token spans context and part, as no model's answer can, the part is encoded by itself.

    Args:
        encoder: encodes texts.
        documents: whole or in parts.
        drop_cuts: the tokenizer's newline is a space, which belongs to the word behind it: the newline at
            which a document was cut is left out.
    """
    if drop_cuts:
        documents = [_without_cuts(document) for document in documents]
    flat = encoder.encode([document.context + document.text for document in documents])
    behind = [number for number, document in enumerate(documents) if document.context]
    if not behind:
        return flat
    contexts = list(dict.fromkeys(documents[number].context for number in behind))
    encoded = dict(zip(contexts, _split(encoder.encode(contexts)), strict=True))
    starts = np.cumsum(flat.lengths) - flat.lengths
    keep = np.ones(len(flat.ids), np.bool_)
    lengths = flat.lengths.copy()
    torn = []
    for number in behind:
        context, start = encoded[documents[number].context], int(starts[number])
        if np.array_equal(flat.ids[start : start + len(context)], context):
            keep[start : start + len(context)] = False
            lengths[number] -= len(context)
        else:
            torn.append(number)
    flat = Flat(flat.ids[keep], lengths)
    if not torn:
        return flat
    parts = list(_split(flat))
    alone = _split(encoder.encode([documents[number].text for number in torn]))
    for number, ids in zip(torn, alone, strict=True):
        parts[number] = ids
    return Flat(np.concatenate(parts), np.array([len(part) for part in parts], np.int64))


def _without_cuts(document: Document) -> Document:
    if not document.cut and document.context != CUT_CONTEXT:
        return document
    text = document.text.removesuffix("\n") if document.cut else document.text
    context = "" if document.context == CUT_CONTEXT else document.context
    return document._replace(text=text, context=context)


def _split(flat: Flat) -> list[npt.NDArray[np.integer]]:
    return np.split(flat.ids, np.cumsum(flat.lengths)[:-1])


class _Presence:
    """How many documents hold each id, without a set a document.

    Attributes:
        open_ids: bool (rows,), ids of the last document so far, which the next batch may continue.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._counts = np.zeros(rows, np.int64)
        self._owners = np.empty(1 << _SLOT_BITS, np.int32)
        self.open_ids = np.zeros(rows, np.bool_)

    def add(self, flat: Flat, begins: npt.NDArray[np.bool_]) -> None:
        """Add texts.

        Args:
            flat: their ids.
            begins: bool (n,), whether each begins a document or continues the one before it.
        """
        firsts = np.flatnonzero(begins)
        if firsts.size == 0:
            self.open_ids[flat.ids] = True
            return
        starts = np.append(0, np.cumsum(flat.lengths))
        begin, end = int(starts[firsts[0]]), int(starts[firsts[-1]])
        self.open_ids[flat.ids[:begin]] = True
        self._close()
        ids = flat.ids[begin:end].astype(np.int64)
        documents = np.repeat(np.arange(len(firsts) - 1), np.diff(starts[firsts]))
        self._counts += np.bincount(self._once(ids, documents), minlength=self._rows)
        self.open_ids[flat.ids[end:]] = True

    def _once(self, ids: npt.NDArray[np.int64], documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The ids, each as often as documents hold it, without sorting.

        Each place writes its number into a slot of a hash table, and the last one to do so is the one that
        counts. The table is never cleared, as it is only read where it was just written.
        """
        # Odd, so documents below 2^_SLOT_BITS differ in it, and an id meets itself in one of them only.
        slots = documents * _GOLDEN
        slots += ids
        slots &= (1 << _SLOT_BITS) - 1
        counted = []
        while ids.size:
            places = np.arange(ids.size, dtype=np.int32)
            self._owners[slots] = places
            owners = self._owners.take(slots)
            counted.append(ids.take(np.flatnonzero(owners == places)))
            other = np.flatnonzero(ids.take(owners) != ids)  # two ids in one slot: the loser tries again
            ids, slots = ids.take(other), slots.take(other)
        return np.concatenate([np.empty(0, np.int64), *counted])

    def _close(self) -> None:
        self._counts += self.open_ids
        self.open_ids[:] = False

    def finish(self) -> Counts:
        """The counts, int64 (rows,), when the last document has ended."""
        self._close()
        return self._counts
