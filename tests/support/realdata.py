"""The real data: hidden from every test but those marked `realdata`; bounded slices of its corpora."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.machine import ROOT
from bench.realdata import VARIABLE, data_folder

# Names the mark in the message of whatever opens it.
HIDDEN = ROOT / "no-real-data-without-the-mark-realdata"
# Where the folder is remembered; pytest-xdist's workers inherit it, and the hidden one.
_REMEMBERED = "TRIMSERVE_DATA_OF_MARKED_TESTS"

TOKENIZERS = ("qwen2", "gpt2", "phi3", "xlm-roberta", "t5-small", "mbert-cased", "bert-uncased")


def hide() -> None:
    """Let `data_folder` name a folder that is not there, in this process and in those that it starts."""
    os.environ.setdefault(_REMEMBERED, str(data_folder()))
    os.environ[VARIABLE] = str(HIDDEN)


@contextmanager
def shown() -> Iterator[None]:
    """Let `data_folder` name the real folder for a while."""
    os.environ[VARIABLE] = os.environ[_REMEMBERED]
    try:
        yield
    finally:
        os.environ[VARIABLE] = str(HIDDEN)


def unmarked(items: Iterable[pytest.Item]) -> list[str]:
    """The tests that ask for `data_dir` without the mark."""
    return [
        item.nodeid
        for item in items
        if "data_dir" in getattr(item, "fixturenames", ()) and item.get_closest_marker("realdata") is None
    ]


def corpus_slices(data_dir: Path, characters: int) -> dict[str, list[str]]:
    """The beginning of every file of every corpus, by the corpus's name."""
    slices: dict[str, list[str]] = {}
    for file in sorted((data_dir / "corpora").glob("*/*.txt")):
        if file.name != "SOURCE.txt":
            with file.open(encoding="utf-8", newline="") as stream:
                slices.setdefault(file.parent.name, []).append(stream.read(characters))
    return slices
