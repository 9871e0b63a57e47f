"""Count a corpus: choose an encoder on a sample of it, run the slices, keep what is done when interrupted."""

import contextlib
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from trimserve.corpus import Corpus, CorpusFile, CorpusSource, Document, Faults, Reading, Slice
from trimserve.corpus.reader import SliceReader
from trimserve.counting.blocks import Block
from trimserve.counting.choosing import choose_encoder
from trimserve.counting.counter import DocumentCounter, uninterrupted
from trimserve.counting.encoders import Encoder
from trimserve.counting.job import Job
from trimserve.counting.local import count_local
from trimserve.counting.sums import Sums, plan_hash
from trimserve.errors import UsageError

log = logging.getLogger(__name__)

Engine = Literal["local", "ray"]
SAMPLE_CHARACTERS = 1 << 18
_SAMPLE_SHARE = 256
_SAMPLE_LEAST = 1 << 14
_SAMPLE_PLACES = 16
_HASH_BLOCK = 1 << 22

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `number` (from 1) of `count` parts of a corpus."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "i/n".

        Raises:
            UsageError: it is not from 1/n to n/n.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UsageError(f"a shard should be from 1/N to N/N but is {text}: for example 3/8.")
        return cls(int(number), int(count))

    def choose(self, slices: Sequence[Slice]) -> list[Slice]:
        """This part's slices; those of one document stay together."""
        groups = [
            list(group)
            for _, group in itertools.groupby(
                enumerate(slices), lambda entry: entry[1].file.name if entry[1].shared else entry[0]
            )
        ]
        return [piece for group in groups[self.number - 1 :: self.count] for _, piece in group]


def sample_texts(slices: Sequence[Slice], reading: Reading, size: int) -> list[str]:
    """Beginnings of slices from all over the corpus, about `size` bytes in all."""
    places = sorted({round(place) for place in np.linspace(0, len(slices) - 1, _SAMPLE_PLACES)})
    texts: list[str] = []
    for number in places if slices else []:
        reader = SliceReader(slices[number], reading, Faults(skip=True))
        share = size // len(places)
        texts += cut_texts(reader.documents(), share)
    return texts


def cut_texts(documents: Iterable[Document], size: int) -> Iterator[str]:
    """The first `size` bytes of documents."""
    for document in documents:
        content = document.text[:size].encode("utf-8", "surrogatepass")
        yield content[:size].decode("utf-8", "ignore")
        size -= len(content)
        if size <= 0:
            return


def head(documents: Iterable[Document], characters: int) -> Iterator[Document]:
    """The first documents that hold so many characters together."""
    for document in documents:
        yield document
        characters -= len(document.text)
        if characters <= 0:
            return


@dataclass(frozen=True, slots=True)
class How:
    """Where a corpus is counted.

    Attributes:
        engine: "local" processes, or a "ray" cluster.
        workers: cores to use; None means all.
        shard: the part of the corpus to count; None means all of it.
    """

    engine: Engine = "local"
    workers: int | None = None
    shard: Shard | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise UsageError(f"the engine should be local or ray but is {self.engine!r}.")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers should be at least 1 but is {self.workers}.")


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
            plan_hash(self.slices, corpus.options), Block.empty(rows), sharded=how.shard is not None
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
        if corpus.streams:
            self._count_stream(encoder, itertools.chain(first, stream), on_bytes)
        if not sums.total.characters and self.slices_are_all:
            raise corpus.no_text()

    @property
    def slices_are_all(self) -> bool:
        """Whether the corpus is not shared out: a shard may hold nothing."""
        return self._how.shard is None

    def _choose_encoder(self, first: Sequence[Document]) -> Encoder:
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

    def _count_slices(self, job: Job, encoder: Encoder, on_bytes: OnBytes) -> None:
        numbers = [number for number in range(len(self.slices)) if number not in self.sums.done]
        waiting = [self.slices[number] for number in numbers]
        if self._how.engine == "ray":
            from trimserve.counting.ray_engine import count_ray

            blocks = count_ray(job, waiting, self._how.workers, on_bytes)
        else:
            blocks = count_local(job, encoder, waiting, self._how.workers or os.cpu_count() or 1, on_bytes)
        with contextlib.closing(blocks):
            for index, block in blocks:
                with uninterrupted():
                    self.sums.add(numbers[index], waiting[index], block)

    def _count_stream(self, encoder: Encoder, documents: Iterable[Document], on_bytes: OnBytes) -> None:
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
