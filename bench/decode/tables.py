"""The tables of docs/exact-mode.md, from the newest rows of bench/decode/run.py and bench/cold_head.py."""

from collections.abc import Mapping
from typing import Any

from bench import harness, text_drafts
from bench.tables.common import markdown, where
from trimserve.console import human_bytes


def decode_table() -> str:
    """Full, compact and exact decoding: the newest row of each model, format and share of standing drafts."""
    rows = decode_rows()
    header = (
        "model",
        "V",
        "K",
        "full",
        "compact",
        "exact",
        "with a sketch",
        "exact to full",
        "accepted drafts",
        "ceiling",
    )
    lines = [
        (
            _name(row),
            f"{row['vocab_size']:,}",
            f"{row['kept']:,}",
            *(_median(row, way) for way in ("full", "compact", "exact", "certified")),
            f"{row['speed'].get('certified_to_full', row['speed']['exact_to_full'])['value']:.2f} x",
            f"{row['drafts']['stood']:.1%}",
            f"{row['ceiling']:.2f} x",
        )
        for row in rows
    ]
    caption = (
        "Milliseconds a token, one request at a time, variants in processes that take turns; ids of exact "
        "mode equal the full model's in every answer. With a sketch (the default for float heads) most steps "
        "are proven without the cold product; the ratio is the default's. The ceiling is what compact mode "
        f"could gain if a token cost its bytes alone. {where(rows[-1])}."
    )
    return f"{markdown(header, lines)}\n{caption}\n"


def decode_cost_table() -> str:
    """What a token of exact mode costs by part, beside the cost model's sum of parts measured apart."""
    rows = [row for row in decode_rows() if "parts_ms" in row]
    if not rows:
        return "Not measured yet: `python -m bench.decode`.\n"
    header = (
        *("model", "body", "compact head", "cold product", "wasted steps", "sum", "measured"),
        *("less own code", "own code, compact"),
    )
    lines = [
        (
            _name(row),
            *(
                f"{row['cost_model'][part]:.2f}"
                for part in ("body", "compact_head", "cold", "wasted", "predicted")
            ),
            f"{row['cost_model']['measured']:.2f} ({row['cost_model']['excess']:+.0%})",
            f"{_excess_without_own(row):+.0%}",
            f"{row['parts_ms']['compact']['own_share']:.1%}",
        )
        for row in rows
    ]
    caption = (
        "Milliseconds a token of exact mode with the cold product alone, and how much more than the sum was "
        "measured, with our own code and without. Own code is what is not spent in ONNX Runtime; the last "
        f"column is its share of a compact step. {where(rows[-1])}."
    )
    return f"{markdown(header, lines)}\n{caption}\n"


def cold_head_table() -> str:
    """The cold product in other layouts, and what each takes in memory and on disk."""
    rows = harness.newest_rows("cold_head", "model") if _has_rows("cold_head") else []
    if not rows:
        return "Not measured yet: `python -m bench.cold_head`.\n"
    sizes = ("1", "4", "16", "32", "48")
    header = ("cold rows", "layout", *(f"{size} states" for size in sizes), "private memory", "file")
    lines = [
        (
            f"{row['rows']:,} x {row['width']}",
            layout,
            *(f"{times[size]['median']:.1f}" for size in sizes),
            human_bytes(max(0, row["anonymous_bytes"][layout])),
            human_bytes(row["file_bytes"][layout]),
        )
        for row in rows
        for layout, times in row["ms"].items()
    ]
    return f"{markdown(header, lines)}\nMilliseconds of one product. {where(rows[-1])}.\n"


def _excess_without_own(row: Mapping[str, Any]) -> float:
    """How much more than the cost model's sum was spent in ONNX Runtime, as a share of the sum."""
    cost = row["cost_model"]
    spent = cost["measured"] * (1 - row["parts_ms"]["exact"]["own_share"])
    return float(spent / cost["predicted"] - 1)


def decode_rows() -> list[dict[str, Any]]:
    """The newest row of each model, format and share of standing drafts; most drafts stand in the first."""
    rows = harness.newest_rows("decode", "model", "quantize", "stand")
    return sorted(rows, key=lambda row: -row["stand"])


def _median(row: Mapping[str, Any], way: str) -> str:
    return f"{row['token_ms'][way]['median']:.2f}" if way in row["token_ms"] else ""


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {row['quantize'] or 'fp32'}"


def _has_rows(name: str) -> bool:
    return (harness.RESULTS / f"{name}.jsonl").exists()


def text_drafts_table() -> str:
    """Drafts from the text, from bench/text_drafts.py."""
    rows = harness.newest_rows("text_drafts", "model")
    lines = [line for row in rows for line in text_drafts.lines(row)]
    costs = "; ".join(
        f"{row['model']} {', '.join(f'{ms:.1f}' for ms in row['step_ms'].values())}" for row in rows
    )
    caption = (
        "Milliseconds a token in exact mode, medians; ratios of the two ways document by document, with "
        "their 95 % interval. To copy, a document stands twice and breaks off; to continue, once. A step "
        f"of 1 (in a pair), 2, 4, 8 and 16 tokens takes so many milliseconds: {costs}. {where(rows[-1])}, "
        f"{rows[-1]['threads']} threads."
    )
    return markdown(text_drafts.HEADER, lines) + f"\n{caption}\n"
