"""Token ids of several texts, and padding them to one array."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text as the original tokenizer gives it.

    Attributes:
        ids: int32 (T,), token ids, special tokens included.
        type_ids: int32 (T,), `token_type_ids` of BERT-like models.
        truncated: whether the text was cut to the asked number of tokens.
    """

    ids: Ids
    type_ids: Ids
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Servable:
    """Sequences whose every id has a row in the folder.

    Attributes:
        sequences: token ids, int32 (T',) each.
        repeats: int64 (T,) each: how many of them stand for each token of the text.
        cold_tokens: cold tokens that were met, split or not.
    """

    sequences: Sequence[Ids]
    repeats: Sequence[npt.NDArray[np.int64]]
    cold_tokens: int


@dataclass(frozen=True, slots=True)
class SlottedBatch:
    """Sequences padded to one length, as the graph wants them.

    Attributes:
        ids: int64 (B, T): below K a compact id, K + s for the cold id in slot s; the rest is padding.
        attention_mask: int64 (B, T), 1 where there is a token.
        cold_ids: int32 (S,), the token ids lent a slot.
        cold_tokens: cold tokens of the sequences, given a slot or split.
    """

    ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]
    cold_ids: Ids
    cold_tokens: int


@dataclass(frozen=True, slots=True)
class Joined:
    """Sequences one behind the other.

    Attributes:
        ids: int (sum of T,).
        lengths: int64 (B,), the T of each.
    """

    ids: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.int64]

    def padded(self, fill: int, side: Side = "right") -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Pad the sequences to the longest one.

        Returns:
            The ids and the mask (1 for a token, 0 for padding), both int64 (B, T).
        """
        width = int(self.lengths.max(initial=0))
        columns = np.arange(width)
        is_token = (
            columns < self.lengths[:, None] if side == "right" else columns >= width - self.lengths[:, None]
        )
        ids = np.full(is_token.shape, fill, np.int64)
        ids[is_token] = self.ids
        return ids, is_token.astype(np.int64)


def join(sequences: Sequence[Ids]) -> Joined:
    """Put sequences one behind the other."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    return Joined(np.concatenate(sequences) if len(sequences) else np.zeros(0, np.int32), lengths)
