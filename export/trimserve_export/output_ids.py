"""A head with fewer rows than the embedding: where that is possible, and its ids among the kept ones."""

import numpy as np

from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.folder import GENERATION_TASK
from trimserve.vocab import VocabMap

_ADVICE = "select without --separate-output."


def check_output_ids(vocab: VocabMap, task: str, *, layout: str, to: str = "onnx") -> None:
    """Refuse a vocab with output ids for what has one set of rows.

    Raises:
        UsageError: a layout whose logits have a place for each kept id, or a checkpoint, with one vocab_size.
        UnsupportedModelError: a model that does not generate, or an encoder-decoder.
    """
    if vocab.output_ids is None:
        return
    if layout != "runtime" or to != "onnx":
        what = f"layout {layout}" if to == "onnx" else f"--to {to}"
        raise UsageError(f"{what} has the same ids in embedding and head: use layout runtime, or {_ADVICE}")
    if task != GENERATION_TASK:
        raise UnsupportedModelError(
            f"a head with fewer rows than the embedding is built for {GENERATION_TASK}, not for {task}: "
            f"{_ADVICE}"
        )


def check_untied(vocab: VocabMap, *, tied: bool) -> None:
    """Refuse a vocab with output ids for a model whose head is its embedding.

    Raises:
        UnsupportedModelError: see above.
    """
    if tied and vocab.output_ids is not None:
        raise UnsupportedModelError(
            f"this model is tied: its head is its embedding, so both have the same rows: {_ADVICE}"
        )


def head_rows(vocab: VocabMap) -> int | None:
    """What the manifest says of the head: its rows where they are fewer than the embedding's."""
    return None if vocab.output_ids is None else len(vocab.output_ids)


def compact_head(vocab: VocabMap) -> VocabMap | None:
    """The output ids as compact ids; None where all kept ids are.

    A checkpoint has one vocab_size, so that exporters make a head of K rows, of which these stay.
    """
    if vocab.output_ids is None:
        return None
    places = vocab.to_compact(vocab.output_ids).astype(np.int32)
    return VocabMap(places, vocab.head.reason, len(vocab))
