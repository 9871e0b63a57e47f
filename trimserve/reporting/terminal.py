"""The report on a terminal: a table and a sparkline."""

import math

from trimserve.console import human_bytes, percent, table
from trimserve.reporting.charts import rows_of_k, share_text
from trimserve.reporting.facts import Point, Report

_BARS = "▁▂▃▄▅▆▇█"
_KINDS, _DROPPED, _SPARKS = 10, 10, 56


def summarise(report: Report, title: str) -> str:
    """Describe a report in some forty lines."""
    choice, missing = report.choice, report.missing
    facts = [
        ("profiled", f"{report.corpus.tokens:,} tokens of {report.corpus.texts:,} documents"),
        (
            "chosen",
            f"{choice.kept:,} of {report.vocab_size:,} ids: {share_text(choice.coverage)} of the tokens",
        ),
        ("recommended", f"{report.recommended.kept:,} ids: {report.recommended.reason}"),
        ("knee", f"{report.knee.kept:,} ids: {share_text(report.knee.coverage)}"),
        ("cold tokens", f"{choice.cold_per_thousand:.3g} of 1,000 expected in {report.further}"),
        ("enough", f"{report.enough:,} ids: no more is expected to be covered beyond"),
        (
            "unseen-token rate",
            f"{share_text(missing.estimate)} (95 %: at most {share_text(missing.likely_bound)}, or "
            f"{share_text(missing.guaranteed_bound)} whatever the distribution)",
        ),
    ]
    if missing.documents is not None:
        facts.append(
            (
                "  leave-one-out",
                f"{share_text(missing.documents)} of a further document, by leaving out each in turn",
            )
        )
    if choice.held_out is not None:
        facts.append(("held out", f"{share_text(choice.held_out)} of {report.held_out_tokens or 0:,} tokens"))
    if report.dead_ids is not None:
        facts.append(("unreachable tokens", f"{report.dead_ids:,} can come of no text: free to drop"))
    if report.verification is not None:
        facts.append(("verified", "yes" if report.verification.get("ok") else "FAILED"))
    parts = [
        title,
        *(f"{name:<20}{value}" for name, value in facts),
        "",
        _sparkline(report),
        "",
        _k_table(report),
    ]
    return "\n".join([*parts, *_kinds(report), *_dropped(report), *_domains(report)])


def _sparkline(report: Report) -> str:
    """Coverage in equal steps of ln K, a step a character; each nine takes the same height."""
    first, last = report.curve[0], report.curve[-1]
    step = (last.kept / first.kept) ** (1 / (_SPARKS - 1))
    shown = [_reached(report, first.kept * step**number) for number in range(_SPARKS)]
    nines = [min(-math.log10(max(1 - point.coverage, 1e-5)), 5.0) for point in shown]
    low, high = min(nines), max(nines)
    bars = "".join(_BARS[round((n - low) / ((high - low) or 1) * (len(_BARS) - 1))] for n in nines)
    place = sum(point.kept < report.choice.kept for point in shown)
    ends = f"{share_text(first.coverage)} at {first.kept:,} to {share_text(last.coverage)} at {last.kept:,}"
    return f"coverage  {bars}  {ends}\n{' ' * (10 + min(place, _SPARKS - 1))}^ {report.choice.kept:,}"


def _reached(report: Report, kept: float) -> Point:
    """The last point of the curve up to a K."""
    return [point for point in report.curve if point.kept <= kept * 1.000001][-1]


def _k_table(report: Report) -> str:
    header = ["kept ids", "coverage", "cold of 1,000"]
    choice = report.choice
    header += ["held out"] * (choice.held_out is not None) + ["weights"] * (choice.weight_bytes is not None)
    header += ["decoding"] * (choice.decode_ratio is not None)
    return table(header, [_k_row(point, name) for point, name in rows_of_k(report)])


def _k_row(point: Point, name: str) -> list[str]:
    cells = [f"{point.kept:,} {name}".strip(), share_text(point.coverage), f"{point.cold_per_thousand:.3g}"]
    cells += [] if point.held_out is None else [share_text(point.held_out)]
    cells += [] if point.weight_bytes is None else [human_bytes(point.weight_bytes)]
    return cells + ([] if point.decode_ratio is None else [f"<= {point.decode_ratio:.2f} x"])


def _kinds(report: Report) -> list[str]:
    if report.kinds is None:
        return []
    rows = [
        [kind.kind, percent(kind.share), f"{kind.kept_ids:,} of {kind.ids:,}"]
        for kind in report.kinds[:_KINDS]
    ]
    return ["", table(["kind", "of the text", "rows kept"], rows)]


def _dropped(report: Report) -> list[str]:
    rows = [
        ["-" if token.text is None else repr(token.text), f"{token.token_id:,}", f"{token.count:,}"]
        for token in report.dropped[:_DROPPED]
    ]
    return ["", table(["heaviest dropped", "id", "occurrences"], rows)] if rows else []


def _domains(report: Report) -> list[str]:
    if report.domains is None:
        return []
    found = report.domains
    rows = [[name, *map(share_text, row)] for name, row in zip(found.names, found.coverage, strict=True)]
    rows.append(["this choice", *map(share_text, found.chosen)])
    return ["", table(["chosen from", *found.names], rows)]
