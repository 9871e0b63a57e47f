"""The measured tables of docs/benchmarks.md, each from the newest rows of its result file, as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import harness, paper, serving
from bench.memory import run as memory
from trimserve.console import human_bytes

# Of the rule of Williams and Aletras: the corpora whose rows are shown.
_PAPER_CORPORA = ("banking77-en", "gsm8k-en", "medquad-en", "wikitext2-shakespeare-en", "law-de")


def where(row: Mapping[str, Any]) -> str:
    """Where and when a row was measured."""
    return f"{row['hardware']} ({row['cpu']}), {row['date']}, onnxruntime {row['versions']['onnxruntime']}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"


def interval(ratio: Mapping[str, float], digits: int = 2) -> str:
    """A ratio with its 95 % interval."""
    value, low, high = (f"{ratio[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def encoder_memory_table() -> str:
    """Bytes, memory and cold start of encoders, from bench/encoder/grid.py."""
    rows = harness.newest_rows("encoder_grid", "model")
    header = (
        "model",
        "rows",
        "graph and weights",
        "resident",
        "anonymous",
        "file pages",
        "peak",
        "first result, ms",
    )
    lines = []
    for row in rows:
        for side, kept in (("full", row["vocab_size"]), ("trimmed", row["kept"])):
            memory = row["memory"][side]
            lines.append(
                (
                    row["model"] if side == "full" else "",
                    f"{kept:,}",
                    human_bytes(row["weight_bytes"][side]),
                    *(human_bytes(memory[key]) for key in ("resident", "anonymous", "file", "peak")),
                    f"{row['first_result_ms'][side]['median']:.0f}",
                )
            )
    shares = ", ".join(f"{row['model']} {row['saved_share']:.0%}" for row in rows)
    caption = (
        f"Whole processes after {rows[-1]['memory_texts']} short texts of the domain. Of the removed bytes "
        f"so many are missing from resident memory: {shares}. {where(rows[-1])}, "
        f"{rows[-1]['threads']} threads."
    )
    return markdown(header, lines) + f"\n{caption}\n"


def quiet(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows whose times can be published: other processes had little of the machine meanwhile."""
    return [row for row in rows if (row["others_cpu_share"] or 0) < _BUSY]


def encoder_time_table() -> str:
    """Times of encoders by batch size and length: the rows of bench/encoder/grid.py on a quiet machine."""
    rows = quiet(harness.newest_rows("encoder_grid", "model"))
    if not rows:
        return "Not measured on a quiet machine yet: `python -m bench.encoder.grid`.\n"
    header = (
        "model",
        "batch x tokens",
        "full ms",
        "trimmed ms",
        "trimmed texts/s",
        "trimmed to full",
        "steps",
    )
    lines = [
        (
            row["model"] if number == 0 else "",
            f"{cell['batch']} x {cell['length']}",
            *(f"{cell['ms'][side]['median']:.1f}" for side in ("full", "trimmed")),
            f"{cell['texts_per_s']['trimmed']:.1f}",
            interval(cell["time_ratio"], 3),
            str(cell["ms"]["full"]["count"]),
        )
        for row in rows
        for number, cell in enumerate(row["cells"])
    ]
    return markdown(header, lines) + f"\nMedians, tokenising included. {where(rows[-1])}.\n"


def paper_table() -> str:
    """The rule of Williams and Aletras and ours, from bench/paper.py."""
    row = harness.last_row("paper")
    shown = [one for one in row["rows"] if one["published"] or one["data"] in _PAPER_CORPORA]
    header = (
        "data set",
        "model",
        "published: rows, parameters",
        "seen once: rows, parameters",
        "held-out tokens lost",
        "99.9 %: rows, parameters",
        "held-out tokens cold",
        "lost",
    )
    lines = []
    for one in shown:
        once = one["seen_once_all_splits"] if one["published"] else one["seen_once"]
        ours = one["coverage_rule"]
        published = one["published"]
        lines.append(
            (
                one["data"],
                one["model"] if one["note"] == "its own" else f"{one['model']} ({one['tokenizer']})",
                f"{published[0]:.1f} %, {published[1]:.1f} %" if published else "-",
                f"{once['rows_removed']:.1f} %, {once['parameters_removed']:.1f} %",
                f"{one['seen_once']['held_out_missing']:.2%}",
                f"{ours['rows_removed']:.1f} %, {ours['parameters_removed']:.1f} %",
                f"{ours['held_out_cold']:.2%}",
                "none",
            )
        )
    return markdown(header, lines) + f"\nShares removed. {where(row)}.\n"


def published_table() -> str:
    """What the replication of Williams and Aletras published: vocab rows and parameters removed."""
    models = tuple(paper.MODELS)
    lines = [
        (name, *(f"{row[model][0]:.2f} %, {row[model][1]:.2f} %" for model in models))
        for name, row in paper.PUBLISHED.items()
    ]
    return markdown(("GLUE task", *models), lines)


def quality_table() -> str:
    """Nll and agreement by K, from bench/quality.py."""
    row = harness.last_row("quality")
    header = (
        "text",
        "K",
        "full nll",
        "exact nll",
        "re-segmented nll",
        "its tokens to the original's",
        "tokens compact mode can produce",
        "agreement: exact",
        "compact",
        "re-segmented",
    )
    lines = [
        (
            f"{name} ({domain['corpus']})" if number == 0 else "",
            f"{point['kept']:,}",
            f"{domain['full_nll']:.4f}",
            f"{point['exact_nll']:.4f}",
            f"{point['resegmented_nll']:.3f}",
            f"{point['resegmented_fertility']:.3f}",
            f"{point['compact_reachable']:.1%}",
            *(f"{point['agreement'][mode]:.0%}" for mode in ("exact", "compact", "resegmented")),
        )
        for name, domain in sorted(row["domains"].items(), reverse=True)
        for number, point in enumerate(domain["points"])
    ]
    caption = (
        "Nats a token of the original segmentation; agreement is the share of the full model's greedy answer "
        f"({row['answer_tokens']} tokens) before the first difference. {where(row)}."
    )
    return markdown(header, lines) + f"\n{caption}\n"


def scale_table() -> str:
    """The fitted law and the simulated models, from bench/scale.py."""
    row = harness.last_row("scale")
    law, speed = row["law"], row["weights_bytes_per_s"]
    reads = f"weights are read at {speed / 1e9:.1f} GB/s" if speed else "arithmetic alone bounds it"
    text = (
        f"ms = {1e3 * law['a']:.2f} + ({1e9 * law['b']:.3f} + {1e9 * law['c']:.4f} n) N H / 10^6, "
        f"median error {law['error']:.0%}: {reads}; a copy of large arrays moves "
        f"{row['copy_bytes_per_s'] / 1e9:.1f} GB/s. {where(row)}, {row['threads']} threads.\n\n"
    )
    header = ("model (simulated)", "V", "H", "vocab's share", "parameters removed", "compact", "exact")
    order = sorted(row["simulated"].items(), key=lambda item: -float(item[1]["compact"]))
    lines = [
        (
            name,
            f"{row['shapes'][name]['vocab_size']:,}",
            f"{row['shapes'][name]['width']:,}",
            f"{one['vocab_share']:.1%}",
            f"{one['parameters_removed'] / 1e9:.2f} billion",
            f"{one['compact']:.2f} x",
            f"{one['exact']:.2f} x",
        )
        for name, one in order
    ]
    return text + markdown(header, lines)


def growth_table() -> str:
    """Cost of translating ids by V and of profiling by corpus size, from bench/scale.py."""
    row = harness.last_row("scale")
    lines = [
        (f"translate ids, V = {one['vocab_size']:,}", f"{one['ns_a_token']:.1f} ns a token")
        for one in row["translation"]
    ]
    lines += [
        (f"profile {one['megabytes']:g} MB", f"{one['seconds']:.2f} s, {one['tokens']:,} tokens")
        for one in row["profiling"]
    ]
    return markdown(("", "cost"), lines) + f"\n{where(row)}.\n"


def memory_table() -> str:
    """What anonymous memory is made of, from bench/memory/run.py."""
    rows = harness.newest_rows("memory", "model", "quantize")
    caption = (
        "Anonymous memory that each part adds; medians of fresh processes. ONNX Runtime's arenas hold the "
        f"packed weights and activations. {where(rows[-1])}, {rows[-1]['threads']} threads."
    )
    return markdown(memory.HEADER, memory.lines(rows)) + f"\n{caption}\n"


def serving_table() -> str:
    """Time to the first token and time a token, from bench/serving.py."""
    rows = harness.newest_rows("serving", "model", "quantize", "device")
    text = ""
    for row in rows:
        title = f"{row['model']}, {row['quantize'] or 'fp32'}, {row['layers']} layers, on {row['device']}"
        text += f"{title}:\n\n{markdown(serving.HEADER, serving.lines(row))}\n"
    return f"{text}{where(rows[-1])}, {rows[-1]['threads']} threads.\n"


# Share of the CPUs that others had, from which a time is no measurement.
_BUSY = 0.1


TABLES: dict[str, Callable[[], str]] = {
    "encoder_memory": encoder_memory_table,
    "encoder_time": encoder_time_table,
    "paper": paper_table,
    "published": published_table,
    "quality": quality_table,
    "scale": scale_table,
    "growth": growth_table,
    "memory": memory_table,
    "serving": serving_table,
}
