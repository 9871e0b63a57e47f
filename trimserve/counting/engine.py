"""Count a corpus: choose an encoder on a sample of it, run the slices, keep what is done when interrupted."""

import contextlib
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tokenizers import Tokenizer

from trimserve.corpus.corpus import Corpus
from trimserve.corpus.documents import Document
from trimserve.corpus.files import CorpusFile, CorpusSource, check_unchanged
from trimserve.counting.documents import DocumentCounter
from trimserve.counting.encoding.choosing import choose_encoder
from trimserve.counting.encoding.encoders import IdEncoder
from trimserve.counting.plan import (
    _SAMPLE_LEAST,
    _SAMPLE_SHARE,
    SAMPLE_CHARACTERS,
    How,
    cut_texts,
    head,
    sample_texts,
)
from trimserve.counting.slice_counts import OnBytes, SliceCounts
from trimserve.counting.sums import Sums, plan_hash
from trimserve.counting.workers.job import Job
from trimserve.counting.workers.processes import count_local
from trimserve.errors import UsageError
from trimserve.interrupts import uninterrupted

log = logging.getLogger(__name__)
_HASH_BLOCK = 1 << 22


class CorpusCounter:
    """Counts a corpus into `sums`, which hold what was done also when it is interrupted.

    Attributes:
        slices: what is to be counted of the files.
        sums: what was counted.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, tokenizer_json: bytes, rows: int, how: How
    ) -> None:
        """Plan the count.

        Raises:
            UsageError: a stream that is to be counted in shards.
        """
        if how.shard is not None and corpus.streams:
            raise UsageError(
                "stdin and texts from memory cannot be shared out: name files, or leave --shard out."
            )
        self._corpus, self._tokenizer, self._how = corpus, tokenizer, how
        self._tokenizer_json = tokenizer_json
        planned = corpus.slices()
        self.slices = planned if how.shard is None else how.shard.choose(planned)
        self.sums = Sums(
            plan_hash(self.slices, corpus.options), SliceCounts.empty(rows), sharded=how.shard is not None
        )

    def count(self, on_bytes: OnBytes) -> None:
        """Count what is not in the sums yet.

        Args:
            on_bytes: called with the number of further bytes that were read.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            TrimserveError: what cannot be read; or no text at all.
        """
        corpus, sums = self._corpus, self.sums
        on_bytes(sum(self.slices[number].bytes for number in sums.done))
        stream = corpus.stream_documents()
        first = list(head(stream, SAMPLE_CHARACTERS)) if corpus.streams else []
        encoder = self._choose_encoder(first)
        job = Job(self._tokenizer_json, encoder.name, sums.total.counts.size, corpus.options)
        with contextlib.closing(SourceHashes(self._hashed_apart())) as hashes:
            self._count_slices(job, encoder, on_bytes)
            sums.sources += hashes.sources()
        for file in dict.fromkeys(piece.file for piece in self.slices):
            check_unchanged(file)
        if corpus.streams:
            self._count_stream(encoder, itertools.chain(first, stream), on_bytes)
        if not sums.total.characters and self.slices_are_all:
            raise corpus.no_text()

    @property
    def slices_are_all(self) -> bool:
        """Whether the corpus is not shared out: a shard may hold nothing."""
        return self._how.shard is None

    def _choose_encoder(self, first: Sequence[Document]) -> IdEncoder:
        """Choose on beginnings of the slices and on the first texts of a stream."""
        streamed = sum(len(document.text) for document in first)
        total = sum(piece.bytes for piece in self.slices) + streamed
        if streamed >= SAMPLE_CHARACTERS:
            total = 1 << 62  # a stream may be of any length
        size = min(SAMPLE_CHARACTERS, max(total // _SAMPLE_SHARE, _SAMPLE_LEAST))
        sample = sample_texts(self.slices, self._corpus.options, size)
        sample += cut_texts(first, size)
        encoder = choose_encoder(self._tokenizer, self._tokenizer_json, sample, total)
        log.info("engine %s", encoder.name)
        return encoder

    def _hashed_apart(self) -> list[CorpusFile]:
        """Files that no slice reads from the beginning to the end; a shard names its slices instead."""
        parts = [piece.file for piece in self.slices if not piece.whole or piece.file.format == "parquet"]
        return list(dict.fromkeys(parts)) if self.slices_are_all else []

    def _count_slices(self, job: Job, encoder: IdEncoder, on_bytes: OnBytes) -> None:
        numbers = [number for number in range(len(self.slices)) if number not in self.sums.done]
        waiting = [self.slices[number] for number in numbers]
        if self._how.engine == "ray":
            from trimserve.counting.workers.ray import count_ray

            blocks = count_ray(job, waiting, self._how.workers, on_bytes)
        else:
            blocks = count_local(job, encoder, waiting, self._how.workers or os.cpu_count() or 1, on_bytes)
        with contextlib.closing(blocks):
            for index, block in blocks:
                with uninterrupted():
                    self.sums.add(numbers[index], waiting[index], block)

    def _count_stream(self, encoder: IdEncoder, documents: Iterable[Document], on_bytes: OnBytes) -> None:
        corpus, sums = self._corpus, self.sums
        counter = DocumentCounter(encoder, sums.total.counts.size)
        before = 0

        def further() -> None:
            nonlocal before
            on_bytes(corpus.bytes_read - before)
            before = corpus.bytes_read

        try:
            counter.add_all(documents, further)
        finally:
            with uninterrupted():
                block = counter.finish()
                block.skipped = corpus.faults.found
                sums.total.add(block)
                sums.sources += corpus.sources


class SourceHashes:
    """Hashes of files that are read in several slices or out of order, taken beside the counting."""

    def __init__(self, files: Sequence[CorpusFile]) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._hashes: list[tuple[CorpusFile, Future[str]]] = [
            (file, self._pool.submit(self._hash, file.path)) for file in files
        ]

    def _hash(self, path: str) -> str:
        digest = hashlib.sha256()
        with Path(path).open("rb") as file:
            while not self._stop.is_set() and (block := file.read(_HASH_BLOCK)):
                digest.update(block)
        return digest.hexdigest()

    def sources(self) -> list[CorpusSource]:
        """Wait for all of them."""
        return [CorpusSource(file.name, future.result(), file.bytes) for file, future in self._hashes]

    def close(self) -> None:
        """Give up what is not done."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
