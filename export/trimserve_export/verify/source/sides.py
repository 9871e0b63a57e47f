"""Both sides of a comparison with the source, and what is said of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trimserve.arrays import Floats, Ids
from trimserve.loading import load
from trimserve_export.checkpoint.rounding import rounding_bound
from trimserve_export.verify.context import Context
from trimserve_export.verify.plain_run import GraphModel, Model, Seq2SeqModel
from trimserve_export.verify.source.original import Original

# Texts that numbers are compared on, the user's first.
_TEXTS = 32


@dataclass(frozen=True, slots=True)
class Part:
    """One comparison.

    Attributes:
        note: what was compared and what was found, as a clause.
        largest: the largest difference of numbers, if any were compared.
        made: False where it could not be made, which the note says.
    """

    note: str
    largest: float | None = None
    made: bool = True


class Differs(Exception):  # noqa: N818 - no error: it ends a comparison
    """The two sides differ; the message says where.

    Attributes:
        largest: by how much, where that is a number.
    """

    def __init__(self, note: str, largest: float | None = None) -> None:
        super().__init__(note)
        self.largest = largest


@dataclass(frozen=True)  # no slots: the runtime is loaded when the first comparison asks for it
class Sides:
    """The trimmed folder and the original.

    Attributes:
        context: what all checks look at.
        original: the source in its own library.
    """

    context: Context
    original: Original

    @cached_property
    def runtime(self) -> Any:  # noqa: ANN401 - an Encoder or a Generator, by the task
        """The folder behind the public API, as its users have it."""
        return load(self.context.folder.path)

    @property
    def is_runtime(self) -> bool:
        """Whether the folder is one for this runtime."""
        return self.context.folder.manifest.layout == "runtime"

    @property
    def graph(self) -> Model:
        """The folder's graph; for other runtimes' layouts the full one, which they are compared with."""
        return self.context.trimmed if self.is_runtime else self.context.full

    @property
    def columns(self) -> Ids | slice:
        """The original's columns that the graph has."""
        return self.graph.vocab.head.kept_ids if self.graph.has_vocab_head else slice(None)

    @property
    def start_id(self) -> int | None:
        """What an encoder-decoder's decoder begins with."""
        return self.graph.start_id if isinstance(self.graph, Seq2SeqModel) else None

    @cached_property
    def texts(self) -> list[str]:
        """Texts that have tokens, and rows for all of them: without cold rows others are split."""
        return [text for text in self.context.texts if self.can_feed(text)][:_TEXTS]

    def can_feed(self, text: str) -> bool:
        """Whether a text has tokens, and the folder a row for each."""
        ids = self.encode(text)
        return ids is not None and len(ids) > 0 and self.graph.can_feed(ids)

    def encode(self, text: str) -> Ids | None:
        """Token ids of a text, of the original vocab; None where the model has no row for one of them."""
        if self.is_runtime:
            return self.context.encode(text)
        ids = np.array(self.original.token_ids(text), np.int32)
        return ids if ids.max(initial=0) < self.context.folder.vocab.vocab_size else None

    @cached_property
    def sequences(self) -> list[Ids]:
        """Token ids of texts that the graph can be fed, cut to what every model takes."""
        encoded = (self.encode(text) for text in self.texts)
        return [ids[: self.context.max_tokens] for ids in encoded if ids is not None]

    def run(self, ids: Ids) -> Floats:
        """What the folder's graph gives for token ids, with the columns that it has."""
        made = self.graph.run(ids)
        found: Floats = (made["logits"] if "logits" in made else made["last_hidden_state"])[0]
        return found

    @property
    def steps(self) -> GraphModel | None:
        """The graph, if it has a cache and is fed in steps."""
        if not isinstance(self.graph, GraphModel):
            return None
        has_cache = any(name.startswith("present.") and name.endswith(".key") for name in self.graph.outputs)
        return self.graph if has_cache else None


@dataclass(slots=True)
class Numbers:
    """Compares arrays with the original's, and keeps the largest difference and the largest bound."""

    original: Original
    largest: float = 0.0
    bound: float = 0.0
    compared: int = 0

    def add(
        self, expected: Floats, found: Floats, what: str, again: Callable[[], Floats] | None = None
    ) -> None:
        """Compare.

        Args:
            expected: what the original gives.
            found: what the folder gives.
            what: the numbers, for a message.
            again: computes `expected` once more; where the bound does not hold, it is computed with all of
                the model's roundings at its input, and what that changes is within the bound, too. Linear
                attention with random weights amplifies errors several times.

        Raises:
            Differs: the shapes are not equal, or a number lies beyond the bound.
        """
        if expected.shape != found.shape:
            raise Differs(f"{what} have the shape {expected.shape}, found {found.shape}")
        bound = rounding_bound(self.original.model.config, expected)
        difference = float(np.abs(expected.astype(np.float64) - found).max(initial=0.0))
        if not difference <= bound and again is not None:
            with self.original.rounded_input():
                bound = max(bound, float(np.abs(again() - expected).max(initial=0.0)))
        if not difference <= bound:
            raise Differs(f"{what} differ by {difference:.3g}, the bound is {bound:.3g}", difference)
        self.note(difference, bound)

    def note(self, difference: float, bound: float) -> None:
        """Take note of a difference within its bound."""
        self.largest, self.bound = max(self.largest, difference), max(self.bound, bound)
        self.compared += 1

    def part(self, what: str) -> Part:
        """What to say of all that was compared."""
        if not self.compared:
            return Part(f"{what} NOT compared: the folder has no rows for their ids", made=False)
        return Part(f"{what} within {self.largest:.2g} (rounding bound {self.bound:.2g})", self.largest)


def shortened(ids: list[int]) -> str:
    """Token ids for a message."""
    return str(ids) if len(ids) <= 12 else f"{str(ids[:12])[:-1]}, …]"
