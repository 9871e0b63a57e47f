"""What each figure shows: matplotlib axes filled from result rows, in the colours of a theme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.tables.common import quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours on a light or a dark page; the series differ in lightness too, for eyes and printers."""

    name: str
    text: str
    grid: str
    full: str
    compact: str
    exact: str
    other: str


# Okabe and Ito's palette, moved towards the page's contrast.
LIGHT = Theme("light", "#1f2328", "#d8dee4", "#8c959f", "#0072b2", "#d55e00", "#009e73")
DARK = Theme("dark", "#e6edf3", "#3d444d", "#9198a1", "#56b4e9", "#f0883e", "#3fb98f")
THEMES = (LIGHT, DARK)


def _style(axes: "Axes", theme: Theme, title: str) -> None:
    axes.set_title(title, loc="left", color=theme.text, fontsize=10.5, fontweight="bold")
    axes.set_facecolor("none")
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(theme.grid)
    axes.tick_params(colors=theme.text, length=0, labelsize=9)
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.set_axisbelow(True)


def _legend(axes: "Axes", theme: Theme, **options: Any) -> None:  # noqa: ANN401
    axes.legend(frameon=False, labelcolor=theme.text, fontsize=9, **options)


def _horizontal_bars(
    axes: "Axes",
    theme: Theme,
    names: Sequence[str],
    series: Mapping[str, tuple[Sequence[float], str]],
    form: str,
) -> None:
    """Groups of bars, the first on top, each with its number at its end."""
    height = 0.8 / len(series)
    longest = max(max(values) for values, _ in series.values())
    for place, (label, (values, colour)) in enumerate(series.items()):
        at = np.arange(len(names)) + (place - (len(series) - 1) / 2) * height
        axes.barh(at, values, height * 0.9, color=colour, label=label)
        for y, value in zip(at, values, strict=True):
            axes.text(
                value + 0.01 * longest, y, form.format(value), va="center", color=theme.text, fontsize=8.5
            )
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.14)
    axes.grid(axis="x", color=theme.grid, linewidth=0.6)


def decode(figure: "Figure", rows: Mapping[str, Sequence[Row]], theme: Theme) -> None:
    """Milliseconds a token of full, compact and exact decoding."""
    found = [row for row in rows["decode"] if row["stand"] >= 0.99]
    axes = figure.subplots()
    names = [f"{row['model']}\n{row['quantize'] or 'fp32'}, K = {row['kept']:,}" for row in found]
    colours = {"full": theme.full, "compact": theme.compact, "exact": theme.exact}
    series = {mode: ([_token_ms(row, mode) for row in found], colour) for mode, colour in colours.items()}
    _horizontal_bars(axes, theme, names, series, "{:.1f}")
    _style(axes, theme, "Milliseconds a token: less is faster")
    _legend(axes, theme, loc="lower right")


def _token_ms(row: Row, mode: str) -> float:
    """A mode's median; of exact mode as it runs by default, with the sketch where the model has one."""
    times = row["token_ms"]
    found = times.get("certified", times["exact"]) if mode == "exact" else times[mode]
    return float(found["median"])


def quality(figure: "Figure", rows: Mapping[str, Sequence[Row]], theme: Theme) -> None:
    """Nll a token and agreement with the full model, by K, in the domain and in another."""
    (row,) = rows["quality"]
    grid = figure.subplots(2, len(row["domains"]), sharex=True, squeeze=False)
    best_first = sorted(row["domains"].items(), key=lambda item: _worst_loss(item[1]))
    for column, (name, domain) in enumerate(best_first):
        _nll(grid[0][column], theme, f"{name.capitalize()} ({domain['corpus']})", domain)
        _agreement(grid[1][column], theme, domain["points"], row["answer_tokens"])
        grid[1][column].set_xlabel(f"K, kept rows of {row['vocab_size']:,}")
    grid[0][0].set_ylabel("nats a token of the original")
    grid[1][0].set_ylabel("agreement with the full model's answer")
    handles = {
        label: handle
        for axes in (grid[0][0], grid[1][0])
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        labelcolor=theme.text,
        fontsize=9,
    )


def _worst_loss(domain: Row) -> float:
    """What re-segmenting costs at the smallest K, in nats a token: least in the profile's own domain."""
    return max(float(point["resegmented_nll"]) for point in domain["points"]) - float(domain["full_nll"])


def _by_kept(axes: "Axes", theme: Theme, points: Sequence[Row]) -> None:
    ticks = [point["kept"] for point in points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick / 1024:.0f}k" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)


def _nll(axes: "Axes", theme: Theme, title: str, domain: Row) -> None:
    points = domain["points"]
    kept = [point["kept"] for point in points]
    cut = [point["resegmented_nll"] for point in points]
    axes.plot(kept, cut, "s--", color=theme.other, label="tokenizer cut to K", markersize=4)
    axes.axhline(domain["full_nll"], color=theme.full, linewidth=5, alpha=0.5, label="full model")
    exact = [point["exact_nll"] for point in points]
    axes.plot(kept, exact, "o-", color=theme.exact, label="exact mode", markersize=4)
    _by_kept(axes, theme, points)
    axes.set_ylim(0, None)
    _style(axes, theme, title)


def _agreement(axes: "Axes", theme: Theme, points: Sequence[Row], tokens: int) -> None:
    kept = [point["kept"] for point in points]
    looks = {
        "exact": ("o-", theme.exact, "exact mode"),
        "compact": ("^-", theme.compact, "compact mode"),
        "resegmented": ("s--", theme.other, "tokenizer cut to K"),
    }
    for name, (look, colour, label) in looks.items():
        values = [100 * point["agreement"][name] for point in points]
        axes.plot(kept, values, look, color=colour, label=label, markersize=4)
    _by_kept(axes, theme, points)
    axes.set_ylim(0, 104)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    _style(axes, theme, f"Same text, of {tokens} greedy tokens")


def encoder(figure: "Figure", rows: Mapping[str, Sequence[Row]], theme: Theme) -> None:
    """Resident memory of encoders, and the ratio of their times where they were measured in quiet."""
    found = rows["encoder_grid"]
    timed = quiet(found)
    if timed:
        memory, ratio = figure.subplots(1, 2, width_ratios=(3, 2))
        _time_ratios(ratio, theme, timed)
    else:
        memory = figure.subplots()
    _resident_memory(memory, theme, found)


def _resident_memory(memory: "Axes", theme: Theme, found: Sequence[Row]) -> None:
    names, anonymous, mapped = [], [], []
    for row in found:
        names += [f"{row['model']}\n{row['vocab_size']:,} rows", f"{row['kept']:,} rows"]
        for side in ("full", "trimmed"):
            anonymous.append(row["memory"][side]["anonymous"] / 1e6)
            mapped.append(row["memory"][side]["file"] / 1e6)
    at = np.array([1.0 * (number // 2) * 2.6 + number % 2 for number in range(len(names))])
    memory.barh(at, anonymous, 0.85, color=theme.compact, label="anonymous")
    memory.barh(at, mapped, 0.85, left=anonymous, color=theme.full, label="file pages")
    for y, total in zip(at, np.add(anonymous, mapped), strict=True):
        memory.text(total, y, f" {total:,.0f}", va="center", color=theme.text, fontsize=8.5)
    memory.set_yticks(at, names)
    memory.invert_yaxis()
    memory.set_xlim(0, max(np.add(anonymous, mapped)) * 1.12)
    memory.grid(axis="x", color=theme.grid, linewidth=0.6)
    _style(memory, theme, "Resident memory, MB")
    _legend(memory, theme, loc="lower right")


def _time_ratios(ratio: "Axes", theme: Theme, found: Sequence[Row]) -> None:
    for number, row in enumerate(found):
        ratios = [cell["time_ratio"] for cell in row["cells"]]
        at = number + np.linspace(-0.32, 0.32, len(ratios))
        ratio.hlines(at, [r["low"] for r in ratios], [r["high"] for r in ratios], color=theme.full)
        ratio.plot([r["value"] for r in ratios], at, "o", color=theme.exact, markersize=5)
    ratio.axvline(1, color=theme.full, linewidth=1)
    ratio.set_yticks(range(len(found)), [row["model"] for row in found])
    ratio.invert_yaxis()
    ratio.set_ylim(len(found) - 0.5, -0.5)
    spread = max(abs(cell["time_ratio"]["value"] - 1) for row in found for cell in row["cells"])
    ratio.set_xlim(1 - max(0.1, 1.3 * spread), 1 + max(0.1, 1.3 * spread))
    ratio.grid(axis="x", color=theme.grid, linewidth=0.6)
    ratio.set_xlabel("each batch size and length, 95 % interval")
    _style(ratio, theme, "Time, trimmed to full")


def scale(figure: "Figure", rows: Mapping[str, Sequence[Row]], theme: Theme) -> None:
    """The head's product against its law, and what public models would gain by it."""
    (row,) = rows["scale"]
    law = row["law"]
    product, gain = figure.subplots(1, 2, width_ratios=(1, 1.15))
    counts = sorted({point["states"] for point in row["points"]})
    colours = dict(
        zip(counts, (theme.exact, theme.compact, theme.other, theme.full, theme.text), strict=False)
    )
    for count in counts:
        points = [point for point in row["points"] if point["states"] == count]
        weights = np.array([point["rows"] * point["width"] for point in points], np.float64)
        label = "1 hidden state (a token)" if count == 1 else f"{count} at once"
        product.plot(
            weights / 1e6,
            [point["ms"] for point in points],
            "o",
            color=colours[count],
            label=label,
            markersize=4,
        )
        line = np.geomspace(weights.min(), weights.max(), 50)
        seconds = law["a"] + law["b"] * line + law["c"] * count * line
        product.plot(line / 1e6, 1e3 * seconds, "-", color=colours[count], linewidth=1.2)
    product.set_xscale("log")
    product.set_yscale("log")
    product.set_xlabel("N x H, millions of weights")
    product.grid(color=theme.grid, linewidth=0.6)
    _style(product, theme, "Milliseconds of the head's product, and the fitted law")
    _legend(product, theme, loc="upper left")
    names = sorted(row["simulated"], key=lambda name: -float(row["simulated"][name]["compact"]))
    series = {
        "compact": ([row["simulated"][name]["compact"] for name in names], theme.compact),
        "exact": ([row["simulated"][name]["exact"] for name in names], theme.exact),
    }
    _horizontal_bars(gain, theme, names, series, "{:.2f}")
    gain.axvline(1, color=theme.full, linewidth=1)
    _style(gain, theme, "Simulated speed, times the full model's")
    _legend(gain, theme, loc="lower right")


def scaling(figure: "Figure", rows: Mapping[str, Sequence[Row]], theme: Theme) -> None:
    """Seconds of `trimserve profile` against the bytes of the corpus, a panel a tokenizer."""
    (row,) = rows["profile_scaling"]
    panels = figure.subplots(1, len(row["seconds"]), sharey=True, squeeze=False)[0]
    looks = {
        "1 worker": ("o--", theme.compact),
        "2 workers": ("o-", theme.compact),
        "Ray, 1 worker": ("s--", theme.exact),
        "Ray, 2 workers": ("s-", theme.exact),
    }
    for axes, (name, by_series) in zip(panels, row["seconds"].items(), strict=True):
        for series, seconds in by_series.items():
            look, colour = looks[series]
            sizes = sorted(seconds, key=int)
            megabytes = [int(size) / 1e6 for size in sizes]
            taken = [seconds[size] for size in sizes]
            axes.plot(megabytes, taken, look, color=colour, label=series, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(megabytes, [f"{size:.0f}" for size in megabytes])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(color=theme.grid, linewidth=0.6)
        axes.set_xlabel("MB of text")
        _style(axes, theme, name)
    panels[0].set_ylabel("seconds, start included")
    _legend(panels[0], theme, loc="upper left")
