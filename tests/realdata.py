"""Bounded slices of the real corpora."""

from pathlib import Path

TOKENIZERS = ("qwen2", "gpt2", "phi3", "xlm-roberta", "t5-small", "mbert-cased", "bert-uncased")


def corpus_slices(data_dir: Path, characters: int) -> dict[str, str]:
    """The beginning of every corpus file, by its path below `corpora`."""
    root = data_dir / "corpora"
    slices = {}
    for file in sorted(root.glob("*/*.txt")):
        if file.name != "SOURCE.txt":
            with file.open(encoding="utf-8", newline="") as stream:
                slices[str(file.relative_to(root))] = stream.read(characters)
    return slices
