"""VocabMap: kept token ids <-> compact ids. numpy alone; nothing here knows a model or a tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trimserve.arguments import kind_of, read_value
from trimserve.arrays import Ids
from trimserve.errors import MismatchError, UnknownIdError, UsageError
from trimserve.files.model_json import MOST_ROWS

_COLD, _OUTSIDE = -1, -2


class Reason(IntEnum):
    """Why an id is kept; the numbers are stored in `vocab_map.safetensors`."""

    STRUCTURAL = 0
    PROFILE = 1
    EXPLICIT = 2
    FILL = 3
    DEPENDENCY = 4  # a rewritten tokenizer needs it: see trimserve_export.layouts.closure


@dataclass(frozen=True, slots=True)
class Slotted:
    """Token ids as the graph wants them, with the cold ids that its extra slots stand for.

    Attributes:
        ids: int64, the shape of the input; below K a compact id, K + s for the cold id in slot s.
        cold_ids: int32 (S,), the token ids lent a slot, in order of first appearance.
        cold_tokens: how many entries of `ids` are cold.
    """

    ids: npt.NDArray[np.int64]
    cold_ids: Ids
    cold_tokens: int


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class VocabMap:
    """The kept ids of a model's vocab.

    Attributes:
        kept_ids: int32 (K,), strictly increasing token ids in [0, vocab_size).
        reason: uint8 (K,), a `Reason` for each kept id.
        vocab_size: V, rows of the original embedding.
        tokenizer_sha256: hash of the tokenizer.json that the ids belong to; empty if unknown.
        rule: how the ids were selected (options, coverage, missing mass), as JSON values.
        output_ids: int32 (K_out,), the kept ids that have a row in the head, strictly increasing; None where
            all have (always for a tied model, whose head is its embedding).
    """

    kept_ids: Ids
    reason: npt.NDArray[np.uint8]
    vocab_size: int
    tokenizer_sha256: str = ""
    rule: dict[str, Any] = field(default_factory=dict)
    output_ids: Ids | None = None
    # Compact id, or _COLD, of each token id; then as many _OUTSIDE, where an index from -V to -1 and
    # from V to 2V - 1 falls: one gather and one minimum map ids and check their range.
    _table: Ids = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, kind in (("vocab_size", int), ("tokenizer_sha256", str)):
            object.__setattr__(self, name, read_value(name, getattr(self, name), kind_of(kind)))
        if not 0 < self.vocab_size <= MOST_ROWS:
            raise MismatchError(
                f"a vocab of {self.vocab_size:,} ids cannot be: expected 1 to {MOST_ROWS:,}. Select it again."
            )
        kept = _whole_numbers(self.kept_ids, "kept_ids")  # a wider type first: int32 would wrap silently
        reason = _whole_numbers(self.reason, "reason")
        if kept.ndim != 1 or kept.size == 0 or reason.shape != kept.shape:
            raise MismatchError(
                "a vocab needs at least one kept id and one reason for each: "
                f"found kept ids of shape {kept.shape} and reasons of shape {reason.shape}."
            )
        if odd := {int(reason.min()), int(reason.max())} - set(range(max(Reason) + 1)):
            raise MismatchError(
                f"reasons are numbers from 0 to {max(Reason)}, found {max(odd)}: select the vocab again."
            )
        reason = reason.astype(np.uint8)
        if kept[0] < 0 or kept[-1] >= self.vocab_size or np.any(np.diff(kept) <= 0):
            raise MismatchError(
                f"kept ids must increase strictly within 0..{self.vocab_size - 1:,}: found "
                f"{kept.size:,} ids from {kept.min():,} to {kept.max():,}. Select the vocab again."
            )
        kept = kept.astype(np.int32)
        table = np.full(2 * self.vocab_size, _OUTSIDE, np.int32)
        table[: self.vocab_size] = _COLD
        table[kept] = np.arange(kept.size, dtype=np.int32)
        for name, array in (("kept_ids", kept), ("reason", reason), ("_table", table)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.output_ids is not None:
            self._set_output_ids(self.output_ids)

    def _set_output_ids(self, ids: npt.ArrayLike) -> None:
        output = _whole_numbers(ids, "output_ids")
        if output.ndim != 1 or output.size == 0 or np.any(np.diff(output) <= 0):
            raise MismatchError(
                f"output ids must increase strictly, found {output.size:,} ids of shape {output.shape}: "
                "select the vocab again."
            )
        if not self.is_kept(output).all():
            raise MismatchError(
                f"output id {int(output[~self.is_kept(output)][0]):,} is not kept: the head's ids must be "
                "among the kept ids. Select the vocab again."
            )
        output = output.astype(np.int32)
        output.setflags(write=False)
        object.__setattr__(self, "output_ids", output)

    @classmethod
    def everything(cls, vocab_size: int, tokenizer_sha256: str = "") -> Self:
        """The vocab of an untrimmed model: every id is kept, and is its own compact id."""
        ids = np.arange(vocab_size, dtype=np.int32)
        return cls(ids, np.full(vocab_size, Reason.EXPLICIT, np.uint8), vocab_size, tokenizer_sha256)

    @cached_property
    def head(self) -> "VocabMap":
        """The ids that have a row in the head, whose places are the columns of compact logits.

        This vocab itself, unless it has `output_ids`: then one whose kept ids those are. What is fed is
        mapped by the vocab, what comes out by its `head`.
        """
        if self.output_ids is None:
            return self
        reason = self.reason[self.to_compact(self.output_ids)]
        return VocabMap(self.output_ids, reason, self.vocab_size, self.tokenizer_sha256, self.rule)

    def __len__(self) -> int:
        """K, the number of kept ids."""
        return int(self.kept_ids.size)

    @property
    def cold_ids(self) -> Ids:
        """The ids without a compact row, int32 (V - K,), increasing."""
        return np.flatnonzero(self._table[: self.vocab_size] == _COLD).astype(np.int32)

    def is_kept(self, ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Tell for each token id, of any shape, whether it has a compact row.

        Raises:
            UnknownIdError: an id is outside 0..V-1.
        """
        return self._lookup(ids) >= 0

    def to_compact(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Map kept token ids to compact ids, int64, same shape.

        Raises:
            UnknownIdError: an id is outside 0..V-1, or not kept.
        """
        compact = self._lookup(ids)
        if np.any(compact < 0):
            cold = np.asarray(ids)[compact < 0].ravel()[0]
            raise UnknownIdError(
                f"token id {cold:,} has no compact row (K = {len(self):,}): feed it through a cold "
                "slot, or select a vocab that keeps it."
            )
        return compact.astype(np.int64)

    def to_original(self, compact_ids: npt.ArrayLike) -> Ids:
        """Map compact ids to token ids, int32, same shape.

        Raises:
            UnknownIdError: a compact id is outside 0..K-1.
        """
        compact = np.asarray(compact_ids)
        _check_range(compact, len(self), "compact id")
        original: Ids = self.kept_ids[compact.astype(np.int64)]  # an empty list is float64
        return original

    def with_slots(self, ids: npt.ArrayLike, slots: Sequence[int] | Ids = ()) -> Slotted:
        """Map any token ids to compact ids and cold slots.

        Args:
            ids: token ids of any shape.
            slots: cold ids that already hold slots 0, 1, ...; new ones are appended.

        Returns:
            The mapped ids and the cold ids behind the slots, `slots` first.

        Raises:
            UnknownIdError: an id is outside 0..V-1.
        """
        array = np.asarray(ids)
        mapped = self._lookup(array).astype(np.int64)
        held = np.asarray(slots, np.int32)
        flat = mapped.reshape(-1)
        cold = np.flatnonzero(flat < 0)
        if cold.size == 0:
            return Slotted(mapped, held, 0)
        # A loop over the cold ids alone: they are few, and sorting pays only from hundreds on.
        slot_of = {id_: slot for slot, id_ in enumerate(held.tolist())}
        values = array.reshape(-1)[cold].tolist()
        flat[cold] = [len(self) + slot_of.setdefault(id_, len(slot_of)) for id_ in values]
        return Slotted(mapped, np.fromiter(slot_of, np.int32, len(slot_of)), int(cold.size))

    def _lookup(self, ids: npt.ArrayLike) -> Ids:
        """Compact ids, int32, same shape; -1 for cold ids."""
        array = np.asarray(ids)
        if array.size == 0:
            return np.zeros(array.shape, np.int32)
        _check_whole(array, "token ids")
        try:
            compact: Ids = self._table.take(array)
        except IndexError:
            _check_range(array, self.vocab_size, "token id")
            raise
        if compact.min() == _OUTSIDE:
            _check_range(array, self.vocab_size, "token id")
        return compact


def _check_range(ids: npt.NDArray[Any], size: int, what: str) -> None:
    if ids.size:
        _check_whole(ids, f"{what}s")
    # Never let -1 through: numpy and ONNX Gather both take it for the last row.
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= size):
        bad = ids[(ids < 0) | (ids >= size)].ravel()[0]
        raise UnknownIdError(
            f"{what} {bad:,} is outside the model's vocab (0..{size - 1:,}): "
            "was this made with another tokenizer or another model?"
        )


def _check_whole(ids: npt.NDArray[Any], what: str) -> None:
    if ids.dtype.kind not in "iu":
        raise UsageError(f"{what} should be whole numbers, found {ids.dtype}.")


def _whole_numbers(values: npt.ArrayLike, name: str) -> npt.NDArray[np.int64]:
    """A copy as int64; nothing that is no whole number is rounded to one."""
    try:
        found = np.array(values)
    except ValueError:  # rows of several lengths
        raise UsageError(f"{name} should be a list of whole numbers, found lists in it.") from None
    if found.size and (found.dtype.kind not in "iu" or found.max() > np.iinfo(np.int64).max):
        raise UsageError(f"{name} should be a list of whole numbers below 2**63, found {found.dtype}.")
    return found.astype(np.int64)
