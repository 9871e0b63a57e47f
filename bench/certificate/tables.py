"""The tables and the figure of docs/certificate.md, from the rows of `bench.certificate.run`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import harness
from bench.tables import common as tables
from bench.tables import figures
from trimserve.console import human_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MISSING = "Not measured yet: `python -m bench.certificate`.\n"


def _is_measured(name: str) -> bool:
    return (harness.RESULTS / f"{name}.jsonl").exists()


def proof_rows() -> list[dict[str, Any]]:
    """The newest row of each corpus and kind of cold rows; nothing if the file does not exist."""
    return _newest("certificate_proof", "corpus")


def decode_rows() -> list[dict[str, Any]]:
    """The newest row of each model and kind of cold rows; nothing if the file does not exist."""
    return _newest("certificate", "model")


def _newest(name: str, subject: str) -> list[dict[str, Any]]:
    if not _is_measured(name):
        return []
    rows = harness.newest_rows(name, subject, "cold_dtype")
    described = {row[subject] for row in rows if "cold_dtype" in row}
    return [row for row in rows if "cold_dtype" in row or row[subject] not in described]


def _cold(row: Mapping[str, Any]) -> str:
    return f", cold rows {row['cold_dtype']}" if "cold_dtype" in row else ""


def proof_table() -> str:
    """Shares of held-back positions that the sketches prove, and what their checks read."""
    rows = proof_rows()
    if not rows:
        return _MISSING
    header = (
        "",
        "compact argmax is true",
        "sketch",
        "proves",
        "with rows read",
        "rows read",
        "width",
        "bytes, blocks of 32",
        "blocks of 1",
    )
    lines = []
    for row in rows:
        label = f"{row['corpus']}, K = {row['kept']:,}, {row['positions']:,} positions{_cold(row)}"
        for sketch, found in (("int8", row), ("int4", row["int4"])):
            true = f"{row['compact_is_true']:.2%}" if sketch == "int8" else ""
            width = found.get("median_width") or _median(found["width_quantiles"])
            settled, read, share, single = "", "", "", ""
            if "settled" in found:
                settled, read = f"{found['settled']:.2%}", f"{found['rows_per_position']:,.1f}"
            if "bytes_per_position" in found:
                share = f"{found['bytes_per_position'] / row['plain_bytes_per_position']:.2f}"
                single = f"{_single_share(row, found):.2f}"
            cells = (true, sketch, f"{found['proven']:.2%}", settled, read, f"{width:.2f}", share, single)
            lines.append((label if sketch == "int8" else "", *cells))
    caption = (
        f"multidomain-qwen2 at coverage {rows[-1]['coverage']}, on documents that were not profiled, in "
        "blocks of 32 steps. The width is how far the largest bound is above the largest cold logit, median; "
        "rows read, a position; bytes of the cold files, to those of the check without a sketch. "
        f"{tables.where(rows[-1])}."
    )
    return tables.markdown(header, lines) + f"\n{caption}\n"


def _single_share(row: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Bytes of the cold files in blocks of one step, where no other open step shares the product."""
    full = row["plain_bytes_per_position"] * row["block"]
    rows = found["rows_per_position"] / (row["vocab_size"] - row["kept"])
    return float(found["sketch_bytes"] / full + 1 - found["settled"] + rows)


def cascade_table() -> str:
    """What 4 bits first and 8 bits for the rest would read and take, beside 8 bits alone."""
    proofs = [row for row in proof_rows() if "sketch_bytes" in row]
    timed = [row for row in decode_rows() if "int4" in row["products_ms"]["warm"]]
    if not proofs or not timed:
        return _MISSING
    lines = []
    for row in proofs:
        coarse = row["int4"]
        rest = coarse["open_rows_per_position"] * _int8_row_bytes(row)
        cells = [
            f"{(coarse['sketch_bytes'] / block + rest) / (row['sketch_bytes'] / block):.2f}"
            for block in (1, row["block"])
        ]
        lines.append((f"bytes a step, {row['corpus']}{_cold(row)}", *cells))
    for row in timed:
        for pages, label in (("warm", ""), ("dropped", ", files dropped")):
            found = row["products_ms"][pages]
            cells = [f"{found['int4'][size] / found['sketch'][size]:.2f}" for size in ("1", "32")]
            lines.append((f"time of the 4-bit product alone, {row['model']}{_cold(row)}{label}", *cells))
    caption = (
        "To 8 bits alone. The bytes are the 4-bit sketch's and the 8-bit rows' of all groups that it leaves "
        f"open. {tables.where(proofs[-1])}."
    )
    return tables.markdown(("4 bits, then 8", "block of 1", "of 32"), lines) + f"\n{caption}\n"


def _int8_row_bytes(row: Mapping[str, Any]) -> float:
    cold = row["vocab_size"] - row["kept"]
    return float(row["sketch_bytes"] / cold)


def targets_table() -> str:
    """What the certificate should reach, and what was measured."""
    lines = []
    for row in proof_rows():
        if "bytes_per_position" in row:
            share = row["bytes_per_position"] / row["plain_bytes_per_position"]
            lines.append(("cold bytes a step", f"{row['corpus']}{_cold(row)}", "0.30", f"{share:.2f}"))
    for row in decode_rows():
        if "check_to_full_head" not in row["ratio"]:
            continue
        label = f"{row['model']}, {row['vocab_size']:,} rows{_cold(row)}"
        reads = row["reads"]
        share = reads["certified"]["bytes_per_token"] / reads["plain"]["bytes_per_token"]
        ratios = row["ratio"]
        # Meant for text: how often drafts of random weights fall decides what their blocks read.
        limit = "0.30" if row["model"] == "multidomain-qwen2" else ""
        lines += [
            ("cold bytes a token", label, limit, f"{share:.2f}"),
            ("time a token", label, "1", tables.interval(ratios["blocks"])),
            ("time a token, cold files dropped", label, "1", tables.interval(ratios["dropped"])),
            (
                "check of one step, to the full head's product",
                label,
                "0.50",
                tables.interval(ratios["check_to_full_head"]),
            ),
        ]
    if not lines:
        return _MISSING
    caption = "Certified to the plain check, unless another is named. 0.30 is meant for cold rows in float32."
    return tables.markdown(("", "", "at most", "measured"), lines) + f"\n{caption}\n"


def decode_table() -> str:
    """Decoding with and without the certificate."""
    rows = decode_rows()
    if not rows:
        return _MISSING
    header = ("", *rows[-1]["token_ms"], "settled", "bytes a token, plain", "certified")
    lines = [
        (
            f"{row['model']}, K = {row['kept']:,} of {row['vocab_size']:,}{_cold(row)}",
            *(f"{value['median']:.2f}" for value in row["token_ms"].values()),
            f"{row['reads']['certified']['certified']:.2%}",
            human_bytes(row["reads"]["plain"]["bytes_per_token"]),
            human_bytes(row["reads"]["certified"]["bytes_per_token"]),
        )
        for row in rows
    ]
    ratios = "; ".join(
        f"{row['model']}{_cold(row)}: certified to plain {tables.interval(row['ratio']['blocks'])}, at block "
        f"size 1 {tables.interval(row['ratio'][', block 1'])}"
        for row in rows
    )
    caption = f"Milliseconds a token, medians. {ratios}. {_circumstances(rows[-1])}"
    return tables.markdown(header, lines) + f"\n{caption}\n"


def products_table() -> str:
    """The products alone, warm and from a dropped page cache."""
    rows = decode_rows()
    if not rows:
        return _MISSING
    sizes = sorted(rows[-1]["products_ms"]["warm"]["sketch"], key=int)
    names = {
        "cold": "cold head",
        "sketch": "sketch and its bounds",
        "int4": "sketch of 4 bits",
        "full": "the full model's head",
    }
    lines = []
    for row in rows:
        for kind, found in row["products_ms"].items():
            for name, times in found.items():
                label = f"{row['model']}{_cold(row)}: {names[name]}" + (
                    ", files dropped" if kind == "dropped" else ""
                )
                lines.append((label, *(f"{times[size]:.1f}" for size in sizes)))
    disk = "; ".join(
        f"{row['model']}{_cold(row)}: {human_bytes(row['folder_bytes'])} with the sketch, "
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
    found = list({row["corpus"]: row for row in rows["certificate_proof"]}.values())
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


def draw_pages(figure: "Figure", rows: Mapping[str, Sequence[figures.Row]], theme: figures.Theme) -> None:
    """Milliseconds a token with cached cold files and with dropped ones, plain and certified."""
    found = rows["certificate_pages"]
    panels = figure.subplots(1, 2, width_ratios=(1, 1))
    titles = {"token_ms": "Cold files in the page cache", "dropped_token_ms": "Dropped before every check"}
    names = [f"{row['model']}\ncold rows {row['cold_dtype']}" for row in found]
    colours = {"plain": theme.full, "certified": theme.exact}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        series = {
            variant: ([row[key][variant]["median"] for row in found], colour)
            for variant, colour in colours.items()
        }
        figures._horizontal_bars(axes, theme, names, series, "{:.1f}")
        figures._style(axes, theme, title)
        axes.set_xlabel("milliseconds a token")
    figures._legend(panels[-1], theme, loc="lower right")
