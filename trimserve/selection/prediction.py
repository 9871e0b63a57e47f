"""What a vocab will do when it is served: cold tokens, weights, the decoding ratio at most."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimserve.profiles.profile import Profile
    from trimserve.vocab.map import VocabMap


def predict(profile: "Profile", vocab: "VocabMap", model: str | None) -> dict[str, Any]:
    """Predict weights, decode speed and cold tokens of an export, as JSON values.

    What takes the model's tokenizer or weights is None where they are not at hand.
    """
    from trimserve.model.prize import read_weight_bytes
    from trimserve.profiles.forecast import cold_share
    from trimserve.profiles.model import find_source
    from trimserve.text.dead_ids import dead_ids
    from trimserve.vocab.map import Reason

    kept, source = len(vocab), find_source(profile, model)
    head_rows = None if vocab.output_ids is None else len(vocab.output_ids)
    weights = None if source is None else read_weight_bytes(source)
    by_frequency = (vocab.reason == Reason.PROFILE) | (vocab.reason == Reason.FILL)
    return {
        "cold_per_thousand": 1000 * (1 - vocab.rule["coverage"]),
        "cold_per_thousand_expected": 1000
        * cold_share(profile, vocab.kept_ids, vocab.kept_ids[~by_frequency]),
        "weight_bytes_before": weights.total if weights else None,
        "weight_bytes_after": weights.at(kept, head_rows) if weights else None,
        "decode_ratio": weights.decode_ratio(head_rows or kept) if weights else None,
        "dead_ids": None if source is None else int(dead_ids(source.tokenizer()).size),
    }
