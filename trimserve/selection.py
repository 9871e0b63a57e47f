"""Choose the kept ids from profiles, with a reason for each."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.artefacts import sha256_file
from trimserve.errors import MismatchError, UnknownIdError, UsageError
from trimserve.keepfile import KeepList, check_named, read_keep_file
from trimserve.merging import merge
from trimserve.profiling import Profile
from trimserve.source import ModelSource, resolve_model
from trimserve.vocab import Ids, Reason, VocabMap

DEFAULT_COVERAGE = 0.999
_CURVE_POINTS = 8
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rule:
    """What decides how many ids stay; at most one of coverage, top_k and max_bytes.

    Attributes:
        coverage: keep the most frequent ids until this share of occurrences is covered, 0..1.
        top_k: keep at most this many ids, structural and explicit ones included, before rounding.
        min_count: an id that occurs less often does not stay for its frequency.
        max_bytes: the kept rows may take this many bytes, as stored in the checkpoint.
        multiple_of: K is rounded to a multiple of this: up, or down for max_bytes.
    """

    coverage: float | None = None
    top_k: int | None = None
    min_count: int | None = None
    max_bytes: int | None = None
    multiple_of: int = 128

    def __post_init__(self) -> None:
        sizes = [name for name in ("coverage", "top_k", "max_bytes") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise UsageError(f"{' and '.join(sizes)} contradict each other: give one of them.")
        if self.coverage is not None and not 0 <= self.coverage <= 1:
            raise UsageError(f"coverage is a share from 0 to 1, not {self.coverage}.")
        for name in ("top_k", "min_count", "max_bytes", "multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} should be at least 1 but is {value:,}.")


def select(  # noqa: PLR0913 - the options are the public interface
    profiles: Profile | Sequence[Profile],
    *,
    coverage: float | None = None,
    top_k: int | None = None,
    min_count: int | None = None,
    max_bytes: int | None = None,
    keep_tokens: Sequence[str] = (),
    keep_ids: Sequence[int] = (),
    keep_file: str | Path | None = None,
    multiple_of: int = 128,
    model: str | Path | ModelSource | None = None,
) -> VocabMap:
    """Choose the kept ids.

    Structural and explicitly named ids always stay. The most frequent ids join them by `coverage`
    (0.999 by default), `top_k`, `max_bytes` or `min_count`; K is then rounded up to a multiple of
    `multiple_of` with the next most frequent ids that the tokenizer has, and moved up further while it
    equals the width of a linear layer. Equally frequent ids: the lower one first.

    Args:
        profiles: one profile, or several of one model, which are added up.
        coverage: see `Rule`, as the next three.
        top_k: see `Rule`.
        min_count: see `Rule`.
        max_bytes: see `Rule`.
        keep_tokens: tokens of the vocabulary, or texts, all of whose tokens stay.
        keep_ids: token ids that stay.
        keep_file: a keep list of this or another tool; see `keepfile.read_keep_file`.
        multiple_of: see `Rule`; a power of two suits matrix kernels.
        model: where the tokenizer is, for `keep_tokens` and `keep_file`; by default as profiled.

    Returns:
        The vocab; its `rule` holds the options, coverage on the profile, missing mass and reasons.

    Raises:
        UsageError: options that contradict each other or cannot be met.
        UnknownIdError: a keep id outside 0..V-1.
        MismatchError: profiles or a model with different tokenizers.
    """
    rule = Rule(coverage, top_k, min_count, max_bytes, multiple_of)
    profile = profiles if isinstance(profiles, Profile) else merge(profiles)
    listed = KeepList() if keep_file is None else read_keep_file(keep_file)
    explicit = [*keep_ids, *listed.ids]
    if words := [*keep_tokens, *listed.words]:
        explicit += _token_ids(words, _tokenizer_of(profile, model))
    if listed.named:
        explicit += check_named(listed.named, _tokenizer_of(profile, model))
    _check_ids(explicit, profile.vocab_size)
    reason = _reasons(profile, rule, explicit)
    kept_ids = np.flatnonzero(reason >= 0).astype(np.int32)
    return VocabMap(
        kept_ids=kept_ids,
        reason=reason[kept_ids].astype(np.uint8),
        vocab_size=profile.vocab_size,
        tokenizer_sha256=profile.tokenizer_sha256,
        rule=_facts(profile, rule, explicit, kept_ids, reason),
    )


def coverage_curve(profile: Profile) -> list[tuple[int, float]]:
    """Coverage on the profile at doubling K: (K, coverage) up to the K that covers all of it."""
    forced = profile.structural
    free = np.ones(profile.vocab_size, np.bool_)
    free[forced] = False
    ranked = _ranked(profile, profile.counts > 0, free)
    seen = int(np.count_nonzero(profile.counts[ranked]))
    size = 1 << max(7, forced.size.bit_length())
    points: list[tuple[int, float]] = []
    while size < forced.size + seen and len(points) < _CURVE_POINTS:
        points.append((size, profile.coverage(np.concatenate([forced, ranked[: size - forced.size]]))))
        size *= 2
    return [*points, (forced.size + seen, profile.coverage(np.concatenate([forced, ranked[:seen]])))]


def _reasons(profile: Profile, rule: Rule, explicit: Sequence[int]) -> npt.NDArray[np.int8]:
    """Give every id its reason, int8 (V,); -1 for those that do not stay."""
    reason = np.full(profile.vocab_size, -1, np.int8)
    reason[list(explicit)] = Reason.EXPLICIT
    reason[profile.structural] = Reason.STRUCTURAL
    forced = np.flatnonzero(reason >= 0)
    eligible = profile.counts >= (rule.min_count or 1)
    ranked = _ranked(profile, eligible, reason < 0)
    wanted = min(int(eligible[ranked].sum()), _limit(profile, rule, ranked, forced))
    size = min(
        forced.size + ranked.size,
        round_up(forced.size + wanted, rule.multiple_of, profile.linear_widths),
    )
    reason[ranked[:wanted]] = Reason.PROFILE
    reason[ranked[wanted : size - forced.size]] = Reason.FILL
    return reason


def _ranked(profile: Profile, eligible: Mask, free: Mask) -> npt.NDArray[np.int64]:
    """The free ids that the tokenizer has: eligible first, then by frequency, then the lower id."""
    free = free.copy()
    free[profile.padding_ids] = False
    ids = np.flatnonzero(free)
    return ids[np.lexsort((ids, -profile.mass[ids], ~eligible[ids]))]


def _limit(profile: Profile, rule: Rule, ranked: npt.NDArray[np.int64], forced: npt.NDArray[np.int64]) -> int:
    """How many ids may stay for their frequency at most."""
    if rule.top_k is not None:
        if rule.top_k < forced.size:
            raise UsageError(f"top_k {rule.top_k:,} is less than the {forced.size:,} ids that must stay.")
        return rule.top_k - forced.size
    if rule.max_bytes is not None:
        return _affordable(profile, rule.max_bytes, rule.multiple_of, forced.size, ranked.size)
    if rule.coverage is None and rule.min_count is not None:
        return ranked.size
    coverage = DEFAULT_COVERAGE if rule.coverage is None else rule.coverage
    return _covering(profile, coverage, ranked, forced)


def _covering(
    profile: Profile, coverage: float, ranked: npt.NDArray[np.int64], forced: npt.NDArray[np.int64]
) -> int:
    """How many of the ranked ids it takes, besides the forced ones, to reach a coverage."""
    # Whole counts where there are no weights, so that coverage 1 is not missed by a rounding error.
    mass = profile.counts if profile.shares is None else profile.shares
    reached = mass[forced].sum() + np.concatenate([[0], np.cumsum(mass[ranked])])
    return int(np.searchsorted(reached, coverage * mass.sum()))


def _affordable(profile: Profile, max_bytes: int, multiple_of: int, forced: int, free: int) -> int:
    """How many free ids fit beside the forced ones, at a K that needs no rounding up."""
    if profile.row_bytes == 0:
        raise UsageError(
            "max_bytes needs to know the bytes of a row, but the profiled folder held no weights: profile "
            "with a folder that has model.safetensors, or use top_k."
        )
    rows = max_bytes // profile.row_bytes
    if rows >= forced + free:
        return free
    size = rows - rows % multiple_of
    while size in profile.linear_widths:
        size -= multiple_of
    if size < forced:
        least = round_up(forced, multiple_of, profile.linear_widths) * profile.row_bytes
        raise UsageError(
            f"max_bytes {max_bytes:,} cannot hold the {forced:,} ids that must stay: allow {least:,} bytes."
        )
    return size - forced


def round_up(size: int, multiple_of: int, widths: Sequence[int]) -> int:
    """The next multiple that is not the width of a linear layer.

    An exporter that looks for the head by its width would take such a layer for it.

    Example:
        >>> round_up(700, 128, [768])
        896
    """
    rounded = -(-max(size, 1) // multiple_of) * multiple_of
    while rounded in widths:
        rounded += multiple_of
    return rounded


def count_reasons(reason: npt.NDArray[np.integer[Any]]) -> dict[str, int]:
    """How many ids stay for each reason; dependencies are named only where there are some."""
    counts = {kind.name.lower(): int((reason == kind).sum()) for kind in Reason}
    if not counts["dependency"]:
        del counts["dependency"]
    return counts


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    outside = [id_ for id_ in ids if not 0 <= id_ < vocab_size]
    if outside:
        raise UnknownIdError(
            f"token id {outside[0]:,} cannot be kept: the model has rows 0..{vocab_size - 1:,}. Leave it out."
        )


def _tokenizer_of(profile: Profile, model: str | Path | ModelSource | None) -> Tokenizer:
    source = resolve_model(model or profile.tokenizer_name, weights=False)
    if (found := sha256_file(source.tokenizer_path)) != profile.tokenizer_sha256:
        raise MismatchError(
            f"{source.name} has another tokenizer (sha256 {found[:12]}…) than the profile "
            f"({profile.tokenizer_sha256[:12]}…): pass the model that was profiled."
        )
    return source.tokenizer()


def _token_ids(words: Sequence[str], tokenizer: Tokenizer) -> Iterator[int]:
    """Yield the id of each word that is a token as it stands, else the ids of its tokens."""
    for word in words:
        exact = tokenizer.token_to_id(word)
        ids = [exact] if exact is not None else tokenizer.encode(word, add_special_tokens=False).ids
        if not ids:
            raise UsageError(f"{word!r} cannot be kept: the tokenizer makes no token of it.")
        yield from ids


def _facts(
    profile: Profile, rule: Rule, explicit: Sequence[int], kept_ids: Ids, reason: npt.NDArray[np.int8]
) -> dict[str, Any]:
    options = {name: value for name, value in asdict(rule).items() if value is not None}
    if explicit:
        options["keep_ids"] = sorted(set(map(int, explicit)))
    if not {"coverage", "top_k", "max_bytes", "min_count"} & options.keys():
        options["coverage"] = DEFAULT_COVERAGE
    return {
        "options": options,
        "coverage": profile.coverage(kept_ids),
        "missing_mass": profile.missing_mass,
        "missing_mass_bound": profile.missing_mass_bound,
        "reasons": count_reasons(reason),
        "tokenizer_name": profile.tokenizer_name,
        "texts": profile.texts,
        "tokens": profile.tokens,
        "row_bytes": profile.row_bytes,
        "sources": [asdict(source) for source in profile.sources],
    }
