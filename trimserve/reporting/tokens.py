"""Tokens in a report: their kinds, and the heaviest that a vocab drops."""

from dataclasses import dataclass

import numpy as np

from trimserve.profiles.profile import Profile
from trimserve.text.names import UNNAMED, TokenNames
from trimserve.vocab.map import VocabMap

_KINDS_SHOWN = 16
OTHERS = "other scripts"


@dataclass(frozen=True, slots=True)
class KindShare:
    """The ids of one kind.

    Attributes:
        kind: see `tokennames.TokenNames.kind`.
        ids: how many the vocab has, padding rows left out.
        kept_ids: how many of them stay.
        share: share of the profiled tokens, 0..1.
        kept_share: what stays of that.
    """

    kind: str
    ids: int
    kept_ids: int
    share: float
    kept_share: float


@dataclass(frozen=True, slots=True)
class DroppedToken:
    """A token that a vocab does not keep: `text` is None where the tokenizer was not at hand."""

    token_id: int
    text: str | None
    count: int


def kinds_of(names: TokenNames, profile: Profile, vocab: VocabMap) -> tuple[KindShare, ...]:
    """Sum ids and occurrences up by kind, the heaviest kind first; the rare ones together at the end."""
    kinds = np.array([names.kind(id_) for id_ in range(profile.vocab_size)])
    kept = vocab.is_kept(np.arange(profile.vocab_size))
    found, place = np.unique(kinds, return_inverse=True)
    sums = [
        np.bincount(place, weights, found.size)
        for weights in (np.ones(place.size), kept, profile.mass, profile.mass * kept)
    ]
    order = np.lexsort((-sums[0], -sums[2]))
    rows = [
        KindShare(str(found[i]), int(sums[0][i]), int(sums[1][i]), float(sums[2][i]), float(sums[3][i]))
        for i in order
        if found[i] != UNNAMED
    ]
    return tuple(rows[:_KINDS_SHOWN]) + _together(rows[_KINDS_SHOWN:])


def _together(rows: list[KindShare]) -> tuple[KindShare, ...]:
    if not rows:
        return ()
    ids, kept_ids = sum(row.ids for row in rows), sum(row.kept_ids for row in rows)
    share, kept_share = sum(row.share for row in rows), sum(row.kept_share for row in rows)
    return (KindShare(OTHERS, ids, kept_ids, share, kept_share),)


def heaviest_dropped(
    names: TokenNames | None, profile: Profile, vocab: VocabMap, top: int, min_docs: int
) -> tuple[DroppedToken, ...]:
    """The dropped tokens that occur most often, among those that `min_docs` documents hold."""
    counts = profile.counts.copy()
    counts[vocab.kept_ids] = 0
    if min_docs > 1:
        documents = profile.document_counts
        counts[documents < min_docs if documents is not None else slice(None)] = 0
    heaviest = np.argsort(-counts, kind="stable")[:top]
    return tuple(
        DroppedToken(id_, names.text(id_) if names else None, int(counts[id_]))
        for id_ in heaviest.tolist()
        if counts[id_]
    )
