"""A head with fewer rows than the embedding: where that is possible, and its ids among the kept ones."""

import numpy as np

from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.folder.tasks import GENERATION_TASK
from trimserve.vocab.map import VocabMap

_ADVICE = "select without --separate-output."


def check_layout(vocab: VocabMap, *, layout: str, to: str) -> None:
    """Refuse a vocab with output ids where embedding and head have one number of rows.

    Raises:
        UsageError: a layout whose logits have a place for each kept id, or a checkpoint, with one vocab_size.
    """
    if vocab.output_ids is not None and (layout != "runtime" or to != "onnx"):
        what = f"--to {to}" if to != "onnx" else f"layout {layout}"
        raise UsageError(f"{what} has the same ids in embedding and head: use layout runtime, or {_ADVICE}")


def check_task_of_head(vocab: VocabMap, task: str) -> None:
    """Refuse a vocab with output ids for another task than generation by a decoder alone.

    Raises:
        UnsupportedModelError: see above.
    """
    if vocab.output_ids is not None and task != GENERATION_TASK:
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
