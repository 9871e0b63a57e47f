"""What a tokenizer costs a process, mapped and whole: private memory, time to load, time of short texts.

Each row is a fresh process (`--one`). Private memory is Private_Dirty of /proc/self/smaps_rollup, before and
after the tokenizer is loaded, and after some texts; what was parsed to load it is given back first.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import harness
from bench.realdata import data_folder
from trimserve.console import table
from trimserve.files.held import HeldFile
from trimserve.process import release_free_memory
from trimserve.text.mapped.building import build_tables
from trimserve.text.mapped.tables import Tables
from trimserve.text.mapped.tokenizer import MappedTokenizer
from trimserve.text.tokenizer import parse_tokenizer

_NAMES = ("xlm-roberta", "qwen2", "mbert-cased", "t5-small", "phi3", "gpt2", "bert-uncased")
_TEXTS = 2000
_MIB = 1024


def private_mib() -> float:
    """Private_Dirty of this process."""
    release_free_memory()
    lines = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / _MIB


def measure(kind: str, path: Path, corpus: str) -> dict[str, Any]:
    """One tokenizer in this process."""
    texts = (data_folder() / "corpora" / corpus / "text.txt").read_text("utf-8").splitlines()[: 2 * _TEXTS]
    parse_tokenizer(b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}').encode("a")
    before, start = private_mib(), time.perf_counter()
    tokenizer = (
        MappedTokenizer(Tables.read(HeldFile(path)), lambda: parse_tokenizer(path.read_bytes()))
        if kind == "mapped"
        else parse_tokenizer(path.read_bytes())
    )
    seconds = time.perf_counter() - start
    loaded = private_mib()
    times = []
    for text in texts:
        start = time.thread_time()  # of this thread: other programs do not count
        tokenizer.encode_batch_fast([text])
        times.append(time.thread_time() - start)
    warm = sorted(times[_TEXTS:])
    start = time.perf_counter()
    tokenizer.encode_batch_fast(texts)
    return {
        "kind": kind,
        "loaded_mib": round(loaded - before, 1),
        "used_mib": round(private_mib() - before, 1),
        "load_ms": round(1e3 * seconds, 1),
        "first_us": round(1e6 * sum(times[:_TEXTS]) / _TEXTS),
        "warm_us": round(1e6 * sum(warm) / len(warm)),
        "median_us": round(1e6 * warm[len(warm) // 2]),
        "batch_us": round(1e6 * (time.perf_counter() - start) / len(texts)),
    }


def main() -> int:
    """Measure all tokenizers of the data folder, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FILE"), help="in this process")
    parser.add_argument("--names", nargs="+", default=list(_NAMES))
    parser.add_argument("--corpus", default="banking77-en")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]), args.corpus)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name in args.names:
            whole = data_folder() / "tokenizers" / name / "tokenizer.json"
            content, tables = whole.read_bytes(), Path(work) / f"{name}.safetensors"
            build_tables(content, hashlib.sha256(content).hexdigest()).write(tables)
            row: dict[str, Any] = {"tokenizer": name, "corpus": args.corpus, "texts": _TEXTS}
            for kind, path in (("whole", whole), ("mapped", tables)):
                words = ["-m", "bench.memory.tokenizers", "--one", kind, str(path), "--corpus", args.corpus]
                row[kind] = harness.fresh_process(words)
                rows.append({"tokenizer": name, **row[kind]})
            harness.save_row("memory_tokenizers", row, quick=False)
    print(table(list(rows[0]), [list(row.values()) for row in rows]), file=sys.stderr)
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
