"""Write the measured tables and figures of README.md and docs/ from the newest rows of bench/results.

A table stands between ``<!-- measured: NAME -->`` and ``<!-- end -->``, a figure of `bench.plot` between
``<!-- plot: NAME -->`` and that. No number in them is typed by hand; a test compares the pages with what this
makes.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import harness, plot
from bench.certificate import tables as certificate_tables
from bench.decode import tables as decode_tables
from bench.encoder import run as encoder
from bench.finetune.tables import activations_table, banking_table, finetune_table, small_table
from bench.memory import tables as memory_tables
from bench.peers import tables as peer_tables
from bench.profile import tables as profile_tables
from bench.quantize.tables import quantize_table
from bench.tables import common as tables
from bench.tables import first_screen, targets
from bench.tables.matrix import matrix_table
from trimserve.console import human_bytes
from trimserve.files.atomic import atomic_path

PAGES = (harness.ROOT / "README.md", *sorted((harness.ROOT / "docs").rglob("*.md")))
# Result files that are not named after the module that writes them.
_COMMANDS = {
    "profile_scaling": "profile --scaling",
    "profile_memory": "profile --memory",
    "certificate_pages": "certificate",
    "race": "peers",
    "memory_encoders": "memory.encoders",
    "memory_tokenizers": "memory.tokenizers",
    "finetune_activations": "finetune.activations",
    "finetune_small": "finetune.small",
}
_BLOCK = re.compile(r"(<!-- (measured|plot): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def encoder_table() -> str:
    """All-MiniLM-L6-v2, full against trimmed, from bench/encoder/run.py."""
    row = harness.last_row("encoder")
    ratio = row["time_ratio"]
    caption = (
        f"Medians of {len(row['full']['resident_samples'])} fresh processes each that embed {row['texts']:,} "
        f"docstrings of the Python standard library; {tables.where(row)}. Time of trimmed to full "
        f"{ratio['value']:.2f} (95 % interval {ratio['low']:.2f} to {ratio['high']:.2f})."
    )
    lines = [line for line in encoder.comparison_lines(row) if not line[0].startswith("-")]
    return tables.markdown(encoder.HEADER, lines) + f"\n{caption}\n"


def startup_table() -> str:
    """Import time, from bench/startup.py."""
    row = harness.last_row("startup")
    lines = [
        (f"`{name}`", f"{value['median']:.0f}", f"{value['p5']:.0f}", f"{value['p95']:.0f}")
        for name, value in row["ms"].items()
    ]
    return tables.markdown(("fresh process", "median ms", "p5", "p95"), lines) + f"\n{tables.where(row)}.\n"


def stream_table() -> str:
    """Trimming a checkpoint by streaming, from bench/stream.py."""
    row = harness.last_row("stream")
    ratio, peak = row["ratio"], row["peak_bytes"]
    time = f"{ratio['value']:.2f} x the time (95 % interval {ratio['low']:.2f} to {ratio['high']:.2f})"
    lines = [
        (f"trimming {human_bytes(row['bytes'])} of fp32 checkpoint, against `cp` of the bytes written", time),
        (
            "peak memory above a process that has imported torch and transformers",
            human_bytes(peak["trim"] - peak["import"]),
        ),
    ]
    return (
        tables.markdown(("step 2, Qwen3-0.6B's shape", ""), lines)
        + f"\n{tables.where(row)}; `python -m bench.stream` measures it again.\n"
    )


def session_table() -> str:
    """Packed copies against mapped weights, from bench/session.py: the newest row of each folder."""
    lines = (harness.RESULTS / "session.jsonl").read_text("utf-8").splitlines()
    newest = {row["folder"]: row for row in map(json.loads, lines)}
    header = ("folder", "weights", "ms, 1 token", "16", "128", "anonymous MB", "file MB")
    rows = [
        (
            folder,
            name,
            *(f"{value['ms'][tokens]:.2f}" for tokens in ("1", "16", "128")),
            *(f"{value['memory'][part] / 1e6:.0f}" for part in ("anonymous", "file")),
        )
        for folder, row in newest.items()
        for name, value in row["variants"].items()
    ]
    where = tables.where(next(reversed(newest.values())))
    caption = f"A step of so many tokens, and memory above that of the imports. {where}."
    return tables.markdown(header, rows) + f"\n{caption}\n"


def trim_table() -> str:
    """Trimming checkpoints and graphs, from bench/trim/run.py: the newest row of each model."""
    from bench.trim import run as trim  # onnx, which who writes the other tables may lack

    rows = harness.newest_rows("trim", "model")
    caption = (
        "Medians of fresh processes. Private memory is the largest anonymous memory less that after the "
        "imports; peak memory counts pages of mapped files too, which the system can drop. A complete copy "
        "is the trimmed graph, its cold rows, the cold head's graphs, and hashes of all files; onnxsim "
        f"writes a graph alone, and cannot hold the two larger models. {tables.where(rows[-1])}."
    )
    lines = [line for row in rows for line in trim.lines(row)]
    return tables.markdown(trim.HEADER, lines) + f"\n{caption}\n"


TABLES: dict[str, Callable[[], str]] = {
    "decode": decode_tables.decode_table,
    "decode_cost": decode_tables.decode_cost_table,
    "cold_head": decode_tables.cold_head_table,
    "text_drafts": decode_tables.text_drafts_table,
    "matrix": matrix_table,
    "session": session_table,
    "encoder": encoder_table,
    "startup": startup_table,
    "stream": stream_table,
    "trim": trim_table,
    **tables.TABLES,
    **peer_tables.TABLES,
    **memory_tables.TABLES,
    "targets": targets.table,
    "first_screen": first_screen.table,
    **profile_tables.TABLES,
    "finetune": finetune_table,
    "quantize": quantize_table,
    "finetune_banking": banking_table,
    "finetune_activations": activations_table,
    "finetune_small": small_table,
    "certificate": certificate_tables.decode_table,
    "certificate_proof": certificate_tables.proof_table,
    "certificate_products": certificate_tables.products_table,
    "certificate_cascade": certificate_tables.cascade_table,
    "certificate_targets": certificate_tables.targets_table,
}


def picture(name: str, page: Path) -> str:
    """The HTML of a figure in its light and its dark form, for a page."""
    plot.rows_of(plot.FIGURES[name])  # so that a figure of nothing is not shown
    folder = os.path.relpath(plot.FOLDER, page.parent)
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.svg">\n'
        f'  <img alt="{plot.FIGURES[name].alt}" src="{folder}/{name}-light.svg">\n</picture>\n'
    )


def render(text: str, page: Path = PAGES[0]) -> str:
    """Return a document with every measured table and figure made again.

    Args:
        text: the document.
        page: where it lies, which figures are named from.

    Raises:
        KeyError: a marker names a table or figure that does not exist.
    """

    def made(match: re.Match[str]) -> str:
        kind, name = match[2], match[3]
        try:
            return match[1] + (TABLES[name]() if kind == "measured" else picture(name, page)) + match[4]
        except FileNotFoundError as error:
            name = Path(error.filename).stem
            command = _COMMANDS.get(name, name)
            return f"{match[1]}Not measured yet: `python -m bench.{command}`.\n{match[4]}"

    return _BLOCK.sub(made, text)


def stale() -> list[Path]:
    """The pages that do not say what the newest rows say."""
    texts = {page: page.read_text("utf-8") for page in PAGES}
    return [page for page, text in texts.items() if render(text, page) != text]


def main() -> int:
    """Rewrite the pages in place, or say which do not say what the newest rows say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a page is out of date"
    )
    if parser.parse_args().check:
        for page in (old := stale()):
            print(f"{page} says other numbers than bench/results: run make plots", file=sys.stderr)
        return int(bool(old))
    for page in PAGES:
        with atomic_path(page) as temporary:
            temporary.write_text(render(page.read_text("utf-8"), page), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
