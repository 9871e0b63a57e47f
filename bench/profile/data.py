"""What the benchmarks of profiling read: real tokenizers, and real corpora as files of records."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import harness

TOKENIZERS = ("qwen2", "xlm-roberta", "mbert-cased")
# Name in the tables -> folder.
CORPORA = {"medquad": "medquad-en", "law-de": "law-de", "kdconv": "dialogue-zh-kdconv"}
_LINES = 16
_LONG_BLOCK = 1 << 16


def items(corpus: str) -> Iterator[str]:
    """The items of a corpus: blocks between blank lines, or some lines of a block without any."""
    for file in text_files(harness.data_folder() / "corpora" / corpus):
        for block in file.read_text("utf-8").split("\n\n"):
            lines = block.split("\n")
            step = len(lines) if len(block) < _LONG_BLOCK else _LINES
            parts = ("\n".join(lines[start : start + step]) for start in range(0, len(lines), step))
            yield from filter(str.strip, parts)


def text_files(corpus: Path) -> list[Path]:
    """The texts of a corpus's folder."""
    return sorted(path for path in corpus.glob("*.txt") if path.name != "SOURCE.txt")


def all_corpora() -> list[str]:
    """The folders of all corpora."""
    return sorted(path.name for path in (harness.data_folder() / "corpora").iterdir() if path.is_dir())


def write_items(path: Path, corpora: Sequence[str], limit: int, *, repeat: bool = False) -> int:
    """Write items as records until `limit` bytes; gives the number of bytes of their text.

    Args:
        path: the .jsonl file to write, with the field "text".
        corpora: folders, one after the other.
        limit: when to stop.
        repeat: begin again behind the last corpus.
    """
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for corpus in itertools.cycle(corpora) if repeat else corpora:
            for text in items(corpus):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size += len(text.encode())
                if size >= limit:
                    return size
    return size
