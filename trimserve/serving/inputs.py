"""What a request gives a model to read: texts, or token ids as they are."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trimserve.arrays import Ids
from trimserve.serving.problems import bad_field


@dataclass(frozen=True, slots=True)
class Inputs:
    """Texts, or token ids, int32 (T,) each: one of the two is empty."""

    texts: list[str]
    ids: list[Ids]


def read_inputs(param: str, given: str | list[Any], *, vocab_size: int, most: int) -> Inputs:
    """Tell apart a text, token ids, and lists of either.

    Args:
        param: the field, for messages.
        given: what stands there.
        vocab_size: V.
        most: entries that one request may have.

    Raises:
        ApiError: 400, it is none of them, too many, or an id that the model does not have.
    """
    entries: list[Any] = [given] if isinstance(given, str) or all(map(_is_id, given)) else given
    if len(entries) > most:
        raise bad_field(
            param, f"{param} has {len(entries):,} entries, and {most:,} may come at a time: send it in parts."
        )
    if all(isinstance(one, str) for one in entries):
        return Inputs(entries, [])
    if not all(isinstance(one, list) and one and all(map(_is_id, one)) for one in entries):
        raise bad_field(
            param,
            f"{param} should be a text, token ids, or a list of either: send one of these.",
            "invalid_value",
        )
    for ids in entries:
        low, high = min(ids), max(ids)
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise bad_field(
                param,
                f"{param} holds the id {wrong:,}, but ids go from 0 to {vocab_size - 1:,}.",
                "invalid_value",
            )
    return Inputs([], [np.array(ids, np.int32) for ids in entries])


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
