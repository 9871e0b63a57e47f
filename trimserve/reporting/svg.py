"""Line charts as SVG text: axes, lines with labels at their ends, marks. Colours come from the page's CSS."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_LABEL_STEP = 16  # least distance of two labels, px
_LETTER = 7.2  # mean width of a bold letter of a label, px
_LINE = 15  # from one line of a label to the next, px


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: `place` maps a value to 0..1, `ticks` are values with their labels."""

    title: str
    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve, its points (x, y) by increasing x; `style` is a CSS class."""

    label: str
    points: tuple[tuple[float, float], ...]
    style: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A point on a curve with a line down to the x axis and a label, of up to two lines."""

    x: float
    y: float
    label: tuple[str, ...]
    style: str


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height of a chart and its margins, px."""

    width: int
    height: int
    left: int
    right: int
    top: int = 26
    bottom: int = 46

    @property
    def inner_width(self) -> int:
        """Width of what the axes enclose."""
        return self.width - self.left - self.right

    @property
    def inner_height(self) -> int:
        """Height of what the axes enclose."""
        return self.height - self.top - self.bottom


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything a chart shows; `summary` says it in words to those who cannot see it."""

    title: str
    summary: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()


def log_axis(title: str, low: float, high: float) -> Axis:
    """A logarithmic axis with its ticks at 1, 2 and 5 times a power of ten, as many as have room."""
    low, high = max(low, 1e-12), max(high, low * 1.01)
    span = math.log(high / low)
    steps = (1,) if span > math.log(5e4) else (1, 3) if span > math.log(200) else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [step * 10.0**power for power in powers for step in steps]
    ticks = tuple((value, short(value)) for value in values if low * 0.999 <= value <= high * 1.001)
    return Axis(title, lambda value: math.log(max(value, low) / low) / span, ticks)


def linear_axis(title: str, low: float, high: float, label: Callable[[float], str]) -> Axis:
    """A linear axis with four to six round ticks, its end at the first of them beyond `high`."""
    rough = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    end = low + step * math.ceil((high - low) / step - 1e-9)
    count = round((end - low) / step)
    ticks = tuple((low + step * number, label(low + step * number)) for number in range(count + 1))
    return Axis(title, lambda value: (value - low) / (end - low), ticks)


def short(value: float) -> str:
    """A number in at most four characters.

    Example:
        >>> [short(value) for value in (128, 1000, 30_000, 2_000_000, 0.05)]
        ['128', '1k', '30k', '2M', '0.05']
    """
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def draw(chart: Chart, size: Size, style: str) -> str:
    """Draw a chart; `style` is the CSS class of the svg element."""
    body = [
        *_grid(chart, size),
        *(_curve(line, chart, size) for line in chart.lines),
        *_end_labels(chart, size),
        *_marks(chart, size),
    ]
    summary = html.escape(chart.summary, quote=True)
    return (
        f'<svg class="chart {style}" viewBox="0 0 {size.width} {size.height}" role="img" '
        f'aria-label="{summary}">' + "".join(body) + "</svg>"
    )


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    """A line of text."""
    named = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{html.escape(content)}</text>'


def _x(value: float, chart: Chart, size: Size) -> float:
    return size.left + size.inner_width * min(max(chart.x.place(value), 0.0), 1.0)


def _y(value: float, chart: Chart, size: Size) -> float:
    return size.top + size.inner_height * (1 - min(max(chart.y.place(value), 0.0), 1.0))


def _grid(chart: Chart, size: Size) -> Iterable[str]:
    right, base = size.width - size.right, size.height - size.bottom
    for value, label in chart.y.ticks:
        y = _y(value, chart, size)
        yield f'<line class="grid" x1="{size.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield text(size.left - 8, y + 4, label, "tick", "end")
    for value, label in _roomy(chart.x.ticks, size):
        x = _x(value, chart, size)
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>'
        yield text(x, base + 19, label, "tick", "middle")
    yield f'<line class="axis" x1="{size.left}" x2="{right}" y1="{base}" y2="{base}"/>'
    yield text(right, size.height - 6, chart.x.title, "axis-title", "end")
    yield text(0, 12, chart.y.title, "axis-title")


def _roomy(ticks: Sequence[tuple[float, str]], size: Size) -> Sequence[tuple[float, str]]:
    """Every n-th tick, so that labels do not touch."""
    every = math.ceil(len(ticks) * 40 / max(size.inner_width, 1))
    return ticks[:: max(every, 1)]


def _curve(line: Line, chart: Chart, size: Size) -> str:
    points = " ".join(f"{_x(x, chart, size):.1f},{_y(y, chart, size):.1f}" for x, y in line.points)
    return f'<polyline class="line {line.style}" points="{points}"/>'


def _end_labels(chart: Chart, size: Size) -> Iterable[str]:
    """Labels beside the right ends of the lines, pushed apart; none where there is no margin for them."""
    if size.right < 60:
        return
    lines = sorted((line for line in chart.lines if line.label), key=lambda line: -line.points[-1][1])
    lowest = -math.inf
    for line in lines:
        lowest = max(_y(line.points[-1][1], chart, size), lowest + _LABEL_STEP * (1 + line.label.count("\n")))
        x = _x(line.points[-1][0], chart, size) + 8
        for number, part in enumerate(line.label.split("\n")):
            yield text(x, lowest + 4 + _LINE * number, part, f"label {line.style}")


def _marks(chart: Chart, size: Size) -> Iterable[str]:
    taken: list[_Box] = []
    for mark in chart.marks:
        x, y, base = _x(mark.x, chart, size), _y(mark.y, chart, size), size.height - size.bottom
        yield f'<line class="drop {mark.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{base}"/>'
        yield f'<circle class="dot {mark.style}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
        box = _free_box(mark, x, size, taken)
        taken.append(box)
        anchor, place = ("end", box.right) if box.right < x else ("start", box.left)
        for number, part in enumerate(mark.label):
            yield text(place, box.top + 11 + _LINE * number, part, f"label {mark.style}", anchor)


@dataclass(frozen=True, slots=True)
class _Box:
    """Where a label stands, px."""

    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: "_Box") -> bool:
        beside = self.right < other.left or other.right < self.left
        return not (beside or self.bottom < other.top or other.bottom < self.top)


def _free_box(mark: Mark, x: float, size: Size, taken: Sequence[_Box]) -> _Box:
    """The lowest place beside a mark that no other label has: right of it, else left of it.

    Curves that rise leave room below them, so that labels stand just above the axis.
    """
    wide, tall = max(map(len, mark.label)) * _LETTER, _LINE * len(mark.label)
    boxes = [
        _Box(left, bottom - tall, left + wide, bottom)
        for bottom in range(size.height - size.bottom - 6, size.top, -_LINE)
        for left in (x + 8, x - 8 - wide)
        if left >= size.left and left + wide <= size.width - min(size.right, 4)
    ]
    return next((box for box in boxes if not any(map(box.touches, taken))), boxes[0])
