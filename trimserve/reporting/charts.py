"""The charts of a report: which numbers on which axes."""

import math
from collections.abc import Callable

from trimserve.console import human_bytes
from trimserve.reporting.facts import Point, Report
from trimserve.reporting.markup import times
from trimserve.reporting.svg import Axis, Chart, Line, Mark, Size, draw, linear_axis, log_axis

# Text does not shrink with a chart, so that phones get a drawing of their own.
_WIDE, _NARROW = "wide", "narrow"
_MOST_DIGITS = 4
_FULL_SIZES = (Size(820, 380, 72, 112), Size(350, 300, 72, 12))
_PLAIN_SIZES = (Size(820, 320, 60, 20), Size(350, 270, 52, 16))
_HALF_SIZES = (Size(396, 270, 60, 14), Size(350, 250, 60, 14))
_ROWS_OF_K = 8


def both(chart: Chart, *, half: bool = False) -> str:
    """Draw a chart for wide and for narrow screens; the page's CSS shows one of them."""
    labelled = any(line.label for line in chart.lines)
    wide, narrow = _HALF_SIZES if half else _FULL_SIZES if labelled else _PLAIN_SIZES
    return draw(chart, wide, _WIDE) + draw(chart, narrow, _NARROW)


def share_text(share: float) -> str:
    """A share near one with as many nines as it has, and one digit more; a small one with two digits.

    Example:
        >>> [share_text(share) for share in (0.0, 1e-7, 0.00042, 0.512, 0.9, 0.99954, 1 - 1e-9, 1.0)]
        ['0 %', '< 0.001 %', '0.042 %', '51 %', '90 %', '99.95 %', '> 99.9999 %', '100 %']
    """
    missing = 1 - share
    if missing <= 0:
        return "100 %"
    if 0 < share < 1e-5:
        return "< 0.001 %"
    if share < 0.9:
        return f"{100 * share:.2g} %"
    digits = math.floor(-math.log10(missing) + 1e-9) - 1
    if digits > _MOST_DIGITS:
        return f"> {100 * (1 - 10.0 ** -(_MOST_DIGITS + 2)):.{_MOST_DIGITS}f} %"
    # Cut, not rounded: a share below one never reads 100 %.
    text = f"{math.floor(share * 10 ** (digits + 2) + 1e-6) / 10**digits:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + " %"


def _nines(report: Report) -> Axis:
    """Coverage so that each further nine takes the same height: 90 %, 99 %, 99.9 %."""
    lowest = min(min(point.coverage, point.expected, _held_out(point)) for point in report.curve)
    largest = max((point.coverage for point in report.curve if point.coverage < 1 - 1e-12), default=0.0)
    top = min(max(math.ceil(-math.log10(1 - max(largest, report.choice.coverage * 0.999999))), 2), 5)
    bottom = min(-math.log10(max(1 - lowest, 1e-6)), top - 1)
    ticks = [(1 - 10.0**-n, share_text(1 - 10.0**-n)) for n in range(1, top + 1)]
    if bottom < math.log10(2):
        ticks.insert(0, (0.5, "50 %"))
    if report.curve[-1].coverage > 1 - 10.0**-top:
        ticks[-1] = ticks[-1][0], f"≥ {ticks[-1][1]}"
    return Axis(
        "share of the tokens whose id is kept",
        lambda share: (-math.log10(max(1 - share, 10.0**-top)) - bottom) / (top - bottom),
        tuple(tick for tick in ticks if tick[0] >= lowest),
    )


def rows_of_k(report: Report) -> list[tuple[Point, str]]:
    """The points that tables show: some of the curve up to where it ends to rise, the knee, the choice."""
    full = report.curve[-1].coverage
    rising = [point for point in report.curve if point.coverage < full]
    rising += report.curve[len(rising) : len(rising) + 1]
    shown = rising[:: math.ceil(len(rising) / _ROWS_OF_K)]
    points = {point.kept: (point, "") for point in [*shown, rising[-1]]}
    points |= {report.knee.kept: (report.knee, "knee"), report.choice.kept: (report.choice, "chosen")}
    return [points[kept] for kept in sorted(points)]


def _held_out(point: Point) -> float:
    return point.coverage if point.held_out is None else point.held_out


def coverage_chart(report: Report) -> Chart:
    """Coverage against K: of the profiled text, expected in text to come, and in the held-out text."""
    choice, knee = report.choice, report.knee
    lines = [
        _line("profiled text", report, lambda point: point.coverage, "profiled"),
        _line(
            report.further.replace("further ", "further\n"), report, lambda point: point.expected, "expected"
        ),
    ]
    if choice.held_out is not None:
        lines.append(_line("held-out text", report, _held_out, "held-out"))
    return Chart(
        title="Coverage",
        summary=(
            f"Coverage against kept ids. {choice.kept:,} ids keep {share_text(choice.coverage)} of the "
            f"profiled tokens; {share_text(choice.expected)} are expected in {report.further}."
        ),
        x=log_axis("kept ids", report.curve[0].kept, report.vocab_size),
        y=_nines(report),
        lines=tuple(lines),
        marks=(
            Mark(choice.kept, choice.coverage, ("chosen", f"{choice.kept:,}"), "chosen"),
            Mark(knee.kept, knee.coverage, ("knee", f"{knee.kept:,}"), "knee"),
        ),
    )


def _line(label: str, report: Report, value: Callable[[Point], float], style: str) -> Line:
    return Line(label, tuple((point.kept, value(point)) for point in report.curve), style)


def bytes_chart(report: Report) -> Chart | None:
    """Bytes of all weights against K; None where they are not known."""
    if report.full_weight_bytes is None or report.choice.weight_bytes is None:
        return None
    choice, full = report.choice, report.full_weight_bytes
    points = tuple((point.kept, float(point.weight_bytes or 0)) for point in report.curve)
    return Chart(
        title="Weights",
        summary=f"Bytes of the weights: {human_bytes(report.choice.weight_bytes)} of {human_bytes(full)}.",
        x=log_axis("kept ids", report.curve[0].kept, report.vocab_size),
        y=linear_axis("bytes of the weights", 0, full, human_bytes),
        lines=(Line("", (*points, (report.vocab_size, float(full))), "profiled"),),
        marks=(
            Mark(
                choice.kept,
                float(choice.weight_bytes or 0),
                (human_bytes(choice.weight_bytes or 0),),
                "chosen",
            ),
        ),
    )


def speed_chart(report: Report) -> Chart | None:
    """The most that decoding can gain against K; None for models without a head or weights."""
    choice = report.choice
    if choice.decode_ratio is None:
        return None
    points = tuple((point.kept, point.decode_ratio or 1.0) for point in report.curve)
    largest = max(ratio for _, ratio in points)
    return Chart(
        title="Decode speed",
        summary=f"Decoding at most {choice.decode_ratio:.2f} times as fast, by the bytes read a token.",
        x=log_axis("kept ids", report.curve[0].kept, report.vocab_size),
        y=linear_axis("times as fast, at most", 0, largest, lambda value: f"{value:g} ×"),  # noqa: RUF001
        lines=(Line("", (*points, (report.vocab_size, 1.0)), "profiled"),),
        marks=(Mark(choice.kept, choice.decode_ratio, (times(choice.decode_ratio),), "chosen"),),
    )


def corpus_chart(report: Report) -> Chart | None:
    """Unseen tokens of text to come against the size of the corpus; None for a corpus of two units."""
    curve = report.corpus_curve
    seen = [(size, 1000 * share) for size, share in zip(curve.sizes, curve.unseen, strict=True)]
    if len(seen) < 3:
        return None
    last = seen[-1][1]
    shown = [(size, max(value, last / 2, 1e-3)) for size, value in seen]
    return Chart(
        title="Corpus size",
        summary=f"After {seen[-1][0]:,} {curve.unit}, {last:.2g} of 1,000 further tokens are unseen.",
        x=log_axis(f"{curve.unit} profiled", seen[0][0], seen[-1][0]),
        y=log_axis(f"unseen of 1,000 tokens of {report.further}", max(last * 0.5, 1e-3), shown[0][1]),
        lines=(Line("", tuple(shown), "unseen"),),
        marks=(Mark(seen[-1][0], max(last, 1e-3), (f"{last:.2g} of 1,000",), "unseen"),),
    )
