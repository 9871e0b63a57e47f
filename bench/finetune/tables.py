"""The measured tables of docs/finetune.md, from the newest rows of bench/finetune/run.py, as Markdown."""

import statistics
from collections.abc import Mapping
from typing import Any

from bench import harness
from bench.finetune import activations
from bench.finetune.run import PAPER, SHAPES_HEADER, shape_line
from bench.tables.common import markdown
from examples.finetune_banking import HEADER, lines
from trimserve.console import human_bytes


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


def activations_table() -> str:
    """What autograd keeps with each method: the newest row of each shape."""
    rows = harness.newest_rows("finetune_activations", "model")
    last = rows[-1]
    meft, wta = activations.PAPERS["MEFT"], activations.PAPERS["WTA-CRS"]
    caption = (
        f"{last['texts']} texts of {last['tokens']} tokens, fp32, random weights; bytes that autograd keeps "
        "between the passes (saved_tensors_hooks), each storage once, without weights; the two shares are of "
        "full fine-tuning with all rows. *Weights and Adam* is 4 bytes a weight and 12 a trained one. The "
        f"papers: MEFT keeps down to {meft:.2f} of full fine-tuning's activations (Liao et al. 2023); "
        f"WTA-CRS has down to {wta:.2f} of its peak memory (Liu et al. 2023). "
        f"{_where(last)}."
    )
    made = [line for row in rows for line in activations.lines(row)]
    return markdown(activations.HEADER, made) + f"\n{caption}\n"


SMALL_HEADER = (
    "MiniLM on banking77",
    "rate",
    "trained",
    "activations",
    "peak",
    "CPU s a step",
    "accuracy",
    "seeds",
)


def small_table() -> str:
    """Accuracy of each method: the newest row of each."""
    rows = harness.newest_rows("finetune_small", "method", "rate")
    last = rows[-1]
    made = []
    for row in rows:
        found = [100 * value for value in row["accuracies"]]
        ends = f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""
        made.append(
            (
                row["method"],
                f"{row['rate']:g}",
                f"{row['trained'] / 1e6:.2f} M",
                human_bytes(row["saved"]),
                human_bytes(row["peak"]),
                f"{row['cpu_seconds']:.2f}",
                f"{statistics.fmean(found):.1f}{ends}",
                str(len(found)),
            )
        )
    caption = (
        f"{last['texts']:,} training texts, {last['steps']} steps of {last['texts'] // last['steps']}, "
        f"{last['tests']:,} test texts, one thread, with `partial_vocab`; mean accuracy in percent, the "
        f"lowest and the highest in brackets. {_where(last)}."
    )
    return markdown(SMALL_HEADER, made) + f"\n{caption}\n"
