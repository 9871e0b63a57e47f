"""Draw every figure from the newest result rows: docs/plots/NAME-light.svg and NAME-dark.svg.

An SVG carries the hash of the rows that it was drawn from; a test compares it with the result files, so that
no figure shows other numbers than its page. `--png FOLDER` writes PNG files on the page's background.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import harness
from bench.certificate import tables as certificate_tables
from bench.tables import figures
from trimserve.errors import MissingExtraError, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FOLDER = harness.ROOT / "docs" / "plots"
Rows = Mapping[str, Sequence[Mapping[str, Any]]]
_HASH = re.compile(r"rows sha256 ([0-9a-f]{64})")
_PAGES = {"light": "#ffffff", "dark": "#0d1117"}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure.

    Attributes:
        sources: result file -> the keys of which each combination's newest row is shown.
        size: width and height in inches.
        draw: fills the canvas.
        alt: what it shows, for those who cannot see it.
    """

    sources: Mapping[str, tuple[str, ...]]
    size: tuple[float, float]
    draw: Callable[["Canvas", Rows, figures.Theme], None]
    alt: str


FIGURES = {
    "decode": Figure(
        {"decode": ("model", "quantize", "stand")},
        (8, 4.2),
        figures.decode,
        "Milliseconds a token of the full model, compact mode and exact mode",
    ),
    "quality": Figure(
        {"quality": ()},
        (9, 6),
        figures.quality,
        "Nats a token and agreement with the full model by the number of kept rows",
    ),
    "encoder": Figure(
        {"encoder_grid": ("model",)},
        (9.5, 4.2),
        figures.encoder,
        "Resident memory of encoders, full and trimmed, and the ratio of their times",
    ),
    "scale": Figure(
        {"scale": ()},
        (10, 4.4),
        figures.scale,
        "Time of the head's product by its size, with the fitted law, and simulated gains of public models",
    ),
    "certificate": Figure(
        {"certificate_proof": ("corpus",)},
        (9, 3.6),
        certificate_tables.draw,
        "How far the largest kept logit is above the largest cold one, and how wide the bound is",
    ),
    "certificate_pages": Figure(
        {"certificate_pages": ("model", "cold_dtype")},
        (9, 3.4),
        certificate_tables.draw_pages,
        "Milliseconds a token of exact mode, plain and certified, with cold files cached and dropped",
    ),
    "profile_scaling": Figure(
        {"profile_scaling": ()},
        (9.5, 3.8),
        figures.scaling,
        "Seconds of profiling by megabytes of text, with processes of one machine and with Ray",
    ),
}


def rows_of(figure: Figure, folder: Path | None = None) -> Rows:
    """The rows that a figure shows, raw samples left out.

    Raises:
        FileNotFoundError: nothing was measured yet.
    """
    return {
        name: [harness.without_samples(row) for row in harness.newest_rows(name, *keys, folder=folder)]
        for name, keys in figure.sources.items()
    }


def digest(rows: Rows) -> str:
    """Hash of result rows, as hexadecimal sha256."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def drawn_from(svg: Path) -> str | None:
    """The hash of the rows that an SVG file was drawn from; None if it does not say."""
    found = _HASH.search(svg.read_text("utf-8"))
    return found[1] if found else None


def measured() -> list[str]:
    """Names of the figures whose result files exist."""
    return [
        name
        for name, figure in FIGURES.items()
        if all((harness.RESULTS / f"{source}.jsonl").exists() for source in figure.sources)
    ]


def draw(name: str, theme: figures.Theme, target: Path) -> None:
    """Draw one figure in one theme; `target` ends in .svg or .png.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="bench", purpose="drawing figures")
    figure_module = require("matplotlib.figure", extra="bench", purpose="drawing figures")
    figure = FIGURES[name]
    rows = rows_of(figure)
    fonts = ["DejaVu Sans", "Verdana", "sans-serif"]
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": fonts}
    with matplotlib.rc_context(settings):
        canvas = figure_module.Figure(figsize=figure.size, layout="constrained")
        figure.draw(canvas, rows, theme)
        if target.suffix == ".png":
            canvas.savefig(target, dpi=110, facecolor=_PAGES[theme.name])
            return
        about = {"Date": None, "Title": figure.alt, "Description": f"rows sha256 {digest(rows)}"}
        canvas.savefig(target, transparent=True, metadata=about)


def stale() -> list[Path]:
    """The files of figures that are missing, or were drawn from other rows than the newest ones."""
    wanted = {FOLDER / f"{name}-{theme.name}.svg": name for name in measured() for theme in figures.THEMES}
    found = {svg: svg.stem.rpartition("-")[0] for svg in FOLDER.glob("*.svg")}
    return sorted(
        svg
        for svg, name in (wanted | found).items()
        if name not in FIGURES or not svg.exists() or drawn_from(svg) != digest(rows_of(FIGURES[name]))
    )


def main() -> int:
    """Draw all figures that were measured, or say which show other rows than the newest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write PNG files there instead")
    parser.add_argument(
        "--check", action="store_true", help="draw nothing; fail where a figure is out of date"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures (default: all that were measured)")
    args = parser.parse_args()
    if args.check:
        for svg in (old := stale()):
            print(f"{svg} shows other rows than bench/results has: run make plots", file=sys.stderr)
        return int(bool(old))
    folder = args.png or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.names or measured():
        for theme in figures.THEMES:
            try:
                draw(name, theme, folder / f"{name}-{theme.name}{'.png' if args.png else '.svg'}")
            except MissingExtraError as error:
                print(error, file=sys.stderr)
                return 1
        print(name, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
