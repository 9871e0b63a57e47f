"""Filters beyond top-k, top-p and min-p: which ids may be drawn, by the shape of the distribution.

Each takes scores (logits after the temperature, float32 (n,)) and sets those it excludes to -inf. `keep` of
the likeliest are never excluded. Names, order and thresholds are those of transformers' logits warpers.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_TOP_H_IDS = 100  # top-H looks at no more of the likeliest ids


def keep_typical(scores: Floats, mass: float, keep: int = 1) -> Floats:
    """Keep the ids whose surprise is nearest to the expected one, up to a mass.

    Locally typical sampling (Meister et al. 2023, https://arxiv.org/abs/2202.00666); ties with the last stay.
    """
    log_probs = _log_softmax(scores)
    probabilities = np.exp(log_probs)
    shift = np.abs(-log_probs - _entropy(log_probs))
    order = np.argsort(shift, kind="stable")
    reached = int((np.cumsum(probabilities[order]) < mass).sum())
    excluded = shift > shift[order[min(reached, shift.size - 1)]]
    excluded[order[:keep]] = False
    return np.where(excluded, np.float32(-np.inf), scores)


def drop_improbable(scores: Floats, epsilon: float, keep: int = 1) -> Floats:
    """Exclude ids less probable than epsilon (Hewitt et al. 2022, https://arxiv.org/abs/2210.15191)."""
    return _drop_below(scores, np.exp(_log_softmax(scores)), epsilon, keep)


def drop_by_entropy(scores: Floats, epsilon: float, keep: int = 1) -> Floats:
    """Eta sampling: as `drop_improbable`, with a lower threshold where the distribution is flat."""
    log_probs = _log_softmax(scores)
    eta = min(epsilon, float(np.sqrt(epsilon) * np.exp(-_entropy(log_probs))))
    return _drop_below(scores, np.exp(log_probs), eta, keep)


def keep_top_h(scores: Floats, share: float) -> Floats:
    """Keep the likeliest ids up to a share of the entropy (https://arxiv.org/abs/2509.02510)."""
    top = np.argsort(-scores, kind="stable")[:_TOP_H_IDS]
    log_probs = _log_softmax(scores[top])
    with np.errstate(invalid="ignore"):
        terms = np.nan_to_num(-np.exp(log_probs) * log_probs)
    stays = np.cumsum(terms) <= terms.sum() * share
    stays[0] = True
    kept = np.full(scores.shape, -np.inf, np.float32)
    kept[top[stays]] = scores[top[stays]]
    return kept


def _drop_below(
    scores: Floats, probabilities: npt.NDArray[np.float64], threshold: float, keep: int
) -> Floats:
    kth = np.partition(scores, scores.size - min(keep, scores.size))[scores.size - min(keep, scores.size)]
    return np.where((probabilities < threshold) & (scores < kth), np.float32(-np.inf), scores)


def _log_softmax(scores: Floats) -> npt.NDArray[np.float64]:
    wide = scores.astype(np.float64) - float(scores.max())
    log_probs: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum())
    return log_probs


def _entropy(log_probs: npt.NDArray[np.float64]) -> float:
    with np.errstate(invalid="ignore"):
        return -float(np.nansum(np.exp(log_probs) * log_probs))
