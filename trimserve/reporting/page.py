"""The report as one HTML file: no script, no font, no image, nothing fetched."""

from collections.abc import Iterable
from pathlib import Path, PurePath

from trimserve.arguments import checked
from trimserve.console import human_bytes
from trimserve.reporting import sections
from trimserve.reporting.charts import share_text
from trimserve.reporting.facts import Report
from trimserve.reporting.markup import per_thousand, safe, tile, times
from trimserve.version import __version__

_SECTIONS = (
    sections.coverage,
    sections.cost,
    sections.corpus,
    sections.kinds,
    sections.dropped,
    sections.domains,
    sections.completions,
    sections.verification,
    sections.method,
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: vocabulary report</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
<footer>Made by trimserve {version}. It holds counts of tokens and no text.</footer>
</main>
</body>
</html>
"""


@checked
def render(report: Report, title: str) -> str:
    """Write the page.

    Args:
        report: its numbers.
        title: what was profiled, as the heading.
    """
    parts = [_header(report, title), *(make(report) for make in _SECTIONS)]
    return _PAGE.format(
        title=safe(title),
        style=Path(__file__).with_name("page.css").read_text("utf-8"),
        body="\n".join(part for part in parts if part),
        version=__version__,
    )


def _header(report: Report, title: str) -> str:
    choice = report.choice
    model = "/".join(PurePath(report.model).parts[-2:])  # a whole path says more than readers need
    return (
        f'<header><p class="eyebrow"><span>Vocabulary report</span> · {safe(model)}</p><h1>{safe(title)}</h1>'
        f'<p class="lead">{choice.kept:,} of {report.vocab_size:,} vocabulary rows '
        f"({share_text(choice.kept / report.vocab_size)}) hold {share_text(choice.coverage)} of the "
        f"{report.corpus.tokens:,} tokens profiled. In {report.further}, "
        f"{per_thousand(choice.cold_per_thousand)} of 1,000 tokens are expected to be cold: they are served "
        f'too, from rows that stay in a file.</p><dl class="tiles">{"".join(_tiles(report))}</dl></header>'
    )


def _tiles(report: Report) -> Iterable[str]:
    choice, missing = report.choice, report.missing
    unseen = missing.estimate if missing.documents is None else missing.documents
    yield tile("Kept ids", f"{choice.kept:,}", f"of {report.vocab_size:,}")
    yield tile("Coverage", share_text(choice.coverage), "of the profiled tokens")
    if choice.held_out is not None:
        yield tile(
            "Held out", share_text(choice.held_out), f"of {report.held_out_tokens or 0:,} other tokens"
        )
    yield tile("Cold", per_thousand(choice.cold_per_thousand), f"of 1,000 tokens of {report.further}")
    yield tile("Never seen", share_text(unseen), f"of the tokens of {report.further}")
    if choice.weight_bytes is not None and report.full_weight_bytes:
        yield tile("Weights", human_bytes(choice.weight_bytes), f"of {human_bytes(report.full_weight_bytes)}")
    if choice.decode_ratio is not None:
        yield tile("Decoding", times(choice.decode_ratio), "by the weight bytes read a token")
