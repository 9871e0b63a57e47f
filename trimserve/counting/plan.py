"""How a corpus is counted: by which workers, which shard of it, and the sample that is tried first."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trimserve.corpus.documents import Document, Faults, Reading
from trimserve.corpus.reader import SliceReader
from trimserve.corpus.slices import Slice
from trimserve.errors import UsageError

Where = Literal["local", "ray"]
SAMPLE_CHARACTERS = 1 << 18
_SAMPLE_SHARE = 256
_SAMPLE_LEAST = 1 << 14
_SAMPLE_PLACES = 16


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

    engine: Where = "local"
    workers: int | None = None
    shard: Shard | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("local", "ray"):
            raise UsageError(f"the engine should be local or ray but is {self.engine!r}.")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers should be at least 1 but is {self.workers}.")
