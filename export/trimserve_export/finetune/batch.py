"""Token ids of training batches, translated to compact ids."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trimserve.arguments import checked
from trimserve.errors import UnknownIdError
from trimserve.vocab.map import VocabMap

IGNORED = -100  # the label that torch's and transformers' losses leave out
INPUTS = ("input_ids", "decoder_input_ids")
LABELS = "labels"
# A dict or transformers' BatchEncoding; values are tensors, arrays or nested lists of ids.
Batch: TypeAlias = Any


@checked
def remap(batch: Batch, vocab: VocabMap, *, labels: bool) -> Batch:
    """Translate a batch's token ids to compact ids; the batch itself is not changed.

    Args:
        batch: a mapping; `input_ids`, `decoder_input_ids` and, if asked, `labels` are translated: integer
            tensors or arrays of any shape, or lists of lists. Other entries are passed on.
        vocab: the kept ids.
        labels: `labels` holds token ids (a language model's), not classes; -100 stays.

    Returns:
        A batch of the same type.

    Raises:
        UnknownIdError: an id is not kept; the message has the text's index in the batch.
    """
    keys = (*INPUTS, LABELS) if labels else INPUTS
    translated = copy.copy(batch)
    for key in keys:
        if batch.get(key) is not None:
            translated[key] = _translate(batch[key], vocab, key)
    return translated


@dataclass(frozen=True)
class Collator:
    """A data collator whose batches hold compact ids; usable in the workers of a DataLoader.

    Attributes:
        inner: the collator that pads: it sees token ids, so the tokenizer's pad id is right there.
        vocab: the kept ids.
        labels: see `remap`.
    """

    inner: Callable[[Sequence[Mapping[str, Any]]], Batch]
    vocab: VocabMap
    labels: bool

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Make a batch of features and translate it.

        Raises:
            UnknownIdError: see `remap`.
        """
        return remap(self.inner(features), self.vocab, labels=self.labels)


def _translate(values: Any, vocab: VocabMap, key: str) -> Any:  # noqa: ANN401 - tensor, array or lists
    if isinstance(values, list):
        if values and isinstance(values[0], list):
            return [
                _compact(np.asarray(row, np.int64), vocab, key, i).tolist() for i, row in enumerate(values)
            ]
        return _compact(np.asarray(values, np.int64), vocab, key, None).tolist()
    if isinstance(values, np.ndarray):
        return _compact(values, vocab, key, None).astype(values.dtype)
    compact = _compact(values.detach().cpu().numpy(), vocab, key, None)
    return values.new_tensor(compact)


def _compact(
    ids: npt.NDArray[np.integer[Any]], vocab: VocabMap, key: str, index: int | None
) -> npt.NDArray[np.int64]:
    ignored = (ids == IGNORED) if key == LABELS else np.zeros(ids.shape, np.bool_)
    outside = ~ignored & ((ids < 0) | (ids >= vocab.vocab_size))
    known = np.where(ignored | outside, vocab.kept_ids[0], ids)
    missing = outside | ~vocab.is_kept(known)
    if missing.any():
        place = np.argwhere(missing)[0]
        index = int(place[0]) if index is None and ids.ndim > 1 else index
        where = "" if index is None else f" of text {index} of the batch"
        raise UnknownIdError(
            f"token id {int(ids[tuple(place)]):,} in {key}{where} is not in the vocab (K = {len(vocab):,}): "
            "select a vocab that covers the training texts, or let their ids join it with "
            "`trimserve finetune check --grow`."
        )
    return np.where(ignored, IGNORED, vocab.to_compact(known))
