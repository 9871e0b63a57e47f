"""The measured tables of docs/finetune.md, from the newest rows of bench/finetune/run.py, as Markdown."""

from collections.abc import Mapping
from typing import Any

from bench import harness
from bench.finetune.run import PAPER, SHAPES_HEADER, shape_line
from bench.tables.common import markdown
from examples.finetune_banking import HEADER, lines


def _where(row: Mapping[str, Any]) -> str:
    return f"{row['hardware']} ({row['cpu']}), {row['date']}, torch {row['versions']['torch']}"


def finetune_table() -> str:
    """Memory and time of full and partial fine-tuning: the newest row of each shape."""
    rows = harness.newest_rows("finetune", "model")
    removed = [1 - row["partial"]["vocab_parameters"] / row["full"]["vocab_parameters"] for row in rows]
    low, high = (f"{100 * share:.1f} %" for share in (min(removed), max(removed)))
    claims = ", ".join(f"{100 * share:.1f} % ({name})" for name, share in PAPER.items())
    last = rows[-1]
    steps = min(row[side]["seconds"]["count"] for row in rows for side in ("full", "partial"))
    busy = max(row["others_cpu_share"] or 0.0 for row in rows)
    caption = (
        f"AdamW, fp32, {last['texts']} texts of {last['tokens']} tokens, threads: {last['threads']}; real "
        "shapes, random weights; kept are all ids of banking77's training texts. *Counted* is parameters, "
        "gradients and Adam's two moments; *peak* is the process's resident memory while it trains; the "
        f"time is the median of at least {steps} steps, while other processes had up to {busy:.0%} of the "
        f"CPUs. We remove {low} to {high} of the vocab's parameters; Williams & Aletras (2025) report, as a "
        f"summary of their paper on arxivlens.com gives it, from {claims} for the larger data sets of GLUE. "
        f"{_where(last)}."
    )
    return markdown(SHAPES_HEADER, [shape_line(row) for row in rows]) + f"\n{caption}\n"


def banking_table() -> str:
    """MiniLM on banking77, from examples/finetune_banking.py."""
    row = harness.last_row("finetune_banking")
    same = "the same in both" if row["same_losses"] else "not the same"
    caption = (
        f"{row['texts']:,} texts, {row['steps']} steps of {row['batch_size']}; the losses of all steps are "
        f"{same}, and the largest difference of a test text's logit is {row['max_logit_difference']:g}. "
        f"{row['test_texts_outside']:.1%} of the test texts have ids that were not trained: the full model "
        f"that the block restores reads them. {_where(row)}."
    )
    return markdown(HEADER, lines(row)) + f"\n{caption}\n"
