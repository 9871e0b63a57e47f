"""What an encoder's head says, for people: tokens for a mask, labels for a text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.arrays import Floats, Ids
from trimserve.encoder.activations import softmax
from trimserve.files.tensors import to_float32
from trimserve.runtime.cold_rows import ColdRows
from trimserve.vocab.map import VocabMap

# Cold rows are multiplied a tile at a time, so that a quarter of a million of them never lie in memory.
_TILE_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that may stand for a mask: its text, its token id and its probability."""

    token: str
    id: int
    probability: float


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


def top_candidates(logits: Floats, ids: Ids, tokenizer: Tokenizer, top_k: int) -> list[list[Candidate]]:
    """The likeliest tokens of each row.

    Args:
        logits: float32 (n, C).
        ids: token ids of the columns, int32 (C,).
        tokenizer: gives the tokens' texts.
        top_k: how many of them; fewer if there are no more.
    """
    if not len(logits):
        return []
    probabilities = softmax(logits)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    best_ids, shares = ids[best].tolist(), np.take_along_axis(probabilities, best, axis=1).tolist()
    return [
        [Candidate(tokenizer.decode([id_], skip_special_tokens=False), id_, share) for id_, share in pairs]
        for pairs in map(zip, best_ids, shares)
    ]


def label_scores(logits: Floats, config: Mapping[str, Any]) -> dict[str, float]:
    """Probability of each label of a classification head, the likeliest first.

    Args:
        logits: float32 (labels,).
        config: config.json; `id2label` names the labels, and `problem_type` says whether several may hold
            at once (a sigmoid each) instead of one (softmax).
    """
    several = config.get("problem_type") == "multi_label_classification"
    scores = 1 / (1 + np.exp(-logits)) if several or len(logits) == 1 else softmax(logits)
    names = config.get("id2label") or {}
    order = np.argsort(-scores, kind="stable").tolist()
    return {str(names.get(str(label), f"LABEL_{label}")): float(scores[label]) for label in order}


def _float32(rows: npt.NDArray[Any]) -> Floats:
    # bfloat16 comes as its bits.
    return to_float32(rows, "BF16" if rows.dtype == np.uint16 else "F32")
