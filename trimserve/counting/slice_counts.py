"""What was counted in a stretch of the corpus; blocks add up to what one count of all of it gives."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Counts

OnBytes = Callable[[int], None]


@dataclass
class SliceCounts:
    """Counts of a stretch, without the tokens that serving adds around each text.

    Attributes:
        counts: int64 (rows,), occurrences of each token id; rows >= V covers the tokenizer's ids.
        document_counts: int64 (rows,), documents of the stretch that hold each id.
        output_counts: int64 (rows,), those of `counts` in completions.
        texts: documents that begin in it.
        characters: number of characters.
        skipped: bad rows and bytes that were left out, by kind.
        open_ids: bool (rows,), ids of the one document that the stretch is a part of; None where its
            documents are whole.
        sha256: hash of the stretch's bytes, where they were read in order.
    """

    counts: Counts
    document_counts: Counts
    output_counts: Counts
    texts: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    open_ids: npt.NDArray[np.bool_] | None = None
    sha256: str | None = None

    @classmethod
    def empty(cls, rows: int) -> "SliceCounts":
        """Nothing counted."""
        return cls(np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(rows, np.int64))

    def add(self, other: "SliceCounts") -> None:
        """Add another stretch, whose own document is still open."""
        self.counts += other.counts
        self.document_counts += other.document_counts
        self.output_counts += other.output_counts
        self.texts += other.texts
        self.characters += other.characters
        self.skipped += other.skipped


def ignore(_: int) -> None:
    """Report no progress."""
