"""The table of docs/quantization.md, from the newest row of each model."""

from bench import harness
from bench.quantize.run import CORPORA, DECODER, lines
from bench.tables import common as tables


def quantize_table() -> str:
    """Quality by method, bytes and calibration, from bench/quantize/run.py."""
    text = ""
    rows = harness.newest_rows("quantize", "model")
    for row in rows:
        unit = "nats a token (from fp32)" if row["model"] == DECODER else "cosine, ten nearest the same"
        domain, *outside = CORPORA
        header = ("method", "bytes", f"{unit}: {domain}", f"{' and '.join(outside)}")
        text += f"{row['model']}, all rows, {row['tokens']:,} tokens held out:\n\n"
        text += tables.markdown(header, lines(row)) + "\n"
    return f"{text}Calibrated with {rows[-1]['calibrated_with']}. {tables.where(rows[-1])}.\n"
