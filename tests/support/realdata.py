"""Bounded slices of the real corpora."""

from pathlib import Path

TOKENIZERS = ("qwen2", "gpt2", "phi3", "xlm-roberta", "t5-small", "mbert-cased", "bert-uncased")


def corpus_slices(data_dir: Path, characters: int) -> dict[str, list[str]]:
    """The beginning of every file of every corpus, by the corpus's name."""
    slices: dict[str, list[str]] = {}
    for file in sorted((data_dir / "corpora").glob("*/*.txt")):
        if file.name != "SOURCE.txt":
            with file.open(encoding="utf-8", newline="") as stream:
                slices.setdefault(file.parent.name, []).append(stream.read(characters))
    return slices
