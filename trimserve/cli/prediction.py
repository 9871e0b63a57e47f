"""What a vocab would cost and bring, before anything is exported."""

from typing import TYPE_CHECKING, Any

from trimserve.report import human_bytes, percent

if TYPE_CHECKING:
    from trimserve.profiling import Profile
    from trimserve.vocab.map import VocabMap


def predict(profile: "Profile", vocab: "VocabMap", model: str | None) -> dict[str, Any]:
    """Predict weights, decode speed and cold tokens of an export, as JSON values.

    What takes the model's tokenizer or weights is None where they are not at hand.
    """
    from trimserve.forecast import cold_share
    from trimserve.model.prize import read_weight_bytes
    from trimserve.profiledmodel import find_source
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


def prediction_summary(prediction: dict[str, Any]) -> str:
    """Describe a prediction for people."""
    cold, expected = prediction["cold_per_thousand"], prediction["cold_per_thousand_expected"]
    facts = [("cold tokens", f"{cold:.3g} per 1,000 profiled, {expected:.3g} expected in text to come")]
    if (before := prediction["weight_bytes_before"]) is not None:
        after = prediction["weight_bytes_after"]
        facts.append(
            ("weights", f"{human_bytes(after)} of {human_bytes(before)} ({percent(after / before)})")
        )
    if (ratio := prediction["decode_ratio"]) is not None:
        facts.append(("decoding", f"at most {ratio:.2f} x faster, by weight bytes read a token"))
    if (dead := prediction["dead_ids"]) is not None:
        facts.append(("dead ids", f"{dead:,} of the vocab can come of no text: free to drop"))
    return "\n".join(f"{name:<18}{value}" for name, value in facts)
