"""What `profile` and `merge` say about a profile."""

from typing import Any

from trimserve.estimates import CONFIDENCE
from trimserve.profiling import Profile
from trimserve.ranking import coverage_curve
from trimserve.report import human_bytes, percent, table


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
        ("missing mass", missing_mass_text(profile.missing_mass, profile.missing_mass_bound)),
    ]
    if (unseen := profile.document_missing_mass) is not None:
        facts.append(("  of documents", f"{percent(unseen)}, with each held back in turn"))
    if profile.beyond_rows:
        facts.append(("ids without a row", f"{profile.beyond_rows:,} occurrences, not counted"))
    lines = [f"{name:<18}{value}" for name, value in facts]
    return "\n".join([f"profile of {profile.tokenizer_name}: {path}", *lines, "", _curve_table(profile)])


def missing_mass_text(mass: float, bound: float) -> str:
    """Format a missing mass with its bound."""
    return f"{percent(mass)} (at most {percent(bound)} at {100 * CONFIDENCE:.0f} % confidence)"


def _curve_table(profile: Profile) -> str:
    rows = [
        (f"{kept:,}", percent(kept / profile.vocab_size), percent(covered), _bytes(kept * profile.row_bytes))
        for kept, covered in coverage_curve(profile)
    ]
    return table(["kept ids", "of the vocab", "coverage", "bytes of rows"], rows)


def _bytes(count: int) -> str:
    return human_bytes(count) if count else "-"
