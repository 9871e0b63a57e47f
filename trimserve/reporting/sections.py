"""The sections of the report, each from the numbers; an empty text where there is nothing to say."""

import html
from typing import Any

from trimserve.console import human_bytes
from trimserve.profiles.estimates import CONFIDENCE
from trimserve.reporting import charts
from trimserve.reporting.charts import share_text
from trimserve.reporting.facts import Point, Report
from trimserve.reporting.markup import (
    NOTHING,
    Row,
    bar,
    per_thousand,
    safe,
    section,
    table,
    times,
    token,
)

# Cold tokens of 1,000 at which a cell of the domain table is as dark as it gets.
_DARKEST = 100


def coverage(report: Report) -> str:
    """The curve of coverage, and its numbers at a few K."""
    chart = charts.coverage_chart(report)
    labels = [(line.style, line.label.replace("\n", " ")) for line in chart.lines]
    legend = "".join(f'<li class="{style}">{safe(label)}</li>' for style, label in labels)
    counted = report.corpus_curve.unit == "documents"
    rare = "that a single document holds" if counted else "that occur once"
    return section(
        "What each K covers",
        "Each further nine takes the same height. The knee is where a further id begins to give less than "
        f"the average one. The expectation for {report.further} takes ids {rare} for cold: had those tokens "
        f"come later, the ids would not have been kept. Beyond {report.enough:,} ids it rises no more.",
        f'<figure><ul class="legend">{legend}</ul>{charts.both(chart)}</figure>{_k_table(report)}'
        f"{_recommended(report)}{_reasons(report)}",
    )


def _recommended(report: Report) -> str:
    """The K to take, as a sentence."""
    found = report.recommended
    return f'<p class="after">Recommended: {found.kept:,} ids, {safe(found.reason)}.</p>'


def _reasons(report: Report) -> str:
    """Why the chosen ids stay, as a sentence."""
    names = {
        "structural": "are structural (special tokens, bytes and the like)",
        "profile": "stay for their frequency",
        "explicit": "were named",
        "fill": "fill K up",
        "dependency": "are needed by the cut tokenizer",
    }
    parts = [f"{count:,} {names[reason]}" for reason, count in report.reasons.items() if count]
    return f'<p class="soft after">Of the chosen ids, {safe(", ".join(parts))}.</p>' if parts else ""


def _k_table(report: Report) -> str:
    choice = report.choice
    header = ["Kept ids", "Coverage", "Cold of 1,000"]
    header += ["Held out"] * (choice.held_out is not None)
    header += ["Weights"] * (choice.weight_bytes is not None)
    header += ["Decoding"] * (choice.decode_ratio is not None)
    return table(header, [_k_row(point, name) for point, name in charts.rows_of_k(report)])


def _k_row(point: Point, name: str) -> Row:
    cells = [share_text(point.coverage), per_thousand(point.cold_per_thousand)]
    cells += [] if point.held_out is None else [share_text(point.held_out)]
    cells += [] if point.weight_bytes is None else [human_bytes(point.weight_bytes)]
    cells += [] if point.decode_ratio is None else [times(point.decode_ratio)]
    label = f"{point.kept:,}" + (f" <small>{name}</small>" if name else "")
    return Row(label, cells, "picked" if name == "chosen" else "")


def cost(report: Report) -> str:
    """Bytes and speed against K."""
    drawn = [chart for chart in (charts.bytes_chart(report), charts.speed_chart(report)) if chart]
    if not drawn:
        return ""
    figures = "".join(
        f"<figure><h3>{safe(chart.title)}</h3>{charts.both(chart, half=len(drawn) > 1)}</figure>"
        for chart in drawn
    )
    lead = "Bytes are those of the stored checkpoint, without the cold rows, which stay in a file."
    if len(drawn) > 1:
        lead += (
            " The speed is the most that decoding can gain: the weight bytes that the full model reads for "
            "one token over those at K."
        )
    return section("What each K costs", lead, f'<div class="pair">{figures}</div>' if drawn[1:] else figures)


def corpus(report: Report) -> str:
    """How much of a further text is unseen, and whether more text would help."""
    read, missing, chart = report.corpus, report.missing, charts.corpus_chart(report)
    sure = f"{100 * CONFIDENCE:.0f} % bound"
    rows = [
        Row("Good and Turing: N1 / N", [share_text(missing.estimate)]),
        Row(f"{sure} in the limit of many tokens", [share_text(missing.likely_bound)]),
        Row(f"{sure} whatever the distribution", [share_text(missing.guaranteed_bound)]),
    ]
    if missing.documents is not None:
        rows.insert(
            0, Row("Leave-one-out: each document left out in turn", [share_text(missing.documents)], "picked")
        )
    figure = f"<figure>{charts.both(chart)}</figure>" if chart else ""
    files = [
        Row(safe(s.name), [human_bytes(s.bytes), f"<small>{s.sha256[:12]}</small>"]) for s in read.sources
    ]
    return section(
        "Is the corpus large enough?",
        _verdict(report),
        f"{figure}{table(['Share of future tokens never seen', ''], rows)}"
        f'<p class="soft after">{read.texts:,} documents, {read.characters:,} characters, {read.tokens:,} '
        f"tokens; {read.distinct:,} different ids occur.</p>"
        f"<details><summary>Files read</summary>{table(['File', 'Bytes', 'sha256'], files)}</details>",
    )


def _verdict(report: Report) -> str:
    curve = report.corpus_curve
    unseen, gained = 1000 * curve.unseen[-1], 1000 * curve.last_doubling
    said = (
        f"After all {curve.sizes[-1] + 1:,} {curve.unit}, {per_thousand(unseen)} of 1,000 tokens of "
        f"{report.further} are expected to have an id that was never seen."
    )
    if len(curve.sizes) < 2:
        return said
    return f"{said} The second half of the corpus lowered that number by {per_thousand(gained)}."


def kinds(report: Report) -> str:
    """What stays of each script and kind, and the unreachable tokens."""
    if report.kinds is None:
        return ""
    rows = []
    for kind in report.kinds:
        cold = per_thousand(1000 * (1 - kind.kept_share / kind.share)) if kind.share else NOTHING
        share = share_text(kind.share) if kind.share else NOTHING
        kept = bar(kind.kept_ids / max(kind.ids, 1))
        rows.append(Row(safe(kind.kind), [share, f"{kind.kept_ids:,} of {kind.ids:,}", kept, cold]))
    dead = (
        f'<p class="after"><strong>{report.dead_ids:,} ids are dead</strong>: no text whatever leads to '
        "them, which follows from how this tokenizer works. They are free to drop.</p>"
        if report.dead_ids
        else ""
    )
    return section(
        "What stays, by kind",
        "Scripts are those of the letters. Code is what looks like it: operators, brackets, names in "
        "camelCase or snake_case. Bytes are single bytes and parts of characters.",
        table(["Kind", "Of the text", "Rows kept", "", "Cold of 1,000"], rows, optional={3}) + dead,
    )


def dropped(report: Report) -> str:
    """The heaviest tokens that have no row."""
    if not report.dropped:
        return ""
    most, least = report.dropped[0].count, report.dropped[-1].count
    items = []
    for entry in report.dropped:
        name = token(entry.text) if entry.text is not None else f"<code>#{entry.token_id}</code>"
        width = f"{100 * entry.count / most:.0f}%" if most > least else "0%"
        items.append(
            f'<li title="id {entry.token_id}" style="--w:{width}">{name}<span>{entry.count:,}</span></li>'
        )
    left_out = " Those that few documents hold are left out." if report.dropped_by_documents else ""
    return section(
        "The heaviest tokens that are dropped",
        f"Tokens of the profiled text without a row at this K, and how often they occur.{left_out}",
        f'<ol class="tokens">{"".join(items)}</ol>',
    )


def completions(report: Report) -> str:
    """How large sets of their own would be for prompts and completions."""
    if (found := report.completions) is None:
        return ""
    rows = [
        Row("Input: prompts and completions", [f"{found.input_ids:,}"]),
        Row("Output: completions alone", [f"{found.output_ids:,}"]),
        Row("Kept" if found.head_rows else "Kept for both", [f"{report.choice.kept:,}"], "picked"),
    ]
    apart = ""
    if found.head_rows is not None and found.head_coverage is not None:
        rows.append(Row("Rows of the head", [f"{found.head_rows:,}"], "picked"))
        apart = f" The head has rows for {share_text(found.head_coverage)} of them."
    return section(
        "Prompts and completions",
        "Decoding reads the head for each token. That of an untied model can keep the smaller number of ids "
        "(select --separate-output), a tied one shares its rows with the embedding.",
        f"{table(['For the same coverage', 'Ids'], rows)}"
        f'<p class="soft after">{found.tokens:,} tokens of completions, {share_text(found.coverage)} of them '
        f"kept.{apart}</p>",
    )


def domains(report: Report) -> str:
    """What the ids of one profile cover of the others, and how far apart they are."""
    if (found := report.domains) is None:
        return ""
    names = [safe(name) for name in found.names]
    rows = [Row(name, [_heat(s) for s in row]) for name, row in zip(names, found.coverage, strict=True)]
    rows.append(Row("this choice", [_heat(share) for share in found.chosen], "picked"))
    distances = [
        Row(name, [NOTHING if one == other else f"{value:.3f}" for other, value in enumerate(row)])
        for one, (name, row) in enumerate(zip(names, found.js_distance, strict=True))
    ]
    return section(
        "Domain against domain",
        f"Each row keeps {report.choice.kept:,} ids, the most frequent ones of one profile; each column is "
        "what they cover of another. The darker a cell, the more of its tokens are cold.",
        f"{table(['Chosen from', *names], rows)}<h3>Jensen-Shannon distance</h3>"
        '<p class="soft">0: the same share of every token; 1: no token in common.</p>'
        f"{table(['', *names], distances)}",
    )


def _heat(share: float) -> str:
    depth = min(1.0, 1000 * (1 - share) / _DARKEST)
    return f'<span class="heat" style="--cold:{55 * depth:.0f}">{share_text(share)}</span>'


def verification(report: Report) -> str:
    """What `trimserve verify` found."""
    if (found := report.verification) is None:
        return ""
    checks = found.get("checks", [])
    failed = sum(not check.get("ok") for check in checks)
    said = (
        f"{failed} of {len(checks)} checks failed." if failed else "Every check against the full model holds."
    )
    items = "".join(map(_check, checks))
    return section("What verification found", said, f'<ul class="checks">{items}</ul>')


def _check(check: dict[str, Any]) -> str:
    style = "" if check.get("ok") else ' class="failed"'
    name, detail = (safe(str(check.get(key, ""))) for key in ("name", "detail"))
    return f'<li{style}><strong>{name}</strong> <span class="soft">{detail}</span></li>'


def method(report: Report) -> str:
    """Definitions and sources."""
    entries = {
        "Coverage": "the share of token occurrences whose id is kept, of the text that was profiled.",
        "Never seen": (
            "N1 / N, the share of occurrences whose id occurs once (I. J. Good, Biometrika 40, 1953). Its "
            "bounds: by the normal limit of W. W. Esty (Ann. Statist. 11, 1983), and for any distribution "
            "from D. Berend and A. Kontorovich (Electron. Commun. Probab. 18, 2013) with C. McDiarmid "
            "(1989). All three take tokens for independent, which they are not: words come in bursts."
        ),
        "Corpus size": (
            f"the mean over all ways to draw that many {report.corpus_curve.unit} and to hold one more back, "
            "computed exactly: n of the others miss an id that d of D hold with probability "
            "C(D - d, n) / C(D - 1, n)."
        ),
        "Knee": "where the curve is farthest above the line between its ends (V. Satopää and others, 2011).",
    }
    if report.domains:
        entries["Distance"] = "the square root of J. Lin's divergence (IEEE Trans. Inf. Theory 37, 1991)."
    parts = "".join(
        f"<div><dt>{name}</dt><dd>{html.escape(text)}</dd></div>" for name, text in entries.items()
    )
    return section("How the numbers are found", "", f'<dl class="method">{parts}</dl>')
