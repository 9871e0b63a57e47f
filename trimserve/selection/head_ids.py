"""Choose the output ids: the kept ids that the head of an untied model keeps, by the completions alone."""

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Ids
from trimserve.errors import UsageError
from trimserve.model.prize import read_weight_bytes
from trimserve.profiles.model import Model, find_source
from trimserve.profiles.profile import Profile
from trimserve.selection.ranking import covering, round_up
from trimserve.selection.rule import SelectionRule
from trimserve.vocab.map import Reason


def output_ids(profile: Profile, rule: SelectionRule, reason: npt.NDArray[np.int8]) -> Ids | None:
    """The kept ids that stay in the head, increasing; None where it takes all of them.

    Structural and explicit ids stay. The ids most frequent in completions join them up to the rule's
    `output_share` of the completions' occurrences, then more of them up to a multiple of `multiple_of`.

    Args:
        profile: with completions counted apart.
        rule: what decides.
        reason: int8 (V,), a `Reason` for each kept id, -1 for the others.
    """
    if profile.output_counts is None:
        return None
    kept = np.flatnonzero(reason >= 0)
    must = (reason[kept] == Reason.STRUCTURAL) | (reason[kept] == Reason.EXPLICIT)
    stays, others = kept[must], kept[~must]
    order = others[np.lexsort((others, -profile.mass[others], -profile.output_counts[others]))]
    wanted = covering(profile.output_counts, rule.output_share, order, stays)
    size = round_up(stays.size + wanted, rule.multiple_of, ())
    if size >= kept.size:
        return None
    return np.sort(np.concatenate([stays, order[: size - stays.size]])).astype(np.int32)


def check_untied(profile: Profile, model: Model | None) -> None:
    """Refuse a model whose head is its embedding, where its config or weights are at hand.

    Raises:
        UsageError: see above.
    """
    source = find_source(profile, model)
    if source is None:
        return
    weights = read_weight_bytes(source)
    if source.tied or (weights is not None and 0 < weights.head == weights.rows):
        raise UsageError(
            f"{source.name} is tied: its head is its embedding, so both have the same rows. Leave "
            "--separate-output out."
        )
