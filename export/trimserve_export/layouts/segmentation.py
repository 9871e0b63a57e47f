"""How a cut tokenizer segments texts beside the original: what changes, and how much longer texts get."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trimserve.arrays import Ids
from trimserve.console import percent
from trimserve.corpus.corpus import Corpus
from trimserve.corpus.documents import Reading
from trimserve.vocab.map import VocabMap

_BATCH = 256
# Enough for every rate to three digits, and a few seconds of work at most.
MAX_TEXTS = 20_000
MAX_CHARACTERS = 8_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """Texts to compare on; `held_out` says that the vocab was not selected from them."""

    texts: Iterable[str]
    held_out: bool = True

    @classmethod
    def of_files(cls, paths: Sequence[str], reading: Reading, *, held_out: bool) -> "Sample":
        """The lines of a corpus's documents; read when they are compared."""
        documents = Corpus(paths, reading=reading).documents()
        lines = (line for document in documents for line in document.text.splitlines() if line.strip())
        return cls(lines, held_out)


@dataclass(frozen=True, slots=True)
class Segmentation:
    """A comparison over texts.

    Attributes:
        texts: how many were compared.
        identical: how many are segmented into the same tokens.
        words: words between white space, over all texts.
        tokens_before: tokens of the original tokenizer, special tokens not counted.
        tokens_after: tokens of the cut one.
        unknown_before: how many of them are unknown tokens.
        unknown_after: how many of the cut one's are.
        held_out: whether the texts are others than those the vocab was selected from.
    """

    texts: int
    identical: int
    words: int
    tokens_before: int
    tokens_after: int
    unknown_before: int
    unknown_after: int
    held_out: bool

    @property
    def fertility_before(self) -> float:
        """Tokens a word of the original tokenizer."""
        return self.tokens_before / max(self.words, 1)

    @property
    def fertility_after(self) -> float:
        """Tokens a word of the cut tokenizer."""
        return self.tokens_after / max(self.words, 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for manifest and command line."""
        fertility = {
            "fertility_before": round(self.fertility_before, 4),
            "fertility_after": round(self.fertility_after, 4),
        }
        return asdict(self) | fertility


def compare_segmentation(
    original: Tokenizer, cut: Tokenizer, vocab: VocabMap, sample: Sample
) -> Segmentation:
    """Segment texts with both tokenizers, at most `MAX_TEXTS` of them and `MAX_CHARACTERS`.

    Args:
        original: the model's tokenizer.
        cut: the tokenizer cut to `vocab`, whose ids are compact.
        vocab: the kept ids.
        sample: any texts.
    """
    unknown = unknown_id(original)
    counts = np.zeros(7, np.int64)
    limited = _limited(sample.texts)
    while batch := list(islice(limited, _BATCH)):
        before = _encode(original, batch)
        after = [vocab.to_original(ids) for ids in _encode(cut, batch)]
        same = sum(np.array_equal(one, two) for one, two in zip(before, after, strict=True))
        words = sum(len(text.split()) for text in batch)
        sizes = [sum(map(len, ids)) for ids in (before, after)]
        unknowns = [sum(int((one == unknown).sum()) for one in ids) for ids in (before, after)]
        counts += [len(batch), same, words, *sizes, *unknowns]
    names = (field.name for field in fields(Segmentation) if field.name != "held_out")
    return Segmentation(**dict(zip(names, counts.tolist(), strict=True)), held_out=sample.held_out)


def describe_segmentation(facts: dict[str, Any]) -> str:
    """One sentence on a comparison, for card and terminal.

    Args:
        facts: `Segmentation.to_dict`.
    """
    kind = "held-out texts" if facts["held_out"] else "profiled texts"
    sentence = (
        f"{facts['identical']:,} of {facts['texts']:,} {kind} "
        f"({percent(facts['identical'] / max(facts['texts'], 1))}) are segmented as before; "
        f"{facts['fertility_before']:.3f} tokens a word became {facts['fertility_after']:.3f}"
    )
    if facts["unknown_before"] or facts["unknown_after"]:
        sentence += f"; {facts['unknown_before']:,} unknown tokens became {facts['unknown_after']:,}"
    return sentence + "."


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def unknown_id(tokenizer: Tokenizer) -> int:
    """The id of a tokenizer's unknown token; -1 if it has none."""
    model = json.loads(tokenizer.to_str())["model"]  # not every model object says its unknown id
    unk = model.get("unk_id")
    if unk is None and model.get("unk_token") is not None:
        unk = tokenizer.token_to_id(model["unk_token"])
    return -1 if unk is None else int(unk)


def _limited(texts: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in islice(texts, MAX_TEXTS):
        if characters >= MAX_CHARACTERS:
            return
        characters += len(text)
        yield text
