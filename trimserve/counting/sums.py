"""How far a count has come: its sums, and what is needed to go on with it later."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Counts
from trimserve.corpus.documents import Reading
from trimserve.corpus.files import CorpusSource
from trimserve.corpus.slices import Slice
from trimserve.counting.slice_counts import SliceCounts
from trimserve.errors import MismatchError, UsageError
from trimserve.files.hashes import sha256_file


def plan_hash(slices: Sequence[Slice], reading: Reading) -> str:
    """A fingerprint of what is to be counted and how; it changes when a file's length does."""
    plan = [[piece.file.name, piece.file.bytes, piece.start, piece.end] for piece in slices]
    return hashlib.sha256(json.dumps([plan, asdict(reading)], sort_keys=True).encode()).hexdigest()


@dataclass
class Sums:
    """Sums over the slices that are done, and which these are.

    Attributes:
        plan: see `plan_hash`.
        total: the sums; documents that other slices continue are not in its document counts yet.
        done: numbers of the slices that are in it.
        open_ids: file name -> bool (rows,), ids so far of its one document, which several slices hold.
        sources: what was read to its end.
        beyond_rows: occurrences of ids >= V that a resumed profile brought with it.
        sharded: whether files are counted in part only, so that each slice is a source of its own.
    """

    plan: str
    total: SliceCounts
    done: set[int] = field(default_factory=set)
    open_ids: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    sources: list[CorpusSource] = field(default_factory=list)
    beyond_rows: int = 0
    sharded: bool = False

    def add(self, number: int, piece: Slice, block: SliceCounts) -> None:
        """Add the block of a slice."""
        self.total.add(block)
        if block.open_ids is not None:
            known = self.open_ids.setdefault(piece.file.name, np.zeros(block.open_ids.size, np.bool_))
            known |= block.open_ids
        self.done.add(number)
        if piece.whole and block.sha256 is not None:
            self.sources.append(CorpusSource(piece.file.name, block.sha256, piece.file.bytes))
        elif self.sharded:
            self.sources.append(_part(piece, block))

    def document_counts(self) -> Counts:
        """Documents that hold each id, int64 (rows,), with those that are still open."""
        counts: Counts = np.sum([self.total.document_counts, *self.open_ids.values()], axis=0, dtype=np.int64)
        return counts

    def state(self) -> dict[str, Any]:
        """What it takes to go on counting besides the profile, as JSON."""
        return {
            "plan": self.plan,
            "done": sorted(self.done),
            "open_ids": {
                name: base64.b64encode(np.packbits(ids).tobytes()).decode()
                for name, ids in self.open_ids.items()
            },
        }

    def restore(self, state: Mapping[str, Any], name: str) -> None:
        """Take over a state.

        Raises:
            UsageError: it is of another corpus, or of other options.
            MismatchError: it is damaged.
        """
        try:
            if state["plan"] != self.plan:
                raise UsageError(
                    f"{name} is part of a count of other files or with other options: give the same ones, or "
                    "count anew without --resume."
                )
            self.done = {int(number) for number in state["done"]}
            rows = self.total.counts.size
            for file, packed in state["open_ids"].items():
                bits = np.frombuffer(base64.b64decode(packed), np.uint8)
                self.open_ids[file] = np.unpackbits(bits, count=rows).astype(np.bool_)
                self.total.document_counts -= self.open_ids[file]
        except (KeyError, TypeError, AttributeError) as error:
            raise MismatchError(f"{name} is damaged ({error}): count anew without --resume.") from error


def _part(piece: Slice, block: SliceCounts) -> CorpusSource:
    file = piece.file
    if block.sha256 is not None:
        return CorpusSource(f"{file.name}, bytes {piece.start}-{piece.end}", block.sha256, piece.bytes)
    # Row groups have no bytes of their own to hash.
    name = f"{file.name}, row groups {piece.start}-{piece.end}"
    digest = hashlib.sha256(f"{sha256_file(Path(file.path))} {piece.start}-{piece.end}".encode())
    return CorpusSource(name, digest.hexdigest(), piece.bytes)
