"""Choose the kept ids from profiles, with a reason for each."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trimserve.arguments import Count, Share, checked
from trimserve.arrays import Ids
from trimserve.errors import UnknownIdError, UsageError
from trimserve.model.source import ModelSource
from trimserve.profiles.merging import merge
from trimserve.profiles.model import Model, find_source, tokenizer_of
from trimserve.profiles.profile import Profile
from trimserve.selection.head_ids import check_untied, output_ids
from trimserve.selection.keep_file import KeepList, check_named, read_keep_file
from trimserve.selection.ranking import Mass, affordable, covering, occurrences, ranked, round_up
from trimserve.selection.rule import SelectionRule
from trimserve.text.dead_ids import dead_ids
from trimserve.text.tokenizer import tokenizer_border
from trimserve.vocab.map import Reason, VocabMap

Profiles = Profile | Sequence[Profile] | Mapping[str, Profile]
log = logging.getLogger(__name__)

Reasons = npt.NDArray[np.int8]


@checked
@tokenizer_border
def select(  # noqa: PLR0913 - the options are the public interface
    profiles: Profiles,
    *,
    coverage: Share | None = None,
    top_k: Count | None = None,
    min_count: Count | None = None,
    max_bytes: Count | None = None,
    min_docs: Count | None = None,
    output_coverage: Share | None = None,
    separate_output: bool = False,
    floors: Mapping[str, Share] | None = None,
    keep_tokens: Sequence[str] = (),
    keep_ids: Sequence[int] = (),
    keep_file: str | Path | None = None,
    multiple_of: Count = 128,
    model: str | Path | ModelSource | None = None,
) -> VocabMap:
    """Choose the kept ids.

    Structural and explicitly named ids always stay, then those that the floors take. The most frequent ids
    join them by `coverage` (0.999 by default), `top_k`, `max_bytes` or `min_count`; K is then rounded up to
    a multiple of `multiple_of` with the next most frequent ids that the tokenizer has, and moved up further
    while it equals the width of a linear layer. Equally frequent ids: the lower one first, but dead ones
    (`trimserve.text.dead_ids`) last.

    Args:
        profiles: one profile, or several of one model, which are added up; by name where there are floors.
        coverage: see `SelectionRule`, as the next six.
        top_k: see `SelectionRule`.
        min_count: see `SelectionRule`.
        max_bytes: see `SelectionRule`.
        min_docs: see `SelectionRule`.
        output_coverage: see `SelectionRule`.
        separate_output: see `SelectionRule`; the vocab then has `output_ids`, unless completions need all
            kept ids.
        floors: see `SelectionRule`; the names are those of `profiles`.
        keep_tokens: tokens of the vocabulary, or texts, all of whose tokens stay.
        keep_ids: token ids that stay.
        keep_file: a keep list of this or another tool; see `keepfile.read_keep_file`.
        multiple_of: see `SelectionRule`; a power of two suits matrix kernels.
        model: where the tokenizer is, for `keep_tokens`, `keep_file` and dead ids; by default as profiled.

    Returns:
        The vocab; its `rule` holds the options, coverage on the profile, missing mass and reasons.

    Raises:
        UsageError: options that contradict each other or cannot be met.
        UnknownIdError: a keep id outside 0..V-1.
        MismatchError: profiles or a model with different tokenizers.
    """
    rule = SelectionRule(
        coverage=coverage,
        top_k=top_k,
        min_count=min_count,
        max_bytes=max_bytes,
        multiple_of=multiple_of,
        min_docs=min_docs,
        output_coverage=output_coverage,
        floors=floors or {},
        separate_output=separate_output,
    )
    named = profiles if isinstance(profiles, Mapping) else {}
    profile = _merged(profiles)
    explicit = _explicit_ids(profile, keep_tokens, keep_ids, keep_file, model)
    dead = partial(_dead_ids, profile, model)
    reason = _reasons(profile, rule, explicit, _floors(profile, rule, named), dead)
    kept_ids = np.flatnonzero(reason >= 0).astype(np.int32)
    of_head = None
    if separate_output:
        check_untied(profile, model)
        of_head = output_ids(profile, rule, reason)
    return VocabMap(
        kept_ids=kept_ids,
        reason=reason[kept_ids].astype(np.uint8),
        vocab_size=profile.vocab_size,
        tokenizer_sha256=profile.tokenizer_sha256,
        rule=_facts(profile, rule, explicit, kept_ids, reason)
        | _floor_facts(profile, rule, named, kept_ids)
        | _head_facts(profile, of_head),
        output_ids=of_head,
    )


def _merged(profiles: Profiles) -> Profile:
    if isinstance(profiles, Profile):
        return profiles
    return merge(list(profiles.values()) if isinstance(profiles, Mapping) else profiles)


def _explicit_ids(
    profile: Profile,
    keep_tokens: Sequence[str],
    keep_ids: Sequence[int],
    keep_file: str | Path | None,
    model: str | Path | ModelSource | None,
) -> list[int]:
    listed = KeepList() if keep_file is None else read_keep_file(keep_file)
    explicit = [*keep_ids, *listed.ids]
    if words := [*keep_tokens, *listed.words]:
        explicit += _token_ids(words, tokenizer_of(profile, model))
    if listed.named:
        explicit += check_named(listed.named, tokenizer_of(profile, model))
    _check_ids(explicit, profile.vocab_size)
    return explicit


def _floors(
    profile: Profile, rule: SelectionRule, named: Mapping[str, Profile]
) -> dict[str, tuple[float, Mass]]:
    """Name -> the share that is covered at least, and (V,) the occurrences that it is a share of."""
    floors: dict[str, tuple[float, Mass]] = {}
    for name, share in rule.floors.items():
        if name not in named:
            known = ", ".join(named) or "none: pass NAME=PROFILE"
            raise UsageError(f"floor {name}={share} names no profile (named profiles: {known}).")
        floors[f"floor {name}={share}"] = share, occurrences(named[name])
    if rule.output_coverage is not None or rule.separate_output:
        floors["output_coverage"] = rule.output_share, _completions(profile)
    return floors


def _completions(profile: Profile) -> Mass:
    if profile.output_counts is None or not profile.output_counts.any():
        raise UsageError(
            "coverage of completions needs completions counted apart: profile with --output-column or --chat."
        )
    return profile.output_counts


def _reasons(
    profile: Profile,
    rule: SelectionRule,
    explicit: Sequence[int],
    floors: Mapping[str, tuple[float, Mass]],
    dead: Callable[[], Ids],
) -> Reasons:
    """Give every id its reason, int8 (V,); -1 for those that do not stay.

    `dead` finds the ids that no text leads to. It is asked where ids that never occur have to fill K up.
    """
    reason = np.full(profile.vocab_size, -1, np.int8)
    reason[list(explicit)] = Reason.EXPLICIT
    reason[profile.structural] = Reason.STRUCTURAL
    eligible, barred = _eligible(profile, rule)
    for name, (share, mass) in floors.items():
        _take_floor(reason, name, share, mass, eligible & (reason < 0))
    taken = np.flatnonzero(reason >= 0)
    free = (reason < 0) & ~barred
    order = ranked(profile, eligible, free)
    wanted = min(int(eligible[order].sum()), _limit(profile, rule, order, taken))
    size = round_up(taken.size + wanted, rule.multiple_of, profile.linear_widths)
    reason[order[:wanted]] = Reason.PROFILE
    if size - taken.size > np.count_nonzero(profile.counts[order]):
        order = ranked(profile, eligible, free, last=dead())
    reason[order[wanted : size - taken.size]] = Reason.FILL
    return reason


def _dead_ids(profile: Profile, model: Model | None) -> Ids:
    """The ids that no text leads to; none where the tokenizer is not at hand."""
    source = find_source(profile, model)
    if source is None:
        log.info("%s is not at hand to tell which ids are dead", profile.tokenizer_name)
        return np.empty(0, np.int32)
    return dead_ids(source.tokenizer())


def _eligible(profile: Profile, rule: SelectionRule) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which ids may stay for their frequency, and which may not even fill K up, bool (V,) each."""
    eligible = profile.counts >= (rule.min_count or 1)
    if rule.min_docs is None:
        return eligible, np.zeros_like(eligible)
    if profile.document_counts is None:
        raise UsageError("min_docs needs the documents of each id, which this profile lacks: profile again.")
    barred = (profile.counts > 0) & (profile.document_counts < rule.min_docs)
    return eligible & ~barred, barred


def _take_floor(
    reason: Reasons, name: str, share: float, mass: Mass, eligible: npt.NDArray[np.bool_]
) -> None:
    """Mark the fewest eligible ids that bring what is covered of `mass` to a share."""
    ids = np.flatnonzero(eligible & (mass > 0))
    order = ids[np.lexsort((ids, -mass[ids]))]
    taken = np.flatnonzero(reason >= 0)
    reachable = (mass[taken].sum() + mass[order].sum()) / mass.sum()
    if reachable < share - 1e-12:
        raise UsageError(
            f"{name} cannot be met: the ids that may stay cover {reachable:.4f} of it. Lower it, or "
            "min_count or min_docs."
        )
    reason[order[: covering(mass, share, order, taken)]] = Reason.PROFILE


def _limit(
    profile: Profile, rule: SelectionRule, order: npt.NDArray[np.int64], taken: npt.NDArray[np.int64]
) -> int:
    """How many ids may stay for their frequency at most."""
    if rule.top_k is not None:
        if rule.top_k < taken.size:
            raise UsageError(f"top_k {rule.top_k:,} is less than the {taken.size:,} ids that must stay.")
        return rule.top_k - taken.size
    if rule.max_bytes is not None:
        return affordable(profile, rule.max_bytes, rule.multiple_of, taken.size, order.size)
    return covering(occurrences(profile), rule.share, order, taken)


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


def _token_ids(words: Sequence[str], tokenizer: Tokenizer) -> Iterator[int]:
    """Yield the id of each word that is a token as it stands, else the ids of its tokens."""
    for word in words:
        exact = tokenizer.token_to_id(word)
        ids = [exact] if exact is not None else tokenizer.encode(word, add_special_tokens=False).ids
        if not ids:
            raise UsageError(f"{word!r} cannot be kept: the tokenizer makes no token of it.")
        yield from ids


def _facts(
    profile: Profile, rule: SelectionRule, explicit: Sequence[int], kept_ids: Ids, reason: Reasons
) -> dict[str, Any]:
    options = rule.to_dict()
    if explicit:
        options["keep_ids"] = sorted(set(map(int, explicit)))
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


def _floor_facts(
    profile: Profile, rule: SelectionRule, named: Mapping[str, Profile], kept_ids: Ids
) -> dict[str, Any]:
    """What the kept ids cover of each named profile, and of completions where they were counted apart."""
    facts: dict[str, Any] = {}
    if len(named) > 1 or rule.floors:
        facts["profiles"] = {name: part.coverage(kept_ids) for name, part in named.items()}
    if profile.output_counts is not None and profile.output_counts.any():
        facts["output_coverage"] = int(profile.output_counts[kept_ids].sum()) / int(
            profile.output_counts.sum()
        )
    return facts


def _head_facts(profile: Profile, of_head: Ids | None) -> dict[str, Any]:
    """Rows of a head with ids of its own, and the share of completions that they cover."""
    if of_head is None or profile.output_counts is None:
        return {}
    covered = int(profile.output_counts[of_head].sum()) / int(profile.output_counts.sum())
    return {"head_rows": int(of_head.size), "head_coverage": covered}
