"""What an encoder's head says, for people: tokens for a mask, labels for a text."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats, Ids
from trimserve.encoder.activations import softmax
from trimserve.files.tensors import to_float32
from trimserve.runtime.cold_rows import ColdRows
from trimserve.text.codec import Codec
from trimserve.vocab.map import VocabMap

# Cold rows are multiplied a tile at a time, so that a quarter of a million of them never lie in memory.
_TILE_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that may stand for a mask.

    Attributes:
        token: its text.
        id: its token id.
        probability: of it in this place.
        sequence: the whole text with it in the place of the mask.
    """

    token: str
    id: int
    probability: float
    sequence: str = ""


def full_logits(logits: Floats, hidden: Floats | None, vocab: VocabMap, cold: ColdRows) -> tuple[Floats, Ids]:
    """Complete compact logits with those of the cold ids, where their rows are at hand.

    Args:
        logits: float32 (n, K), of the kept ids.
        hidden: float32 (n, H), the head's input, if the graph gives it.
        vocab: the kept ids.
        cold: rows of the head, if the folder has them.

    Returns:
        float32 (n, V) and the token ids of its columns, or the compact logits and the kept ids.
    """
    if hidden is None or not len(cold) or not cold.has_head:
        return logits, vocab.kept_ids
    both = np.concatenate([logits, cold_logits(hidden, cold)], axis=1)
    return both, np.concatenate([vocab.kept_ids, cold.cold_ids])


def cold_logits(hidden: Floats, cold: ColdRows) -> Floats:
    """Logits of the cold ids: the part of the vocab head that is not in the graph.

    Args:
        hidden: float32 (n, H), the head's input.
        cold: rows of the head.

    Returns:
        float32 (n, V - K), columns in the order of ``cold.cold_ids``.
    """
    logits = np.empty((len(hidden), len(cold)), np.float32)
    hidden = cold.head_input(hidden)
    for start in range(0, len(cold), _TILE_ROWS):
        ids = cold.cold_ids[start : start + _TILE_ROWS]
        columns = slice(start, start + len(ids))
        logits[:, columns] = hidden @ _float32(cold.head(ids)).T
        if cold.has_head_bias:
            logits[:, columns] += _float32(cold.head_bias(ids))
    return logits


def top_candidates(
    logits: Floats, ids: Ids, text_of: Callable[[int], str], top_k: int, targets: Ids | None = None
) -> list[list[Candidate]]:
    """The likeliest tokens of each row.

    Args:
        logits: float32 (n, C).
        ids: token ids of the columns, int32 (C,).
        text_of: a token's text by its id.
        top_k: how many of them; fewer if there are no more.
        targets: the token ids to choose among, if not all.
    """
    if not len(logits):
        return []
    probabilities = softmax(logits)
    if targets is not None:
        columns = np.flatnonzero(np.isin(ids, targets))
        probabilities, ids = probabilities[:, columns], ids[columns]
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    best_ids, shares = ids[best].tolist(), np.take_along_axis(probabilities, best, axis=1).tolist()
    return [
        [Candidate(text_of(id_), id_, share) for id_, share in pairs] for pairs in map(zip, best_ids, shares)
    ]


def fill_in(candidate: Candidate, ids: Ids, place: int, codec: Codec, *, only_mask: bool) -> Candidate:
    """The candidate with the text that it makes; as in the pipeline, other masks stay to be seen.

    Args:
        candidate: of a mask.
        ids: the text's token ids, int32 (T,).
        place: of the mask among them.
        codec: decodes them.
        only_mask: whether the text has no other mask: special tokens are left out then.
    """
    filled = ids.copy()
    filled[place] = candidate.id
    shown = filled[filled != codec.named_id("pad_token", "[PAD]", "<pad>")]
    text = codec.decode(shown, skip_special_tokens=only_mask)
    return replace(candidate, sequence=text)


def _float32(rows: npt.NDArray[Any]) -> Floats:
    # bfloat16 comes as its bits.
    return to_float32(rows, "BF16" if rows.dtype == np.uint16 else "F32")
