"""The tables and the figure of docs/certificate.md, from the rows of `bench.certificate`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import figures, harness, tables
from trimserve.report import human_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MISSING = "Not measured yet: `python -m bench.certificate`.\n"


def _is_measured(name: str) -> bool:
    return (harness.RESULTS / f"{name}.jsonl").exists()


def proof_table() -> str:
    """Shares of held-back positions that the sketch proves."""
    if not _is_measured("certificate_proof"):
        return _MISSING
    rows = harness.newest_rows("certificate_proof", "corpus")
    header = ("", "compact argmax is true", "int8 proves", "with rows read", "width", "int4 proves", "width")
    lines = [
        (
            f"{row['corpus']}, K = {row['kept']:,}, {row['positions']:,} positions",
            *(f"{row[key]:.2%}" for key in ("compact_is_true", "proven", "settled")),
            f"{_median(row['width_quantiles']):.2f}",
            f"{row['int4']['proven']:.1%}",
            f"{row['int4']['median_width']:.2f}",
        )
        for row in rows
    ]
    read = ", ".join(f"{row['rows_per_position']:.2f} ({row['corpus']})" for row in rows)
    caption = (
        f"multidomain-qwen2 at coverage {rows[-1]['coverage']}, on documents that were not profiled. The "
        "width is how far the largest bound is above the largest cold logit, median; the int4 sketch has "
        f"blocks of 32 and exact arithmetic. Rows read a position: {read}. {tables.where(rows[-1])}."
    )
    return tables.markdown(header, lines) + f"\n{caption}\n"


def decode_table() -> str:
    """Decoding with and without the certificate."""
    if not _is_measured("certificate"):
        return _MISSING
    rows = harness.newest_rows("certificate", "model")
    header = ("", *rows[-1]["token_ms"], "settled", "bytes a token, plain", "certified")
    lines = [
        (
            f"{row['model']}, K = {row['kept']:,} of {row['vocab_size']:,}",
            *(f"{value['median']:.2f}" for value in row["token_ms"].values()),
            f"{row['reads']['certified']['certified']:.2%}",
            human_bytes(row["reads"]["plain"]["bytes_per_token"]),
            human_bytes(row["reads"]["certified"]["bytes_per_token"]),
        )
        for row in rows
    ]
    ratios = "; ".join(
        f"{row['model']}: certified to plain {tables.interval(row['ratio']['blocks'])}, at block size 1 "
        f"{tables.interval(row['ratio'][', block 1'])}"
        for row in rows
    )
    caption = f"Milliseconds a token, medians. {ratios}. {_circumstances(rows[-1])}"
    return tables.markdown(header, lines) + f"\n{caption}\n"


def products_table() -> str:
    """The products alone, warm and from a dropped page cache."""
    if not _is_measured("certificate"):
        return _MISSING
    rows = harness.newest_rows("certificate", "model")
    sizes = sorted(rows[-1]["products_ms"]["warm"]["sketch"], key=int)
    names = {"cold": "cold head", "sketch": "sketch and its bounds", "full": "the full model's head"}
    lines = []
    for row in rows:
        for kind, found in row["products_ms"].items():
            for name, times in found.items():
                label = f"{row['model']}: {names[name]}" + (", files dropped" if kind == "dropped" else "")
                lines.append((label, *(f"{times[size]:.1f}" for size in sizes)))
    disk = "; ".join(
        f"{row['model']} {human_bytes(row['folder_bytes'])} with the sketch, "
        f"{human_bytes(row['folder_bytes_without'])} without (cold rows {human_bytes(row['cold_row_bytes'])})"
        for row in rows
    )
    caption = f"Milliseconds, medians. Folders: {disk}. {_circumstances(rows[-1])}"
    return tables.markdown(("hidden states", *sizes), lines) + f"\n{caption}\n"


def _circumstances(row: Mapping[str, Any]) -> str:
    others = row["others_cpu_share"]
    busy = "" if others is None else f"; other processes had {others:.0%} of the CPUs"
    return f"{tables.where(row)}, {row['threads']} threads{busy}."


def _median(quantiles: Sequence[float]) -> float:
    return quantiles[len(quantiles) // 2]


def draw(figure: "Figure", rows: Mapping[str, Sequence[figures.Row]], theme: figures.Theme) -> None:
    """Share of positions by gap and by bound width, a panel a corpus."""
    found = rows["certificate_proof"]
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, row in zip(panels, found, strict=True):
        figures._style(axes, theme, row["corpus"])
        share = np.linspace(0, 100, len(row["gap_quantiles"]))
        axes.plot(row["gap_quantiles"], share, color=theme.compact, label="gap: kept above cold maximum")
        axes.plot(
            row["width_quantiles"], share, color=theme.exact, label="width: int8 bound above cold maximum"
        )
        axes.axvline(
            row["int4"]["median_width"], color=theme.full, linestyle="--", label="median width, int4"
        )
        axes.set_xlabel("logits")
        axes.grid(color=theme.grid, linewidth=0.6)
    panels[0].set_ylabel("% of positions at most so far")
    figures._legend(panels[-1], theme, loc="lower right")
