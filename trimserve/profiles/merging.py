"""Add profiles of one model up, as they are or by weight."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np

from trimserve.arguments import checked
from trimserve.arrays import Counts
from trimserve.errors import MismatchError, UsageError
from trimserve.profiles.profile import Profile
from trimserve.vocab.map import VocabMap

log = logging.getLogger(__name__)


@checked
def merge(profiles: Sequence[Profile], *, weights: Sequence[float] | None = None) -> Profile:
    """Add profiles up.

    Args:
        profiles: profiles of one model, over different texts.
        weights: share of the deployment's tokens that each profile stands for (normalised to sum 1);
            by default each counts with its own number of tokens.

    Returns:
        A profile whose counts are the sums, and whose coverage and missing mass follow the weights.

    Raises:
        UsageError: no profiles, or weights that do not fit them.
        MismatchError: the profiles are of different tokenizers or models.
    """
    if not profiles:
        raise UsageError("there is no profile to merge: name at least one.")
    _warn_of_repeats(profiles)
    return add_up(profiles, weights)


def add_up(profiles: Sequence[Profile], weights: Sequence[float] | None = None) -> Profile:
    """What `merge` gives, without a word on texts that several profiles hold: for who was warned before."""
    for other in profiles[1:]:
        check_same_model(profiles[0], other)
    parts = _normalised(profiles, weights)
    weighted = weights is not None or any(part.shares is not None for part in profiles)
    shares = sum(share * part.mass for share, part in zip(parts, profiles, strict=True))
    # Kish's effective sample size: the variance of a weighted mean of independent draws.
    variance = sum(share**2 / part.effective_tokens for share, part in zip(parts, profiles, strict=True))
    return Profile(
        counts=np.sum([part.counts for part in profiles], axis=0),
        tokenizer_sha256=profiles[0].tokenizer_sha256,
        tokenizer_name=min(part.tokenizer_name for part in profiles),
        texts=sum(part.texts for part in profiles),
        characters=sum(part.characters for part in profiles),
        beyond_rows=sum(part.beyond_rows for part in profiles),
        sources=tuple(sorted((source for part in profiles for source in part.sources), key=astuple)),
        structural=np.unique(np.concatenate([part.structural for part in profiles])),
        padding_ids=profiles[0].padding_ids,
        linear_widths=tuple(sorted({width for part in profiles for width in part.linear_widths})),
        row_bytes=max(part.row_bytes for part in profiles),
        shares=np.asarray(shares) if weighted else None,
        effective_tokens=1 / variance if weighted else 0.0,
        output_counts=_sum_known([part.output_counts for part in profiles]),
        document_counts=_sum_known([part.document_counts for part in profiles]),
    )


def _sum_known(arrays: Sequence[Counts | None]) -> Counts | None:
    """The sum, or None if one is not known: a sum of the others would count too little."""
    known = [array for array in arrays if array is not None]
    return np.sum(known, axis=0) if len(known) == len(arrays) else None


def _normalised(profiles: Sequence[Profile], weights: Sequence[float] | None) -> list[float]:
    values = [float(part.tokens) for part in profiles] if weights is None else list(weights)
    if len(values) != len(profiles) or not all(math.isfinite(value) and value > 0 for value in values):
        raise UsageError(
            f"{len(profiles)} profiles need {len(profiles)} weights above 0: found "
            f"{', '.join(map(str, values))}."
        )
    return [value / sum(values) for value in values]


def check_same_model(one: Profile, other: Profile) -> None:
    """Refuse profiles whose ids mean different tokens.

    Raises:
        MismatchError: other tokenizers, or models with other numbers of rows.
    """
    if one.tokenizer_sha256 != other.tokenizer_sha256:
        raise MismatchError(
            f"the profiles count different tokenizers' ids: {one.tokenizer_name} (sha256 "
            f"{one.tokenizer_sha256[:12]}…) and {other.tokenizer_name} ({other.tokenizer_sha256[:12]}…). "
            "Profile both with one model."
        )
    if one.vocab_size != other.vocab_size:
        raise MismatchError(
            f"the profiles are of models with {one.vocab_size:,} ({one.tokenizer_name}) and "
            f"{other.vocab_size:,} rows ({other.tokenizer_name}): profile both with one model."
        )


def _warn_of_repeats(profiles: Sequence[Profile]) -> None:
    hashes = Counter(source.sha256 for part in profiles for source in part.sources)
    names = {s.name for part in profiles for s in part.sources if hashes[s.sha256] > 1}
    if names:
        log.warning("counted more than once, because several profiles hold it: %s", ", ".join(sorted(names)))


def check_vocab(profile: Profile, vocab: VocabMap) -> None:
    """Refuse a vocab that was not selected for the model of a profile.

    Raises:
        MismatchError: another tokenizer, or another number of rows.
    """
    same = vocab.tokenizer_sha256 in ("", profile.tokenizer_sha256)
    if not same or vocab.vocab_size != profile.vocab_size:
        raise MismatchError(
            f"the vocab keeps ids of another model ({vocab.vocab_size:,} rows, tokenizer "
            f"{vocab.tokenizer_sha256[:12]}…) than the profile ({profile.vocab_size:,} rows, "
            f"{profile.tokenizer_sha256[:12]}…): select one from this profile."
        )
