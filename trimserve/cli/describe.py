"""Results as text for people and as JSON documents: a profile, a vocab, a prediction."""

from typing import TYPE_CHECKING, Any

from trimserve.console import human_bytes, percent, table
from trimserve.profiles.estimates import CONFIDENCE
from trimserve.profiles.profile import Profile
from trimserve.selection.ranking import coverage_curve

if TYPE_CHECKING:
    from trimserve.vocab.map import VocabMap

# What only some selections have to tell.
_OPTIONAL = ("profiles", "output_coverage", "head_rows", "head_coverage")


def selection_document(vocab: "VocabMap", path: str | None) -> dict[str, Any]:
    """The JSON document of a vocab that was written to `path`."""
    rule = vocab.rule
    document = {
        "path": path,
        "kept": len(vocab),
        "vocab_size": vocab.vocab_size,
        "coverage": rule["coverage"],
        "missing_mass": rule["missing_mass"],
        "missing_mass_bound": rule["missing_mass_bound"],
        "reasons": rule["reasons"],
        "bytes_kept": _row_bytes(vocab),
        "bytes_before": vocab.vocab_size * rule["row_bytes"],
    }
    return document | {name: rule[name] for name in _OPTIONAL if name in rule}


def _row_bytes(vocab: "VocabMap") -> int:
    """Bytes of the kept rows; embedding and head of an untied model are alike, a bias is next to nothing."""
    row_bytes: int = vocab.rule["row_bytes"]
    return (len(vocab) + len(vocab.head)) * row_bytes // 2


def selection_summary(vocab: "VocabMap", path: str | None) -> str:
    """Describe a vocab for people: how many ids, why, and what that covers."""
    rule, size = vocab.rule, vocab.vocab_size
    facts = [("kept ids", f"{len(vocab):,} of {size:,} ({percent(len(vocab) / size)})")]
    facts += [(f"  {reason}", f"{count:,}") for reason, count in rule["reasons"].items()]
    facts.append(("coverage", f"{percent(rule['coverage'])} of the {rule['tokens']:,} tokens profiled"))
    facts += [(f"  {name}", percent(share)) for name, share in rule.get("profiles", {}).items()]
    if "output_coverage" in rule:
        facts.append(("  completions", percent(rule["output_coverage"])))
    if "head_rows" in rule:
        covered = percent(rule["head_coverage"])
        facts.append(("head", f"{rule['head_rows']:,} of the kept ids: {covered} of completions"))
    facts.append(("unseen-token rate", missing_mass_text(rule["missing_mass"], rule["missing_mass_bound"])))
    if row_bytes := rule["row_bytes"]:
        kept, before = human_bytes(_row_bytes(vocab)), human_bytes(size * row_bytes)
        facts.append(("bytes of rows", f"{kept} of {before}"))
    title = f"vocab for {rule['tokenizer_name']}: {path or 'nothing was written (dry run)'}"
    return "\n".join([title, *(f"{k:<20}{v}" for k, v in facts)])


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
        facts.append(("unreachable tokens", f"{dead:,} of the vocab can come of no text: free to drop"))
    return "\n".join(f"{name:<20}{value}" for name, value in facts)


def profile_document(profile: Profile, path: str) -> dict[str, Any]:
    """The JSON document of a profile that was written to `path`."""
    return {
        "path": path,
        "texts": profile.texts,
        "characters": profile.characters,
        "tokens": profile.tokens,
        "distinct": profile.distinct,
        "vocab_size": profile.vocab_size,
        "structural": int(profile.structural.size),
        "beyond_rows": profile.beyond_rows,
        "missing_mass": profile.missing_mass,
        "missing_mass_bound": profile.missing_mass_bound,
        "missing_mass_likely": profile.missing_mass_likely,
        "document_missing_mass": profile.document_missing_mass,
    }


def profile_summary(profile: Profile, path: str) -> str:
    """Describe a profile for people: what was counted, and the coverage at a few K."""
    facts = [
        ("texts", f"{profile.texts:,}"),
        ("characters", f"{profile.characters:,}"),
        ("tokens", f"{profile.tokens:,}"),
        ("distinct ids", f"{profile.distinct:,} of {profile.vocab_size:,}"),
        ("structural ids", f"{profile.structural.size:,}"),
        ("unseen-token rate", missing_mass_text(profile.missing_mass, profile.missing_mass_bound)),
    ]
    if (unseen := profile.document_missing_mass) is not None:
        facts.append(
            ("  leave-one-out", f"{percent(unseen)} of a further document, by leaving out each in turn")
        )
    if profile.beyond_rows:
        facts.append(("ids without a row", f"{profile.beyond_rows:,} occurrences, not counted"))
    lines = [f"{name:<20}{value}" for name, value in facts]
    return "\n".join([f"profile of {profile.tokenizer_name}: {path}", *lines, "", _curve_table(profile)])


def missing_mass_text(mass: float, bound: float) -> str:
    """Format an unseen-token rate with its bound."""
    return f"{percent(mass)} (at most {percent(bound)} at {100 * CONFIDENCE:.0f} % confidence)"


def _curve_table(profile: Profile) -> str:
    rows = [
        (f"{kept:,}", percent(kept / profile.vocab_size), percent(covered), _bytes(kept * profile.row_bytes))
        for kept, covered in coverage_curve(profile)
    ]
    return table(["kept ids", "of the vocab", "coverage", "bytes of rows"], rows)


def _bytes(count: int) -> str:
    return human_bytes(count) if count else "-"
